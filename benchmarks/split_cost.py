"""What statistics of a vocabulary split over ranks should cost, by bytes and latencies: arithmetic, no measurement.

python -m benchmarks.split_cost
"""

from dataclasses import dataclass

from benchmarks.evidence.tables import table_header, table_line
from paec_kernels.ops.split_rows import CUTS

ROWS, VOCAB_SIZE, RANKS = 4096, 151_936, 8
FLOAT = 4  # bytes
# Numbers a row that the ranks add up or take the largest of, and in how many collectives.
SUMS, SUMS_IN = 7, 3  # largest logit, capped too; Z, S, the token's logit and ties; second largest logit
MEMBERS, MEMBERS_IN = 5, 2  # of the nucleus: mass, moment and counts; its threshold
AGREEMENT = 1  # collective in which the ranks tell that they mean the same rows, some 100 bytes in all
ROUNDS = {"16 bits": 8, "float32": 16}  # of the search, at most: two bits of a key each
READ_BANDWIDTH = 0.85 * 3.35e12  # bytes a second, of an H100's memory


@dataclass(frozen=True)
class Link:
    """A link between ranks, as assumed: what a small all-reduce takes, and bytes a second of a large one."""

    name: str
    latency: float  # seconds
    bandwidth: float


LINKS = (Link("NVLink, one node", 15e-6, 360e9), Link("InfiniBand, a rank a node", 40e-6, 45e9))


def ring_bytes(numbers: int, ranks: int = RANKS) -> float:
    """Return the bytes that a rank sends for each row when a ring adds up so many float32 numbers."""
    return 2 * (ranks - 1) / ranks * FLOAT * numbers


def numbers_of(rounds: int) -> int:
    """Return how many numbers a row are added up with a nucleus that takes so many rounds."""
    return SUMS + CUTS * rounds + MEMBERS


def collectives_of(rounds: int) -> int:
    return AGREEMENT + SUMS_IN + rounds + MEMBERS_IN


def seconds_of_ranks(link: Link, rounds: int) -> float:
    return collectives_of(rounds) * link.latency + ROWS * ring_bytes(numbers_of(rounds)) / link.bandwidth


def seconds_of_gathering(link: Link, itemsize: int) -> float:
    """Return what it takes to send every rank all logits instead."""
    return link.latency + ROWS * (RANKS - 1) / RANKS * VOCAB_SIZE * itemsize / link.bandwidth


def table() -> list[str]:
    """Return the table, in Markdown; milliseconds for ROWS tokens."""
    lines = [*table_header(["logits, link", "bytes a token", "collectives", "ranks", "reads", "gathering instead"])]
    for (dtype, rounds), itemsize in zip(ROUNDS.items(), (2, 4), strict=True):
        reads = (2 + rounds) * ROWS * VOCAB_SIZE / RANKS * itemsize / READ_BANDWIDTH
        for link in LINKS:
            times = seconds_of_ranks(link, rounds), reads, seconds_of_gathering(link, itemsize)
            counts = f"{ring_bytes(numbers_of(rounds)):.0f}", str(collectives_of(rounds))
            cells = [f"{dtype}, {link.name}", *counts, *(f"{1e3 * x:.2f} ms" for x in times)]
            lines.append(table_line(cells))
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
