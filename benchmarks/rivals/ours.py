"""This package's operator, by its public names."""

from collections.abc import Callable

import paec_kernels as pk
from benchmarks.implementations import STATISTICS, Implementation, Outputs
from benchmarks.workload import TOP_P, Inputs
from paec_kernels.train.algorithms import NO_NUCLEUS

SMALL_CHUNK_ROWS = 128
NO_NUCLEUS_GIVES = ("logp", "entropy", "margin")


def outputs(stats: pk.TokenStats, names: tuple[str, ...] = STATISTICS) -> Outputs:
    return {name: getattr(stats, name) for name in names}


def token_stats() -> Callable[[Inputs], Outputs]:
    return lambda inputs: outputs(pk.token_stats(inputs.rows, inputs.token_ids, top_p=TOP_P))


def in_place() -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        logits = inputs.rows.view_as(inputs.rows)  # no copy, and no leaf, which would be refused; a model's are none
        return outputs(pk.token_stats(logits, inputs.token_ids, top_p=TOP_P, inplace_backward=True))

    return run


def without_nucleus() -> Callable[[Inputs], Outputs]:
    return lambda inputs: outputs(pk.token_stats(inputs.rows, inputs.token_ids, top_p=NO_NUCLEUS), NO_NUCLEUS_GIVES)


def by_chunks(chunk_rows: int | None) -> Callable[[], Callable[[Inputs], Outputs]]:
    def run(inputs: Inputs) -> Outputs:
        stats = pk.linear_token_stats(inputs.rows, inputs.head, inputs.token_ids, top_p=TOP_P, chunk_rows=chunk_rows)
        return outputs(stats)

    return lambda: run


def whole_logits() -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        logits = inputs.rows @ inputs.head.T
        return outputs(pk.token_stats(logits, inputs.token_ids, top_p=TOP_P, inplace_backward=True))

    return run


IMPLEMENTATIONS = (
    Implementation("token_stats", "paec_kernels.token_stats", token_stats, exact=True),
    Implementation(
        "token_stats in place",
        "paec_kernels.token_stats(inplace_backward=True)",
        in_place,
        exact=True,
        overwrites=True,
    ),
    Implementation(
        "token_stats, no nucleus",
        f"paec_kernels.token_stats(top_p={NO_NUCLEUS})",
        without_nucleus,
        NO_NUCLEUS_GIVES,
        ("logp", "entropy"),
        exact=True,
        note="the same operator where the first token is nucleus enough: what the nucleus itself costs",
    ),
    Implementation(
        "linear_token_stats",
        "paec_kernels.linear_token_stats",
        by_chunks(None),
        linear=True,
        exact=True,
    ),
    Implementation(
        "linear_token_stats, small chunks",
        f"paec_kernels.linear_token_stats(chunk_rows={SMALL_CHUNK_ROWS})",
        by_chunks(SMALL_CHUNK_ROWS),
        linear=True,
        exact=True,
    ),
    Implementation(
        "matmul, token_stats in place",
        "hidden @ head.T, paec_kernels.token_stats(inplace_backward=True)",
        whole_logits,
        linear=True,
        exact=True,
    ),
)
