"""Defaults that belong together, by the name that ``--preset`` takes."""

from dataclasses import replace

from paec_kernels.train.algorithms import ALGORITHMS
from paec_kernels.train.config import AlgoName, TrainConfig


def with_algo(config: TrainConfig, algo: AlgoName) -> TrainConfig:
    """The same run with another method: its options are the preset's own where it has some, else the defaults."""
    if algo == config.algo:
        return config
    return replace(config, algo=algo, method=ALGORITHMS[algo]())


PRESETS = {
    "tiny": TrainConfig(),
}
