"""A context that grows over the run: documents are cut at a length that is short at first.

SkyLadder (arXiv 2503.15450) trains a model from scratch on windows that grow linearly from a few tokens to
the whole row, and reports better models in less time. `--context_schedule START:STEPS` is its linear form: in
a step before which t steps were done, attention spans at most

    START + floor((row length - START) * t / STEPS)      tokens, and from t = STEPS on whole documents.

(The paper's rate alpha is (row length - START) / STEPS; it starts at 32 tokens, and alpha is 1/8.) What is
cut are documents, each from its own start, and a cut is a document's boundary: with anchors, every piece
begins behind one. For the pattern `full` it is the rows, as in the paper.

Guarantees: a function of the step alone, so a resumed run stands where it would have. Every target stays one:
the last token of a piece still learns the next token of its document; the one behind it has lost its context.
Costs: a unit of a few tokens takes the loader as long as a long one; a step of a million tokens cut at 32 has
33,000.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ContextSchedule:
    """Linear growth from `start` tokens to the `row_length`, which is reached after `steps` steps."""

    start: int
    steps: int
    row_length: int

    def length(self, steps_done: int) -> int | None:
        """The most tokens that attention spans in the step behind so many; None: nothing is cut."""
        if steps_done >= self.steps:
            return None
        return self.start + (self.row_length - self.start) * steps_done // self.steps


def parse_context_schedule(text: str, *, row_length: int) -> ContextSchedule:
    """`--context_schedule START:STEPS`.

    Raises:
        ValueError: it is something else, or no growth.
    """
    start, _, steps = text.partition(":")
    if not (
        start.isdecimal() and steps.isdecimal() and 2 <= int(start) < row_length and int(steps)
    ):
        raise ValueError(
            f"--context_schedule {text} must be START:STEPS, as 32:1000: tokens, from 2 to less than the "
            f"{row_length} of --seq-length, and the steps in which they grow to so many"
        )
    return ContextSchedule(int(start), int(steps), row_length)
