"""A training run in a process of its own: ``python train_worker.py PICKLED_CONFIG``; a rank of one under torchrun."""

import os
import pickle
import sys

import torch
import torch.distributed as dist

from paec_kernels.train.loop import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    train(pickle.loads(bytes.fromhex(sys.argv[1])), lambda row: print("step", int(row["step"]), flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()
