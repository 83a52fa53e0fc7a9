"""PAEC in TRL's GRPOTrainer (trl 1.16): another trainer class and another config class, nothing else to change.

TRL scores tokens in a forward of its own that ends in a kernel: hidden states and head in, log-probabilities and
entropies out. Here `linear_token_stats` stands where that kernel stood. It gives the nucleus statistics by the same
call, and everything around it (vision inputs, MoE's auxiliary loss, soft-caps, adapters, sharded heads) stays TRL's.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from paec_kernels.ops.linear import backward_node, linear_token_stats
from paec_kernels.saved_state import read_json
from paec_kernels.types import TokenStats

with extra("trl"):
    from transformers import TrainerCallback
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import get_last_checkpoint
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

KERNEL_NAMES = ("_ChunkedLogProbFunction", "_use_triton")  # globals that TRL's forward reads
REMEDY = (
    "Resume from another checkpoint of PAECGRPOTrainer, an earlier one or one saved without save_only_model; to start "
    "PAEC from these weights, pass them as the model."
)
SCORING_INPUTS = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters.keys()


def _option(name: str, text: str) -> Any:
    return field(default=getattr(PAECConfig, name), metadata={"help": f"PAEC: {text}"})


@dataclass
class PAECGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig with the fields of ``PAECConfig``, each under the prefix ``paec_``.

    ``beta``, ``top_p`` and ``temperature`` remain TRL's: weight of the KL term, sampling, and the temperature at
    which PAEC's statistics are taken, too. With another ``paec_anchored`` than ``"mean"`` the reference model of the KL
    term is the anchor policy, so that ``beta`` must not be 0; it must stay as it is, without ``sync_ref_model``.

    Raises:
        TypeError, ValueError: as ``PAECConfig``.
    """

    paec_top_p: float = _option("top_p", "probability mass of the nucleus, in (0, 1].")
    paec_nucleus_norm: str = _option(
        "nucleus_norm", "what divides the nucleus entropy: 'log_size', 'log_vocab' or 'none'."
    )
    paec_alpha: float = _option("alpha", "weight of the nucleus entropy in the score, in [0, 1].")
    paec_tau_c: float = _option("tau_c", "scale of the top-two competition, in nats, > 0.")
    paec_rho: float = _option("rho", "quantile of the scores at which the soft mask is 1/2, in [0, 1].")
    paec_tau_m: float = _option("tau_m", "width of the soft mask, in units of the score, > 0.")
    paec_beta: float = _option("beta", "weight of the masked mean entropy, a bonus, >= 0.")
    paec_lam: float = _option("lam", "weight of the penalty, or gain of the integral one, >= 0.")
    paec_rho_min: float = _option("rho_min", "entropy floor as a fraction of the anchor, >= 0.")
    paec_anchored: str = _option("anchored", "what the anchor is: 'mean', 'scores' or 'positions'; see beta.")
    paec_anchor_steps: int = _option("anchor_steps", "steps averaged into the anchor, >= 1.")
    paec_entropy_support: str = _option("entropy_support", "whose entropy is kept up: 'full' or 'nucleus'.")
    paec_penalty: str = _option("penalty", "the penalty's form: 'absolute', 'relative', 'proportional' or 'integral'.")
    paec_anchor_unit: str = _option("anchor_unit", "what the anchor's steps are: 'optimiser_step' or 'rollout_batch'.")
    paec_vocab_size: int | None = _option("vocab_size", "vocabulary size, for nucleus_norm 'log_vocab'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paec_config()

    def paec_config(self) -> PAECConfig:
        config = PAECConfig(**{option.name: getattr(self, f"paec_{option.name}") for option in fields(PAECConfig)})
        if config.anchored != "mean":
            why = f"with paec_anchored={config.anchored!r}, whose anchor policy is the KL term's reference model"
            if self.beta == 0:
                raise ValueError(f"beta must not be 0 {why}, got {self.beta!r}")
            if self.sync_ref_model:  # the floor would follow a collapse
                raise ValueError(f"sync_ref_model must be False {why}, got True")
        return config


class PAECGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with PAEC's term in the loss, exact over all micro-batches and ranks of an optimiser step.

    With one micro-batch a step, PAEC's threshold and mean come from the training forward itself. With several they
    come from a forward pass without gradients over all of them first, except in the step after generation where TRL
    has just computed the old log-probabilities: that pass has seen the same tokens with the same weights.

    ``paec`` is the ``PAEC`` module. Its metrics are in the trainer's log as ``paec/...``, once for each optimiser
    step; entropies in nats. A step that mixed precision skips leaves the anchor as it was; ``paec/step_skipped`` is the
    share of these. Its anchor is in each checkpoint, in the file ``paec.pt``. Evaluation is TRL's, without
    the term.

    Args:
        args: a ``PAECGRPOConfig``, by default one of a folder by the model's name with ``-PAEC``; this and everything
            else as in GRPOTrainer.
    Raises:
        TypeError: ``args`` is something else.
        ValueError: several micro-batches a step with dropout or other noise on, since two passes would then see
            different scores; with ``steps_per_generation`` not a multiple of ``gradient_accumulation_steps``, since
            later micro-batches would not be generated yet; or a model whose forward is not TRL's.
        RuntimeError: ``train`` once more after it was left within an optimiser step, by an exception; or from a
            checkpoint of another PAEC config.
        FileNotFoundError, UnreadableFileError: ``train`` from a checkpoint without PAEC's state or the trainer's, or
            with a damaged one.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **options: Any) -> None:
        if args is None:  # as GRPOTrainer, whose own run of this model is in a folder by its own name
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PAECGRPOConfig(f"{model_name.split('/')[-1]}-PAEC")
        if not isinstance(args, PAECGRPOConfig):
            raise TypeError(
                f"args must be a PAECGRPOConfig, which is a GRPOConfig with PAEC's options, got {args!r:.60}"
            )
        if args.steps_per_generation % args.gradient_accumulation_steps != 0:
            raise ValueError(
                f"steps_per_generation must be a multiple of gradient_accumulation_steps, so that all tokens of an "
                f"optimiser step exist when it starts, got {args.steps_per_generation} and "
                f"{args.gradient_accumulation_steps}"
            )
        super().__init__(model, reward_funcs, args, *others, **options)
        if args.gradient_accumulation_steps > 1:
            _refuse_noise(self.model, args)
        micro_batches = self.args.steps_per_generation * self.num_iterations  # on a batch of rollouts
        steps_per_batch = micro_batches // args.gradient_accumulation_steps
        self.paec = PAEC(args.paec_config(), steps_per_batch=steps_per_batch)
        self._within_step = False
        self._plan: Plan | None = None  # of the optimiser step under way
        self._scored: list[tuple[Tensor, TokenStats]] = []  # log-probs and statistics of the last passes
        self._head = _Head(args.paec_top_p)
        causal_lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        causal_lm.forward = _with_head(causal_lm.forward, self._head)
        self._anchored_by_policy = self.paec.config.anchored != "mean"
        if self._anchored_by_policy and self.ref_model is not None:  # without one it is the model without its adapter
            reference = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
            # Without accelerate's autocast around it: TRL scores under its own.
            forward = vars(reference).get("_original_forward", reference.forward)
            reference.forward = _with_head(forward, self._head)
        self.add_callback(_EndOfStep(self))

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *others, **options):
        result = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *others, **options
        )
        if model is not self.ref_model or self._anchored_by_policy:
            scored = attention_mask[:, -logits_to_keep:].bool()
            self._scored.append((result[0], self._head.take(scored)))
        return result

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        passes = {"paec_": output.get("old_per_token_logps")}
        if self._anchored_by_policy:
            passes["paec_anchor_"] = output["ref_per_token_logps"]
        for logps, stats in self._scored:
            for prefix, of_pass in passes.items():
                if logps is of_pass:  # the two may have gone through the same model, with its adapter and without
                    output |= {f"{prefix}{name}": value for name, value in stats._asdict().items()}
        self._scored.clear()
        return output

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._plan is None and self.current_gradient_accumulation_steps > 1:
            generated: Any = self._buffered_inputs
            for k in range(self.current_gradient_accumulation_steps):
                batch = generated[(self._step + k) % self.args.steps_per_generation]
                anchor_stats = _kept_stats(batch, "paec_anchor_")
                self.paec.observe(self._stats_of(batch), _valid(batch), anchor_stats=anchor_stats)
            self._plan = self._new_plan()
        return inputs

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        _, stats = self._scored.pop()
        if not self.model.training:
            return loss
        valid, anchor_stats = _valid(inputs), _kept_stats(inputs, "paec_anchor_")
        if self._plan is None:  # one micro-batch is the whole step
            self.paec.observe(stats, valid, anchor_stats=anchor_stats)
            self._plan = self._new_plan()
        return loss + self.paec.term(stats, valid, self._plan, anchor_stats=anchor_stats)

    def train(self, resume_from_checkpoint=None, *args, **options):
        if self._within_step:
            raise RuntimeError(
                "train() was left within an optimiser step, of which PAEC has seen tokens that no step will take; "
                "construct the trainer again, and resume_from_checkpoint=True goes on from its last checkpoint"
            )
        last = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if last else resume_from_checkpoint
        if checkpoint:  # refused before the weights are loaded
            read_state(self.paec, Path(checkpoint) / STATE_NAME, REMEDY)
            # Written last: a run that was killed may leave it cut off, and its own reader does not name it.
            read_json(Path(checkpoint) / TRAINER_STATE_NAME, "the state of a trainer", REMEDY)
        return super().train(resume_from_checkpoint, *args, **options)

    def training_step(self, *args, **options):
        self._within_step = True
        return super().training_step(*args, **options)

    def _end_of_step(self, scale: float) -> None:
        """Commit the step to the anchor, unless mixed precision found an overflow and the optimiser left it out.

        Args:
            scale: the gradient scaler's before the step.
        """
        skipped = self.accelerator.optimizer_step_was_skipped or loss_scale(self.accelerator.scaler) < scale
        self._metrics["train"]["paec/step_skipped"].append(float(skipped))
        if not skipped:
            self.paec.step()
        self._plan = None
        self._within_step = False

    def _save_optimizer_and_scheduler(self, output_dir):
        # Written before trainer_state.json, whose absence marks a checkpoint as incomplete.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(self.paec, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.paec.load_state_dict(read_state(self.paec, Path(checkpoint) / STATE_NAME, REMEDY))

    def _stats_of(self, batch: dict[str, Any]) -> TokenStats:
        """Return the statistics ``[B, T]`` of a micro-batch's completions by the present weights, without a graph."""
        just_generated = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if just_generated and (stats := _kept_stats(batch, "paec_")):
            return stats
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                **{name: batch[name] for name in SCORING_INPUTS if name in batch},
            )
        return self._scored.pop()[1]

    def _new_plan(self) -> Plan:
        """Plan over what was observed, and put the plan's numbers into the trainer's log."""
        plan = self.paec.plan()
        for name, value in numbers(plan, self.paec).items():
            self._metrics["train"][f"paec/{name}"].append(value)
        return plan


