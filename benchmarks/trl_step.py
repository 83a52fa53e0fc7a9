"""An optimiser step of PAECGRPOTrainer beside the stock GRPOTrainer's, on SmolLM2-135M and without generation.

A step here is forward and backward of its micro-batches: answers that were generated once, the same for both, and a
learning rate of 0. With one micro-batch PAEC needs no pass of its own; with two it makes one before. PAEC's loss less
its term must be the stock loss.

On a GPU the stock trainer scores the answers alone, as PAEC does anywhere. Left to itself on a CPU it scores the
prompts, too; that is not what to compare with, so here it scores the answers alone on both.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import smollm2
from benchmarks.parts import Part
from benchmarks.rows import Row
from benchmarks.step import Step, rows_in_turns
from benchmarks.workload import Case
from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.tasks.by_name import load_tasks

ANSWERS = 2  # of each micro-batch
MAX_NEW_TOKENS = 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the loss, absolute: without PAEC's term it is near 0


def step_rows(part: Part, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Yield a row for each trainer, with one micro-batch and with two; the stock one is the anchor of the ratios."""
    policy = smollm2.policy(part.case.device)
    model = copy.deepcopy(policy.module.model).to(part.case.dtype)
    model.is_quantized = False  # its file is, its weights were dequantised
    for micro_batches in (1, 2):
        on_step("answers")
        stock, ours = trainers(part.case, model, policy.tokenizer, micro_batches)
        expected = stock_step(stock)
        error = abs(take_step(ours) - ours._metrics["train"]["paec/loss"][-1] - expected)
        steps = {
            "GRPOTrainer": Step("trl.GRPOTrainer", partial(stock_step, stock), 0.0),
            "PAECGRPOTrainer": Step("paec_kernels.integrations.trl.PAECGRPOTrainer", partial(take_step, ours), error),
        }
        tokens = sum(int(batch["completion_mask"].sum()) for batch in stock._buffered_inputs)
        kind = f"{part.case.kind}, micro-batches: {micro_batches}"
        counted = replace(part, case=replace(part.case, n=tokens, v=len(policy.head), kind=kind))
        yield from rows_in_turns(counted, steps, TOLERANCE[part.case.dtype], on_step)


def trainers(
    case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, micro_batches: int
) -> tuple[GRPOTrainer, PAECGRPOTrainer]:
    """Make both; each has made its first step, so that all is set up, and holds the stock one's answers."""
    (task, *_), _ = load_tasks(PRESETS["smollm2"].tasks)
    prompts = [{"prompt": [{"role": "user", "content": task.train_problem(place).prompt}]} for place in range(4)]
    made = []
    for trainer, config in ((GRPOTrainer, GRPOConfig), (PAECGRPOTrainer, PAECGRPOConfig)):
        with tempfile.TemporaryDirectory() as folder:
            options = config(
                folder, use_cpu=case.device == "cpu", bf16=case.dtype == torch.bfloat16, report_to="none",
                disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, optim="sgd", learning_rate=0.0,
                per_device_train_batch_size=ANSWERS, gradient_accumulation_steps=micro_batches,
                num_generations=ANSWERS, max_completion_length=MAX_NEW_TOKENS, max_steps=1,
                num_iterations=1000,  # the answers are kept for all turns
            )  # fmt: skip
            one = trainer(
                model=copy.deepcopy(model),
                reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
                args=options,
                train_dataset=Dataset.from_list(prompts),
                processing_class=tokenizer,
            )
            one.remove_callback(PrinterCallback)
            one.train()
            made.append(one)
    made[1]._buffered_inputs = made[0]._buffered_inputs
    return made[0], made[1]


def stock_step(trainer: GRPOTrainer) -> float:
    """Take a step that scores the answers alone, and return its loss."""
    with patch("trl.trainer.utils._use_triton", lambda device: True):  # what TRL asks before it does so
        return take_step(trainer)


def take_step(trainer: GRPOTrainer) -> float:
    loss = 0.0
    for k in range(trainer.args.gradient_accumulation_steps):
        trainer.accelerator.gradient_state._set_sync_gradients(k == trainer.args.gradient_accumulation_steps - 1)
        loss += trainer.training_step(trainer.model, {}, None).item()
    trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)  # as after its own step
    trainer.model.zero_grad()
    return loss
