"""Seconds that the kernels should take on an H100 and an H200, by each limit of the device, from their machine code.

    python -m benchmarks.compiled_code --model                                      # compile, count, print the table
    python -m benchmarks.compiled_code --model --out bench_results/predictions.json     # and write it down

A device of S multiprocessors (SMs) holds S B programs of a kernel at a time, a wave. A program has W warps and takes
I = outside + rounds x round + search instructions a thread. A wave of P programs takes at least, by

    bytes      the bytes that they read, and backward writes, / bandwidth of a copy
    issue      ceil(P / S) W I / (ISSUED x SCHEDULERS a clock): of the SM that has most of them
    ex2        ceil(P / S) elements / (EX2 a clock)
    in flight  what one program takes alone: Little's law, since P programs keep P times a program's bytes in flight.
               It waits SERIAL_LOADS latencies and computes at ALONE clocks an instruction. A round waits for its
               loads, latency x their bytes / those in flight, then computes; where it loads rounds ahead, at once.

and so many times that as there are waves. Together:

    prediction = full waves x the largest limit of one + the largest limit of the last wave + LAUNCHES x LAUNCH

The tail is what this is above the largest limit of all waves: a last wave that does not fill the device takes more
than its share. What is left of a row after whole rounds counts as a round. The shortest way through a kernel is
counted: rows that read lanes again, or the whole row, take more. Caches are taken to be cold.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

# What is predicted, and what the sweep measures on a GPU.
VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 201_088, 262_144)
ROWS = (64, 512, 4096, 16_384)
SIZES = {"bf16": 2, "fp32": 4}  # bytes
TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
# The rows' implementation and pass that measure a kernel.
MEASURED_AS = {
    "forward": ("token_stats", "forward"),
    "backward": ("token_stats", "backward"),
    "backward, no nucleus": ("token_stats, no nucleus", "backward"),
}
# Of an SM of compute capability 9.0, from the CUDA programming guide and NVIDIA's description of the H100.
SCHEDULERS = 4  # each issues one warp instruction a clock
EX2 = 16  # a clock
REGISTERS = 65_536  # given out to a warp by 8 a thread
WARPS = 64
PROGRAMS = 32
SHARED = 228 << 10  # bytes, of which each program takes 1 KiB more than it asks for
WARP = 32

# Assumptions [ours].
ISSUED = 0.9  # of the clocks, those in which a scheduler that has enough warps issues
LATENCY = 800  # clocks, of memory under load
ALONE = 2  # clocks an instruction of a warp that waits for its own results
# Each waiting for the one before: token id, the row's first block, the first round; statistics, their gradients.
SERIAL_LOADS = {"forward": 3, "backward": 2}
LAUNCH = 2e-6  # seconds, of a kernel however small
# With the small kernels around ours: temperature, a flag and its assertion; the stack of the three gradients.
LAUNCHES = {"forward": 4, "backward": 2}
# Mean rounds of the nucleus' search, counted in Triton's interpreter over 96 rows of the benchmarks' real logits, of
# which 15 that read lanes or the row again are left out; tests/ops/test_compiled_code.py counts a third.
SEARCH_ROUNDS = {"bf16": 4.7, "fp32": 5.7}


@dataclass(frozen=True)
class Device:
    """A device; its name is part of what PyTorch calls it. Seconds, bytes.

    Attributes:
        clock: under load [ours]; NVIDIA's data sheet has a boost of 1.98 GHz.
        bandwidth: of a device copy, as reported; the data sheets have 3.35 and 4.8 TB/s.
    """

    name: str
    sms: int
    clock: float
    bandwidth: float


DEVICES = (Device("H100", 132, 1.755e9, 3.0e12), Device("H200", 132, 1.755e9, 4.3e12))


@dataclass(frozen=True)
class Counts:
    """What is read from a compiled kernel; instructions are of one thread.

    Attributes:
        kernel: "forward", "backward", or "backward, no nucleus" where that entropy has no gradient.
        registers: of a thread. shared: bytes of a program.
        columns: of a row that a program works on; None where it is all of them.
        elements: of a thread in a round of the loop.
        round, outside, search: instructions in a round, in a program outside its loops, in a round of the search.
        in_flight: bytes of loads that a thread waits for at a time.
        ahead: whether a round's loads are issued rounds before.
    """

    kernel: str
    dtype: str
    threads: int
    registers: int
    shared: int
    columns: int | None
    elements: int
    round: int
    outside: int
    search: int
    in_flight: int
    ahead: bool

    @property
    def direction(self) -> str:
        return self.kernel.split(",")[0]

    @property
    def blocks(self) -> int:
        """Count the programs that an SM holds at a time."""
        warps = self.threads // WARP
        by_registers = REGISTERS // (WARP * 8 * math.ceil(self.registers / 8)) // SCHEDULERS * SCHEDULERS // warps
        return min(by_registers, WARPS // warps, PROGRAMS, SHARED // (self.shared + 1024))


def limits(counts: Counts, device: Device, columns: float, rounds: float, programs: int) -> dict[str, float]:
    """Compute the seconds of a wave of programs, each of so many columns in so many rounds, by each limit."""
    size = SIZES[counts.dtype]
    moved = {"forward": 1, "backward": 2}[counts.direction] * columns * size
    search = SEARCH_ROUNDS[counts.dtype] * counts.search
    instructions = (counts.outside + search + rounds * counts.round) * counts.threads / WARP
    waiting, computing = LATENCY * counts.elements * size / counts.in_flight, ALONE * counts.round
    a_round = max(waiting, computing) if counts.ahead else waiting + computing
    alone = LATENCY * SERIAL_LOADS[counts.direction] + ALONE * (counts.outside + search) + rounds * a_round
    busiest = math.ceil(programs / device.sms)
    return {
        "bytes": programs * moved / device.bandwidth,
        "issue": busiest * instructions / (ISSUED * SCHEDULERS * device.clock),
        "ex2": busiest * rounds * counts.elements * counts.threads / (EX2 * device.clock),
        "in flight": alone / device.clock,
    }


def predict(counts: Counts, device: Device, n: int, v: int) -> dict[str, Any]:
    """Predict seconds by each limit and of all together, the limit that binds, and the share of a copy's bandwidth."""
    of_a_row = math.ceil(v / (counts.columns or v))
    rounds = math.ceil(v / (counts.threads * counts.elements))
    of_a_wave = device.sms * counts.blocks
    full, rest = divmod(n * of_a_row, of_a_wave)
    wave, last = (limits(counts, device, v / of_a_row, rounds / of_a_row, programs) for programs in (of_a_wave, rest))
    if full:
        times = {name: (full + rest / of_a_wave) * t for name, t in wave.items()}
    else:
        times = last
    limit = max(times, key=times.__getitem__)
    working = full * max(wave.values()) + (max(last.values()) if rest else 0.0)
    launch = LAUNCHES[counts.direction] * LAUNCH
    share = times["bytes"] / (working + launch)
    seconds = times | {"tail": max(working - times[limit], 0.0), "launch": launch, "seconds": working + launch}
    return {
        "device": device.name, "kernel": counts.kernel, "dtype": counts.dtype, "n": n, "v": v,
        "limit": limit if working > launch else "launch", "share": round(share, 3),
    } | {name: float(f"{t:.3g}") for name, t in seconds.items()}  # fmt: skip


