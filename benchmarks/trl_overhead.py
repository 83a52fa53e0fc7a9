"""A training step of PAECGRPOTrainer beside the stock GRPOTrainer's, without generation.

    python -m benchmarks.trl_overhead                      # SmolLM2-135M, 2 and 2 x 2 answers
    python -m benchmarks.trl_overhead --out trl_overhead.json

An optimiser step here is forward and backward of all its micro-batches: answers that were generated once, the same for
all, and a learning rate of 0, so that every turn does the same work. The trainers take turns in one process; a ratio
is the median over the turns. Before anything is timed, PAEC's loss less its term is held against the stock loss. Where
there is a GPU it runs on that, in bfloat16, otherwise in float32.

On a CPU the stock trainer also scores the prompts, on a GPU the answers alone, as PAEC does everywhere. So there are
two of it: as it is, and "answers only", which is what to compare with. With one micro-batch PAEC needs no pass of its
own; with two it makes one before, and the last column is what remains without that.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl.trainer.utils
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.provenance import device_name, provenance
from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer
from paec_kernels.train.models import smollm2
from paec_kernels.train.tasks.by_name import load_tasks

STOCK, ANSWERS_ONLY, PAEC = "stock", "stock, answers only", "PAEC"
ON_A_GPU = trl.trainer.utils._use_triton
ON_CPU = not torch.cuda.is_available()
DTYPE, TOLERANCE = (torch.float32, 1e-5) if ON_CPU else (torch.bfloat16, 1e-2)
ANSWERS = 2  # of each micro-batch


def prompts() -> list[dict[str, Any]]:
    (task, *_), _ = load_tasks(("gym:basic_arithmetic,max_terms=2,max_digits=1",))
    return [{"prompt": [{"role": "user", "content": task.train_problem(place).prompt}]} for place in range(4)]


class Turn(NamedTuple):
    seconds: float
    before: float  # of them, spent before the training pass: on PAEC's own pass
    loss: float


class Contender:
    """A trainer that has generated and made its first step, so that everything is set up."""

    def __init__(self, name: str, policy: Any, tokenizer: Any, micro_batches: int, tokens: int, folder: str) -> None:
        trainer, config = (PAECGRPOTrainer, PAECGRPOConfig) if name == PAEC else (GRPOTrainer, GRPOConfig)
        self.name = name
        self.run = trainer(
            model=copy.deepcopy(policy),
            reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
            args=config(
                folder,
                use_cpu=ON_CPU, bf16=not ON_CPU, report_to="none", disable_tqdm=True, save_strategy="no",
                per_device_train_batch_size=ANSWERS, gradient_accumulation_steps=micro_batches,
                num_generations=ANSWERS, max_completion_length=tokens, max_steps=1, optim="sgd", learning_rate=0.0,
                gradient_checkpointing=False,
                num_iterations=1000,  # the answers are kept for all turns
            ),
            train_dataset=Dataset.from_list(prompts()),
            processing_class=tokenizer,
        )  # fmt: skip
        self.run.train()
        self.before = 0.0
        self.prepare = self.run._prepare_inputs
        self.run._prepare_inputs = self.timed_prepare

    def timed_prepare(self, inputs: Any) -> Any:
        start = time.perf_counter()
        prepared = self.prepare(inputs)
        self.before += time.perf_counter() - start
        return prepared

    def turn(self) -> Turn:
        micro_batches = self.run.args.gradient_accumulation_steps
        self.before = loss = 0.0
        start = time.perf_counter()
        for k in range(micro_batches):
            self.run.accelerator.gradient_state._set_sync_gradients(k == micro_batches - 1)
            loss += self.run.training_step(self.run.model, {}, None).item()
        self.run.model.zero_grad()
        return Turn(time.perf_counter() - start, self.before, loss)


def contenders(policy: Any, tokenizer: Any, micro_batches: int, tokens: int) -> list[Contender]:
    with tempfile.TemporaryDirectory() as folder:
        made = [
            Contender(name, policy, tokenizer, micro_batches, tokens, folder) for name in (STOCK, ANSWERS_ONLY, PAEC)
        ]
    for other in made[1:]:
        other.run._buffered_inputs = made[0].run._buffered_inputs
    return made


def take_turn(contender: Contender) -> Turn:
    compact = contender.name == ANSWERS_ONLY
    trl.trainer.utils._use_triton = (lambda device: True) if compact else ON_A_GPU
    try:
        return contender.turn()
    finally:
        trl.trainer.utils._use_triton = ON_A_GPU


def check(made: list[Contender]) -> float:
    """Return the largest difference from the stock loss; exit where there is one."""
    losses = {contender.name: take_turn(contender).loss for contender in made}
    losses[PAEC] -= made[-1].run._metrics["train"]["paec/loss"][-1]
    error = max(abs(loss - losses[STOCK]) for loss in losses.values())
    if not error < TOLERANCE:
        raise SystemExit(f"losses without PAEC's term differ: {losses}")
    return error


def measure(made: list[Contender], repeats: int) -> list[dict[str, Any]]:
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in made}
    for _ in range(repeats):
        for contender in made:
            turns[contender.name].append(take_turn(contender))

    def ratio(name: str, other: str, spent: float) -> float:
        pairs = zip(turns[name], turns[other], strict=True)
        return statistics.median((a.seconds - spent * a.before) / b.seconds for a, b in pairs)

    return [
        {
            "trainer": name,
            "seconds": statistics.median(turn.seconds for turn in own),
            "before_seconds": statistics.median(turn.before for turn in own),
            "times_stock": ratio(name, STOCK, 0),
            "times_answers_only": ratio(name, ANSWERS_ONLY, 0),
            "times_answers_only_without_its_pass": ratio(name, ANSWERS_ONLY, 1),
        }
        for name, own in turns.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    policy, tokenizer = smollm2.load(torch.device("cpu"))
    policy.is_quantized = False  # its file is, its weights were dequantised
    policy.to(DTYPE)  # the trainers take their copies to their device
    rows = []
    for micro_batches in (1, 2):
        made = contenders(policy, tokenizer, micro_batches, arguments.tokens)
        batches = made[0].run._buffered_inputs
        tokens = {
            "micro_batches": micro_batches,
            "answer_tokens": sum(int(batch["completion_mask"].sum()) for batch in batches),
            "all_tokens": sum(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches),
            "loss_error": check(made),
        }
        rows += [tokens | row for row in measure(made, arguments.repeats)]
    setting = {"model": smollm2.NAME, "threads": arguments.threads, "repeats": arguments.repeats, "dtype": str(DTYPE)}
    setting |= {"device": device_name("cpu" if ON_CPU else "cuda")} | provenance()
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(
        f"{'micro-batches':13} {'trainer':20} {'s':>6} {'x stock':>8} {'x answers only':>15} {'without its pass':>17}"
    )
    for row in rows:
        print(
            f"{row['micro_batches']:13} {row['trainer']:20} {row['seconds']:6.2f} {row['times_stock']:8.3f} "
            f"{row['times_answers_only']:15.3f} {row['times_answers_only_without_its_pass']:17.3f}"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
