"""Optimiser steps that mixed precision skips for a gradient that is not finite."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
from integrations.tiny_trl import PAEC_ON, logged, trainer
from torch import Tensor
from transformers import TrainerCallback

from paec_kernels.integrations.trl import PAECGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of options that TRL sets

SKIPPED = 1  # of five steps


class Overflow(TrainerCallback):
    """Makes a gradient infinite before one optimiser step, and keeps what there is after each."""

    def __init__(self) -> None:
        self.run: PAECGRPOTrainer
        self.states: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == SKIPPED:
            next(self.run.model.parameters()).grad[0] = math.inf

    def on_step_end(self, args, state, control, **_):
        tensors = self.run.model.state_dict() | {"sum": self.run.paec.anchor_sum, "count": self.run.paec.anchor_count}
        self.states.append({name: value.clone() for name, value in tensors.items()})


# A fused optimiser, transformers' default, is called and skips by itself; another is not called.
@pytest.mark.parametrize(("micro_batches", "optim"), [(1, "adamw_torch_fused"), (2, "adamw_torch")])
def test_a_skipped_step_leaves_the_anchor_as_it_was(micro_batches: int, optim: str, tmp_path: Path) -> None:
    overflow = Overflow()
    options = PAEC_ON | {"paec_anchor_steps": 3, "max_steps": 5, "max_grad_norm": 0.0, "optim": optim}
    run = trainer(tmp_path, callbacks=[overflow], gradient_accumulation_steps=micro_batches, **options)
    overflow.run = run
    # As for fp16, which accelerate does not offer on a CPU: everything below is its own.
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.train()
    assert run.accelerator.scaler.get_scale() == 2.0**9  # it found the overflow

    before, after, next_one = overflow.states[SKIPPED - 1 : SKIPPED + 2]
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not torch.equal(next_one["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert [state["count"].item() for state in overflow.states] == [1, 1, 2, 3, 3]
    assert logged(run, "paec/step_skipped") == [0.0, 1.0, 0.0, 0.0, 0.0]
    entropies = logged(run, "paec/mean_entropy")
    anchor = (entropies[0] + entropies[2] + entropies[3]) / 3
    assert logged(run, "paec/anchor") == [pytest.approx(anchor, rel=1e-6)]
    assert logged(run, "paec/floor")[:4] == [0.0] * 4
