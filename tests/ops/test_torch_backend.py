"""What only the torch backend has: chunks, threads, the short list and the sieve of its nucleus, its memory."""

import json
import math
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ops.rows import flat, gradient_of, hard_rows

import paec_kernels as pk
from paec_kernels import reference
from paec_kernels.ops import layout, torch_backend, torch_nucleus, torch_rows
from paec_kernels.ops.layout import Rows

ROOT = Path(__file__).parents[2]
WIDTH = 5003


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def mixed_rows(n: int) -> torch.Tensor:
    """``[n, 5003]`` hard rows in turn, so that every chunk has narrow and wide nuclei."""
    rows = list(hard_rows().values())
    return torch.stack([rows[i % len(rows)] for i in range(n)])


def table_of(logits, top_p=0.95):
    """The table's rest, and the sizes."""
    one = torch.ones(1, dtype=torch.float32)
    return torch_backend.forward(logits[None], Rows(None, None, one), top_p, 0.0, logits.shape[-1])[1:]


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_in_any_chunk_and_with_any_threads(monkeypatch, n_threads, dtype, softcap):
    logits = mixed_rows(20).to(dtype)  # in bfloat16 the largest float is infinity, its rows NaN
    token_ids = torch.arange(20) * 250
    temperature = torch.linspace(0.5, 1.5, 20)
    weights = torch.randn(3, 20)

    def stats_and_gradient(rows):
        options = {"temperature": temperature[rows], "softcap": softcap, "backend": "torch"}
        gradient = gradient_of(lambda z: pk.token_stats(z, token_ids[rows], **options), logits[rows], weights[:, rows])
        return *pk.token_stats(logits[rows], token_ids[rows], **options), gradient

    torch.set_num_threads(1)
    expected = [torch.cat(values) for values in zip(*(stats_and_gradient([i]) for i in range(20)), strict=True)]
    torch.set_num_threads(n_threads)
    for chunk_rows in (1, 3, 5, 20):
        monkeypatch.setattr(torch_rows, "CHUNK_BYTES_PER_THREAD", chunk_rows * 5056 * 4)
        for order in (list(range(20)), [*range(5, 20), *range(5)]):
            for value, alone in zip(stats_and_gradient(order), expected, strict=True):
                torch.testing.assert_close(value, alone[order], rtol=0, atol=0, equal_nan=True)


def test_scattered_valid_rows_of_a_slice(monkeypatch):
    monkeypatch.setattr(torch_rows, "CHUNK_BYTES_PER_THREAD", 3 * 5056 * 4)
    whole = mixed_rows(24).view(4, 6, WIDTH)
    logits = whole[:, 1:]
    valid = torch.rand(4, 5) < 0.6
    token_ids = torch.randint(0, WIDTH, (4, 5))
    poisoned = whole.clone()
    poisoned[:, 1:][~valid] = math.nan
    weights = torch.randn(3, 20)

    def run(z):
        return pk.token_stats(z, token_ids, valid=valid, backend="torch")

    stats, gradient = run(poisoned[:, 1:]), gradient_of(run, poisoned[:, 1:], weights)
    dense = pk.token_stats(logits[valid], token_ids[valid], backend="torch")
    dense_gradient = gradient_of(
        lambda z: pk.token_stats(z, token_ids[valid], backend="torch"), logits[valid], weights[:, valid.flatten()]
    )
    for value, expected in zip((*stats, gradient), (*dense, dense_gradient), strict=True):
        assert torch.equal(value[valid], expected)
        assert (value[~valid] == 0).all()


def steps(*counts: int) -> torch.Tensor:
    """A row in random order with counts[0] logits of 0, counts[1] of -1, and so on."""
    row = torch.cat([torch.full((count,), -float(level)) for level, count in enumerate(counts)])
    return row[torch.randperm(len(row))]


SHORT_LIST = torch_nucleus.SHORT_LIST
TIED = {
    "within the list": steps(20, 40, 3000),
    "up to its end": steps(20, SHORT_LIST - 20, 10),
    "across its end": steps(20, SHORT_LIST, 3000),
    "just one more": steps(SHORT_LIST + 1, 5),
    "all": steps(4096),
    "all and a little": steps(4095, 1),
}


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.95, 0.999999])
@pytest.mark.parametrize("name", TIED)
def test_tied_tokens_in_and_beyond_the_short_list(name, top_p):
    logits = TIED[name]
    table, size = table_of(logits[None], top_p=top_p)
    z = logits.double()
    weights, expected_size = reference.nucleus_weights(z, z.softmax(-1), top_p)
    assert abs(size.item() - expected_size.item()) <= 1
    threshold, tie_weight = table[layout.THRESHOLD].item(), table[layout.TIE_WEIGHT].item()
    assert threshold == logits[weights > 0].min()
    weights_here = (logits > threshold) + tie_weight * (logits == threshold)
    assert weights_here.sum().item() == pytest.approx(size.item(), rel=1e-6)
    tied = (logits == threshold).sum()
    assert weights_here.sub(weights).abs().max() <= 1.001 / tied


