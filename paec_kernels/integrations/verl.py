"""PAEC in verl's PPO and GRPO trainer (verl 0.9, the actor on FSDP or FSDP2): a configuration class, and its worker.

Importing this module makes verl's actor worker `PAECTrainingWorker`, which does nothing else until the configuration
asks for PAEC. It must be imported wherever verl runs, Ray's workers included. Any of these does that:

- the entry point ``verl.plugins`` that this package installs,
- the environment variable ``VERL_USE_EXTERNAL_MODULES=paec_kernels.integrations.verl``,
- the configuration itself, whose ``_target_`` is in this module.

So a failure to load cannot pass unseen: verl hides that of an entry point, but not that of a ``_target_``, and without
the ``_target_`` the keys ``paec`` are refused.

    actor_rollout_ref.actor.policy_loss._target_=paec_kernels.integrations.verl.PAECPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.paec.beta=0.01
"""

import os
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from paec_kernels.extras import extra
from paec_kernels.integrations.common import (
    STATE_NAME,
    loss_scale,
    numbers,
    read_state,
    save_state,
    sources_of_noise,
)
from paec_kernels.losses.paec import PAEC, Plan
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.ops.operator import token_stats
from paec_kernels.types import TokenStats

with extra("verl"):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.fs import copy_to_local
    from verl.utils.metric import AggregationType, Metric
    from verl.utils.ulysses import ulysses_pad_and_slice_inputs
    from verl.workers.config import PolicyLossConfig
    from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
    from verl.workers.utils.padding import no_padding_2_padding

REMEDY = (
    "Resume from another checkpoint of a run with PAEC, by trainer.resume_mode=resume_path and resume_from_path; to "
    "start PAEC from these weights, pass them as the model."
)
MICRO_BATCH_SIZES = ("micro_batch_size_per_gpu", "max_token_len_per_gpu")
# verl's engine then calls the loss with the logits, and computes nothing from them itself.
LOGITS_TO_THE_LOSS = {"distillation_use_topk": True, "distillation_only": True, "calculate_entropy": False}


@dataclass
class PAECPolicyLossConfig(PolicyLossConfig):
    """verl's ``actor.policy_loss`` and, under ``paec``, fields of ``PAECConfig``; those left out keep their defaults.

    Any ``loss_mode`` goes with PAEC, which adds its term to it.

    ``steps_per_batch`` is needed by ``paec.anchor_unit=rollout_batch``: how many optimiser steps the trainer takes
    on a batch, data.train_batch_size / actor.ppo_mini_batch_size * actor.ppo_epochs. The worker is not told the first.

    Raises:
        TypeError, ValueError: as ``PAECConfig``.
    """

    paec: dict[str, Any] = field(default_factory=dict)
    steps_per_batch: int | None = None

    def __post_init__(self) -> None:
        self.paec_config()

    def paec_config(self) -> PAECConfig:
        config = PAECConfig(**self.paec)
        if config.anchored != "mean":
            raise ValueError(
                "paec.anchored must be 'mean' in verl, whose trainer keeps of the reference pass the log-probabilities "
                f"alone, got {config.anchored!r}"
            )
        return config