def record(every: list[Counts], provenance: dict[str, str]) -> dict[str, Any]:
    """Collect all that is written down before a measurement."""
    return {
        "provenance": provenance,
        "counts": [asdict(counts) for counts in every],
        "predictions": [predict(c, device, n, v) for device, c, v, n in product(DEVICES, every, VOCABULARIES, ROWS)],
    }


def text(found: dict[str, Any]) -> str:
    """Write JSON, a prediction a line."""
    head = json.dumps({name: part for name, part in found.items() if name != "predictions"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(p)}" for p in found["predictions"])
    return f'{head[:-2]},\n "predictions": [\n{lines}\n ]\n}}\n'


def table(found: dict[str, Any]) -> Iterator[str]:
    """Write what was counted, and the times in microseconds."""
    for counts in (Counts(**c) for c in found["counts"]):
        yield (
            f"{counts.kernel}, {counts.dtype}: {counts.round / counts.elements:.2f} instructions an element in the "
            f"loop, {counts.outside:,} outside, {counts.search:,} in a round of the search; {counts.registers} "
            f"registers, {counts.shared:,} bytes of shared memory: {counts.blocks} programs of {counts.threads} "
            f"threads an SM, {counts.blocks * counts.threads * counts.in_flight / 1024:.0f} KiB in flight"
        )
    names = ("bytes", "issue", "ex2", "in flight", "tail", "launch", "seconds")
    heading = None
    for p in found["predictions"]:
        if heading != (p["device"], p["kernel"], p["dtype"]):
            heading = (p["device"], p["kernel"], p["dtype"])
            columns = "".join(f"{name.replace('seconds', 'all'):>11}" for name in names)
            yield from ("", f"{', '.join(heading)}; microseconds", f"{'V':>8}{'N':>8}{columns}  limit")
        times = "".join(f"{1e6 * p[name]:>11,.1f}" for name in names)
        yield f"{p['v']:>8,}{p['n']:>8,}{times}  {p['limit']}, {100 * p['share']:.0f} % of a copy's bandwidth"
