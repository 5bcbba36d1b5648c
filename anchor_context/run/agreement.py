"""One rank's work, and its answer for all.

Guarantees: every rank gets the same answer, or the same error, so none is left waiting in a collective
that the others never enter. Waiting is done in collectives of a few seconds each: work that takes
longer than the process group's timeout does not run into it.
"""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 5.0


class ErrorElsewhere(RuntimeError):
    """An error of another rank, as its type and text; its traceback is the cause."""


class RankTraceback(Exception):
    """The traceback of another rank's error."""

    def __init__(self, tb: str):
        super().__init__(tb)
        self.tb = tb  # the name that `concurrent.futures` gives a worker's

    def __str__(self) -> str:
        return f"\n{self.tb}"


@dataclass(frozen=True)
class _Failure:
    """What the other ranks are told of an error. Not the error itself: many cannot be pickled and back."""

    type: str
    text: str
    tb: str
    is_value_error: bool
    numbered: tuple | None
    """Of an `OSError` its arguments: number, text and paths."""

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        numbered = None
        if isinstance(error, OSError) and error.errno is not None:
            paths = [None if p is None else str(p) for p in (error.filename, error.filename2)]
            numbered = (error.errno, str(error.strerror), paths[0], None, paths[1])
        return cls(
            type=type(error).__qualname__,
            text=str(error),
            tb="".join(traceback.format_exception(error)),
            is_value_error=isinstance(error, ValueError),
            numbered=numbered,
        )

    def error(self) -> Exception:
        """To raise on the other ranks; of the two classes that a command may tell in one line."""
        if self.numbered is not None:
            return OSError(*self.numbered)
        if self.is_value_error:
            return ValueError(self.text)
        return ErrorElsewhere(f"{self.type}: {self.text}")


def on_one_rank(accelerator: Accelerator, work: Callable[[], Result], *, rank: int = 0) -> Result:
    """Run `work` on one rank, in a thread; every rank returns its result or raises its error. Collective.

    `work` must not enter collectives. Its result travels pickled between the ranks; of its error travel
    type, text and traceback. The rank itself raises the error as it is, and so do the others a `ValueError`
    or an `OSError`; any other is an `ErrorElsewhere` there.
    """
    return _on_ranks(accelerator, work, here=accelerator.process_index == rank)[rank]


def on_each_machine(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank of every machine, as `on_one_rank`; the first error is every rank's.

    Every rank returns its own machine's result.
    """
    results = _on_ranks(accelerator, work, here=accelerator.is_local_main_process)
    until_here = results[: PartialState().process_index + 1]  # a machine's ranks follow each other
    return [result for result in until_here if result is not None][-1]


def _on_ranks(
    accelerator: Accelerator, work: Callable[[], Result], *, here: bool
) -> list[Result | None]:
    """Run `work` on the ranks that are `here`: each rank's result, on all ranks."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(work) if here else None
        while True:
            done, result, error, mine = future is None, None, None, None
            if future is not None and wait([future], timeout=HEARTBEAT_SECONDS).done:
                done, error = True, future.exception()
                if error is None:
                    result = future.result()
                else:
                    mine = _Failure.of(error)
            news = gather_object([(done, result, mine)])
            failure = next((failure for _, _, failure in news if failure is not None), None)
            if failure is not None:
                atexit.register(_leave_the_group)
                if failure == mine:
                    raise error
                raise failure.error() from RankTraceback(failure.tb)
            if all(done for done, _, _ in news):
                return [result for _, result, _ in news]


def _leave_the_group() -> None:
    """At the exit after an error: while gloo's threads run, C++ ends the process by SIGABRT now and then, and
    the exit code is lost. (NCCL's group would wait for ranks that may be gone.)"""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
