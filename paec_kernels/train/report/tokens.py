"""The terminal's view of ``paec inspect``: answers with each token coloured by PAEC's soft mask, and tables."""

import math
from collections.abc import Sequence
from typing import Any

from paec_kernels.extras import extra

with extra("train"):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


Report = dict[str, Any]  # of JSON's types, NaN included; see `train.inspect.make_report`
SUMMARISED = {
    "entropy": "entropy, nats",
    "nucleus_entropy": "nucleus entropy, nats",
    "nucleus_size": "nucleus size, tokens",
    "margin": "top-two margin, nats",
    "mask": "soft mask",
}
CALM, DECISIVE = (40, 42, 54), (255, 140, 0)  # background at mask 0 and 1
VERDICTS = {True: "[green]right[/]", False: "[red]wrong[/]"}


def show(report: Report, console: Console) -> None:
    """Print the answers, each token on a background that tells its soft mask, then the tables."""
    in_colour = console.color_system is not None and not console.no_color
    console.rule()
    console.print(Text(f"{report['training']['model']}: sampled answers and their tokens' soft masks"))
    console.print(legend(in_colour))
    for group in report["groups"]:
        console.print(Text(f"\n{visible(group['prompt'])}", "bold"))
        rewards = [answer["reward"] for answer in group["answers"]]
        if not report["options"]["prompts"]:
            n_right = f"{sum(rewards):.0f} of {len(rewards)} answers are right; beside each, its advantage"
            console.print(Text(f"expected {visible(group['expected'])}: {n_right}"))
            if len(set(rewards)) == 1:
                console.print("[yellow]equal rewards give no advantage: only the entropy term acts on these[/]")
        answers = Table.grid(padding=(0, 1))
        for answer, reward in zip(group["answers"], rewards, strict=True):
            verdict = ["·"] if reward is None else [VERDICTS[reward > 0], f"{answer['advantage']:+.2f}"]
            answers.add_row(*verdict, tokens_text(answer, in_colour))
        console.print(answers)
    for table in tables(report):
        console.print(table)


def mask_style(mask: float) -> str:
    """Return rich's style for a soft mask in [0, 1]; none for NaN."""
    if math.isnan(mask):
        return ""
    red, green, blue = (round(a + (b - a) * mask) for a, b in zip(CALM, DECISIVE, strict=True))
    return f"{'rgb(0,0,0)' if mask > 0.5 else 'rgb(255,255,255)'} on rgb({red},{green},{blue})"


def visible(text: str) -> str:
    """Show line ends as arrows, and escape what else a terminal would obey or hide."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def tokens_text(answer: Report, in_colour: bool) -> Text:
    """Return an answer's tokens; without colours those with a mask of at least 0.5 stand in brackets."""
    text = Text()
    for token, mask in zip(answer["tokens"], answer["mask"], strict=True):
        if in_colour:
            text.append(visible(token), mask_style(mask))
        else:
            text.append(f"[{visible(token)}]" if mask >= 0.5 else visible(token))
    return text


def legend(in_colour: bool) -> Text:
    """Explain `tokens_text`."""
    masks = [0.0, 0.25, 0.5, 0.75, 1.0]
    example = {"tokens": [f" {mask:.2f} " for mask in masks], "mask": masks}
    mask = Text("soft mask ") + tokens_text(example, True) if in_colour else Text("[token]: soft mask of 0.5 or more")
    return mask + Text("   ↵: new line")


def tables(report: Report) -> list[Table]:
    """Return the statistics and, where a step was taken, what its loss was and what it changed."""
    n_tokens = sum(len(answer["tokens"]) for group in report["groups"] for answer in group["answers"])
    rows = [
        (title, *(f"{x:,.0f}" if name == "nucleus_size" else f"{x:.3f}" for x in report["statistics"][name].values()))
        for name, title in SUMMARISED.items()
    ]
    statistics = _table((f"{n_tokens:,} tokens", *report["statistics"]["mask"]), *rows)
    step, before, after = report["step"], report["before"], report["after"]
    if step is None:
        return [statistics]
    loss = _table(
        ("Loss of the step", "", "weighted"),
        ("GRPO, token-level", "at ratio 1, so only its gradient tells", f"{step['policy_loss']:+.6f}"),
        ("entropy bonus", f"masked mean entropy {before['mean_entropy']:.4f}", f"{before['entropy_bonus']:+.6f}"),
        ("floor penalty", _floor(before), f"{before['floor_penalty']:+.6f}"),
        ("sum", f"gradient norm {step['gradient_norm']:.3f}", f"{step['policy_loss'] + step['entropy_loss']:+.6f}"),
    )
    changes = [
        (f"log-prob of a token, {name}", "", "no such answer" if math.isnan(change) else f"{change:+.4f}")
        for name, change in report["logp_change"].items()
    ]
    entropies = (f"{look['mean_entropy']:.4f}" for look in (before, after))
    change = _table(
        ("The same answers", "before", "after the step"),
        ("masked mean entropy, nats", *entropies),
        ("entropy floor, nats", _floor(before), _floor(after)),
        *changes,
    )
    return [statistics, loss, change]


def _table(header: Sequence[str], *rows: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, min_width=76)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _floor(batch: Report) -> str:
    if math.isnan(batch["anchor"]):
        return "not set yet"
    return f"{batch['floor']:.4f}, penalty {batch['penalty']:.4f}"
