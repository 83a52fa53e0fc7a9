"""Defaults that belong together, by the name that ``--preset`` takes."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.train.algorithms import ALGORITHMS, PAECOptions
from paec_kernels.train.config import AlgoName, EvalOptions, TrainConfig
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.tasks.by_name import value_of

DATA = Path("data")  # relative to where the command is started


def with_algo(config: TrainConfig, algo: AlgoName) -> TrainConfig:
    """Return the same run with another method: with the preset's own options if it has some, else the defaults."""
    if algo == config.algo:
        return config
    return replace(config, algo=algo, method=ALGORITHMS[algo]())


def with_arm(config: TrainConfig, arm: str) -> TrainConfig:
    """Return the same run with the method that ``arm`` names, NAME or NAME,FIELD=VALUE,...

    Raises:
        TypeError, ValueError: a field that the method does not have, or a value that it refuses.
    """
    name, *pairs = arm.split(",")
    config = with_algo(config, name)
    method = config.method
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"arms must be NAME or NAME,FIELD=VALUE,..., got {arm!r}")
        method = _with_field(method, path, text, arm)
    return replace(config, method=method)


def with_arm_and_seed(config: TrainConfig, arm: str, seed: int, warm_starts: int) -> TrainConfig:
    """Return one run of a comparison, in which seed s begins with the warm start of s modulo ``warm_starts``.

    Raises:
        TypeError, ValueError: as ``with_arm``.
    """
    start = replace(config.warm_start, seed=config.warm_start.seed + seed % warm_starts)
    return replace(with_arm(config, arm), seed=seed, warm_start=start)


def _with_field(options: Any, path: str, text: str, arm: str) -> Any:
    """Return a frozen dataclass with the field at ``path``, dots for nested ones, set to what ``text`` says."""
    name, _, rest = path.partition(".")
    names = [field.name for field in fields(options)]
    if name not in names:
        raise ValueError(f"arms must name fields among {', '.join(names)}, got {name!r} in {arm!r}")
    value = _with_field(getattr(options, name), rest, text, arm) if rest else value_of(text)
    return replace(options, **{name: value})


# The long families, on a smaller tiny model. Difficulty (the habits' share of rare routes, learning rate, number of
# batches) was set by runs of GRPO and of the oracle alone, so that without help the rare routes are found sometimes.
LONG = TrainConfig(
    preset="long",
    tasks=("chain",),
    warm_start=WarmStart(width=64, layers=2, skill_steps=3000, batch=64, learning_rate=3e-3),
    steps=150,
    prompts=12,
    answers=8,
    micro_batch=48,
    max_new_tokens=40,
    learning_rate=3e-4,
)

# SmolLM2-135M on the datasets of reasoning-gym that gave most groups with right and wrong answers, of 14 tried (5 of
# them in two difficulties):
#     paec eval --model smollm2 --tasks NAME --evaluate.problems 6 --evaluate.samples 8 --max-new-tokens 96
# Beside each: mean@8, and how many of the 6 problems were mixed. Six tell little: look at the log's mixed_groups.
# Left out: single-digit products (0.25, 4), where 25 problems remain to train on. Datasets whose answers are words,
# which count only inside <answer> tags (syllogism, ransom_note, calendar_arithmetic), were never right.
SMOLLM2 = TrainConfig(
    preset="smollm2",
    model="smollm2",
    tasks=(
        "gym:basic_arithmetic,max_terms=2,max_digits=1",  # 0.15, 4
        "gym:letter_counting",  # 0.10, 4
        "gym:chain_sum,max_terms=2,max_digits=1",  # 0.13, 3
        "gym:simple_equations,max_terms=2,max_value=10",  # 0.06, 3
        "gym:aiw",  # 0.06, 3
    ),
    steps=100,
    prompts=10,
    answers=8,
    micro_batch=8,
    max_new_tokens=96,
    learning_rate=2e-6,
    operator="linear",
)

# The run of PAEC's paper (arXiv 2606.08543), as far as it is known. Each value says where it comes from: [reported] in
# public summaries of the paper; [DAPO] in DAPO's paper (arXiv 2503.14476), whose data and loss this run takes, where
# those summaries are silent; [ours] where both are.
# The files are the public data sets as JSONL, in the formats that `tasks/jsonl.py` describes:
# BytedTsinghua-SIA/DAPO-Math-17k; AIME 2024, 2025 and 2026; HuggingFaceH4/MATH-500; AMC 2023.
PAPER = TrainConfig(
    preset="paper",
    model="Qwen/Qwen2.5-Math-1.5B",  # [reported]
    chat=True,  # [ours], as verl, in which DAPO was trained, does with every prompt
    tasks=(str(DATA / "dapo-math-17k.jsonl"),),  # [reported]
    eval_tasks=tuple(  # [reported]
        str(DATA / f"{name}.jsonl") for name in ("aime24", "aime25", "aime26", "math500", "amc23")
    ),
    algo="paec",  # [reported]
    method=PAECOptions(
        clip_low=0.2,  # [DAPO]
        clip_high=0.28,  # [DAPO]
        paec=PAECConfig(
            top_p=0.95,  # [ours]
            nucleus_norm="log_size",  # [ours]
            alpha=0.5,  # [ours]
            tau_c=1.0,  # [ours]
            rho=0.8,  # [reported]
            tau_m=0.05,  # [ours]
            beta=0.005,  # [ours]
            lam=1.0,  # [ours]
            rho_min=0.8,  # [ours]
            anchored="mean",  # [reported]
            anchor_steps=4,  # [reported]
            entropy_support="full",  # [ours]
            vocab_size=None,  # [ours], as nucleus_norm, which needs none
            penalty="absolute",  # [reported]
            anchor_unit="optimiser_step",  # [ours]
        ),
    ),
    steps=200,  # [ours]
    prompts=128,  # [ours], a quarter of DAPO's
    answers=16,  # [DAPO]
    updates=4,  # [DAPO], an optimiser step for each 512 answers
    micro_batch=4,  # [ours], does not change the result
    max_new_tokens=2048,  # [ours], leaves a prompt half of the model's 4096 positions
    temperature=1.0,  # [DAPO]
    learning_rate=1e-6,  # [DAPO], constant but for a warm-up there
    weight_decay=0.1,  # [ours], as verl's scripts for DAPO have it
    max_grad_norm=1.0,  # [ours], as weight_decay
    operator="linear",  # [ours], does not change the result
    precision="bfloat16",  # [ours]
    evaluate=EvalOptions(
        problems=500,  # [ours], all of each benchmark
        samples=32,  # [ours], DAPO's on AIME
    ),
)

PRESETS = {"tiny": TrainConfig(), "long": LONG, "smollm2": SMOLLM2, "paper": PAPER}
