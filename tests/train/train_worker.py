"""A training run in a process of its own: ``python train_worker.py CONFIG_JSON``; a rank of one under torchrun."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from paec_kernels.train.config import TrainConfig
from paec_kernels.train.loop import train
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.presets import with_algo

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    config = with_algo(
        TrainConfig(
            out=Path(options.pop("out")),
            cache=Path(options.pop("cache")),
            warm_start=WarmStart(**options.pop("warm_start")),
            tasks=tuple(options.pop("tasks")),
        ),
        options.pop("algo"),
    )
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    train(TrainConfig(**{**vars(config), **options}), lambda row: print("step", int(row["step"]), flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()
