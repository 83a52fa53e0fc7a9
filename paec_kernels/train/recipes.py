"""The paper's own run (arXiv 2606.08543), as far as it is known: values of `TrainConfig` by their names.

Marks: [reported] public summaries of the paper say so; [DAPO] the value of DAPO's paper (arXiv 2503.14476), whose data
and loss this run takes, where those summaries are silent; [ours] this package's choice, where both are.

The six files are those of the public data sets as JSONL, a question and its answer a line (`jsonl_tasks` says in which
fields): BytedTsinghua-SIA/DAPO-Math-17k; AIME 2024, 2025 and 2026; HuggingFaceH4/MATH-500; AMC 2023.
"""

from pathlib import Path
from typing import Any

from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.train.algorithms import PAECOptions
from paec_kernels.train.config import EvalOptions

DATA = Path("data")  # relative to where the command is started

PAPER: dict[str, Any] = {
    "model": "Qwen/Qwen2.5-Math-1.5B",  # [reported]
    "chat": True,  # [ours], as verl, in which DAPO was trained, does with every prompt
    "tasks": (str(DATA / "dapo-math-17k.jsonl"),),  # [reported]
    "eval_tasks": tuple(  # [reported]
        str(DATA / f"{name}.jsonl") for name in ("aime24", "aime25", "aime26", "math500", "amc23")
    ),
    "algo": "paec",  # [reported]
    "method": PAECOptions(
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
            anchor_steps=4,  # [reported]
            entropy_support="full",  # [ours]
        ),
    ),
    "steps": 200,  # [ours]
    "prompts": 128,  # [ours], a quarter of DAPO's
    "answers": 16,  # [DAPO]
    "updates": 4,  # [DAPO], an optimiser step for each 512 answers
    "micro_batch": 4,  # [ours], does not change the result
    "max_new_tokens": 2048,  # [ours], leaves a prompt half of the model's 4096 positions
    "temperature": 1.0,  # [DAPO]
    "learning_rate": 1e-6,  # [DAPO], constant but for a warm-up there
    "weight_decay": 0.1,  # [ours], as verl's scripts for DAPO have it
    "max_grad_norm": 1.0,  # [ours], as weight_decay
    "operator": "linear",  # [ours], does not change the result
    "precision": "bfloat16",  # [ours]
    "evaluate": EvalOptions(
        problems=500,  # [ours], all of each benchmark
        samples=32,  # [ours], DAPO's on AIME
    ),
}
