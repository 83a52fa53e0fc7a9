"""Logits that look like users': real ones, harder real ones, and three kinds made to be like or unlike them."""

import functools
import json
from pathlib import Path

import torch
from torch import Generator, Tensor

DATA = Path(__file__).parents[1] / "tests" / "data"
REAL_LOGITS, SHARES = DATA / "real_logits.pt", DATA / "real_logits_shares.json"  # by make_real_logits.py beside them
GOLDEN = (5**0.5 - 1) / 2
SLICE = 64  # rows made at a time, so that no temporary is as large as the logits
JITTER = 0.02  # far below the spread of a row's logits, enough to break its ties in float32
TAIL_OFFSET = 12.0  # nats by which columns beyond the real vocabulary lie lower: e^-12 of the mass, six times at most


@functools.cache
def _fixture(device: torch.device) -> Tensor:
    """Load the tests' rows, bfloat16 ``[32, 49152]``."""
    return torch.load(REAL_LOGITS, weights_only=True)["logits"].to(device)


def real(rows: range, width: int, generator: Generator) -> Tensor:
    """Take the tests' 32 rows of SmolLM2-135M with jitter, each as often as nuclei of its size were met in answers."""
    return _of_fixture(by_share(rows), width, generator)


def wide(rows: range, width: int, generator: Generator) -> Tensor:
    """Take the same 32 rows in turn. They were chosen for sizes even on a log scale: hard, many nuclei are large."""
    return _of_fixture(torch.tensor(rows) % 32, width, generator)


def by_share(rows: range) -> Tensor:
    """Choose the ones of the 32 rows that stand for these, int64 ``[len(rows)]``.

    Row i takes the place u_i = (1/2 + i GOLDEN) mod 1 in the cumulated shares, in order of nucleus size. These places
    fill [0, 1) evenly from any start, so that every batch has the right mix.
    """
    found = json.loads(SHARES.read_text())
    order = torch.tensor(found["row_nuclei"]).argsort(stable=True)
    ends = torch.tensor(found["row_shares"], dtype=torch.float64)[order].cumsum(0)
    places = (0.5 + GOLDEN * torch.tensor(rows, dtype=torch.float64)) % 1
    return order[torch.searchsorted(ends, places, right=True).clamp(max=len(order) - 1)]


def _of_fixture(picks: Tensor, width: int, generator: Generator) -> Tensor:
    """Bring rows of the fixture to a width; their nuclei stay of the sizes that were measured.

    A wider vocabulary repeats a row's columns TAIL_OFFSET lower; a narrower one keeps its largest logits, in order.
    """
    picked = _fixture(generator.device)[picks.to(generator.device)].float()
    n_columns = picked.shape[1]
    if width < n_columns:
        kept = picked.topk(width, dim=1).indices.sort(dim=1).values
        picked = picked.gather(1, kept)
    elif width > n_columns:
        copies = -(-width // n_columns) - 1
        picked = torch.cat([picked] + copies * [picked - TAIL_OFFSET], dim=1)[:, :width]
    return picked + JITTER * _normal(picked.shape, generator)


def peaked(rows: range, width: int, generator: Generator) -> Tensor:
    """Draw N(0, 2) and 16 candidates a row around 16: nuclei of a handful of tokens."""
    z = 2 * _normal((len(rows), width), generator)
    candidates = torch.randint(width, (len(rows), 16), generator=generator, device=generator.device)
    return z.scatter(1, candidates, 16 + _normal((len(rows), 16), generator))


def flat(rows: range, width: int, generator: Generator) -> Tensor:
    """Draw N(0, 3), an untrained model's: nuclei of thousands of tokens."""
    return 3 * _normal((len(rows), width), generator)


def collapsed(rows: range, width: int, generator: Generator) -> Tensor:
    """Draw what entropy collapse leaves: N(0, 2) and one token 20 above its scale, with nearly all of the mass."""
    z = 2 * _normal((len(rows), width), generator)
    chosen = torch.randint(width, (len(rows), 1), generator=generator, device=generator.device)
    return z.scatter(1, chosen, 30 + _normal((len(rows), 1), generator))


KINDS = {draw.__name__: draw for draw in (real, wide, peaked, flat, collapsed)}


def make(kind: str, n: int, width: int, dtype: torch.dtype, generator: Generator) -> tuple[Tensor, Tensor]:
    """Make logits ``[n, width]`` of ``dtype``, and sample token ids int64 ``[n]``, on the generator's device."""
    logits = torch.empty(n, width, dtype=dtype, device=generator.device)
    token_ids = torch.empty(n, dtype=torch.int64, device=generator.device)
    for start, part, ids in zip(range(0, n, SLICE), logits.split(SLICE), token_ids.split(SLICE), strict=True):
        part.copy_(KINDS[kind](range(start, start + len(part)), width, generator))
        ids.copy_(sample(part, generator))
    return logits, token_ids


def sample(logits: Tensor, generator: Generator) -> Tensor:
    """Sample a token a row at temperature 1, by the Gumbel trick: argmax(z - log(-log u)), u uniform in (0, 1)."""
    u = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_(1e-20, 1 - 1e-7)
    return (logits.float() - (-u.log()).log()).argmax(-1)


def hidden_states(
    n: int, width: int, vocab_size: int, dtype: torch.dtype, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states ``[n, width]``, a head ``[vocab_size, width]`` and tokens ``[n]``, with nuclei of all sizes.

    head rows ~ N(0, 1/D); hidden = 2 noise + sum over 16 tokens t of a_t head[t], a_t ~ N(12, 3): every row's logits
    are N(0, 2) with 16 candidates, whose lead over the rest decides whether the nucleus is one token or thousands.
    """
    head = torch.empty(vocab_size, width, dtype=dtype, device=generator.device)
    for part in head.split(1 << 14):
        part.copy_(_normal(part.shape, generator) / width**0.5)
    hidden = torch.empty(n, width, dtype=dtype, device=generator.device)
    token_ids = torch.empty(n, dtype=torch.int64, device=generator.device)
    for part, ids in zip(hidden.split(SLICE), token_ids.split(SLICE), strict=True):
        planted = torch.randint(vocab_size, (len(part), 16), generator=generator, device=generator.device)
        strength = 12 + 3 * _normal(planted.shape, generator)
        part.copy_(2 * _normal(part.shape, generator) + (strength[..., None] * head[planted].float()).sum(1))
        ids.copy_(sample(part @ head.T, generator))
    return hidden, head, token_ids


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
