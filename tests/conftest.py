"""One torch thread: the suite runs on two cores beside other things, and OpenMP's threads wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
