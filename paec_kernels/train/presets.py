"""Defaults that belong together, by the name that ``--preset`` takes."""

from dataclasses import replace

from paec_kernels.train.algorithms import ALGORITHMS
from paec_kernels.train.config import AlgoName, TrainConfig
from paec_kernels.train.recipes import PAPER


def with_algo(config: TrainConfig, algo: AlgoName) -> TrainConfig:
    """The same run with another method: its options are the preset's own where it has some, else the defaults."""
    if algo == config.algo:
        return config
    return replace(config, algo=algo, method=ALGORITHMS[algo]())


PRESETS = {
    "tiny": TrainConfig(),
    # SmolLM2-135M on reasoning-gym. How often it is right at the start has not been measured: look at mixed_groups.
    "smollm2": TrainConfig(
        preset="smollm2",
        model="smollm2",
        tasks=(
            "gym:chain_sum",
            "gym:basic_arithmetic",
            "gym:letter_counting",
            "gym:number_sorting",
            "gym:leg_counting",
        ),
        steps=100,
        prompts=10,
        answers=8,
        micro_batch=8,
        max_new_tokens=96,
        learning_rate=2e-6,
        operator="linear",
    ),
    "paper": replace(TrainConfig(preset="paper"), **PAPER),
}