class _EndOfStep(TrainerCallback):
    """Tells the trainer when the optimiser has taken its step, or has left it out."""

    def __init__(self, trainer: PAECGRPOTrainer) -> None:
        self.trainer = trainer
        self.scale = 1.0

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.scale = loss_scale(self.trainer.accelerator.scaler)

    def on_optimizer_step(self, args, state, control, **_):
        self.trainer._end_of_step(self.scale)


class _Head:
    """Takes the place of TRL's kernel, and keeps everything that `linear_token_stats` returns."""

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p
        self.pieces: list[TokenStats] = []

    @torch.compiler.disable  # keeps statistics and hooks on the graph, which a compiled forward cannot
    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, Tensor, None, None, None]:
        """Score tokens with the arguments and the result of TRL's kernel: ``hidden [N, D]`` in, ``[N]`` each out."""
        stats = linear_token_stats(
            hidden,
            weight.to(hidden.dtype),
            token_ids,
            bias=None if bias is None else bias.to(hidden.dtype),
            top_p=self.top_p,
            # TRL's x = softcap * tanh(scale * z / softcap) / temperature, the scale folded into the other two
            temperature=temperature / logit_scale,
            softcap=None if softcap is None else softcap / logit_scale,
        )
        _gather_in_backward(stats, weight, bias)
        self.pieces.append(stats)
        return stats.logp, stats.entropy, None, None, None

    def take(self, scored: Tensor) -> TokenStats:
        """Lay the statistics kept since the last call out where ``scored [B, T]`` is True, with 0 elsewhere."""
        if not self.pieces:
            raise RuntimeError("no statistics: model.forward was replaced after PAECGRPOTrainer was constructed")
        pieces, self.pieces = self.pieces, []
        flat = (torch.cat(values) for values in zip(*pieces, strict=True))
        return TokenStats(*(values.new_zeros(scored.shape).masked_scatter(scored, values) for values in flat))


