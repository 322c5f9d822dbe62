"""Read before any test module: without a GPU, Triton's interpreter runs the kernels, and it must be told before the import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
