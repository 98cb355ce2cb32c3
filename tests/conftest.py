"""One thread per test process: tests run beside each other, and float sums stay the same."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

torch.set_num_threads(1)
