"""The same bits in every run on the same machine and the same number of ranks (--deterministic).

On a GPU many sums are made in the order in which threads come by, so that two runs part within a few steps.
Each library has its own cure: attention's kernels are chosen by `choose_kernel(…, deterministic=True)`, and
PyTorch's is here. Liger's kernels that are used here sum in a fixed order as they are.
"""

from __future__ import annotations

import os

import torch


def compute_deterministically() -> None:
    """Switch PyTorch, for the whole process, to operations that repeat their bits; one that has none raises
    `RuntimeError` when it is called. Before anything runs on a GPU: cuBLAS reads its setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
