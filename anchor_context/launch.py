"""`accelerate launch` for schedulers: passes signals on to the ranks, and their exit code back.

    python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py …

Takes what `accelerate launch` takes. That alone ends with code 1 whatever its ranks returned, and when
it is signalled it kills them 30 s later, in the middle of a large checkpoint. This ends with

    0        finished
    75       stopped by a signal; the same command with --resume auto continues
    2        a flag or the data is wrong, or a path cannot be read or written
    128 + N  a rank died of signal N, or a second signal N ended the run at once
    1        anything else

Guarantees: it signals nobody by itself; a rank that fails still ends all others.
Costs: nothing, it is the same launcher in the same process.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from termcolor import colored
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from anchor_context.agreement import EXIT_TRY_AGAIN, PreemptionGuard


def main(arguments: list[str]) -> int:
    """Launch, wait, and return the exit code of the rank that failed first, or 0."""
    asked: list[int] = []  # the signals that came

    def pass_on(_number: int, _frame: object) -> None:
        # Always as SIGTERM: a SIGINT before the first step would be Python's KeyboardInterrupt, code 1.
        asked.append(signal.SIGTERM)
        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has just left
                rank.send_signal(signal.SIGTERM)
        if not ranks:
            sys.exit(EXIT_TRY_AGAIN)

    if not torch.cuda.is_available():  # or every rank's DeepSpeed warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torchrun's own handlers would raise in the launcher; of these two signals it is told to keep off.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    for number in PreemptionGuard.SIGNALS:
        signal.signal(number, pass_on)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        code = exit_code(error.get_first_failure()[1].exitcode, asked)
        if code == EXIT_TRY_AGAIN:
            print(colored("stopped; --resume auto continues", "yellow"), file=sys.stderr)
        elif code != 2:  # then the rank has said what is wrong
            print(error, file=sys.stderr)
        return code
    return 0


def exit_code(first_failure: int, asked: list[int]) -> int:
    """The launcher's code for a rank's, which is negative where a signal killed it.

    A rank that is asked to stop before its first step has nothing to save and dies of the signal.
    """
    if asked and -first_failure in PreemptionGuard.SIGNALS:
        return EXIT_TRY_AGAIN
    return 128 - first_failure if first_failure < 0 else first_failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
