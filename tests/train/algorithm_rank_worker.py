"""What each process of `test_algorithms` runs; a module of its own, so that spawned processes can import it."""

import torch
import torch.distributed as dist
from train.steps import OPTIONS, PIECES, make_answers, run_step, started

PIECES_OF_RANK = [PIECES[:3], PIECES[3:]]


def run(rank: int, world_size: int, folder: str) -> None:
    """Write to ``folder/rank`` what each algorithm makes of this rank's micro-batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    answers = make_answers()
    outcomes = []
    for options in OPTIONS:
        pieces = [answers.piece(*piece) for piece in PIECES_OF_RANK[rank]]
        outcomes.append(tuple(run_step(started(options), pieces)))
    torch.save(outcomes, f"{folder}/{rank}")
    dist.destroy_process_group()
