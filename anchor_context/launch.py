"""`accelerate launch` for schedulers: passes signals on to the ranks, and their exit code back.

    python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py …

Takes what `accelerate launch` takes. That alone ends with code 1 whatever its ranks returned, and when
it is signalled it kills them 30 s later, in the middle of a large checkpoint. This ends with

    0        finished
    75       stopped by a signal; the same command with --resume auto continues
    2        a flag or the data is wrong, or a path cannot be read or written
    128 + N  a rank died of signal N, or a second signal N ended the run at once
    1        anything else

With `--plan_only` among the flags of `train.py` it starts one process, which plans for as many ranks as it
would have started, on all machines.

Guarantees: it signals nobody by itself; a rank that fails still ends all others; its ranks end with it,
however it ends. The ranks of one machine meet on its loopback interface.
Costs: nothing, it is the same launcher in the same process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from contextlib import suppress

import psutil
from termcolor import colored

from anchor_context.files import keep_talking
from anchor_context.run.lifeline import LAUNCHER
from anchor_context.run.signals import EXIT_TRY_AGAIN, STOP_SIGNALS, stop_signals

KILLED = (
    "error: rank {rank} was killed, most likely because the machine's memory ran out; take fewer processes, "
    "a shorter --seq-length or a lower --memory_gib, or end what runs beside. --resume auto continues"
)


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
            # At once: an exception may come in the middle of any import, and some would catch it.
            os._exit(EXIT_TRY_AGAIN)

    for number in stop_signals():
        signal.signal(number, pass_on)

    # Only now, for these take seconds.
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import api as torchruns_processes
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from anchor_context.run.rendezvous import meet_on_loopback
    from anchor_context.run.versions import check_versions

    try:
        check_versions()
    except ValueError as error:
        print(colored(f"error: {error}", "red"), file=sys.stderr)
        return 2

    if not torch.cuda.is_available():  # or every rank's DeepSpeed warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torchrun's own handlers would raise in the launcher; of our signals it is told to keep off.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # It would tell of ends, exit codes and signals what the ranks, or the lines below, say as well.
    torchruns_processes.logger.setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    meet_on_loopback()
    settings = launch_command_parser().parse_args(arguments)
    plan_in_one_process(settings)
    try:
        launch_command(settings)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = exit_code(failure.exitcode, asked)
        if code == EXIT_TRY_AGAIN:
            print(colored("stopped; --resume auto continues", "yellow"), file=sys.stderr)
        elif code != 2:  # then the rank has said what is wrong
            print(error, file=sys.stderr)
            if failure.exitcode == -signal.SIGKILL:
                print(colored(KILLED.format(rank=rank), "red"), file=sys.stderr)
        return code
    return 0


def plan_in_one_process(settings: Namespace) -> None:
    """Make of a launch with `--plan_only` one process, which is told of all ranks by `--plan_ranks`."""
    from accelerate.commands.config.config_args import load_config_from_file

    flags = [word.partition("=")[0].replace("-", "_") for word in settings.training_script_args]
    if "__plan_only" not in flags:
        return
    ranks = settings.num_processes
    if ranks is None and settings.config_file is not None:
        ranks = load_config_from_file(settings.config_file).num_processes
    if ranks is not None and "__plan_ranks" not in flags:
        settings.training_script_args += ["--plan_ranks", str(ranks)]
    settings.num_processes = settings.num_machines = 1
    settings.machine_rank = 0


def exit_code(first_failure: int, asked: list[int]) -> int:
    """The launcher's code for a rank's, which is negative where a signal killed it.

    A rank that is asked to stop before its first step has nothing to save and dies of the signal.
    """
    if asked and -first_failure in STOP_SIGNALS:
        return EXIT_TRY_AGAIN
    return 128 - first_failure if first_failure < 0 else first_failure


if __name__ == "__main__":
    keep_talking()
    sys.exit(main(sys.argv[1:]))
