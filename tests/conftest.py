"""The same tests, with the same random numbers, in every process and run."""

import random

import numpy as np
import pytest
import torch


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are not part of a test's name: a compressed file holds the second in which it was made.

    pytest numbers equal names. Processes that name a test differently refuse to share the tests.
    """
    return "bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on the tests that ran before it in its process."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
