import threading

import pytest
import torch

pytest.importorskip("transformers", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
from paec_kernels.demo import comparison, peak_memory
from paec_kernels.demo.comparison import Job, Stats, against_eager, against_logits


@pytest.fixture
def job(real_logits) -> Job:
    n = len(real_logits.logits)
    weights = torch.randn(2, n) / n
    return Job(real_logits.logits.float(), real_logits.token_ids, 0.95, weights[0], weights[1])


def test_compare_on_real_logits(job: Job) -> None:
    ticks: list[None] = []
    found = against_eager(job, repeats=2, on_run=lambda: ticks.append(None))
    assert len(ticks) == comparison.runs(2)
    assert (found.rows, found.vocab_size, found.dtype) == (32, 49152, "float32")
    gradient_bytes = job.rows.nbytes
    for side in (found.operator, found.eager):
        assert side.seconds > 0
        assert side.peak_bytes >= gradient_bytes
        assert side.stats_error < 0.05
        assert side.gradient_error < 1e-4
    assert found.operator.stats_error < 1e-5
    assert found.memory_ratio < 0.5


def test_nothing_is_reported_when_the_operator_is_wrong(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(job: Job, logits: torch.Tensor) -> Stats:
        logp, entropy, nucleus_entropy, margin = comparison.by_reference(job, logits)
        return logp, entropy * 1.01, nucleus_entropy, margin

    monkeypatch.setattr(comparison, "by_operator", wrong)
    with pytest.raises(ValueError, match="errors against float64"):
        against_eager(job, repeats=1)


def test_linear_against_logits() -> None:
    n, width, vocab_size = 256, 16, 20_000
    weights = torch.randn(2, n) / n
    job = Job(
        torch.randn(n, width),
        torch.randint(vocab_size, (n,)),
        0.95,
        weights[0],
        weights[1],
        head=torch.randn(vocab_size, width),
        temperature=0.8,
        chunk_rows=16,
    )
    found = against_logits(job, repeats=1)
    assert (found.rows, found.vocab_size) == (n, vocab_size)
    assert found.operator.stats_error < 1e-4
    assert found.operator.gradient_error < 1e-4
    assert found.memory_ratio < 1


def test_peak_memory_is_what_is_held_at_once_in_any_thread() -> None:
    mib = 2**20

    def allocate() -> None:
        def one_after_the_other() -> None:
            torch.ones(100 * mib, dtype=torch.uint8)
            torch.ones(60 * mib, dtype=torch.uint8)

        thread = threading.Thread(target=one_after_the_other)
        thread.start()
        thread.join()

    assert 95 * mib < peak_memory.growth(allocate) < 110 * mib
