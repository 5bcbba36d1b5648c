"""The signals that ask a run to stop, and the exit code of a run that did.

Costs: nothing; no library is imported, so that a launcher can listen before it does anything else.
"""

from __future__ import annotations

import signal

EXIT_TRY_AGAIN = 75
"""Exit code of a run that was asked to stop and can be resumed (`EX_TEMPFAIL` of sysexits.h)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler's, a Ctrl-C, a closed terminal."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that this process is to listen to: not SIGHUP where `nohup` had it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(s for s in STOP_SIGNALS if not (ignored and s == signal.SIGHUP))
