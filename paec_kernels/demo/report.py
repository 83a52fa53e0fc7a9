"""What a run found, as plain values: the terminal, the JSON file and the picture all show this."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paec_kernels.demo.comparison import Comparison
from paec_kernels.demo.questions import Question
from paec_kernels.demo.rollout import Rollout
from paec_kernels.demo.step import Scored, StepResult
from paec_kernels.saved_state import whole_file


@dataclass(frozen=True)
class Answer:
    """One sampled answer; the lists have an entry for each of its tokens, the end token included."""

    text: str
    reward: float
    advantage: float
    tokens: list[str]
    logp: list[float]  # nats, as the entropies and margins
    entropy: list[float]
    nucleus_entropy: list[float]
    nucleus_size: list[int]
    margin: list[float]
    mask: list[float]  # 0 to 1


@dataclass(frozen=True)
class Group:
    question: str
    expected: int
    answers: list[Answer]


@dataclass(frozen=True)
class Batch:
    """PAEC's view of all tokens of one optimiser step. Entropies in nats; None: not set yet."""

    n_tokens: int
    mean_entropy_unmasked: float
    mean_entropy: float  # H_bar
    threshold: float
    mask_sum: float
    anchor: float | None
    floor: float | None
    penalty: float


@dataclass(frozen=True)
class Report:
    model: str
    device: str
    versions: dict[str, str]
    options: dict[str, Any]
    config: dict[str, Any]
    groups: list[Group]
    batch: Batch  # as sampled
    step: StepResult
    batch_after: Batch  # the same answers under the updated weights
    logp_change: dict[str, float | None]  # nats per token over the step, by "rewarded" and "not rewarded"
    comparison: Comparison
    comparison_linear: Comparison | None  # with --linear: linear_token_stats beside the path through logits
    seconds: dict[str, float]  # by stage


def groups(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    rollout: Rollout,
    rewards: Tensor,
    advantages: Tensor,
    scored: Scored,
    mask: Tensor,
) -> list[Group]:
    """The answers by question.

    Args:
        rewards, advantages: [Q, K].
        scored, mask: [Q * K, T].
    """
    found = []
    n_answers = rewards.shape[1]
    for i, question in enumerate(questions):
        answers = []
        for k in range(n_answers):
            row = i * n_answers + k
            length = int(rollout.valid[row].sum())
            token_ids = rollout.token_ids[row, :length]
            stats = scored.stats
            columns = (
                scored.logp,
                stats.entropy,
                stats.nucleus_entropy,
                stats.nucleus_size,
                stats.margin,
                mask,
            )
            answers.append(
                Answer(
                    tokenizer.decode(token_ids, skip_special_tokens=True),
                    rewards[i, k].item(),
                    advantages[i, k].item(),
                    [tokenizer.decode([token]) for token in token_ids.tolist()],
                    *(column[row, :length].tolist() for column in columns),
                )
            )
        found.append(Group(question.text, question.answer, answers))
    return found


def batch(scored: Scored, valid: Tensor) -> Batch:
    """valid: bool [B, T]."""
    plan = scored.plan
    anchored = bool(plan.anchor.isfinite())
    return Batch(
        int(valid.sum()),
        scored.stats.entropy[valid].mean().item(),
        plan.mean_entropy.item(),
        plan.threshold.item(),
        plan.mask_sum.item(),
        plan.anchor.item() if anchored else None,
        plan.floor.item() if anchored else None,
        plan.penalty.item(),
    )


def logp_change(before: Tensor, after: Tensor, valid: Tensor, rewards: Tensor) -> dict[str, float | None]:
    """Mean change of the sampled tokens' log-probs, nats; None where no answer is of that kind.

    Args:
        before, after: [B, T]; valid: bool [B, T]; rewards: [B].
    """
    change = {}
    for name, chosen in (("rewarded", rewards > 0), ("not rewarded", rewards <= 0)):
        tokens = valid & chosen[:, None]
        change[name] = (after - before)[tokens].mean().item() if tokens.any() else None
    return change


def save_json(report: Report, path: Path) -> None:
    """Whole or not at all: an interrupted run leaves no half-written file."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
