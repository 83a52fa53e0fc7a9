"""The loop on a hardly trained tiny model: what a step does, and that a run may be stopped at any moment."""

import fcntl
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from paec_kernels import reference
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.saved_state import UnreadableFileError
from paec_kernels.train import commands, loop
from paec_kernels.train.algorithms import ALGORITHMS, PAECOptions
from paec_kernels.train.config import CompareConfig, EvalOptions, TrainConfig
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.out_folder import LOCK, FolderInUseError
from paec_kernels.train.policies import starting_policy, trained_policy
from paec_kernels.train.presets import with_algo
from paec_kernels.train.run_folder import OtherConfigError, read_checkpoint, read_rows
from paec_kernels.train.tasks.long_families import LONG_FAMILIES
from paec_kernels.train.tasks.task import FORK, FREE, ROLES, STEP

TIMES = ("seconds", "sample_seconds")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tmp_path, cache) -> TrainConfig:
    return TrainConfig(
        out=tmp_path / "run",
        cache=cache,
        warm_start=WarmStart(skill_steps=150, habit_steps=0, batch=32),
        tasks=("parity", "count"),
        steps=5,
        prompts=4,
        answers=8,
        micro_batch=10,
        max_new_tokens=16,
        checkpoint_every=2,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoint.pt")["model"]


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_same_weights(a: dict, b: dict, learning_rate: float):
    """But for rounding, which shows where a gradient is almost 0, since Adam's first steps are lr * sign(gradient)."""
    for name in a:
        off = (a[name] - b[name]).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding: it moves all scores of a query alike
            query, _, value = off.chunk(3)
            off = torch.cat([query, value])
        assert off.mean() < 1e-3 * learning_rate, name


def assert_alike(a: dict, b: dict, rel: float):
    assert a.keys() == b.keys()
    for name in a.keys() - set(TIMES):
        if a[name] is None or b[name] is None:  # before the anchor is set
            assert a[name] is b[name]
        else:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-5), name


