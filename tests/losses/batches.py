"""Random statistics with their logits, for the tests of this folder."""

from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels import reference
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.types import TokenStats

VOCAB = 40
# Every part of the loss is active: a floor well above the batch's mean entropy, and a weighty penalty.
CONFIG = PAECConfig(beta=0.03, lam=0.7, vocab_size=VOCAB)
ANCHOR = 4.0


class Batch(NamedTuple):
    logits: Tensor  # [B, T, VOCAB], requires grad
    valid: Tensor  # bool [B, T]

    @property
    def stats(self) -> TokenStats:
        return reference.token_stats(self.logits, valid=self.valid)


def make_batch(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, p_valid: float = 0.7) -> Batch:
    """Rows from nearly one-hot to flat, so that scores spread over [0, 1]."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        width = 0.1 + 8 * torch.rand(*shape, 1, dtype=torch.float64, generator=generator)
        logits = width * torch.randn(*shape, VOCAB, dtype=torch.float64, generator=generator)
        valid = torch.rand(shape, generator=generator) < p_valid
    return Batch(logits.to(device, dtype).requires_grad_(), valid.to(device))


def flattened(batches: list[Batch]) -> Batch:
    """The same tokens as one batch."""
    logits = torch.cat([batch.logits.detach().reshape(-1, VOCAB) for batch in batches])
    return Batch(logits.requires_grad_(), torch.cat([batch.valid.reshape(-1) for batch in batches]))


def with_anchor(term: EntropyTerm, anchor: float = ANCHOR) -> EntropyTerm:
    """The term itself, its anchor set."""
    term.anchor_count.fill_(term.anchor_steps)
    term.anchor_sum.fill_(anchor * term.anchor_steps)
    return term


def anchored(config: PAECConfig = CONFIG, anchor: float = ANCHOR, **options) -> PAEC:
    return with_anchor(PAEC(config, **options), anchor)


def accuracy_of(stats: TokenStats) -> Tensor:
    """``[B, 1]`` for three answers at most."""
    return torch.tensor([[0.25], [1.0], [0.0]], dtype=stats.entropy.dtype)[: len(stats.entropy)]


def whole_step(term: EntropyTerm, stats: TokenStats, valid: Tensor) -> Tensor:
    """The loss of an optimiser step of one micro-batch."""
    term.observe(stats, valid)
    return term.term(stats, valid, term.plan(), accuracy_of(stats))
