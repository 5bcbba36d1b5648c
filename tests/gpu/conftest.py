"""Everything here needs a CUDA device; `benchmarks/gpu.sh` runs it where there is one."""

from __future__ import annotations

import os

import pytest
import torch

# FlashAttention-4 keeps what it compiled, so that several processes and calls compile once.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# cuBLAS reads it once, and the tests of determinism come later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config, items):
    asked = "large" in config.option.markexpr
    for item in items:
        if "tests/gpu/" not in item.path.as_posix():
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("large") and not asked:
            item.add_marker(pytest.mark.skip(reason="takes the GPU alone: -m large runs it"))
