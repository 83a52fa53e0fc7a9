"""What each process of `test_verl_ranks` runs; a module of its own, so that spawned processes can import it."""

from pathlib import Path

import torch

RANKS = 2
STEPS = 3
MICRO_BATCHES = 3  # of each rank


def run(rank: int, port: int, folder: str) -> None:
    """Train without a policy gradient, and write to ``folder/rank`` the steps of this rank."""
    torch.set_num_threads(1)
    from integrations_verl import tiny_verl

    tiny_verl.start_process_group(rank, RANKS, port)
    worker = tiny_verl.worker(Path(folder) / "model")
    rows = MICRO_BATCHES * tiny_verl.MICRO_BATCH
    steps = []
    for i in range(STEPS):
        sequences = tiny_verl.sequences(rows, seed=10 * i + rank, advantage=0.0)
        step = tiny_verl.take(worker, tiny_verl.batch(sequences, RANKS, global_token_num=None))
        steps.append((tuple(sequences), *step))
    torch.save(steps, Path(folder) / str(rank))
    torch.distributed.destroy_process_group()
