"""One thread for the tests' small tensors: two threads that wait for each other on a busy machine take far longer."""

import torch

torch.set_num_threads(1)
