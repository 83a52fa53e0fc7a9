"""A tiny random model, tokenizer and task for TRL's trainers; a module of its own, so that processes can import it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from paec_kernels import reference
from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer
from paec_kernels.losses.paec_config import PAECConfig

PAEC_OFF = {"paec_beta": 0.0, "paec_lam": 0.0}
# The first step sets the anchor; from the second on the floor is above it, so that the penalty acts.
PAEC_ON = {"paec_beta": 0.1, "paec_anchor_steps": 1, "paec_rho_min": 1.2}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz012"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, **sizes | {"initializer_range": 0.3, "eos_token_id": 1} | options)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 5, 9, 13]  # several, so that completions differ in length
    return model


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": ["a b c", "d", "e f", "g h i j", "k l", "m", "n o p", "q r"]})


def vowels(completion_ids: list[list[int]], **_) -> list[float]:
    """A reward that differs between the completions of a group."""
    return [sum(token % 5 == 3 for token in ids) / len(ids) for ids in completion_ids]


def constant(completion_ids: list[list[int]], **_) -> list[float]:
    """Advantages of 0: no policy gradient."""
    return [1.0] * len(completion_ids)


def config(folder: Path, kind: type[GRPOConfig] = PAECGRPOConfig, **options) -> GRPOConfig:
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
    }
    return kind(str(folder), **defaults | options)


def trainer(
    folder: Path,
    *,
    stock: bool = False,
    kind: type[GRPOTrainer] = PAECGRPOTrainer,
    model=None,
    reward=vowels,
    callbacks=(),
    peft_config=None,
    eval_dataset=None,
    **options,
) -> GRPOTrainer:
    return (GRPOTrainer if stock else kind)(
        model=llama() if model is None else model,
        reward_funcs=reward,
        args=config(folder, GRPOConfig if stock else PAECGRPOConfig, **options),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
        eval_dataset=eval_dataset,
    )


def logged(run: GRPOTrainer, key: str) -> list[float]:
    return [row[key] for row in run.state.log_history if row.get(key) is not None]


class Piece(NamedTuple):
    """A micro-batch of one rank."""

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor
    completion_ids: Tensor  # [B, T]
    completion_mask: Tensor


class Step(NamedTuple):
    """What a rank saw and did in an optimiser step; gradients as the optimiser gets them."""

    pieces: list[Piece]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Recorder(TrainerCallback):
    """Keeps every optimiser step of ``run``, which is set once it is constructed."""

    def __init__(self) -> None:
        self.run: GRPOTrainer
        self.steps: list[Step] = []

    def on_pre_optimizer_step(self, args, state, control, **_):
        accumulated, generated = args.gradient_accumulation_steps, args.steps_per_generation
        batches = [self.run._buffered_inputs[(self.run._step - k) % generated] for k in range(accumulated, 0, -1)]
        pieces = [Piece(*(batch[name].clone() for name in Piece._fields)) for batch in batches]
        model = self.run.accelerator.unwrap_model(self.run.model)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
        self.steps.append(Step(pieces, weights, gradients))


def recorded(folder: Path, **options) -> tuple[GRPOTrainer, list[Step]]:
    """A trainer that does not clip gradients, and the optimiser steps that it will have taken."""
    recorder = Recorder()
    recorder.run = trainer(folder, callbacks=[recorder], max_grad_norm=0.0, **options)
    return recorder.run, recorder.steps


class Truth(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def truth(
    pieces: list[Piece],
    weights: dict[str, Tensor],
    config: PAECConfig,
    anchor: float | None,
    *,
    temperature: float = 1.0,
    model: nn.Module | None = None,
    bfloat16: bool = False,
    counted: Callable[[Tensor], Tensor] = lambda position: position >= 0,
    anchor_weights: dict[str, Tensor] | None = None,
) -> Truth:
    """PAEC's loss of all pieces together from whole logits, by the reference alone, in float64 from the logits on.

    Args:
        model: whose forward makes the logits, in float32 or under autocast, as in training.
        counted: which positions ``[T]`` of a completion count.
        anchor_weights: of the anchor policy.
    """
    model = llama() if model is None else model

    def stats_under(weights: dict[str, Tensor]) -> reference.TokenStats:
        model.load_state_dict(weights)
        stats = []
        for piece in pieces:
            ids = torch.cat([piece.prompt_ids, piece.completion_ids], 1)
            mask = torch.cat([piece.prompt_mask, piece.completion_mask], 1)
            with torch.autocast("cpu", enabled=bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits[:, -piece.completion_ids.shape[1] - 1 : -1]
            counts = piece.completion_mask.bool() & counted(torch.arange(piece.completion_ids.shape[1]))
            stats.append(reference.token_stats(logits.double()[counts], top_p=config.top_p, temperature=temperature))
        return reference.TokenStats(None, *(torch.cat(values) for values in list(zip(*stats, strict=True))[1:]))

    with torch.no_grad():
        anchor_stats = None if anchor_weights is None else stats_under(anchor_weights)
    whole = stats_under(weights)
    valid = torch.ones_like(whole.entropy, dtype=torch.bool)
    loss, _, metrics = reference.paec_loss(whole, valid, config, anchor, anchor_stats)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return Truth(loss.detach(), metrics, dict(zip(parameters, gradients, strict=True)))


def truths(steps: list[Step], config: PAECConfig, **options) -> list[Truth]:
    """The truth of every step, the first of which sets the anchor; its weights are those of the anchor policy."""
    found: list[Truth] = []
    if config.anchored != "mean":
        options["anchor_weights"] = steps[0].weights
    for step in steps:
        anchor = found[0].metrics["mean_entropy"].item() if found else None
        found.append(truth(step.pieces, step.weights, config, anchor, **options))
    return found
