"""The core's tests compute next to nothing: one thread, so that none waits for another."""

import torch

torch.set_num_threads(1)
