"""Rows whose columns several gloo ranks share, and what each rank makes of them."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ops.rows import INF, broken_rows, flat, gradient_of, hard_rows
from torch import Tensor

import paec_kernels as pk
from paec_kernels.ops import operator

DATA = Path(__file__).parents[1] / "data"
V = 5003


class Case(NamedTuple):
    logits: Tensor
    token_ids: Tensor | None
    options: Mapping[str, Any] = MappingProxyType({})
    cut: str = "even"  # how the columns are cut: see `widths`


@cache
def cases() -> dict[str, Case]:
    """By name; the same in every process."""
    token = torch.tensor([4321])
    noise = flat(4, V, 1.0)
    tied = (3 * noise).round().clamp(-1, 1)
    on_the_last = torch.cat([noise[:, :-1] - 50, torch.full((4, 1), 3.0)], dim=1)
    masked_front = noise.clone()
    masked_front[:, : V // 2 + 4] = -INF
    ids = torch.tensor([0, 2500, 5002, -100])
    real = torch.load(DATA / "real_logits.pt", weights_only=True)
    found = {name: Case(row[None], token) for name, row in (hard_rows() | broken_rows()).items()}
    found |= {
        f"{dtype}".removeprefix("torch."): Case(flat(4, V).to(dtype), ids)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    return found | {
        "real rows": Case(real["logits"][:4], real["token_ids"][:4]),
        "ties across shards": Case(tied, ids, {"top_p": 0.5}),
        "ties across shards in 16 bits": Case(tied.bfloat16(), ids, {"top_p": 0.5}),
        "all candidates on the last shard": Case(on_the_last, ids),
        "shards of -inf": Case(masked_front, ids, {"top_p": 0.999}),
        "a target in a shard of -inf": Case(masked_front, torch.tensor([0, 1, 2, 3])),
        "softcap": Case(noise * 10, ids, {"softcap": 15.0, "temperature": 0.8}),
        "a small temperature and a softcap": Case(noise * 10, ids, {"softcap": 30.0, "temperature": 0.1}),
        "a temperature for each row": Case(noise, ids, {"temperature": torch.tensor([0.3, 1.0, 1.7, 4.0])}),
        "rows that are not valid": Case(noise, ids, {"valid": torch.tensor([True, False, False, True])}),
        "no row is valid": Case(noise, ids, {"valid": torch.zeros(4, dtype=torch.bool)}),
        "no row at all": Case(noise[:0], ids[:0]),
        "no token ids": Case(noise, None),
        "whole vocabulary": Case(noise, ids, {"top_p": 1.0}),
        "whole vocabulary with masked tokens": Case(masked_front, ids, {"top_p": 1.0}),
        "padding": Case(noise, torch.tensor([0, 2500, 4899, -100]), {"vocab_size": 4900}),
        "nothing but padding": Case(noise, torch.tensor([0, 1, 2, -100]), {"vocab_size": 3}),
        "shards of one column": Case(noise, ids, cut="one column"),
        "shards of no column": Case(noise, ids, cut="no column"),
        "a vocabulary of one": Case(noise[:, :1], torch.tensor([0, 0, 0, -100]), cut="no column"),
        "three dimensions": Case(noise.view(2, 2, V), ids.view(2, 2)),
        "in place": Case(noise, ids, {"inplace_backward": True}),
    }


def widths(n_cols: int, cut: str, n_ranks: int) -> list[int]:
    """How many columns each rank has: uneven in every case but that of few columns."""
    first = {"even": n_cols // n_ranks + 3, "one column": 1, "no column": 0}[cut]
    own = [first] * (n_ranks - 1)
    return [*own, n_cols - sum(own)]


def own_columns(case: Case, rank: int, n_ranks: int) -> slice:
    before = sum(widths(case.logits.shape[-1], case.cut, n_ranks)[:rank])
    return slice(before, before + widths(case.logits.shape[-1], case.cut, n_ranks)[rank])


def weights(case: Case) -> Tensor:
    """The incoming gradients ``[3, N]``."""
    n_rows = case.logits.shape[:-1].numel()
    return torch.randn(3, n_rows, generator=torch.Generator().manual_seed(1))


GROUPS = (2, 3, 4)
# What few rows suffice for where kernels are interpreted, on two ranks.
FOR_TRITON = (
    *("flat", "tied at three values", "descending", "NaN", "bfloat16", "float16", "softcap", "padding"),
    *("whole vocabulary", "rows that are not valid", "a temperature for each row", "shards of no column"),
    *("no row at all", "a small temperature and a softcap"),
)


def work(rank: int) -> dict[str, dict[str, dict]]:
    """What this rank's columns give in groups of each size, by its name, and by case."""
    dist.init_process_group("gloo")
    groups = {n: dist.new_group(range(n)) for n in GROUPS}
    found = {str(n): of_cases(rank, group, "torch", cases()) for n, group in groups.items() if rank < n}
    if rank < 2 and operator.HAS_TRITON and operator.INTERPRETED:
        found["triton"] = of_cases(rank, groups[2], "triton", FOR_TRITON)
    return found


def of_cases(rank: int, group: dist.ProcessGroup, backend: str, names: Iterable[str]) -> dict[str, dict]:
    """The statistics and the gradient of this rank's columns, by case, in torch each twice on two ranks."""
    found = {}
    for name in names:
        case = cases()[name]
        shard = case.logits[..., own_columns(case, rank, group.size())]
        inplace = case.options.get("inplace_backward", False)
        kept: list[pk.TokenStats] = []

        def statistics(z: Tensor, case=case, inplace=inplace, kept=kept) -> pk.TokenStats:
            options = {**case.options, "vocab_group": group, "backend": backend}
            kept.append(pk.token_stats(z.view_as(z) if inplace else z, case.token_ids, **options))
            return kept[-1]

        runs = 2 if group.size() == 2 and backend == "torch" else 1  # interpreted kernels take their time
        gradients = [gradient_of(statistics, shard.clone(), weights(case)) for _ in range(runs)]
        found[name] = {
            "stats": [[None if x is None else x.detach() for x in stats] for stats in kept],
            "gradients": gradients,
        }
    return found