class PAECTrainingWorker(TrainingWorker):
    """verl's actor worker with PAEC's term in the loss, exact over all micro-batches and ranks of an optimiser step.

    Each ``train_batch``, which is one optimiser step, starts with a forward pass without gradients over all its
    micro-batches, from which threshold and mean come. In both passes verl's engine hands over the logits, as it does
    for distillation, and the statistics, the log-probabilities and the entropy of the policy loss come from one call
    of ``token_stats``; its backward pass writes over the logits, so no second tensor of their size exists. Where verl
    has no flash-attn, it rounds the old log-probabilities to the logits' dtype, and these are more exact.

    Metrics are in verl's log as ``actor/paec/...``; entropies in nats. The anchor is in each of the actor's
    checkpoints, in the file ``paec.pt``.

    ``paec`` is the ``PAEC`` module, or None if the configuration does not ask for it: this is verl's worker then.
    """

    paec: PAEC | None = None

    def set_loss_fn(self, loss_fn: Any) -> None:
        """Set the policy loss. verl's own carries the actor's configuration; a later one keeps PAEC as it is.

        Raises:
            ValueError: an engine that does not offer its logits, noise in the model, or an ``anchor_unit`` of
            rollout_batch without ``steps_per_batch``.
        """
        options = getattr(loss_fn, "keywords", {})
        policy_loss = getattr(options.get("config"), "policy_loss", None)
        if isinstance(policy_loss, PAECPolicyLossConfig):
            self._refuse_what_cannot_work(distillation=options.get("distillation_config") is not None)
            self.paec = PAEC(
                policy_loss.paec_config(),
                self.engine.get_data_parallel_group(),
                steps_per_batch=policy_loss.steps_per_batch,
            )
        super().set_loss_fn(loss_fn if self.paec is None else _LossWithPAEC(loss_fn, self.paec))

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        if self.paec is None:
            return super().train_batch(data)
        tu.assign_non_tensor(data, **LOGITS_TO_THE_LOSS)
        scan = data.copy()  # infer_batch writes into it, and would split it for scoring instead of training
        sizes = {key: getattr(self.engine_config, key) for key in MICRO_BATCH_SIZES if key not in data}
        tu.assign_non_tensor(scan, compute_loss=True, **sizes)
        self.loss_fn.start_step()
        self.infer_batch(scan)
        self.loss_fn.make_plan()
        # verl leaves the optimiser's step out where a gradient is not finite, and the anchor stays then as it was.
        scaler, steps = getattr(self.engine, "scaler", None), []
        scale = loss_scale(scaler)
        hook = self.engine.optimizer.register_step_post_hook(lambda *arguments: steps.append(arguments))
        try:
            output = super().train_batch(data)
        finally:
            hook.remove()
        skipped = not steps or loss_scale(scaler) < scale
        if not skipped:
            self.paec.step()
        if output is not None:
            tu.get(output, "metrics")["paec/step_skipped"] = float(skipped)
        return output

    def save_checkpoint(self, local_path: str, *args: Any, **options: Any) -> None:
        super().save_checkpoint(local_path, *args, **options)
        if self.paec is not None and local_path is not None:
            # Every rank writes the same, since a checkpoint may lie on each node's own disk.
            save_state(self.paec, local_path)

    def load_checkpoint(self, local_path: str, *args: Any, **options: Any) -> None:
        """Load verl's checkpoint and PAEC's state of it.

        Raises:
            FileNotFoundError, UnreadableFileError: PAEC's state is missing or damaged; nothing is loaded then.
            RuntimeError: it is of another config; nothing is loaded then.
        """
        if self.paec is None or local_path is None:
            super().load_checkpoint(local_path, *args, **options)
            return
        state = read_state(self.paec, copy_to_local(os.path.join(local_path, STATE_NAME)), REMEDY)
        super().load_checkpoint(local_path, *args, **options)
        self.paec.load_state_dict(state)

    def _refuse_what_cannot_work(self, distillation: bool) -> None:
        config = self.engine_config
        if config.strategy not in ("fsdp", "fsdp2"):
            reason = f"needs actor.strategy fsdp or fsdp2, got {config.strategy!r}"
        elif config.use_fused_kernels:
            reason = "needs use_fused_kernels=False: verl's fused kernels leave no logits"
        elif config.pad_to_length:
            reason = "needs pad_to_length=False: verl offers no logits of padded batches"
        elif distillation:
            reason = "cannot be combined with distillation, which takes the logits for itself"
        elif noise := sources_of_noise(self.engine.module):
            reason = f"needs a model without noise, since it sees each token twice, got {', '.join(noise)}"
        else:
            return
        raise ValueError(f"PAEC {reason}")


class _LossWithPAEC:
    """What verl's engine calls twice for each micro-batch: with the logits, and with what came of them, for the loss.

    Before the plan is made, micro-batches are only observed.
    """

    def __init__(self, loss_fn: Any, paec: PAEC) -> None:
        self.loss_fn = loss_fn
        self.paec = paec
        self.plan: Plan | None = None
        self.metrics: dict[str, float] = {}

    def start_step(self) -> None:
        self.plan = None
        self.paec.forget()  # a pass that failed may have left some of its micro-batches

    def make_plan(self) -> None:
        self.plan = self.paec.plan()
        self.metrics = {f"paec/{name}": value for name, value in numbers(self.plan, self.paec).items()}

    def __call__(
        self,
        model_output: Any = None,
        data: Any = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        if student_logits is not None:
            return self._statistics(student_logits, data)
        stats = TokenStats(*(no_padding_2_padding(model_output[f"paec_{name}"], data) for name in TokenStats._fields))
        valid = data.select("response_mask").to_padded_tensor()["response_mask"].bool()  # [B, T], as stats
        if self.plan is None:
            self.paec.observe(stats, valid)
            return stats.entropy.new_zeros(()), {}
        loss, metrics = self.loss_fn(model_output=model_output, data=data, dp_group=dp_group)
        metrics |= Metric.from_dict(self.metrics, AggregationType.MEAN)
        # A share of the whole step's term; shares add up over micro-batches, and ranks are averaged, as in verl.
        return loss + self.paec.term(stats, valid, self.plan), metrics

    def _statistics(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Compute statistics ``[1, N]`` of packed logits ``[1, N, V]``, which verl has divided by the temperature."""
        token_ids = data["input_ids"].values().roll(-1)[None]  # of what each row predicts; the last row is not used
        sp_size = tu.get_non_tensor_data(data, "sp_size", default=1)
        if sp_size > 1:  # Ulysses: this rank has a part of the logits, and verl gathers what comes of them
            token_ids = ulysses_pad_and_slice_inputs(token_ids, sp_size=sp_size)[0]
        stats = token_stats(logits, token_ids, top_p=self.paec.config.top_p, inplace_backward=True)
        named = {f"paec_{name}": value for name, value in stats._asdict().items()}
        return named | {"log_probs": stats.logp, "entropy": stats.entropy}


# verl's own hook for another worker; a subclass of ActorRolloutRefWorker that sets it, as Tinker's, is left alone.
ActorRolloutRefWorker.actor_worker_cls = PAECTrainingWorker
