"""The types that the operators hand to the losses."""

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100
CERTAIN = 0.02  # nats: a token of less entropy is settled, some 1 sample in 350 is another token [ours]
MAX_LOG_RATIO = 20.0  # verl's; the exponential of more overflows, and infinity times advantage 0 is NaN


class TokenStats(NamedTuple):
    """Statistics of each token position, shaped ``logits.shape[:-1]``.

    ``logp`` (None without ``token_ids``), ``entropy`` and ``nucleus_entropy`` are float32, in nats, and
    differentiable; ``margin`` and ``lse`` are float32 without a gradient; ``nucleus_size`` is int32.

    To a type checker ``logp`` is a tensor: whoever reads it gave token ids, and would otherwise have to say so again.
    """

    logp: Tensor
    entropy: Tensor
    nucleus_entropy: Tensor
    margin: Tensor
    lse: Tensor
    nucleus_size: Tensor
