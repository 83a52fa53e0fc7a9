"""`paec inspect` on a hardly trained tiny model: its numbers, its step, and what the terminal shows of them."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("tyro", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

import paec_kernels as pk
from paec_kernels.train import inspect as module
from paec_kernels.train.commands import inspect
from paec_kernels.train.config import TrainConfig, plain, seed_of
from paec_kernels.train.inspect import InspectConfig, make_report
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy, encode
from paec_kernels.train.models.warm_start import WarmStart, warm_start
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.report.tokens import CALM, DECISIVE, show
from paec_kernels.train.tasks.families import FAMILIES

ANSWERS, TEMPERATURE, TASKS = 8, 0.8, ("parity", "count")
WARM_START = WarmStart(skill_steps=150, habit_steps=0, batch=32)
COLUMNS = ("logp", "entropy", "nucleus_entropy", "nucleus_size", "margin", "lse")


def save_run(folder: Path, model: TinyModel) -> Path:
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    config = TrainConfig(tasks=TASKS, temperature=TEMPERATURE, max_new_tokens=16, learning_rate=1e-3)
    (folder / "config.json").write_text(json.dumps(plain(config)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return save_run(folder / "run", warm_start(WARM_START, folder))


def read_json(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert [path.name for path in folder.iterdir()] == ["inspect.json"]
    return json.loads((folder / "inspect.json").read_text(), parse_constant=refuse)


def start_model(run: Path) -> TinyModel:
    model = TinyModel()
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    return model


class Inspected(NamedTuple):
    config: InspectConfig
    report: dict  # as written
    model: TinyModel  # after the step

    @property
    def answers(self) -> list[dict]:
        return [answer for group in self.report["groups"] for answer in group["answers"]]

    def column(self, name: str) -> torch.Tensor:
        return torch.tensor([x for answer in self.answers for x in answer[name]], dtype=torch.float64)


@pytest.fixture(scope="module", params=["logits", "linear"])
def inspected(request, trained, tmp_path_factory) -> Inspected:
    config = InspectConfig(
        run=trained,
        problems=4,
        answers=ANSWERS,
        operator=request.param,
        paec=pk.PAECConfig(anchor_steps=1, beta=0.3, rho_min=1.5),
        out=tmp_path_factory.mktemp("out"),
    )
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start", lambda *args, was=module.start: runs.append(was(*args)) or runs[-1])
        assert inspect(config) == 0
    return Inspected(config, read_json(config.out), runs[0].policy.module)


def true_stats(model: TinyModel, report: dict, top_p: float) -> pk.TokenStats:
    """The reference in float64 on the tokens that were recorded, flat; each answer read alone."""
    model = copy.deepcopy(model).double()
    found = []
    for group in report["groups"]:
        prompt, _ = encode([group["prompt"]])
        for answer in group["answers"]:
            ids = torch.tensor(answer["token_ids"])
            sequence = torch.cat([prompt[0], ids])[None]
            logits = model(sequence, torch.ones_like(sequence), prompt.shape[1])[0] @ model.embedding.weight.T
            found.append(pk.reference.token_stats(logits, ids, top_p=top_p, temperature=TEMPERATURE))
    return pk.TokenStats(*(torch.cat(column).detach() for column in zip(*found, strict=True)))


def test_the_answers_are_those_of_training(inspected, trained) -> None:
    policy = TinyPolicy(start_model(trained))
    rewards = []
    for number, group in enumerate(inspected.report["groups"]):
        task = FAMILIES[TASKS[number % 2]]
        problem = task.train_problem(number // 2)
        assert (group["task"], group["prompt"], group["expected"]) == (task.name, problem.prompt, problem.answer)
        sampled = policy.sample(
            [problem.prompt], ANSWERS, max_new_tokens=16, temperature=TEMPERATURE,
            seeds=[seed_of(0, "sample", number, 0)],
        )  # fmt: skip
        assert sorted(answer["text"] for answer in group["answers"]) == sorted(policy.texts(sampled))
        for answer in group["answers"]:
            assert "".join(answer["tokens"]).removesuffix(".") == answer["text"]
            assert answer["reward"] == task.reward(problem, answer["text"])
        rewards.append([answer["reward"] for answer in group["answers"]])
    assert any(0 < sum(of_group) < ANSWERS for of_group in rewards), "no group has an advantage"
    advantages = [answer["advantage"] for answer in inspected.answers]
    torch.testing.assert_close(torch.tensor(advantages), pk.group_advantages(torch.tensor(rewards)).flatten())


def test_its_numbers_are_the_references(inspected, trained) -> None:
    config, report = inspected.config.paec, inspected.report
    after, before = report["after"], report["before"]
    for model, suffix, batch, anchor in (
        (start_model(trained), "", before, None),
        (inspected.model, "_after", after, before["mean_entropy"]),
    ):
        stats = true_stats(model, report, config.top_p)
        for name in ("logp", "entropy") if suffix else COLUMNS:
            expected = getattr(stats, name).double()
            torch.testing.assert_close(inspected.column(name + suffix), expected, rtol=1e-4, atol=1e-4)
        loss, mask, metrics = pk.reference.paec_loss(stats, torch.ones_like(stats.margin).bool(), config, anchor)
        expected = {name: metrics[name].item() for name in ("mean_entropy", "penalty", "threshold", "mask_sum")}
        expected["entropy"] = stats.entropy.mean().item()
        assert {name: batch[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert batch["entropy_bonus"] + batch["floor_penalty"] == pytest.approx(loss.item(), rel=1e-3)
        if not suffix:
            torch.testing.assert_close(inspected.column("mask"), mask, rtol=1e-3, atol=1e-3)
    assert (before["anchor"], before["floor"]) == (None, 0)
    assert after["anchor"] == pytest.approx(before["mean_entropy"])
    assert after["floor"] == pytest.approx(1.5 * after["anchor"])
    assert after["penalty"] > 0


def test_its_summaries_are_of_these_tokens(inspected) -> None:
    mask = inspected.column("mask")
    for name, shown in inspected.report["statistics"].items():
        x = inspected.column(name)
        ordered = x.sort().values.tolist()
        last = len(ordered) - 1
        expected = [
            ordered[last // 2],
            ordered[int(0.9 * last)],
            ordered[last],
            x.mean(),
            (mask * x).sum() / mask.sum(),
        ]
        assert list(shown.values()) == pytest.approx([float(value) for value in expected])
        assert list(shown) == ["median", "90 %", "largest", "mean", "masked mean"]
    change = inspected.column("logp_after") - inspected.column("logp")
    rewarded = torch.tensor([answer["reward"] > 0 for answer in inspected.answers for _ in answer["tokens"]])
    expected = {"rewarded": change[rewarded].mean().item(), "others": change[~rewarded].mean().item()}
    assert inspected.report["logp_change"] == pytest.approx(expected, abs=1e-6)


def test_its_step_is_that_of_grpo_and_paec_by_hand(inspected, trained) -> None:
    model, config = start_model(trained), inspected.config.paec
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    paec, stats = pk.PAEC(config), []
    n_tokens = len(inspected.column("logp"))
    for group in inspected.report["groups"]:  # a micro-batch, padded as it was sampled
        prompt, _ = encode([group["prompt"]])
        rows = [answer["token_ids"] for answer in group["answers"]]
        valid = torch.tensor([[i < len(row) for i in range(max(map(len, rows)))] for row in rows])
        ids = torch.tensor([row + [0] * (valid.shape[1] - len(row)) for row in rows])
        prompts = prompt.expand(len(rows), -1)
        mask = torch.cat([torch.ones_like(prompts), valid.long()], dim=1)
        logits = model(torch.cat([prompts, ids], dim=1), mask, prompts.shape[1]) @ model.embedding.weight.T
        of_group = pk.token_stats(logits, ids, valid=valid, top_p=config.top_p, temperature=TEMPERATURE)
        paec.observe(of_group, valid)
        stats.append((of_group, valid, torch.tensor([[answer["advantage"]] for answer in group["answers"]])))
    plan = paec.plan()
    for of_group, valid, advantages in stats:
        logp = of_group.logp
        policy_loss, _ = pk.grpo_loss(logp, logp.detach(), advantages, valid, normalizer=n_tokens)
        (policy_loss + paec.term(of_group, valid, plan)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    step = inspected.report["step"]
    assert step["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step["entropy_loss"] == pytest.approx(inspected.report["before"]["entropy_bonus"], rel=1e-4)
    # Adam's first step is the gradient's sign times the learning rate, so that a rounding error may turn one around.
    agree = [
        ((ours - theirs).abs() < 1e-5).float().mean().item()
        for ours, theirs in zip(model.parameters(), inspected.model.parameters(), strict=True)
    ]
    assert min(agree) > 0.99


def test_own_prompts_are_looked_at_and_left(trained, tmp_path, capsys) -> None:
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start", lambda *args, was=module.start: runs.append(was(*args)) or runs[-1])
        assert inspect(InspectConfig(run=trained, prompts=("p01:", "n1a2:"), answers=2, out=tmp_path)) == 0
    report = read_json(tmp_path)
    assert [(group["prompt"], len(group["answers"])) for group in report["groups"]] == [("p01:", 2), ("n1a2:", 2)]
    assert {answer["reward"] for group in report["groups"] for answer in group["answers"]} == {None}
    assert (report["step"], report["after"], report["logp_change"]) == (None, None, None)
    unchanged = start_model(trained).state_dict()
    assert all(x.equal(unchanged[name]) for name, x in runs[0].policy.module.state_dict().items())
    shown = capsys.readouterr().out
    assert "masked mean" in shown
    assert not any(word in shown for word in ("wrong", "expected", "Loss"))


@pytest.mark.parametrize("anchored", ["scores", "positions"])
def test_an_anchor_policy_is_the_model_as_it_is_found(trained, anchored) -> None:
    def report(**options) -> dict:
        config = InspectConfig(run=trained, problems=1, answers=4, paec=pk.PAECConfig(anchor_steps=1, **options))
        return make_report(config, Progress(disable=True))

    found, of_a_mean = report(anchored=anchored), report()
    assert found["before"]["threshold"] == of_a_mean["before"]["threshold"]
    assert found["after"]["threshold"] == found["before"]["threshold"], "of the same policy, on the same answers"
    assert found["after"]["threshold"] != of_a_mean["after"]["threshold"]


def test_any_question_of_a_named_file_may_be_asked(trained, tmp_path) -> None:
    """A single question, which a division between training and evaluation would refuse."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": [{"content": "p00:"}], "answer": "0"}) + "\n")
    config = InspectConfig(run=trained, tasks=(str(file),), problems=1, answers=2)
    assert {group["prompt"] for group in make_report(config, Progress(disable=True))["groups"]} == {"p00:"}


