"""A process that ends with the one that works for it.

Whoever is killed with SIGKILL, as the out-of-memory killer does, cannot end the processes it started. Each
of them therefore watches: a rank its launcher, a data worker its rank, a worker of the preparation the
process that prepares.

Costs: a thread that looks once a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

LAUNCHER = "ANCHOR_CONTEXT_LAUNCHER"
"""The environment variable in which a launcher tells its ranks its process id."""

LOOK_SECONDS = 1.0


def end_with_launcher() -> None:
    """In a rank: end when the launcher is gone, be it gone already. Without a launcher, do nothing."""
    # Taken out: a launcher that somebody starts from here says its own.
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None and "TORCHELASTIC_RUN_ID" in os.environ:  # `accelerate launch` or torchrun
        launcher = os.getppid()
    if launcher is not None:
        rank = os.environ.get("RANK", "?")
        _end_with(int(launcher), last_words=f"the launcher is gone; rank {rank} ends")


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: end when its parent is gone."""
    _end_with(multiprocessing.parent_process().pid)


def live_with_rank(_worker: int) -> None:
    """A worker ends with its rank, and not before: the rank needs it to finish its step.

    So it passes over the signals that a scheduler or a terminal sends to everyone, but for the SIGTERM
    that multiprocessing sends when a rank leaves by an error.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # Before any thread is started: a thread has the mask of the one that starts it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_the_ranks_signal, daemon=True).start()
    end_with_parent()


def _end_by_the_ranks_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _end_with(process_id: int, *, last_words: str | None = None) -> None:
    """End this process, with code 1, when the other one is gone; a thread sees to it from now on."""
    try:
        other = psutil.Process(process_id)  # knows when it began: a later one may have the same id
    except psutil.NoSuchProcess:
        other = None

    def watch() -> None:
        while other is not None and _lives(other):
            time.sleep(LOOK_SECONDS)
        if last_words is not None:
            with suppress(OSError, ValueError):  # nobody may be left to read
                print(last_words, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _lives(process: psutil.Process) -> bool:
    """Not so a killed one that nobody has waited for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