def _with_head(forward: Callable, head: _Head) -> types.MethodType:
    """Return TRL's scoring forward with its kernel replaced by ``head``: the same code, with other globals.

    The second global makes it hand over only the tokens to be scored, as TRL does on a GPU.
    """
    function = getattr(forward, "__func__", None)
    names = function.__code__.co_names if isinstance(function, types.FunctionType) else ()
    if function is None or not set(KERNEL_NAMES) <= set(names):
        raise ValueError(
            "model.forward must be the scoring forward of trl 1.16, which PAEC's statistics come from, got "
            f"{forward!r}: another trl version, or a fused loss that replaces the forward"
        )
    replaced = dict(zip(KERNEL_NAMES, (head, lambda device: True), strict=True))
    copy = types.FunctionType(
        function.__code__.replace(),  # of its own, by which torch.compile keeps what it compiled
        function.__globals__ | replaced,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(functools.update_wrapper(copy, function), forward.__self__)  # type: ignore[attr-defined]


def _gather_in_backward(stats: TokenStats, *parameters: Any) -> None:
    """Gather the head around the node that recomputes its logits, since DeepSpeed ZeRO-3 has split it again by then.

    Without ZeRO-3 TRL's context, and so this, is a no-op.
    """
    node = backward_node(stats)
    if node is None:
        return
    contexts = []

    def gather(gradients):
        contexts.append(maybe_gather_lm_head_ctx(*parameters))
        contexts[-1].__enter__()

    def release(inputs, outputs):
        contexts.pop().__exit__(None, None, None)

    node.register_prehook(gather)
    node.register_hook(release)


def _kept_stats(batch: dict[str, Any], prefix: str) -> TokenStats | None:
    """Return the statistics ``[B, T]`` that were put beside the completions when they were generated, if any were."""
    if f"{prefix}entropy" not in batch:
        return None
    return TokenStats(*(batch[f"{prefix}{name}"] for name in TokenStats._fields))


def _valid(batch: dict[str, Any]) -> Tensor:
    """Tell where TRL's loss counts a token, bool ``[B, T]``."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def _refuse_noise(model: nn.Module, args: PAECGRPOConfig) -> None:
    noise = [] if args.neftune_noise_alpha is None else [f"neftune_noise_alpha={args.neftune_noise_alpha}"]
    noise += sources_of_noise(model)
    if noise:
        raise ValueError(
            "the model must be without noise where gradient_accumulation_steps > 1, since PAEC's threshold then comes "
            f"from a pass of its own; set disable_dropout=True, or these to 0: {', '.join(noise[:4])}"
            + (f" and {len(noise) - 4} more" if len(noise) > 4 else "")
        )