def test_what_is_not_finite_is_null(tmp_path, capsys) -> None:
    model = TinyModel()
    torch.nn.init.constant_(model.norm.weight, math.nan)
    run = save_run(tmp_path / "run", model)
    assert inspect(InspectConfig(run=run, prompts=("p01:",), answers=2, out=tmp_path / "out")) == 0
    report = read_json(tmp_path / "out")
    assert set(report["groups"][0]["answers"][0]["entropy"]) == {None}
    assert report["before"]["mean_entropy"] is None
    assert "nan" in capsys.readouterr().out


def test_a_models_own_defaults(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(
        PRESETS, "tiny", replace(PRESETS["tiny"], warm_start=replace(WARM_START, skill_steps=3), cache=tmp_path)
    )
    assert inspect(InspectConfig(problems=1, answers=2, max_new_tokens=3, out=tmp_path / "out")) == 0
    training = read_json(tmp_path / "out")["training"]
    given = {"model": "tiny", "tasks": list(FAMILIES), "temperature": 1.0, "max_new_tokens": 3, "learning_rate": 1e-4}
    assert {name: training[name] for name in given} == given
    smollm2 = InspectConfig(model="smollm2", temperature=0.5).training()
    assert smollm2 == replace(
        PRESETS["smollm2"],
        temperature=0.5,
        method=smollm2.method,
        prompts=1,
        updates=1,
        micro_batch=8,
        operator="logits",
    )


@pytest.fixture
def made_up(trained) -> dict:
    """The report with answers that a terminal could choke on."""
    made = {
        "reward": 1.0,
        "advantage": 0.7,
        "tokens": ["9 + [b]6", " =\n", "\x1b[31m15", "<|end|>"],
        "mask": [0.0, 0.5, 0.2, 1.0],
    }
    wrong = made | {"reward": 0.0, "advantage": -0.7, "tokens": ["a", "b", "c", "d"], "mask": [math.nan, 0.4, 0.6, 0.0]}
    groups = [
        {"prompt": "What is\n[i]9[/i]?", "expected": "15", "answers": [made, wrong]},
        {"prompt": "And 5?", "expected": "5", "answers": [wrong]},
    ]
    report = make_report(InspectConfig(run=trained, problems=1, answers=2), Progress(disable=True))
    return report | {"groups": groups, "logp_change": {"rewarded": 0.25, "others": math.nan}}


def printed(report: dict, width: int = 80, **options) -> str:
    console = Console(width=width, force_terminal=True, highlight=False, **options)
    with console.capture() as capture:
        show(report, console)
    return capture.get()


@pytest.mark.parametrize("width", [80, 60])
def test_nothing_is_cut(made_up: dict, width: int) -> None:
    made_up["training"]["model"] = "a/model-whose-name-is-as-long-as-such-names-are"
    shown = printed(made_up, width, color_system=None)
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    whole = printed(made_up, 200, color_system=None)
    assert set(re.findall(r"[-+]?\d+\.\d{3,}", whole)) == set(re.findall(r"[-+]?\d+\.\d{3,}", shown))
    assert "soft masks" in " ".join(shown.split())


@pytest.mark.parametrize("options", [{"color_system": None}, {"color_system": "truecolor", "no_color": True}])
def test_without_colours_high_masks_are_in_brackets(made_up: dict, options: dict) -> None:
    shown = printed(made_up, **options)
    assert "9 + [b]6[ =↵]\\x1b[31m15[<|end|>]" in shown
    assert "ab[c]d" in shown
    for text in (
        "What is↵[i]9[/i]?",
        "expected 15: 1 of 2 answers are right",
        "expected 5: 0 of 1 answers are right",
        "equal rewards give no advantage",
        "+0.70",
        "-0.70",
        "not set yet",
        "+0.2500",
        "no such answer",
        f"{made_up['step']['policy_loss']:+.6f}",
        f"{made_up['after']['floor']:.4f}, penalty {made_up['after']['penalty']:.4f}",
    ):
        assert text in shown
    assert shown.count("equal rewards") == 1
    assert max(map(len, Text.from_ansi(shown).plain.splitlines())) <= 80


def test_colours_go_from_calm_to_decisive(made_up: dict) -> None:
    shown = printed(made_up, color_system="truecolor")
    for token, (r, g, b) in (("9 + [b]6", CALM), ("<|end|>", DECISIVE)):
        assert f"48;2;{r};{g};{b}m{token}" in shown
    assert "\\x1b[31m15" in shown
    assert "[ =" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ("a", "")}, "prompts must not be empty texts"),
        ({"run": Path("r"), "model": "smollm2"}, "model and chat must be left to the run, got 'smollm2' and None"),
        ({"run": Path("r"), "chat": False}, "model and chat must be left to the run, got 'tiny' and False"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InspectConfig(**options)


@pytest.mark.slow
@pytest.mark.usefixtures("_smollm2")
def test_smollm2(tmp_path, capsys) -> None:
    tasks = ("gym:chain_sum,max_terms=2,max_digits=1",)
    options = {"tasks": tasks, "problems": 2, "answers": 2, "max_new_tokens": 8, "out": tmp_path}
    assert inspect(InspectConfig(model="smollm2", **options)) == 0
    report = read_json(tmp_path)
    answers = [answer for group in report["groups"] for answer in group["answers"]]
    assert len(answers) == 4
    for answer in answers:
        assert "".join(answer["tokens"]).removesuffix("<|im_end|>") == answer["text"]
        assert all(0 <= mask <= 1 for mask in answer["mask"])
        assert answer["logp"] != answer["logp_after"]
    assert report["after"]["anchor"] == pytest.approx(report["before"]["mean_entropy"])
    assert capsys.readouterr().out.count("answers are right") == 2
