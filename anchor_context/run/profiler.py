"""A torch profiler trace of a few steps (`--profile_steps A:B`)."""

from __future__ import annotations

from pathlib import Path

import torch

from anchor_context.files import warn, whole


class StepProfiler:
    """Writes a torch profiler trace of some steps (`--profile_steps A:B`), for Perfetto."""

    def __init__(self, steps: str | None, folder: Path, *, rank: int):
        """Of steps "A:B", into folder/steps-A-B.rank-R.json.gz; None profiles nothing."""
        self.profile = None
        if steps is not None:
            self.first, self.last = parse_profile_steps(steps)
            self.trace = folder / f"steps-{self.first}-{self.last}.rank-{rank}.json.gz"
        else:
            self.first = self.last = 0  # steps count from 1

    def before(self, step: int) -> None:
        """Call before optimiser step `step`. A resumed run may come in between A and B."""
        if self.profile is None and self.first <= step <= self.last:
            self.profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profile.start()

    def after(self, step: int, *, final: bool = False) -> None:
        """Call after it; `final` if the run ends here, perhaps before B."""
        if self.profile is not None and (final or step == self.last):
            self.profile.stop()
            try:
                self.trace.parent.mkdir(parents=True, exist_ok=True)
                with whole(self.trace) as unfinished:
                    self.profile.export_chrome_trace(str(unfinished))
            except OSError as error:
                warn(f"{self.trace} not written: {error.strerror} (--output-dir)")
            self.profile, self.first, self.last = None, 0, 0


def parse_profile_steps(steps: str) -> tuple[int, int]:
    """ "A:B" -> the first and the last step to profile, counted from 1.

    Raises:
        ValueError: not two whole numbers, or no step.
    """
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"--profile_steps {steps} must be A:B, the first and the last step to profile, such as 3:5"
        )
    return int(first), int(last)
