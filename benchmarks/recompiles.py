"""What a new shape compiles: graphs of `torch.compile`, and variants of Triton's kernels. No GPU is needed.

    python -m benchmarks.recompiles                           # a table
    python -m benchmarks.recompiles --out FILE                # as JSON
    python -m benchmarks.recompiles --entries token_stats     # of the graphs, only these entry points'

Triton is given a GPU that only says what it is: every launch goes as far as the key under which its kernel would be
compiled, and nothing runs. What the kernels "compute" here is memory that nobody has written, on which shapes, graphs
and keys do not depend. Needs TRITON_INTERPRET unset.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import paec_kernels as pk
from benchmarks.provenance import provenance
from paec_kernels.ops import operator

V, D = 48, 16
# Answers and their length. Every N and T is new, and none is 0 or 1, for which Dynamo compiles a graph of its own.
DOZEN = [(4, 16), (5, 33), (7, 64), (8, 127), (16, 13), (3, 5), (2, 8), (6, 40), (9, 21), (12, 2), (2, 100), (31, 3)]
UP_TO_TWELVE = [(1, length) for length in range(13)]
SHAPES = {"a dozen": DOZEN, "lengths from 0 to 12": UP_TO_TWELVE}
ALL = [*DOZEN, *UP_TO_TWELVE[1:], (2, 1), (64, 1), (1, 1000)]
VOCABULARIES = (151_936, 50_260, 50_257)  # multiples of 16, of 4, and of 1


class AnyGPU:
    """What `triton.runtime.driver` asks of a device before a kernel is compiled for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launches:
    """Watches Triton's launches: by kernel, the keys under which it would be compiled, and the grids."""

    def __init__(self) -> None:
        self.keys: dict[str, set[str]] = {}
        self.grids: dict[str, set[tuple[int, ...]]] = {}

    def __enter__(self) -> "Launches":
        triton.runtime.driver.set_active(AnyGPU())
        triton.knobs.runtime.jit_cache_hook = self._compiles
        self._run, JITFunction.run = JITFunction.run, self._watched(JITFunction.run)
        self._interpreted, operator.INTERPRETED = operator.INTERPRETED, True  # its kernels take CPU tensors
        return self

    def __exit__(self, *_: Any) -> None:
        operator.INTERPRETED = self._interpreted
        JITFunction.run = self._run
        triton.knobs.runtime.jit_cache_hook = None

    def _compiles(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.keys.setdefault(fn.name.split(".")[-1], set()).add(key)
        return True  # nothing is to be compiled

    def _watched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(function: JITFunction, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
            self.grids.setdefault(function.__name__, set()).add(grid)
            return run(function, *args, grid=grid, **options)

        return watched


class Entry(NamedTuple):
    """An entry point: what makes a step of a backend, and what makes its arguments of (answers, length)."""

    step: Callable[[str], Callable[..., Tensor]]
    arguments: Callable[[int, int], tuple]


def _tokens(b: int, t: int) -> tuple[Tensor, Tensor]:
    return torch.randint(V, (b, t)), torch.rand(b, t) < 0.8


def _logits(b: int, t: int) -> tuple:
    return torch.randn(b, t, V, requires_grad=True), *_tokens(b, t)


def _hidden(b: int, t: int) -> tuple:
    return torch.randn(b, t, D, requires_grad=True), torch.randn(V, D, requires_grad=True), *_tokens(b, t)


def _stats(b: int, t: int) -> tuple:
    logp, entropy, nucleus_entropy = (torch.rand(b, t, requires_grad=True) for _ in range(3))
    size = torch.randint(1, 9, (b, t), dtype=torch.int32)
    return pk.TokenStats(logp, entropy, nucleus_entropy, torch.rand(b, t), torch.rand(b, t), size), _tokens(b, t)[1]


def _stats_and_accuracy(b: int, t: int) -> tuple:
    return *_stats(b, t), torch.rand(b, 1)


def _logp(b: int, t: int) -> tuple:
    return torch.randn(b, t, requires_grad=True), torch.randn(b, t), torch.randn(b, 1), _tokens(b, t)[1]


def _whole_batch(b: int, t: int) -> tuple:
    logits, token_ids, valid = _logits(b, t)
    return logits, token_ids, torch.randn(b, 1), valid, torch.randn(b, t)


def _mixed(stats: pk.TokenStats) -> Tensor:
    return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()


def _token_stats(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda z, ids, valid: _mixed(pk.token_stats(1.0 * z, ids, valid=valid, backend=backend, **options))


def _linear(backend: str) -> Callable[..., Tensor]:
    return lambda h, w, ids, valid: _mixed(pk.linear_token_stats(h, w, ids, valid=valid, backend=backend))


def _one_pass(backend: str) -> Callable[..., Tensor]:
    return lambda h, w, ids, valid: pk.one_pass_loss(h, w, ids, lambda s, _: _mixed(s), valid=valid, backend=backend)


def _drop_in(backend: str) -> Callable[..., Tensor]:
    loss_fn = pk.PAECLoss(pk.PAECConfig(), backend=backend)

    def step(*arguments: Tensor) -> Tensor:
        loss = loss_fn(*arguments).loss
        loss_fn.step()
        return loss

    return step


def _whole_step(backend: str) -> Callable[..., Tensor]:
    paec = pk.PAEC(pk.PAECConfig(), backend=backend)

    def step(stats: pk.TokenStats, valid: Tensor) -> Tensor:
        loss = paec(stats, valid).loss
        paec.step()
        return loss

    return step


def _four_calls(make: Callable[[str], Any]) -> Callable[[str], Callable[..., Tensor]]:
    def of_backend(backend: str) -> Callable[..., Tensor]:
        term = make(backend)

        def step(stats: pk.TokenStats, valid: Tensor, accuracy: Tensor) -> Tensor:
            term.observe(stats, valid)
            loss = term.term(stats, valid, term.plan(), accuracy)
            term.step()
            return loss

        return step

    return of_backend


def _policy(loss: Callable[..., tuple[Tensor, Any]]) -> Callable[[str], Callable[..., Tensor]]:
    return lambda _: lambda *arguments: loss(*arguments)[0]


ENTRIES = {
    "token_stats": Entry(_token_stats, _logits),
    "token_stats, in place": Entry(lambda backend: _token_stats(backend, inplace_backward=True), _logits),
    "linear_token_stats": Entry(_linear, _hidden),
    "one_pass_loss": Entry(_one_pass, _hidden),
    "PAECLoss": Entry(_drop_in, _whole_batch),
    "PAEC": Entry(_whole_step, _stats),
    "PAEC, observe to step": Entry(
        _four_calls(lambda backend: pk.PAEC(pk.PAECConfig(), backend=backend)), _stats_and_accuracy
    ),
}
# Those that have no kernels of their own, and so one backend.
ENTRIES_IN_TORCH = {
    "grpo_loss": Entry(_policy(pk.grpo_loss), _logp),
    "cispo_loss": Entry(_policy(pk.cispo_loss), _logp),
    "clip_cov_loss": Entry(_policy(pk.clip_cov_loss), lambda b, t: (*_logp(b, t), torch.rand(b, t) < 0.1)),
    "kl_cov_loss": Entry(_policy(pk.kl_cov_loss), lambda b, t: (*_logp(b, t), torch.rand(b, t) < 0.1)),
    "group_advantages": Entry(lambda _: pk.group_advantages, lambda b, t: (torch.randn(b, t, requires_grad=True),)),
    "GlobalEntropy": Entry(_four_calls(lambda _: pk.GlobalEntropy()), _stats_and_accuracy),
    "AER": Entry(_four_calls(lambda _: pk.AER()), _stats_and_accuracy),
    "SIREN": Entry(_four_calls(lambda _: pk.SIREN()), _stats_and_accuracy),
}
EVERY_ENTRY = ENTRIES | ENTRIES_IN_TORCH


def graphs(entry: Entry, backend: str, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Count what each shape, forward and backward, makes `torch.compile` compile as a user calls it."""
    made = {"forward": 0, "backward": 0}

    def compiler(name: str) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
            made[name] += 1
            return make_boxed_func(graph.forward)

        return compile_graph

    torch._dynamo.reset()
    counters.clear()
    backend_of_graphs = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    compiled = torch.compile(entry.step(backend), backend=backend_of_graphs)
    found: dict[str, list[int]] = {"forward": [], "backward": []}
    for shape in shapes:
        before = dict(made)
        compiled(*entry.arguments(*shape)).sum().backward()
        for name, counts in found.items():
            counts.append(made[name] - before[name])
    return {**found, "graph_breaks": bool(counters["graph_break"])}


def variants(vocabulary: int, sliced: bool, softcap: float | None) -> dict[str, int]:
    """Count the variants of each kernel that steps of ALL shapes compile, without `torch.compile`.

    Args:
        sliced: logits are ``[:, :-1]`` and token ids and the mask ``[:, 1:]`` of tensors one longer, as in a trainer.
    """
    more = int(sliced)
    with Launches() as launches:
        for b, t in ALL:
            logits = torch.empty(b, t + more, vocabulary, dtype=torch.bfloat16, requires_grad=True)
            token_ids, valid = torch.zeros(b, t + more, dtype=torch.int64), torch.ones(b, t + more, dtype=torch.bool)
            token_ids, valid = token_ids[:, more:], valid[:, more:]
            stats = pk.token_stats(logits[:, :t], token_ids, valid=valid, softcap=softcap, backend="triton")
            out = pk.PAEC(pk.PAECConfig(), backend="triton")(stats, valid)
            (out.loss + stats.logp.sum()).backward()
    return {name: len(keys) for name, keys in launches.keys.items()}


def linear_variants(vocabulary: int) -> dict[str, int]:
    """Count the same of the linear form, in chunks of some rows forward and of some columns backward."""
    weight = torch.randn(vocabulary, D, requires_grad=True)
    with Launches() as launches:
        for b, t in ALL:
            hidden = torch.randn(b, t, D, requires_grad=True)
            token_ids, valid = torch.zeros(b, t, dtype=torch.int64), torch.ones(b, t, dtype=torch.bool)
            for rows in (None, valid):
                stats = pk.linear_token_stats(hidden, weight, token_ids, valid=rows, chunk_rows=40, backend="triton")
                stats.entropy.sum().backward()
    return {name: len(keys) for name, keys in launches.keys.items()}


def grids() -> dict[str, list[int]]:
    """Find the grids that 70,000 rows are launched on, more than a GPU's second axis takes."""
    logits = torch.zeros(1, 16, dtype=torch.bfloat16).expand(70_000, 16).requires_grad_()
    with Launches() as launches:
        stats = pk.token_stats(logits, backend="triton")
        pk.PAEC(pk.PAECConfig(), backend="triton")(stats, torch.ones(70_000, dtype=torch.bool)).loss.backward()
    return {name: list(grid) for name, found in launches.grids.items() for grid in found}


def report(names: list[str]) -> dict[str, Any]:
    with Launches():
        rows = [
            {"entry": name, "backend": backend, "shapes": shapes} | graphs(EVERY_ENTRY[name], backend, SHAPES[shapes])
            for name in names
            for backend in (("torch", "triton") if name in ENTRIES else ("torch",))
            for shapes in SHAPES
        ]
    return {
        "provenance": provenance(),
        "shapes": SHAPES,
        "graphs": rows,
        "variants": [
            {"vocabulary": vocabulary, "sliced": sliced, "softcap": softcap}
            | {"shapes": len(ALL), "kernels": variants(vocabulary, sliced, softcap)}
            for vocabulary in VOCABULARIES
            for sliced in (False, True)
            for softcap in (None, 30.0)
        ],
        "linear_variants": {vocabulary: linear_variants(vocabulary) for vocabulary in (4096, 1001)},
        "grids": grids(),
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    for row in result["graphs"]:
        breaks = ", graph breaks" if row["graph_breaks"] else ""
        yield f"{row['entry']} ({row['backend']}): {row['forward']} forward, {row['backward']} backward{breaks}"
    for row in result["variants"]:
        yield " ".join(f"{name}={value}" for name, value in row.items())
    yield f"linear form: {result['linear_variants']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write JSON to this file in place of a table to the terminal")
    parser.add_argument("--entries", nargs="+", choices=EVERY_ENTRY, default=list(EVERY_ENTRY), metavar="NAME")
    arguments = parser.parse_args()
    result = report(arguments.entries)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1)
        arguments.out.write_text(re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    else:
        print(*table(result), sep="\n")


if __name__ == "__main__":
    main()
