"""The launcher's exit code tells a scheduler what to do. (Whole runs: tests/end_to_end/test_signals.py.)"""

from __future__ import annotations

import pytest

from anchor_context.launch import exit_code


@pytest.mark.parametrize(
    ("first_failure", "asked", "code"),
    [
        (75, [15], 75),  # saved, after a signal to all
        (75, [], 75),  # the ranks alone were signalled
        (-15, [15], 75),  # asked before the first step: nothing to save
        (-2, [15], 75),  # a scheduler's SIGINT to the rank itself came first
        (-15, [], 143),  # somebody else's signal
        (143, [15, 15], 143),  # a second one, in the middle of a step
        (-9, [15], 137),  # out of memory, or of patience
        (2, [], 2),
        (1, [15], 1),
    ],
)
def test_a_ranks_code_becomes_the_launchers(first_failure, asked, code):
    assert exit_code(first_failure, asked) == code
