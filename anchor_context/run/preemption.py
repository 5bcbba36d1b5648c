"""A request to stop the run, which all ranks see at the same step.

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
from contextlib import suppress

import torch.distributed

from anchor_context.run.signals import stop_signals

SAME_REQUEST_SECONDS = 2.0


class PreemptionGuard:
    """Turns SIGTERM, SIGINT and SIGHUP into a request that all ranks see at the same step.

        with PreemptionGuard() as guard:
            while ...:
                ...                       # a step
                if guard.requested():     # the same answer on all ranks
                    ...                   # save a checkpoint
                    sys.exit(EXIT_TRY_AGAIN)

    The first signal is a request. A later one ends the process at once, with 128 + its number, even in
    the middle of a collective. Signals within `SAME_REQUEST_SECONDS` of the first are the same request:
    a terminal and a launcher both deliver a Ctrl-C, and so do Slurm and a launcher a SIGTERM. Under `nohup`
    a SIGHUP is none.

    The launcher (torchrun under `accelerate launch`) kills its workers 30 s after it was signalled
    itself; TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds) gives a large checkpoint more.

    To be made, entered and left on the main thread, on all ranks (it makes a process group). One at a time.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that this rank got, if any."""
        self._signals = stop_signals()
        self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> PreemptionGuard:
        # Python runs a handler only between two bytecodes of the main thread, and a rank that waits in a
        # collective runs none. The wake-up descriptor is written at once, so a thread reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # First the descriptor: a signal that comes in between must not be lost.
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {s: signal.signal(s, lambda *_: None) for s in self._signals}
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
            if data[0] not in self._signals:
                continue
            now, name = time.monotonic(), signal.Signals(data[0]).name
            if self.received is None:
                self.received, first = signal.Signals(data[0]), now
                with suppress(OSError):  # the terminal may be gone
                    print(
                        f"{name}: finishing the step, then saving a checkpoint; again to exit at once",
                        file=sys.stderr,
                        flush=True,
                    )
            elif now - first > SAME_REQUEST_SECONDS:
                os._exit(128 + data[0])
