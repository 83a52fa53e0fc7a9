"""What each process of `test_verl_ranks` runs; a module of its own, so that spawned processes can import it."""

from pathlib import Path
from types import SimpleNamespace

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


def hand_over_in_parts(rank: int, port: int, folder: str) -> None:
    """Ulysses: two ranks share the packed tokens of a batch. Write what verl gathered, and the gradient of its sum.

    The model's own forward pass needs flash-attn there; its logits are made up here.
    """
    torch.set_num_threads(1)
    from integrations_verl import tiny_verl

    from paec_kernels.integrations.verl import LOGITS_TO_THE_LOSS
    from paec_kernels.losses.ranks import world_size

    tiny_verl.start_process_group(rank, RANKS, port)
    worker = tiny_verl.worker(
        Path(folder) / "model", ulysses_sequence_parallel_size=RANKS, model={"use_remove_padding": True}
    )
    data = tiny_verl.batch(tiny_verl.sequences(5, seed=1), **LOGITS_TO_THE_LOSS, sp_size=RANKS)
    n = data["input_ids"].values().numel()
    share = -(-n // RANKS)
    logits = torch.randn(RANKS * share, tiny_verl.VOCABULARY, generator=torch.Generator().manual_seed(3))
    part = logits[rank * share : (rank + 1) * share].requires_grad_()
    with worker.engine.train_mode():
        _, output_args = worker.engine.prepare_model_inputs(data)
        output = worker.engine.prepare_model_outputs(
            SimpleNamespace(logits=part[None] * 1), output_args, data, worker.loss_fn
        )
        (output["log_probs"].values().sum() + output["paec_entropy"].values().sum()).backward()
    saved = {name: value.values().detach() for name, value in output.items()}
    saved["ranks of a step"] = torch.tensor(world_size(worker.paec.process_group))
    saved |= {"token_ids": data["input_ids"].values().roll(-1), "logits": logits[:n].detach(), "gradient": part.grad}
    torch.save(saved, Path(folder) / f"part{rank}")
    torch.distributed.destroy_process_group()
