"""What is wrong, missing or fails gets a row that says so and no number; what is right is timed in turns."""

import json
import weakref
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from benchmarks import check, harness, parts, sweep
from benchmarks.floors import bytes_moved, operations
from benchmarks.implementations import Implementation
from benchmarks.parts import Part
from benchmarks.rivals import ours
from benchmarks.rivals.eager import IMPLEMENTATIONS as EAGER
from benchmarks.rows import PASSES, RowFile, only, read, times_of
from benchmarks.workload import PLANTED, Case

CASE = Case(9, 300, torch.float32, "flat", "cpu")
LINEAR = Case(9, 300, torch.float32, PLANTED, "cpu", d=32)
TURNS = 3
HONEST = ours.IMPLEMENTATIONS[0]


def altered(name, change, of=HONEST, **fields) -> Implementation:
    """An implementation whose outputs are changed: ``change(inputs, outputs)`` returns them."""

    def prepare():
        honest = of.prepare()
        return lambda inputs: change(inputs, honest(inputs))

    return replace(of, name=name, prepare=prepare, **fields)


def rows_of(monkeypatch, *implementations, case=CASE):
    monkeypatch.setattr(harness, "all_implementations", lambda: {i.name: i for i in implementations})
    return list(harness.rows_of_part(Part("test", case, TURNS, tuple(i.name for i in implementations))))


def assert_no_number(rows, status, reason):
    assert {row.passes for row in rows} == set(PASSES)
    for row in rows:
        assert row.status == status
        assert reason in row.reason
        numbers = (row.p20, row.p50, row.p80, row.bandwidth, row.share, row.relative, row.peak_bytes, row.value_error)
        assert numbers == (None,) * 8


def scale_gradient(inputs, outputs):
    """Right values, with a gradient that is 1 % too large."""
    entropy = outputs["entropy"]
    return outputs | {"entropy": 1.01 * entropy - 0.01 * entropy.detach()}


def leak_gradient(inputs, outputs):
    """Right values and gradients, but another row's gradient too."""
    leak = inputs.rows[-1].sum()
    return outputs | {"logp": outputs["logp"] + leak - leak.detach()}