def start(config: TrainConfig, *launcher: str) -> subprocess.Popen:
    """Train in a process of its own, which runs the end of this file; a rank of one under torchrun."""
    command = [sys.executable, *launcher, __file__, pickle.dumps(config).hex()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def of_algo(config: TrainConfig, algo: str) -> TrainConfig:
    """The run with another method, on tasks that it can be trained on."""
    return with_algo(replace(config, tasks=("scan",), max_new_tokens=24) if algo == "oracle" else config, algo)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_trains(config, algo):
    config = of_algo(replace(config, steps=2), algo)
    before = {name: x.clone() for name, x in starting_policy(config, torch.device("cpu")).module.state_dict().items()}
    run = loop.train(config)
    after = run.policy.module.state_dict()
    assert all(x.isfinite().all() for x in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = read_rows(config.out)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["entropy"] < 4 and 0 < row["selected_entropy"] < 4 for row in rows)
    assert rows[0]["floor"] == 0
    assert rows[0]["anchor"] is None  # JSON has no NaN


@pytest.mark.parametrize("algo", ["paec", "paec-no-mask", "grpo"])
def test_a_mask_that_is_not_selective_is_warned_of_once(config, algo):
    config = with_algo(replace(config, steps=2), algo)
    if algo != "grpo":  # no score is above 1
        config = replace(config, method=replace(config.method, paec=PAECConfig(tau_m=0.5)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loop.train(config)
    assert sum("not selective" in str(warning.message) for warning in found) == (algo == "paec")


def test_an_anchor_of_rollout_batches_is_the_mean_over_them(config):
    paec = PAECConfig(anchor_unit="rollout_batch", anchor_steps=2)
    loop.train(replace(config, updates=2, steps=3, method=PAECOptions(paec=paec)))
    rows = read_rows(config.out)
    assert [row["anchor"] for row in rows[:2]] == [None, None]
    assert rows[2]["anchor"] == pytest.approx((rows[0]["selected_entropy"] + rows[1]["selected_entropy"]) / 2)


@pytest.mark.parametrize("anchored", ["scores", "positions"])
def test_the_anchor_policy_is_the_policy_at_the_start(config, anchored):
    """After steps, too, and after a resume, which goes on to the bit."""
    method = PAECOptions(paec=PAECConfig(anchored=anchored, lam=5.0, rho_min=3.0, anchor_steps=1))
    config = replace(config, method=method, steps=4, learning_rate=1e-2, updates=2)
    start = starting_policy(config, torch.device("cpu")).module.state_dict()
    run = loop.train(replace(config, out=config.out / "whole"))
    assert run.anchor_policy is not None
    assert_same_bits(run.anchor_policy.module.state_dict(), start)
    rows = read_rows(config.out / "whole")
    assert max(row["term/penalty"] for row in rows) > 0
    assert (rows[0]["anchor"] is None) == (anchored == "scores")  # floors of positions are there from the first step

    stopped = replace(config, out=config.out / "stopped")
    loop.train(replace(stopped, steps=2))
    resumed = loop.train(stopped)
    assert_same_bits(resumed.anchor_policy.module.state_dict(), start)
    assert_same_bits(weights(stopped.out), weights(config.out / "whole"))


def test_no_anchor_policy_is_kept_where_none_is_needed(config):
    assert new_run(config).anchor_policy is None
    assert new_run(with_algo(config, "grpo")).anchor_policy is None


@pytest.mark.parametrize("algo", ["paec", "clip-cov", "aer"])
def test_micro_batches_change_nothing_but_rounding(config, algo):
    config = with_algo(replace(config, steps=2, updates=2), algo)
    whole = loop.train(replace(config, out=config.out / "whole", micro_batch=1000))
    parts = loop.train(replace(config, out=config.out / "parts", micro_batch=3))
    assert_same_weights(whole.policy.module.state_dict(), parts.policy.module.state_dict(), config.learning_rate)
    rows = [read_rows(config.out / name)[-1] for name in ("whole", "parts")]
    assert rows[0]["selected_entropy"] == pytest.approx(rows[1]["selected_entropy"], rel=1e-4)
    assert rows[0]["policy_loss"] == pytest.approx(rows[1]["policy_loss"], rel=1e-3, abs=1e-6)


def new_run(config: TrainConfig) -> loop.Run:
    return loop.new_run(config, starting_policy(config, torch.device("cpu")))


def sampled(run: loop.Run):
    tasks, _ = run.config.load_tasks()
    return loop.sample(run.config, run.policy, tasks, 0, 0, 1)[0]


def test_draws_depend_on_seed_step_and_place_alone(config):
    """No place of any step has another's seed or prompts, and places are the same on any number of ranks."""
    tasks, _ = config.load_tasks()

    class Asked(Exception):
        pass

    def asked(seed: int, step: int, rank: int = 0, world: int = 1) -> tuple[list[str], list[int]]:
        def sample(prompts, answers, *, seeds, **_):
            raise Asked(prompts, seeds)

        with pytest.raises(Asked) as found:
            loop.sample(replace(config, seed=seed), SimpleNamespace(sample=sample), tasks, step, rank, world)
        return found.value.args

    steps = [asked(seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len({seed for _, seeds in steps for seed in seeds}) == 4 * config.prompts
    assert len({tuple(prompts) for prompts, _ in steps}) == 4
    for rank in (0, 1):
        assert asked(1, 1, rank, 2) == tuple(of_all[rank::2] for of_all in steps[-1])


@pytest.mark.parametrize("updates", [1, 2])
def test_each_update_takes_its_own_answers_once(config, updates):
    run = new_run(replace(config, updates=updates))
    rollout = sampled(run)
    rollout = rollout._replace(roles=torch.arange(rollout.valid.numel()).view(rollout.valid.shape))  # no two alike
    rewards = torch.rand(config.prompts, config.answers)  # by which answers are told apart
    advantages = loop.pk.group_advantages(rewards).flatten()
    taken = []
    for micro_batches in loop.split(run, rollout, rewards):
        numbers = []
        for batch in micro_batches:
            rows = (batch.rollout.token_ids, batch.rollout.roles, batch.valid, batch.advantages)
            for tokens, roles, valid, advantage in zip(*rows, strict=True):
                number = (advantages == advantage).nonzero().item()
                assert torch.equal(tokens[valid], rollout.token_ids[number][rollout.valid[number]])
                assert torch.equal(roles, rollout.roles[number, : len(roles)])
                numbers.append(number)
            assert batch.rollout.roles.shape == batch.valid.shape
        taken.append(sorted(numbers))
    assert taken == torch.arange(len(advantages)).view(updates, -1).tolist()


def test_each_update_looks_by_the_weights_it_starts_from(config, monkeypatch):
    step, moved = loop.optimiser_step, []

    def watched(run, micro_batches, seed):
        for batch in micro_batches:
            assert torch.equal(batch.stats.logp, run.look(batch.rollout).logp)
        moved.append(not torch.equal(micro_batches[0].stats.logp, micro_batches[0].old_logp))
        return step(run, micro_batches, seed)

    monkeypatch.setattr(loop, "optimiser_step", watched)
    loop.train(replace(config, steps=1, updates=2))
    assert moved == [False, True]


@pytest.fixture
def mixed(config) -> TrainConfig:
    """Prompts of a long family and of a short one, in turn."""
    return replace(config, tasks=("chain+", "parity"), steps=2, updates=1, max_new_tokens=40, prompts=2)


def test_roles_are_those_of_the_asked_tasks_places(mixed):
    rollout = sampled(new_run(mixed))
    chain = LONG_FAMILIES["chain+"]
    assert chain.roles[:3] == (FREE, STEP, FORK)
    known = [ROLES.index(role) for role in chain.roles] + [-1] * 6
    assert len(known) == 40
    length = rollout.valid.shape[1]
    assert rollout.roles.tolist() == [known[:length]] * mixed.answers + [[-1] * length] * mixed.answers
    for length in (7, 40):  # shorter answers than it has places, and longer ones
        roles = loop.roles_of([chain], 2, torch.ones(2, length, dtype=torch.bool))
        assert roles.dtype == torch.int64
        assert roles.tolist() == [known[:length]] * 2


def test_only_the_tiny_models_tokens_have_roles(mixed):
    """To another model's tokens the letters are none."""
    run = new_run(mixed)
    tasks, _ = mixed.load_tasks()
    rollout, _ = loop.sample(replace(mixed, model="elsewhere"), run.policy, tasks, 0, 0, 1)
    assert rollout.roles is None


def by_role(row: dict) -> dict:
    return {name: value for name, value in row.items() if name.startswith(("entropy/", "mask/"))}


def test_the_log_tells_roles_apart(config):
    loop.train(replace(config, tasks=("scan", "parity"), max_new_tokens=24, steps=1))
    (row,) = read_rows(config.out)
    expected = {f"{name}/{role}" for name in ("entropy", "mask") for role in ROLES}
    assert by_role(row).keys() == expected
    assert {name for name in expected if row[name] is None} == {"entropy/free", "mask/free"}  # scan has none
    assert all(0 < row[name] < 4 for name in expected if row[name] is not None)
    loop.train(replace(config, out=config.out / "short", steps=1))
    assert by_role(read_rows(config.out / "short")[0]) == {}


def rows_of_rank(rank: int, config: TrainConfig) -> list[dict]:
    """Train on tasks that take turns, of which this rank is asked one alone."""
    dist.init_process_group("gloo")
    rows = []
    run = loop.new_run(config, starting_policy(config, torch.device("cpu")))
    tasks, _ = config.load_tasks()
    for _ in range(config.steps):
        rows.append(loop.train_step(run, tasks, rank, 2))
    return rows


def test_a_rank_without_known_roles_takes_part(mixed):
    from helpers import on_ranks

    loop.train(mixed)
    expected = read_rows(mixed.out)
    first, second = on_ranks(2, rows_of_rank, mixed.out.parent, mixed)
    for row, other, whole in zip(first, second, expected, strict=True):
        assert by_role(row) == by_role(other)
        assert by_role(row).keys() == by_role(whole).keys() != set()
        assert all(value == pytest.approx(whole[name], rel=1e-3) for name, value in by_role(row).items())


@pytest.mark.parametrize("operator", ["logits", "linear"])
def test_statistics_are_those_of_the_sampling_temperature(config, operator):
    run = new_run(replace(config, operator=operator, temperature=0.7))
    rollout = sampled(run)
    with torch.no_grad():
        hidden = run.policy.module(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
        logits = hidden @ run.policy.head.T
    expected = reference.token_stats(logits, rollout.token_ids, valid=rollout.valid, temperature=0.7)
    torch.testing.assert_close(run.look(rollout).logp, expected.logp, rtol=1e-4, atol=1e-5)


def test_hidden_states_give_what_logits_give(config):
    config = replace(config, steps=1)
    rows = []
    for operator in ("logits", "linear"):
        loop.train(replace(config, out=config.out / operator, operator=operator))
        rows.append(read_rows(config.out / operator)[0])
    assert_alike(*rows, rel=1e-4)


@pytest.mark.parametrize("operator", ["logits", "linear"])
def test_bfloat16_trains_float32_weights(config, operator):
    rows = {}
    for precision in ("float32", "bfloat16"):
        run = loop.train(replace(config, steps=1, out=config.out / precision, operator=operator, precision=precision))
        assert all(parameter.dtype == torch.float32 for parameter in run.policy.module.parameters())
        rows[precision] = read_rows(config.out / precision)[0]
    for name in ("entropy", "selected_entropy", "gradient_norm"):
        assert rows["bfloat16"][name] != rows["float32"][name]
        assert rows["bfloat16"][name] == pytest.approx(rows["float32"][name], rel=0.1)


def test_several_updates_move_away_from_the_sampling_policy(config):
    config = replace(config, steps=1, learning_rate=1e-2)
    loop.train(replace(config, out=config.out / "1", updates=1))
    loop.train(replace(config, out=config.out / "4", updates=4))
    one, four = (read_rows(config.out / name)[0] for name in "14")
    assert abs(one["approx_kl"]) < 1e-9
    assert four["approx_kl"] > 1e-4


@pytest.mark.parametrize("algo", ["cispo", "kl-cov"])
def test_one_update_leaves_ratios_nothing_to_do(config, algo):
    """Why a comparison of all algorithms needs more than one."""

    def weights(algo, updates):
        here = with_algo(replace(config, steps=1, updates=updates, out=config.out / f"{algo}{updates}"), algo)
        return torch.cat([p.flatten() for p in loop.train(here).policy.module.parameters()])

    assert torch.allclose(weights(algo, 1), weights("grpo", 1), atol=1e-6)
    assert not torch.allclose(weights(algo, 2), weights("grpo", 2), atol=1e-6)


def test_an_interrupted_run_goes_on_to_the_bit(config):
    before = signal.getsignal(signal.SIGINT)
    loop.train(replace(config, out=config.out / "whole"))

    def interrupt(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = replace(config, out=config.out / "stopped")
    with pytest.raises(loop.Interrupted, match="step 3 of 5"):
        loop.train(stopped, interrupt)
    assert read_checkpoint(stopped.out / "checkpoint.pt")["steps_done"] == 3
    assert signal.getsignal(signal.SIGINT) is before
    loop.train(stopped)
    assert_same_bits(weights(config.out / "whole"), weights(stopped.out))
    logs = [read_rows(config.out / name) for name in ("whole", "stopped")]
    for whole, resumed in zip(*logs, strict=True):
        assert {**whole, **dict.fromkeys(TIMES)} == {**resumed, **dict.fromkeys(TIMES)}


def test_a_small_model_on_a_long_family_with_the_oracle_goes_on_to_the_bit(config):
    """Trained, evaluated, stopped before the oracle's anchor is set, and taken out again, of its own size."""
    start = replace(config.warm_start, width=64, layers=2)
    config = replace(of_algo(config, "oracle"), warm_start=start, steps=4, updates=2, evaluate=EvalOptions(2, 2))
    whole, stopped = (replace(config, out=config.out / name) for name in ("whole", "stopped"))
    assert commands.train(whole) == 0
    loop.train(replace(stopped, steps=1))
    state = read_checkpoint(stopped.out / "checkpoint.pt")
    assert state["algorithm"]["term.anchor_count"] == 2
    assert state["config"]["warm_start"]["families"] == ["scan"]
    assert commands.train(stopped) == 0
    assert_same_bits(weights(whole.out), weights(stopped.out))
    rows, resumed = ([{**row, **dict.fromkeys(TIMES)} for row in read_rows(c.out)] for c in (whole, stopped))
    assert rows == resumed
    assert rows[1]["term/floor"] == 0 < rows[2]["term/floor"]
    assert (whole.out / "eval.json").read_text() == (stopped.out / "eval.json").read_text()

    policy = trained_policy(stopped.out, torch.device("cpu"))
    assert policy.head.shape[1] == 64
    assert len(policy.module.blocks) == 2
    assert_same_bits(policy.module.state_dict(), weights(whole.out))


def test_a_run_from_before_there_were_sizes_goes_on(config):
    """It was of the sizes and families that are the defaults now."""
    loop.train(replace(config, out=config.out / "whole", steps=2))
    stopped = replace(config, out=config.out / "stopped", steps=2)
    loop.train(replace(stopped, steps=1))
    state = read_checkpoint(stopped.out / "checkpoint.pt")
    saved = json.loads((stopped.out / "config.json").read_text())
    for written in (state["config"], saved):
        for name in ("families", "width", "layers"):
            del written["warm_start"][name]
        del written["warm_start"]["habits"]["step_slip"]
    torch.save(state, stopped.out / "checkpoint.pt")
    (stopped.out / "config.json").write_text(json.dumps(saved))
    policy = trained_policy(stopped.out, torch.device("cpu"))
    assert policy.head.shape[1] == 96
    assert len(policy.module.blocks) == 3
    loop.train(stopped)
    assert_same_bits(weights(stopped.out), weights(config.out / "whole"))


def test_the_oracle_is_refused_where_it_knows_no_forks(config):
    known = "chain, chain+, scan, scan+, carry, carry+"
    with pytest.raises(
        ValueError, match=rf"^tasks must be among {re.escape(known)} for 'oracle', .*got parity, count$"
    ):
        with_algo(config, "oracle")
    with pytest.raises(ValueError, match=r"got parity$"):
        with_algo(replace(config, tasks=("chain", "parity")), "oracle")
    with pytest.raises(ValueError, match=r"^model must be tiny for 'oracle', .*got smollm2$"):
        with_algo(replace(config, tasks=("chain",), model="smollm2"), "oracle")
    with pytest.raises(ValueError, match=r"^tasks must be among .*got parity, count$"):
        CompareConfig(arms=("grpo", "oracle"), train=config)
    CompareConfig(arms=("grpo", "oracle"), train=replace(config, tasks=("chain", "carry+")))
    CompareConfig(arms=("grpo", "oracle"), train=config, runs=(config.out,))  # which trains none


def test_killed_while_it_writes_a_checkpoint(config, monkeypatch):
    loop.train(replace(config, steps=2))
    old = (config.out / "checkpoint.pt").read_bytes()

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    assert (config.out / "checkpoint.pt").read_bytes() == old


def damage_checkpoint(path: Path, how: str) -> None:
    content, state = path.read_bytes(), read_checkpoint(path)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "code":
        torch.save({"config": ALGORITHMS["paec"]()}, path)
    elif how == "start":  # another file of ours
        torch.save(state["model"], path)
    elif how == "no optimiser":
        del state["optimizer"]
        torch.save(state, path)
    elif how == "other weights":
        state["model"].popitem()
        torch.save(state, path)
    elif how == "other algorithm":
        state["algorithm"]["_extra_state"]["clip_high"] = 3.0
        torch.save(state, path)
    elif how == "other steps":
        torch.save(state | {"steps_done": "2"}, path)


DAMAGES = ("empty", "cut", "bit", "code", "start", "no optimiser", "other weights", "other algorithm", "other steps")


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(config):
    loop.train(replace(config, steps=2))
    path = config.out / "checkpoint.pt"
    whole = path.read_bytes()
    for how in DAMAGES:
        path.write_bytes(whole)
        damage_checkpoint(path, how)
        files = {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
        with pytest.raises(
            UnreadableFileError, match=f"^{path} must be a checkpoint of paec train, but it .*Put a copy"
        ):
            loop.train(config)
        assert files == {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}, how
    path.write_bytes(whole)
    loop.train(config)
    loop.train(replace(config, out=config.out / "undisturbed"))
    assert_same_bits(weights(config.out), weights(config.out / "undisturbed"))


def test_fewer_steps_than_are_done_are_refused(config):
    loop.train(replace(config, steps=2))
    before = (config.out / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"steps must be >= 2, which .*checkpoint.pt has done, got 1"):
        loop.train(replace(config, steps=1))
    assert (config.out / "config.json").read_bytes() == before


def test_an_evaluation_of_earlier_weights_is_set_aside(config):
    """By the steps it is of, also where the checkpoint is gone and the run begins again."""
    loop.train(replace(config, steps=1))
    (config.out / "eval.json").write_text("of one step")
    loop.train(replace(config, steps=1))
    assert (config.out / "eval.json").exists()
    loop.train(replace(config, steps=2))
    assert not (config.out / "eval.json").exists()
    assert (config.out / "eval-1.json").read_text() == "of one step"
    (config.out / "eval.json").write_text("of two steps")
    (config.out / "checkpoint.pt").unlink()
    loop.train(replace(config, steps=1))
    assert (config.out / "eval-2.json").read_text() == "of two steps"


def test_steps_are_said_to_be_saved_once_they_are(config):
    said = []

    def check(steps_done):
        said.append(steps_done)
        assert read_checkpoint(config.out / "checkpoint.pt")["steps_done"] == steps_done
        assert len(read_rows(config.out)) == steps_done

    loop.train(config, on_saved=check)
    assert said == [2, 4, 5]


def test_rows_are_on_the_disk_before_the_checkpoint_of_their_steps(config, calls):
    done = calls((loop.RunLog, "sync"), (loop, "write_saved"))
    loop.train(replace(config, steps=2))
    assert done == ["sync", "write_saved"]


def test_a_full_disk_stops_the_run_and_its_checkpoint_stands(config, monkeypatch):
    loop.train(replace(config, steps=2))
    saved = weights(config.out)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=f"File too large: '{config.out}/checkpoint.pt'"):
            # The rows still find room.
            loop.train(config, lambda row: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_same_bits(saved, weights(config.out))
    assert not list(config.out.glob("*.partial"))
    loop.train(config)
    loop.train(replace(config, out=config.out / "undisturbed"))
    assert_same_bits(weights(config.out), weights(config.out / "undisturbed"))


def test_a_folder_that_another_process_trains_in_is_refused(config):
    config.out.mkdir()
    with (config.out / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 1 on another machine")
        other.flush()
        with pytest.raises(FolderInUseError, match=f"{config.out} is held by process 1 on another machine"):
            loop.train(config)
    assert [path.name for path in config.out.iterdir()] == [LOCK]


def test_another_config_is_refused(config):
    loop.train(replace(config, steps=1))
    files = {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    other = replace(config, temperature=0.5, method=replace(config.method, clip_high=0.3))
    with pytest.raises(OtherConfigError) as refused:
        loop.train(other)
    assert "temperature: checkpoint 1.0, here 0.5" in str(refused.value)
    assert "method.clip_high: checkpoint 0.28, here 0.3" in str(refused.value)
    assert "steps" not in str(refused.value)
    assert files == {path: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    loop.train(replace(config, steps=2))  # more steps of the same run are no other run


@pytest.mark.parametrize(("factor", "norm"), [(math.inf, "nan"), (1e30, "inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(config, monkeypatch, factor, norm):
    loop.train(replace(config, steps=2))
    saved = weights(config.out)
    advantages = loop.pk.group_advantages
    monkeypatch.setattr(loop.pk, "group_advantages", lambda rewards: advantages(rewards) * factor)
    with pytest.raises(FloatingPointError, match=f"norm is {norm} in step 3, where .*policy_loss is .*was not taken"):
        loop.train(config)
    assert_same_bits(saved, weights(config.out))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_step_that_is_not_taken_changes_nothing(config, algo, monkeypatch):
    """Neither weights, nor the optimiser, nor anchors and coefficients."""
    config = of_algo(config, algo)
    run = loop.new_run(config, starting_policy(config, torch.device("cpu")))
    tasks, _ = config.load_tasks()
    loop.train_step(run, tasks, 0, 1)
    before = pickle.dumps(run.state_dict())
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="norm is inf in step 2"):
        loop.train_step(run, tasks, 0, 1)
    assert pickle.dumps(run.state_dict()) == before


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["paec", "siren"])
def test_two_processes_equal_one(config, algo):
    config = with_algo(replace(config, steps=2, updates=2), algo)
    finish(start(replace(config, out=config.out / "one")))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(start(replace(config, out=config.out / "two"), *torchrun))
    one, two = (read_rows(config.out / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert_alike(a, b, rel=1e-3)
    assert_same_weights(weights(config.out / "one"), weights(config.out / "two"), config.learning_rate)


def stopped_rank(rank: int, config: TrainConfig) -> str:
    """Train, the second rank being interrupted in the first step; return what it said when it stopped."""
    dist.init_process_group("gloo")
    if rank == 1:
        sample = loop.sample
        loop.sample = lambda *arguments: (signal.raise_signal(signal.SIGINT), sample(*arguments))[1]
    with pytest.raises(loop.Interrupted) as stopped:
        loop.train(config)
    return str(stopped.value)


def test_an_interruption_of_one_rank_stops_all(config):
    from helpers import on_ranks  # which this file does not find where it is run

    said = on_ranks(2, stopped_rank, config.out.parent, config)
    assert said == ["stopped after step 1 of 5"] * 2


def test_prompts_must_divide_among_updates(config):
    with pytest.raises(ValueError, match=r"prompts must be a multiple of updates = 3, got 4"):
        replace(config, updates=3)


def test_seeds_differ_and_repeat(config):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(replace(config, steps=1, seed=seed, out=config.out / name))
        runs[name] = weights(config.out / name)
    assert_same_bits(runs["a"], runs["b"])
    assert any(not torch.equal(runs["a"][name], runs["c"][name]) for name in runs["a"])


def test_time_is_counted_as_it_passes(config, monkeypatch):
    clock = 0.0

    def taking(seconds: float, work):
        def timed(*arguments):
            nonlocal clock
            clock += seconds
            return work(*arguments)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(loop, "sample", taking(8, loop.sample))
    monkeypatch.setattr(loop, "optimiser_step", taking(1, loop.optimiser_step))
    loop.train(replace(config, updates=2))
    times = [tuple(row[name] for name in TIMES) for row in read_rows(config.out)]
    assert times == [(10, 8)] * config.steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    loop.train(pickle.loads(bytes.fromhex(sys.argv[1])), lambda row: print("step", int(row["step"]), flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()
