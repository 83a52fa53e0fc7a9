"""The report on a terminal: each sampled token on a background that tells its soft mask."""

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from paec_kernels.demo.comparison import Comparison
from paec_kernels.demo.report import Answer, Batch, Report

CALM, DECISIVE = (40, 42, 54), (255, 140, 0)  # background at mask 0 and 1


def show(report: Report, console: Console) -> None:
    """Print the answers, then the statistics, the loss and the comparison with eager PyTorch."""
    console.rule(f"{report.model}: sampled answers, each token coloured by its soft mask")
    console.print(_legend(in_colour=console.color_system is not None))
    for group in report.groups:
        n_right = sum(answer.reward > 0 for answer in group.answers)
        console.print(
            f"\n[bold]{escape(group.question)}[/] expected {group.expected}; "
            f"{n_right} of {len(group.answers)} answers are right"
        )
        if n_right in (0, len(group.answers)):
            console.print("[yellow]equal rewards, so advantage 0: only the entropy term acts on these[/]")
        for answer in group.answers:
            console.print(_answer(answer, in_colour=console.color_system is not None))
    console.print()
    tables = [_statistics(report), _loss(report), _change(report)]
    tables.append(_comparison(report.comparison, "of these logits", "eager PyTorch", "token_stats", report.device))
    if report.comparison_linear is not None:
        tables.append(
            _comparison(report.comparison_linear, "from hidden states", "logits", "linear_token_stats", report.device)
        )
    console.print(Group(*tables))


def mask_style(mask: float) -> str:
    """Rich style for a soft mask in [0, 1]."""
    red, green, blue = (round(a + (b - a) * mask) for a, b in zip(CALM, DECISIVE, strict=True))
    return f"{'rgb(0,0,0)' if mask > 0.5 else 'rgb(255,255,255)'} on rgb({red},{green},{blue})"


def tokens_text(answer: Answer, in_colour: bool) -> Text:
    """The answer's tokens; without colours those with a mask of at least 0.5 stand in brackets."""
    text = Text()
    for token, mask in zip(answer.tokens, answer.mask, strict=True):
        shown = token.replace("\n", "↵").replace("<|im_end|>", "■")
        if in_colour:
            text.append(shown, mask_style(mask))
        else:
            text.append(f"[{shown}]" if mask >= 0.5 else shown)
    return text


def _answer(answer: Answer, in_colour: bool) -> Table:
    line = Table.grid(padding=(0, 1))
    verdict = "[green]right[/]" if answer.reward > 0 else "[red]wrong[/]"
    line.add_row(verdict, f"{answer.advantage:+.2f}", tokens_text(answer, in_colour))
    return line


def _legend(in_colour: bool) -> Text:
    if not in_colour:
        return Text("[token]: soft mask of 0.5 or more   ■: end of the answer")
    text = Text("soft mask ")
    for mask in (0.0, 0.25, 0.5, 0.75, 1.0):
        text.append(f" {mask:.2f} ", mask_style(mask))
    return text.append("   ■: end of the answer   ↵: new line   number: advantage")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, min_width=76)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _statistics(report: Report) -> Table:
    answers = [answer for group in report.groups for answer in group.answers]
    table = _table(f"Statistics of {report.batch.n_tokens:,} tokens", "", "median", "90 %", "largest")
    for name, form, values in (
        ("entropy, nats", ".3f", [v for a in answers for v in a.entropy]),
        ("nucleus entropy, nats", ".3f", [v for a in answers for v in a.nucleus_entropy]),
        ("nucleus size, tokens", ",", [v for a in answers for v in a.nucleus_size]),
        ("top-two margin, nats", ".3f", [v for a in answers for v in a.margin]),
        ("soft mask", ".3f", [v for a in answers for v in a.mask]),
    ):
        ordered = sorted(values)
        last = len(ordered) - 1
        table.add_row(name, *(format(ordered[int(share * last)], form) for share in (0.5, 0.9, 1.0)))
    return table


def _loss(report: Report) -> Table:
    batch, step = report.batch, report.step
    table = _table("Loss of the step", "", "", "weighted")
    table.add_row("GRPO, token-level", "at ratio 1, so only its gradient tells", f"{step.policy_loss:+.6f}")
    table.add_row(
        "entropy bonus",
        f"masked mean {batch.mean_entropy:.4f} nats, unmasked {batch.mean_entropy_unmasked:.4f}",
        f"{step.entropy_bonus:+.6f}",
    )
    table.add_row("floor penalty", _floor(batch), f"{step.weighted_penalty:+.6f}")
    total = step.policy_loss + step.entropy_bonus + step.weighted_penalty
    table.add_row("[bold]sum[/]", f"gradient norm {step.gradient_norm:.3f}", f"[bold]{total:+.6f}[/]")
    return table


def _change(report: Report) -> Table:
    before, after = report.batch, report.batch_after
    table = _table("The same answers after the step", "", "before", "after")
    table.add_row("masked mean entropy, nats", f"{before.mean_entropy:.4f}", f"{after.mean_entropy:.4f}")
    table.add_row("entropy floor", _floor(before), _floor(after))
    for name, change in report.logp_change.items():
        shown = "no such answer" if change is None else f"{change:+.4f}"
        table.add_row(f"log-prob of a token, {name}", "", shown)
    return table


def _floor(batch: Batch) -> str:
    if batch.floor is None:
        return "not set yet"
    return f"{batch.floor:.4f}, penalty {batch.penalty:.4f}"


def _comparison(c: Comparison, of_what: str, other: str, ours: str, device: str) -> Table:
    title = f"Forward and backward on {c.rows} x {c.vocab_size:,} {of_what}, {c.dtype}, {device}"
    table = _table(title, "", other, ours, "")
    table.add_row(
        f"time, median of {c.repeats}",
        f"{1e3 * c.eager.seconds:.0f} ms",
        f"{1e3 * c.operator.seconds:.0f} ms",
        f"[bold]{c.speedup:.1f} x as fast[/]",
    )
    table.add_row(
        "peak beyond the input",
        f"{c.eager.peak_bytes / 2**20:.0f} MiB",
        f"{c.operator.peak_bytes / 2**20:.0f} MiB",
        f"[bold]{100 * c.memory_ratio:.0f} %[/]",
    )
    for name, eager, operator in (
        ("statistics, nats", c.eager.stats_error, c.operator.stats_error),
        ("gradient, relative", c.eager.gradient_error, c.operator.gradient_error),
    ):
        table.add_row(f"error, {name}", f"{eager:.1e}", f"{operator:.1e}", "against float64")
    return table
