"""What passes between the operator and its backends: arguments of the rows, and the table that a forward pass fills.

The table has a column for each row of logits. It is two float32 tensors, since the outputs of an operator may not share
memory: ``stats [3, N]``, which are differentiable, and ``rest [7, N]``, which are not. Its first two are public, and
the others are what the gradient needs beside the logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOGP = 0
ENTROPY = 1
NUCLEUS_ENTROPY = 2

N_STATS = 3

MARGIN = 0
LSE = 1
TOP = 2  # f(z) of the row's largest logit, f being the softcap or the identity
LOG_TOTAL = 3  # lse - TOP / T: kept apart, since lse alone loses the digits in which logits near 5,000 differ
THRESHOLD = 4  # the smallest logit z in the nucleus, as it was given
TIE_WEIGHT = 5  # w = k / n of the tokens at the threshold
LOG_MASS = 6  # log of the nucleus' share of the probability

N_REST = 7

# Rows of what one rank's columns add to the sums of rows that lie on several ranks: f(z) of the largest logit (also as
# it was given), of the second largest and of the token, and sums relative to the first.
TOP_LOGIT = 0
OWN_TOP = 1
OWN_SECOND = 2
TOTAL = 3
MOMENT = 4
TOKEN = 5

N_SUMS = 6
N_CUTS = 3  # thresholds of which a reading sums the masses
# And what they add to the nucleus.
MASS = 0
MASS_MOMENT = 1
N_ABOVE = 2
N_TIED = 3
LARGEST_BELOW = 4

N_MEMBERS = 5


class Rows(NamedTuple):
    """The arguments that each row of logits has of its own."""

    token_ids: Tensor | None  # int64 [N]
    valid: Tensor | None  # bool [N]
    temperature: Tensor  # float32 [N], or [1] for all

    def take(self, rows: Tensor | slice) -> "Rows":
        """Return the arguments of some rows, all of them valid."""
        token_ids, _, temperature = self
        return Rows(
            None if token_ids is None else token_ids[rows],
            None,
            temperature if temperature.numel() == 1 else temperature[rows],
        )


def new_table(make: Callable[..., Tensor], n_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Make the table's stats and rest, and the nucleus sizes ``[N]`` int32, by ``torch.empty`` or ``torch.zeros``."""
    return (
        make(N_STATS, n_rows, dtype=torch.float32, device=device),
        make(N_REST, n_rows, dtype=torch.float32, device=device),
        make(n_rows, dtype=torch.int32, device=device),
    )
