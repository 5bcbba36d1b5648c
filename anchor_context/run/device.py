"""What a device promises to compute, what of it training reaches, and how much of its memory was used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

PEAK_BF16_FLOPS = {  # dense, per second, from the vendors' data sheets
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,  # before "H100": the first name that fits counts
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}

EXPECTED_MFU = 0.5
"""What the hours of a run are planned with. On one H100 `train.py` reached 0.51 (rows of 131,072 tokens) and
0.53 (1,048,576) with FlashAttention-4, 0.47 with PyTorch's kernel (`benchmarks/results/`); over several ranks
nobody measured it yet."""


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 operations per second that the GPU's data sheet promises; None if unknown or no GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: the allocator's on a GPU, the process's resident on the CPU.

    There glibc keeps much of what tensors give back: of SmolLM2-135M at 2,048 tokens 8.8 GiB are resident
    where tensors hold 4.9; 5.6 under MALLOC_MMAP_THRESHOLD_=1048576, for a sixth more time.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's getrusage would count the launcher too, which became this process.
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