@pytest.mark.parametrize("top_p", [0.1, 0.95, 0.9999])
@pytest.mark.parametrize("name", hard_rows())
def test_the_sieve_keeps_every_member_and_its_ties(name, top_p):
    z = hard_rows()[name]
    e = (z - z.max()).exp()
    columns, listed = torch_nucleus.possible_members(e[None], (1 - top_p) * e.sum()[None])
    kept = torch.zeros_like(z, dtype=torch.bool)
    kept[columns[listed]] = True
    assert kept.sum() == listed.sum()
    p = z.double().softmax(-1)
    weights, _ = reference.nucleus_weights(z.double(), p, top_p)
    assert kept[weights > 0].all()


@pytest.mark.parametrize("width", [64, 128, 192, 8192, 8256])
def test_top_columns_are_those_of_a_topk(width):
    z = flat(3, width).round(decimals=1)
    columns = torch_nucleus.top_columns(z, SHORT_LIST)
    assert torch.equal(z.gather(1, columns), z.topk(min(SHORT_LIST, width)).values)
    assert all(len(row.unique()) == len(row) for row in columns)


def test_wide_nuclei_cost_no_sort_of_the_vocabulary(monkeypatch):
    sorted_widths = []
    sort = torch.Tensor.sort

    def watched_sort(values, **options):
        sorted_widths.append(values.shape[1])
        return sort(values, **options)

    monkeypatch.setattr(torch.Tensor, "sort", watched_sort)
    _, size = table_of(flat(4, 49_152, 4.0))
    assert size.min() > SHORT_LIST
    assert 0 < max(sorted_widths) < 4 * size.max() < 49_152


def test_the_whole_vocabulary_is_a_nucleus_at_top_p_1():
    logits = mixed_rows(20)
    stats = pk.token_stats(logits, top_p=1.0, backend="torch")
    assert torch.equal(stats.nucleus_entropy, stats.entropy)
    assert torch.equal(stats.nucleus_size, (logits > -math.inf).sum(-1).int())
    only_entropy, only_nucleus_entropy = torch.eye(3)[1:, :, None].expand(2, 3, 20)
    gradients = [
        gradient_of(lambda z: pk.token_stats(z, top_p=1.0, backend="torch"), logits, weights)
        for weights in (only_entropy, only_nucleus_entropy)
    ]
    assert gradients[0].abs().amax(-1).count_nonzero() > 10
    assert torch.equal(*gradients)


def test_threads_keep_their_settings(n_threads):
    seen = []
    logits = flat(64, 3000)
    torch_rows.serial_threads.cache_clear()  # it is their start that touches the settings
    pk.token_stats(logits, backend="torch")
    for _ in range(2):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert [torch.get_num_threads(), *seen] == [n_threads] * 3


def test_calls_from_several_threads_at_once():
    logits = mixed_rows(40)
    expected = pk.token_stats(logits, backend="torch")
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(pk.token_stats(logits, backend="torch"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for stats in results:
        for value, other in zip(stats[1:], expected[1:], strict=True):
            assert torch.equal(value, other)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, which is unsafe with threads elsewhere than on Linux")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_threads_of_its_own():
    logits = flat(40, 3000)
    expected = pk.token_stats(logits, backend="torch").entropy
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(pk.token_stats(logits, backend="torch").entropy.tolist()))
    child.start()
    child.join(timeout=60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert queue.get() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    logits = TIED["across its end"][None]
    expected, _ = table_of(logits)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        table, _ = table_of(logits)
    finally:
        torch.set_default_dtype(before)
    assert table.dtype == torch.float32
    assert torch.equal(table, expected)


def test_inference_mode():
    logits = flat(40, 3000)
    expected = pk.token_stats(logits, backend="torch").entropy
    with torch.inference_mode():
        assert torch.equal(pk.token_stats(logits, backend="torch").entropy, expected)


def test_an_error_in_a_chunk_reaches_the_caller(n_threads):
    def fail(rows, index, chunk):
        raise RuntimeError("in a chunk")

    with pytest.raises(RuntimeError, match="in a chunk"):
        torch_rows.for_each_chunk(fail, flat(8, 300)[None], None)


def test_peak_memory():
    """Resident memory of new processes: out of place the gradient and a few chunks, in place the chunks alone."""
    program = (
        "import json, torch\n"
        "from benchmarks.harness import peak_bytes\n"
        "from benchmarks.workload import Case, build\n"
        "if __name__ == '__main__':\n"
        "    torch.set_num_threads(2)\n"
        "    case = Case(256, 49_152, torch.float32, 'real', 'cpu')\n"
        "    names = ['token_stats', 'token_stats in place', 'eager, sort']\n"
        "    found = peak_bytes(names, build(case))\n"
        "    print(json.dumps([found[name] for name in names]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out_of_place, in_place, eager = json.loads(result.stdout)
    logits = 256 * 49_152 * 4
    chunks = 36 << 20
    assert 0 < in_place < chunks < logits
    assert logits < out_of_place < logits + chunks
    assert out_of_place < eager / 2
