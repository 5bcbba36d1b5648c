"""What all ranks must decide alike: one rank's answer for all, and a request to stop the run.

Guarantees: every rank gets the same answer, or the same error, so none is left waiting in a collective
that the others never enter. Waiting is done in collectives of a few seconds each: work that takes
longer than the process group's timeout does not run into it.
Costs: `requested` and `main_decides` are one all-reduce of one byte over gloo, on the CPU: they do not
wait for the GPU.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object

Result = TypeVar("Result")

EXIT_TRY_AGAIN = 75
"""Exit code of a run that was asked to stop and can be resumed (`EX_TEMPFAIL` of sysexits.h)."""

HEARTBEAT_SECONDS = 5.0
SAME_REQUEST_SECONDS = 2.0


def on_one_rank(accelerator: Accelerator, work: Callable[[], Result], *, rank: int = 0) -> Result:
    """Run `work` on one rank, in a thread; every rank returns its result or raises its error. Collective.

    `work` must not enter collectives. Its result and its error travel pickled between the ranks.
    """
    return _on_ranks(accelerator, work, here=accelerator.process_index == rank)[rank]


def on_each_machine(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Run `work` on the first rank of every machine, as `on_one_rank`; the first error is every rank's."""

    def without_result() -> None:
        work()

    _on_ranks(accelerator, without_result, here=accelerator.is_local_main_process)


def _on_ranks(
    accelerator: Accelerator, work: Callable[[], Result], *, here: bool
) -> list[Result | None]:
    """Run `work` on the ranks that are `here`: each rank's result, on all ranks."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(work) if here else None
        while True:
            done, result, error = future is None, None, None
            if future is not None and wait([future], timeout=HEARTBEAT_SECONDS).done:
                done, error = True, future.exception()
                result = None if error else future.result()
            news = gather_object([(done, result, error)])
            for _, _, error in news:
                if error is not None:
                    raise error
            if all(done for done, _, _ in news):
                return [result for _, result, _ in news]


class PreemptionGuard:
    """Turns SIGTERM and SIGINT into a request that all ranks see at the same step.

        with PreemptionGuard() as guard:
            while ...:
                ...                       # a step
                if guard.requested():     # the same answer on all ranks
                    ...                   # save a checkpoint
                    sys.exit(EXIT_TRY_AGAIN)

    The first signal is a request. A later one ends the process at once, with 128 + its number, even in
    the middle of a collective. Signals within `SAME_REQUEST_SECONDS` of the first are the same request:
    a terminal and a launcher both deliver a Ctrl-C, and so do Slurm and a launcher a SIGTERM.

    The launcher (torchrun under `accelerate launch`) kills its workers 30 s after it was signalled
    itself; TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds) gives a large checkpoint more.

    To be made, entered and left on the main thread, on all ranks (it makes a process group). One at a time.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that this rank got, if any."""
        self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> PreemptionGuard:
        # Python runs a handler only between two bytecodes of the main thread, and a rank that waits in a
        # collective runs none. The wake-up descriptor is written at once, so a thread reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # First the descriptor: a signal that comes in between must not be lost.
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {s: signal.signal(s, lambda *_: None) for s in self.SIGNALS}
        # A data worker is forked from here; its signals are not ours.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The thread reads the end of the stream. close() would not do: data workers inherited the socket.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def requested(self) -> bool:
        """Whether any rank got a signal: the same answer on all ranks. Collective."""
        return self._any(self.received is not None)

    def main_decides(self, yes: bool) -> bool:
        """The main rank's `yes` on all ranks; the others' is not looked at. Collective.

        For what the ranks may see differently, as a clock.
        """
        return self._any(yes and torch.distributed.get_rank() == 0)

    def _any(self, yes: bool) -> bool:
        flag = torch.tensor([yes], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _watch(self) -> None:
        first = 0.0
        while data := self._reader.recv(1):
            if data[0] not in self.SIGNALS:
                continue
            now, name = time.monotonic(), signal.Signals(data[0]).name
            if self.received is None:
                self.received, first = signal.Signals(data[0]), now
                print(
                    f"{name}: finishing the step, then saving a checkpoint; again to exit at once",
                    file=sys.stderr,
                    flush=True,
                )
            elif now - first > SAME_REQUEST_SECONDS:
                os._exit(128 + data[0])
