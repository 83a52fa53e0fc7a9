"""PAEC anchored by a policy: held against the definition, over micro-batches, and what it is for."""

import dataclasses

import pytest
import torch
from losses.batches import ANCHOR, CONFIG, VOCAB, Batch, anchored, flattened, make_batch

from paec_kernels import reference
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import ANCHORED, ENTROPY_SUPPORTS, OF_POSITIONS, PAECConfig
from paec_kernels.types import TokenStats

pytestmark = pytest.mark.usefixtures("device")


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def anchor_policy_of(batch: Batch) -> TokenStats:
    """Statistics of another policy on the same tokens, float64 or float32 as the batch."""
    other = make_batch(*batch.valid.shape, dtype=batch.logits.dtype, seed=100)
    return reference.token_stats(other.logits.detach(), valid=batch.valid)


@pytest.mark.parametrize("penalty", OF_POSITIONS)
@pytest.mark.parametrize("entropy_support", ENTROPY_SUPPORTS)
@pytest.mark.parametrize("anchored_by", ["scores", "positions"])
def test_an_anchor_policy_equals_the_definition(anchored_by, entropy_support, penalty):
    batch = make_batch(5, 40)
    config = dataclasses.replace(
        CONFIG, anchored=anchored_by, entropy_support=entropy_support, rho_min=1.2, penalty=penalty
    )
    out = anchored(config)(batch.stats, batch.valid, anchor_stats=anchor_policy_of(batch))
    expected, mask, metrics = reference.paec_loss(batch.stats, batch.valid, config, ANCHOR, anchor_policy_of(batch))
    assert metrics["penalty"] > 0.01
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.mask, mask)
    torch.testing.assert_close(gradient(out.loss, batch.logits), gradient(expected, batch.logits))
    torch.testing.assert_close({name: out.metrics[name] for name in metrics}, metrics)


@pytest.mark.parametrize("anchored_by", ["scores", "positions"])
def test_an_anchor_policy_over_micro_batches(anchored_by):
    pieces = [make_batch(3, 20, seed=1), make_batch(2, 31, seed=2), make_batch(1, 4, seed=3, p_valid=0.0)]
    whole = flattened(pieces)
    of_pieces = [anchor_policy_of(piece) for piece in pieces]
    of_whole = TokenStats(
        *(None if x[0] is None else torch.cat([y.reshape(-1) for y in x]) for x in zip(*of_pieces, strict=True))
    )
    config = dataclasses.replace(CONFIG, anchored=anchored_by, rho_min=1.2)
    expected = anchored(config)(whole.stats, whole.valid, anchor_stats=of_whole).loss

    paec = anchored(config)
    for piece, anchor_stats in zip(pieces, of_pieces, strict=True):
        paec.observe(piece.stats, piece.valid, anchor_stats=anchor_stats)
    plan = paec.plan()
    terms = [
        paec.term(piece.stats, piece.valid, plan, anchor_stats=anchor_stats)
        for piece, anchor_stats in zip(pieces, of_pieces, strict=True)
    ]
    torch.testing.assert_close(sum(terms), expected)
    found = torch.cat(
        [gradient(term, piece.logits).reshape(-1, VOCAB) for term, piece in zip(terms, pieces, strict=True)]
    )
    torch.testing.assert_close(found, gradient(expected, whole.logits))


@pytest.mark.parametrize("anchored_by", ["scores", "positions"])
def test_an_anchor_policy_in_float32(backend, anchored_by):
    config = dataclasses.replace(CONFIG, anchored=anchored_by, rho_min=1.2)
    exact, batch = make_batch(5, 40), make_batch(5, 40, dtype=torch.float32)
    expected = reference.paec_loss(exact.stats, exact.valid, config, ANCHOR, anchor_policy_of(exact))[0]
    out = anchored(config, backend=backend)(batch.stats, batch.valid, anchor_stats=anchor_policy_of(batch))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient(out.loss, batch.logits).double(), gradient(expected, exact.logits), rtol=1e-4, atol=1e-7
    )


def test_a_fork_that_has_collapsed_is_held_by_positions_alone():
    """Two forks have collapsed; six free places are as open as ever, and the rest is certain all the time."""

    def stats_of(fork: float, free: float) -> TokenStats:
        peak = torch.full((1, 20), 9.0, dtype=torch.float64)
        peak[0, :2], peak[0, 2:8] = fork, free
        logits = torch.zeros(1, 20, VOCAB, dtype=torch.float64)
        logits[..., 0] = peak
        return reference.token_stats(logits.requires_grad_())

    at_start, now = stats_of(fork=3.0, free=3.0), stats_of(fork=9.0, free=2.5)
    valid = torch.ones(1, 20, dtype=torch.bool)
    outputs = {}
    for anchored_by in ANCHORED:
        paec = PAEC(PAECConfig(anchored=anchored_by, anchor_steps=1))
        paec(at_start, valid, anchor_stats=at_start)
        paec.step()
        outputs[anchored_by] = paec(now, valid, anchor_stats=at_start)
    collapsed, as_open = outputs["mean"], outputs["positions"]
    assert collapsed.mask[0, :2].max() < 0.1  # it has left the mask, and the free places hold the mean
    assert collapsed.metrics["penalty"] == 0
    assert as_open.mask[0, :2].min() > 0.45
    assert as_open.metrics["penalty"] > 0.1
    assert outputs["scores"].mask[0, :2].min() > 0.45
    pull = torch.autograd.grad(as_open.loss, now.entropy)[0][0]
    assert pull[:2].max() < 100 * pull[2:].min()  # negative: up, and at the forks alone beyond the bonus


@pytest.mark.parametrize("anchored_by", ["scores", "positions"])
def test_the_anchor_policy_is_needed(anchored_by):
    batch = make_batch(2, 5)
    paec = PAEC(PAECConfig(anchored=anchored_by))
    message = f"anchor_stats is None, but anchored='{anchored_by}' needs"
    with pytest.raises(ValueError, match=message):
        paec.observe(batch.stats, batch.valid)
    with pytest.raises(TypeError, match="anchor_stats must be a TokenStats, got Tensor"):
        paec.observe(batch.stats, batch.valid, anchor_stats=batch.valid)
    with pytest.raises(ValueError, match=r"valid must have the shape of anchor_stats.entropy, \(3, 5\), got \(2, 5\)"):
        paec.observe(batch.stats, batch.valid, anchor_stats=make_batch(3, 5).stats)
    paec.observe(batch.stats, batch.valid, anchor_stats=anchor_policy_of(batch))
    with pytest.raises(ValueError, match=message):
        paec.term(batch.stats, batch.valid, paec.plan())
