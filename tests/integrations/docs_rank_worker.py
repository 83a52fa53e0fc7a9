"""What each process of `test_docs` runs, in a module of its own, so that spawned processes can import it."""

import gc
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import paec_kernels as pk

PAGE = Path(__file__).parents[2] / "docs" / "in_your_trainer.md"
B, L, V, D = 4, 12, 50, 8
RANKS = 2
STEPS = 2
# The first step sets the anchor; in the second the floor is above it, so that the penalty acts.
ON = pk.PAECConfig(beta=1.0, anchor_steps=1, rho_min=1.2)


def page() -> dict[str, Any]:
    """The names that the page's code defines, in one namespace."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False))


def ragged_batches(number: int) -> list[SimpleNamespace]:
    """Micro-batches of which each has more tokens than the one before."""
    torch.manual_seed(1)
    made = []
    for k in range(number):
        input_ids = torch.randint(V, (B, L))
        valid = torch.rand(B, L - 1) < (k + 1) / (number + 1)
        with torch.no_grad():
            old_logp = pk.token_stats(tiny_model()(input_ids)[:, :-1], input_ids[:, 1:], valid=valid).logp
        made.append(SimpleNamespace(input_ids=input_ids, valid=valid, advantages=torch.randn(B), old_logp=old_logp))
    return made


def run(rank: int, port: int, library: str, folder: str) -> None:
    """Take the page's steps with this rank's half of the micro-batches; write what came of it to ``folder/rank``."""
    torch.set_num_threads(1)
    # As torchrun sets them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(trained(rank, library, Path(folder) / "checkpoint"), Path(folder) / str(rank))
    # DistributedDataParallel must go first: the last to let go of gloo's threads can wait for them for ever.
    gc.collect()
    torch.distributed.destroy_process_group()


def trained(rank: int, library: str, path: Path) -> dict[str, Any]:
    """Weights, number of tokens, and the anchor's sum before it was saved and after it was loaded."""
    names = page()
    paec = names["paec"] = pk.PAEC(ON)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    micro_batches = ragged_batches(4)[2 * rank : 2 * rank + 2]
    if library == "accelerate":
        from accelerate import Accelerator

        ranks = Accelerator(cpu=True)
        model, optimizer = ranks.prepare(model, optimizer)
        ranks.register_for_checkpointing(paec)
        step, save, load = names["accelerate_step"], ranks.save_state, ranks.load_state
    else:
        from lightning_fabric import Fabric

        ranks = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
        ranks.launch()
        model, optimizer = ranks.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer, "paec": paec}
        step, save, load = names["fabric_step"], partial(ranks.save, state=state), partial(ranks.load, state=state)
    for _ in range(STEPS):
        step(ranks, model, micro_batches, optimizer)
    weights = [value.detach().clone() for value in model.parameters()]
    anchors = [paec.anchor_sum.clone()]
    save(str(path))
    torch.distributed.barrier()  # the first rank has written
    paec.load_state_dict(pk.PAEC(ON).state_dict())
    load(str(path))
    anchors.append(paec.anchor_sum)
    return {"weights": weights, "tokens": names["tokens_per_rank"](micro_batches), "anchors": anchors}
