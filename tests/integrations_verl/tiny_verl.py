"""verl's actor worker on a tiny random Llama; a module of its own, so that spawned processes can import it."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from paec_kernels import PAECConfig, reference
from paec_kernels.integrations.verl import PAECPolicyLossConfig, PAECTrainingWorker

VOCABULARY = 48
TEMPERATURE = 0.8
PROMPT, RESPONSE = 4, 10  # longest
MICRO_BATCH = 2
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
# The first step sets the anchor; from the second on the floor is above it, so that the penalty acts.
PAEC = {"beta": 0.1, "anchor_steps": 1, "rho_min": 1.2}


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).save_pretrained(folder)


def start_process_group(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")


def worker(
    folder: Path,
    policy_loss: PolicyLossConfig | None = None,
    kind: type[TrainingWorker] = PAECTrainingWorker,
    loss_fn=ppo_loss,
    override: dict | None = None,
    model: dict | None = None,
    actor: dict | None = None,
    optimizer: dict | None = None,
    **engine,
) -> TrainingWorker:
    """As ActorRolloutRefWorker.init_model makes it."""
    defaults = {"mixed_precision": FP32, "use_torch_compile": False, "strategy": "fsdp2"}
    defaults |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": MICRO_BATCH, "infer_micro_batch_size_per_gpu": 3}
    model_config = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        override_config={"attn_implementation": "eager"} | (override or {}),
        **{"use_remove_padding": False} | (model or {}),
    )
    engine_config = FSDPEngineConfig(**defaults | engine)
    actor_config = FSDPActorConfig(
        strategy=engine_config.strategy,
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=MICRO_BATCH,
        policy_loss=PAECPolicyLossConfig(paec=PAEC) if policy_loss is None else policy_loss,
        fsdp_config=engine_config,
        **actor or {},
    )
    made = kind(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=FSDPOptimizerConfig(
                lr=1e-2, total_training_steps=10, lr_warmup_steps=0, clip_grad=1e9, weight_decay=0.0, **optimizer or {}
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    made.set_loss_fn(partial(loss_fn, config=actor_config))
    return made


class Sequences(NamedTuple):
    """``[B, PROMPT + RESPONSE]``, prompts padded on the left and responses on the right, as verl has them."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor  # [B, RESPONSE]; not all of the response is the policy's: tools answer in between
    advantages: Tensor  # [B, RESPONSE]
    old_log_probs: Tensor  # [B, RESPONSE]


def sequences(n: int, seed: int, advantage: float = 1.0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (n, PROMPT + RESPONSE), generator=generator)
    prompts = torch.randint(1, PROMPT + 1, (n, 1), generator=generator)
    responses = torch.randint(1, RESPONSE + 1, (n, 1), generator=generator)
    prompt_mask = torch.arange(PROMPT) >= PROMPT - prompts
    response_mask = torch.arange(RESPONSE) < responses
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1).long()
    tool = torch.rand(n, RESPONSE, generator=generator) < 0.2
    tool[:, 0] = False
    advantages = advantage * torch.randn(n, 1, generator=generator) * response_mask
    old_log_probs = -3 + torch.rand(n, RESPONSE, generator=generator)
    return Sequences(input_ids * attention_mask, attention_mask, response_mask & ~tool, advantages, old_log_probs)


def batch(rows: Sequences, ranks: int = 1, **flags) -> TensorDict:
    """As the trainer's _update_actor makes it of an optimiser step's rows on this rank."""
    columns = {
        "input_ids": rows.input_ids,
        "prompts": rows.input_ids[:, :PROMPT],
        "responses": rows.input_ids[:, PROMPT:],
        "attention_mask": rows.attention_mask,
        "position_ids": (rows.attention_mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": rows.response_mask.long(),
        "advantages": rows.advantages,
        "old_log_probs": rows.old_log_probs,
    }
    data = left_right_2_no_padding(TensorDict(columns, batch_size=len(rows.input_ids)))
    n = len(rows.input_ids) * ranks
    defaults = {"temperature": TEMPERATURE, "global_batch_size": n, "calculate_entropy": False, "compute_loss": True}
    tu.assign_non_tensor(data, **defaults | flags)
    return data


class Step(NamedTuple):
    """An optimiser step of a worker: weights before it, gradients as the optimiser gets them, verl's metrics."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def take(worker: TrainingWorker, data: TensorDict) -> Step:
    """Runs ``train_batch`` as train_mini_batch does, and reads metrics as it does."""
    module = worker.engine.module
    gradients: dict[str, Tensor] = {}
    optimizer_step = worker.engine.optimizer_step

    def recorded() -> float:
        gradients.update({name: whole(value.grad) for name, value in module.named_parameters() if value.requires_grad})
        return optimizer_step()

    worker.engine.optimizer_step = recorded
    weights = {name: whole(value) for name, value in module.state_dict().items()}
    metrics = tu.get(worker.train_batch(data), "metrics")
    del worker.engine.optimizer_step
    # a list of one for each rank, or a number
    values = {name: Metric.aggregate_dp(v) if isinstance(v, list) else v for name, v in metrics.items()}
    return Step(weights, gradients, values)


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


class Truth(NamedTuple):
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    thresholds: list[float]  # of each micro-batch by itself


def truth(
    folder: Path, micro_batches: list[Sequences], weights: dict[str, Tensor], config: PAECConfig, anchor: float | None
) -> Truth:
    """PAEC's loss of all micro-batches together, by the reference alone, in float64 from the logits on."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.load_state_dict(weights)
    stats = []
    for rows in micro_batches:
        positions = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(rows.input_ids, attention_mask=rows.attention_mask, position_ids=positions).logits
        logits = logits[:, PROMPT - 1 : -1].double()[rows.response_mask]
        stats.append(reference.token_stats(logits, top_p=config.top_p, temperature=TEMPERATURE)._replace(logp=None))
    together = reference.TokenStats(None, *(torch.cat(values) for values in list(zip(*stats, strict=True))[1:]))
    every = torch.ones_like(together.entropy, dtype=torch.bool)
    loss, _, metrics = reference.paec_loss(together, every, config, anchor)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    alone = [reference.position_score(one, config) for one in stats]
    return Truth(
        {name: value.item() for name, value in {**metrics, "loss": loss}.items()},
        dict(zip(names, gradients, strict=True)),
        [reference.soft_mask(score, torch.ones_like(score).bool(), config)[1].item() for score in alone],
    )