WRONG = {
    "value": (lambda i, o: o | {"entropy": o["entropy"] + 0.01}, "entropy is off by 1.0e-02"),
    "NaN": (lambda i, o: o | {"margin": o["margin"] * torch.nan}, "margin is off by inf"),
    "nucleus size": (lambda i, o: o | {"nucleus_size": o["nucleus_size"] + 50}, "another nucleus size"),
    "gradient": (scale_gradient, "its gradient is off by"),
    "gradient elsewhere": (leak_gradient, "to rows without weight"),
    "an output left out": (lambda i, o: {k: v for k, v in o.items() if k != "margin"}, "returns no margin"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_implementation_gets_no_number(monkeypatch, what):
    change, reason = WRONG[what]
    rows = rows_of(monkeypatch, HONEST, altered("wrong", change))
    assert_no_number(only(rows, implementation="wrong"), "wrong", reason)
    assert all(row.p50 > 0 for row in only(rows, implementation=HONEST.name))


@pytest.mark.parametrize("weight", ["rows", "head"])
def test_a_wrong_gradient_of_the_linear_form_gets_no_number(monkeypatch, weight):
    honest = ours.IMPLEMENTATIONS[3]
    assert honest.linear

    def change(inputs, outputs):
        extra = 0.01 * getattr(inputs, weight)[0].sum() / len(inputs.rows)
        return outputs | {"logp": outputs["logp"] + inputs.valid * (extra - extra.detach())}

    rows = rows_of(monkeypatch, honest, altered("wrong", change, of=honest), case=LINEAR)
    assert_no_number(only(rows, implementation="wrong"), "wrong", "its gradient is off by")
    assert all(row.status == "ok" for row in only(rows, implementation=honest.name))


def test_a_wrong_result_written_over_the_logits_gets_no_number(monkeypatch):
    """The bound comes from the logits as they were, not from what stands in their place."""
    in_place = ours.IMPLEMENTATIONS[1]
    assert in_place.overwrites
    rows = rows_of(monkeypatch, in_place, altered("value", WRONG["value"][0], of=in_place))
    assert_no_number(only(rows, implementation="value"), "wrong", "entropy is off by 1.0e-02")
    rows = rows_of(monkeypatch, in_place, altered("gradient", scale_gradient, of=in_place))
    assert_no_number(only(rows, implementation="gradient"), "wrong", "its gradient is off by")
    assert all(row.status == "ok" for row in only(rows, implementation=in_place.name))


def test_a_missing_rival_gets_no_number(monkeypatch):
    missing = replace(HONEST, name="missing", package=("no-such-thing", "no_such_thing"))
    rows = rows_of(monkeypatch, missing, HONEST)
    assert_no_number(only(rows, implementation="missing"), "missing", "no-such-thing is not installed")
    assert {row.anchor for row in only(rows, implementation=HONEST.name)} == {HONEST.name}


def test_what_does_not_run_on_this_device_gets_no_number(monkeypatch):
    rows = rows_of(monkeypatch, HONEST, replace(HONEST, name="fused", on=("cuda",)))
    assert_no_number(only(rows, implementation="fused"), "skipped", "needs cuda, this is cpu")


def test_what_raises_only_when_timed_gets_no_number(monkeypatch):
    calls = []

    def fail_later(inputs, outputs):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("too large")
        return outputs

    rows = rows_of(monkeypatch, HONEST, altered("failing", fail_later))
    assert_no_number(only(rows, implementation="failing"), "failed", "MemoryError: too large")
    assert all(row.status == "ok" for row in only(rows, implementation=HONEST.name))


def test_every_check_comes_before_any_time_and_all_take_turns(monkeypatch):
    calls = []
    spies = [altered(name, lambda i, o, name=name: calls.append(name) or o) for name in ("a", "b")]
    clock = harness.clock
    monkeypatch.setattr(harness, "clock", lambda *job: calls.append("clock") or clock(*job))
    rows_of(monkeypatch, *spies)
    turn = ["clock", "clock", "a", "clock", "b"]  # the floor, then each
    assert calls == ["a", "b"] + turn * (1 + TURNS)


def test_a_gpu_begins_when_the_host_has_launched_both_passes(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, later):
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    found = harness.clock("cuda", lambda: calls.append("forward"), lambda _: calls.append("backward"))
    assert found == harness.Seconds(2.0, 2.0)
    assert calls == ["sleep", "record", "forward", "record", "backward", "record", "synchronize"]


def test_caches_are_flushed_without_a_write(monkeypatch):
    made = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: made.append(ones(*size, **options)) or made[-1])
    flush = harness.flusher("cpu")
    (buffer,) = made
    version = buffer._version
    assert buffer.nbytes == harness.FLUSH_BYTES["cpu"]
    assert flush() == buffer.numel()
    assert buffer._version == version


def test_what_raises_gets_no_number_and_what_it_held_is_free_before_the_next(monkeypatch):
    held = []

    def fail(inputs, outputs):
        try:
            raise MemoryError("too large\nand more")
        except MemoryError as error:
            cycle = [error, inputs]
            cycle.append(cycle)
            held.append(weakref.ref(inputs.rows))
            raise

    def note(inputs, outputs):
        assert all(rows() is None for rows in held)
        return outputs

    rows = rows_of(monkeypatch, altered("failing", fail), altered("next", note))
    assert held
    assert_no_number(only(rows, implementation="failing"), "failed", "MemoryError: too large")
    assert {row.status for row in only(rows, implementation="next")} == {"ok"}


def test_backward_is_that_of_the_weighted_sum():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = {"logp": torch.randn(6), "mean_policy_loss": None}
    outputs = {"logp": (x * x).bfloat16(), "mean_policy_loss": x.mean()}
    (expected,) = torch.autograd.grad(check.weighted_sum(outputs, weights), x, retain_graph=True)
    check.backward(outputs, ("logp", "mean_policy_loss"), weights)
    assert torch.equal(x.grad, expected)


def test_nucleus_sizes_are_held_to_rounding(monkeypatch):
    """Another implementation's may be off by a token of a hundred, an exact one's only in few rows."""

    def off_by(share, rows):
        def change(inputs, outputs):
            size = outputs["nucleus_size"].clone()
            size[:rows] += (share * size[:rows]).ceil().to(size.dtype)
            return outputs | {"nucleus_size": size}

        return change

    by_sort = EAGER[0]
    found = rows_of(
        monkeypatch,
        HONEST,
        altered("a little, a rival", off_by(0.01, 4), of=by_sort),
        altered("far, a rival", off_by(0.5, 4), of=by_sort),
        altered("a little, exact", off_by(0.01, 4)),
        case=replace(CASE, v=3000),
    )
    assert all(row.status == "ok" for row in only(found, implementation="a little, a rival"))
    assert_no_number(only(found, implementation="far, a rival"), "wrong", "by more than rounding")
    assert_no_number(only(found, implementation="a little, exact"), "wrong", "another nucleus size in 4 of")


def test_approximate_and_forward_only_ways_say_so(monkeypatch):
    forward_only = altered("forward only", lambda i, o: {"entropy": o["entropy"].detach()}, computes=("entropy",),
                           gradients=())  # fmt: skip
    rows = rows_of(monkeypatch, HONEST, forward_only, EAGER[1])
    by_pass = {row.passes: row for row in only(rows, implementation="forward only")}
    assert by_pass["forward"].status == "ok"
    assert by_pass["both"].status == by_pass["backward"].status == "skipped"
    assert all(row.status == "ok" for row in only(rows, implementation=EAGER[1].name))
    assert "approximate" in EAGER[1].note


def test_top_k_cut_is_not_held_to_nuclei_it_cannot_hold(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.rivals.eager.SIREN_TOP_K", 3)
        rows = rows_of(patched, HONEST, replace(EAGER[1], keeps=3), case=replace(CASE, v=3000))
    assert_no_number(only(rows, implementation=EAGER[1].name), "wrong", "every nucleus that was checked is larger")


def test_a_row_without_success_cannot_hold_a_number(monkeypatch):
    (row, *_) = only(rows_of(monkeypatch, HONEST), implementation=HONEST.name)
    with pytest.raises(ValueError, match="a row that is wrong has no number"):
        replace(row, status="wrong", reason="it is")
    with pytest.raises(ValueError, match="has a time"):
        replace(row, p50=None)
    with pytest.raises(ValueError, match="status 'ok' with reason"):
        replace(row, reason="but")


def test_rows_are_on_disk_as_soon_as_they_are_written(monkeypatch, tmp_path):
    rows = rows_of(monkeypatch, HONEST)
    file = RowFile(tmp_path / "cpu" / "test.jsonl")
    file.write(rows[0])
    assert read(tmp_path / "cpu" / "test.jsonl") == rows[:1]
    file.write(rows[1])
    assert read(tmp_path / "cpu" / "test.jsonl") == rows[:2]
    RowFile(tmp_path / "cpu" / "test.jsonl").write(rows[2])  # another run
    assert read(tmp_path / "cpu" / "test.jsonl") == rows[2:3]
    (tmp_path / "old.jsonl").write_text(json.dumps(asdict(rows[0]) | {"speedup": 100}))
    with pytest.raises(ValueError, match="speedup"):
        read(tmp_path / "old.jsonl")


def test_rows_that_hold_no_result_replace_none(monkeypatch, tmp_path):
    (good, *_) = rows_of(monkeypatch, HONEST)
    late, failed = (replace(good, status=s, reason="why", p20=None, p50=None, p80=None, bandwidth=None, share=None)
                    for s in ("skipped", "failed"))  # fmt: skip
    path = tmp_path / "test.jsonl"
    for rows, expected in [
        ([late, failed], [late, failed]),  # no file was there
        ([failed, good, late], [failed, good, late]),
        ([late, failed], [failed, good, late]),
        ([good], [good]),
    ]:
        file = RowFile(path)
        for row in rows:
            file.write(row)
        file.close()
        assert read(path) == expected


def test_what_the_time_did_not_reach_is_said():
    part = Part("rivals", CASE, 1, ("token_stats", "eager, sort"))
    rows = list(sweep.rows_of(part, too_late=True, tell=print))
    for name in part.names:
        assert_no_number(only(rows, implementation=name), "skipped", "the sweep's time was spent")
    (row,) = sweep.rows_of(Part("step", CASE, 1), too_late=True, tell=print)
    assert (row.passes, row.status) == ("step", "skipped")


def test_a_part_that_raises_leaves_the_others_and_the_page(monkeypatch, tmp_path):
    """The floor of the first part is out of memory; while the third is measured, somebody stops the sweep."""
    take_turns = harness.take_turns

    def fail(part, *args):
        if part.case.v == 4:
            raise KeyboardInterrupt
        if part.case.v == 3:
            raise MemoryError("too large\nand more")
        return take_turns(part, *args)

    monkeypatch.setattr(harness, "take_turns", fail)
    cases = [replace(CASE, v=3), CASE, replace(CASE, v=4)]
    names = ("token_stats", "eager, sort", "TRL, fused")
    parts = [Part("kinds", case, 1, names) for case in cases]
    monkeypatch.setattr(sweep, "parts_on_cpu", lambda: iter(parts))
    monkeypatch.setattr(sweep.page, "draw", lambda *_: [])
    threads = f"--threads={torch.get_num_threads()}"
    monkeypatch.setattr("sys.argv", ["sweep", "--device", "cpu", "--out", str(tmp_path), threads])
    with pytest.raises(KeyboardInterrupt):
        sweep.main()

    rows = read(tmp_path / "cpu" / "kinds.jsonl")
    first = only(rows, v=3)
    assert sorted((row.implementation, row.passes) for row in first) == sorted(product(names, PASSES))
    for row in first:
        fused = ("skipped", "needs cuda, this is cpu")
        assert (row.status, row.reason) == (
            fused if "TRL" in row.implementation else ("failed", "MemoryError: too large")
        )
    assert {row.status for row in only(rows, v=CASE.v, implementation="token_stats")} == {"ok"}
    page = (tmp_path / "README.md").read_text()
    assert "failed: MemoryError: too large" in page
    assert "| 9 | 300 |" in page


@pytest.mark.parametrize("parts_on", [parts.parts_on_cpu, parts.parts_on_gpu])
def test_every_section_has_its_parts(parts_on):
    found = list(parts_on())
    known = harness.all_implementations()
    assert {name for part in found for name in part.names} <= set(known)
    assert {part.section for part in found} == set(sweep.page.SECTIONS)
    for dtype in (torch.float32, torch.bfloat16):
        of_dtype = [part for part in found if part.case.dtype == dtype]
        assert {p.case.kind for p in of_dtype if p.section == "kinds"} == set(parts.KINDS)
        assert {p.case.v for p in of_dtype if p.section == "vocabulary"} == set(parts.VOCABULARIES)
    turns = {part.section: part.turns for part in found}
    assert (turns["rivals"] >= 12, turns["linear"] >= 8, turns["step"] >= 10) == (True, True, True)


def test_bytes_and_operations():
    case = Case(4096, 151_936, torch.bfloat16, "real", "cuda")
    logits = 4096 * 151_936 * 2
    assert [bytes_moved(case, passes) for passes in PASSES] == [logits, 2 * logits, 3 * logits]
    linear = Case(16_384, 151_936, torch.bfloat16, PLANTED, "cuda", d=2048)
    product = 2 * 16_384 * 151_936 * 2048
    assert [operations(linear, passes) for passes in PASSES] == [product, 3 * product, 4 * product]
    assert bytes_moved(linear, "both") is operations(case, "both") is None


def test_bandwidth_and_shares_are_of_the_times(monkeypatch):
    """Times given by hand: the floor takes 1 and 2 s, the implementation twice and four times as long."""
    turns = iter([harness.Seconds(1.0, 3.0), harness.Seconds(2.0, 10.0)] * (1 + TURNS))
    monkeypatch.setattr(harness, "clock", lambda *job: next(turns))
    rows = {row.passes: row for row in only(rows_of(monkeypatch, HONEST), implementation=HONEST.name)}
    assert times_of([6.0, 1.0, 3.0, 2.0, 5.0, 4.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0, "turns": 6}
    logits = 9 * 300 * 4
    assert [rows[p].p50 for p in PASSES] == [2.0, 8.0, 10.0]
    assert [rows[p].bandwidth for p in PASSES] == [logits / 2, 2 * logits / 8, 3 * logits / 10]
    assert [rows[p].share for p in PASSES] == pytest.approx([0.5, 0.25, 0.3])
    assert [rows[p].relative for p in PASSES] == [1.0, 1.0, 1.0]
