"""Liger's GRPO losses: of logits, and fused with the head."""

from collections.abc import Callable

import torch

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import ADVANTAGE, CLIP_HIGH, CLIP_LOW, Inputs

PACKAGE = ("liger-kernel", "liger_kernel")
SEQUENCES = 8  # of equal length, where they divide the tokens; the fused form takes one at a time


def grpo_loss() -> Callable[[Inputs], Outputs]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(inputs: Inputs) -> Outputs:
        # Its logits hold one position more than there are tokens: the last row has none.
        loss, _, _ = triton_grpo_loss(
            inputs.rows[None],
            inputs.old_logp[None, :-1].contiguous(),
            None,
            inputs.token_ids[None, :-1].contiguous(),
            torch.full((1,), ADVANTAGE, device=inputs.rows.device),
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP_LOW,
            eps_high=CLIP_HIGH,
        )
        return {"policy_loss": loss[0]}

    return run


def fused_linear_grpo() -> Callable[[Inputs], Outputs]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_fn = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, temperature=1.0
    )

    def run(inputs: Inputs) -> Outputs:
        n = len(inputs.rows)
        shape = (SEQUENCES, n // SEQUENCES) if n % SEQUENCES == 0 else (1, n)
        loss, _ = loss_fn(
            inputs.rows.view(*shape, -1),
            inputs.head,
            inputs.token_ids.view(shape),
            inputs.valid.view(shape).float(),
            torch.full(shape[:1], ADVANTAGE, device=inputs.rows.device),
            old_per_token_logps=inputs.old_logp.view(shape),
        )
        return {"mean_policy_loss": loss}

    return run


IMPLEMENTATIONS = (
    Implementation(
        "Liger, GRPO loss",
        "liger_kernel.transformers.grpo_loss.triton_grpo_loss",
        grpo_loss,
        (),
        ("policy_loss",),
        package=PACKAGE,
        on=("cuda",),
        overwrites=True,
        note="GRPO's loss of each token; logp stays inside",
    ),
    Implementation(
        "Liger, fused linear GRPO",
        "liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss",
        fused_linear_grpo,
        (),
        ("mean_policy_loss",),
        linear=True,
        package=PACKAGE,
        gradient_in_forward=True,
        compiled=True,
        note="GRPO's mean loss alone; logp stays inside",
    ),
)
