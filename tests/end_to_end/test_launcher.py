"""The launcher, with small scripts in the place of `train.py`: who ends with whom, and who can knock."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from runs import ROOT, free_port

A_MINUTE = 60

RANK = """\
    import json, os, sys, time
    import psutil, torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from anchor_context.run.lifeline import end_with_launcher, live_with_rank
    from anchor_context.run.preemption import PreemptionGuard

    end_with_launcher()
    accelerator = Accelerator(cpu=True)
    with PreemptionGuard() as guard:  # a gloo group, with sockets of its own
        batches = iter(DataLoader(range(9), num_workers=1, worker_init_fn=live_with_rank))
        next(batches)
        guard.requested()
        me = psutil.Process()
        listening = {c.laddr.ip for p in (me, me.parent())
                     for c in p.net_connections("tcp") if c.status == "LISTEN"}
        guard.requested()
        with open(sys.argv[1] + os.environ["RANK"], "w") as file:
            json.dump({"pids": [me.pid, *[c.pid for c in me.children()]],
                       "listening": sorted(listening)}, file)
        while not guard.requested():
            time.sleep(0.1)
    sys.exit(75)
"""


@contextmanager
def launched(folder: Path, script: str, *, port: int, **how) -> Iterator[subprocess.Popen]:
    """The launcher with two ranks of `script`, which gets the start of file names as its argument."""
    (folder / "script.py").write_text(textwrap.dedent(script))
    command = [
        *(sys.executable, "-m", "anchor_context.launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2"),
        *("--main_process_port", str(port), str(folder / "script.py"), str(folder / "rank")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= how.pop("environment", {})
    log = (folder / "log").open("w")
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, **how
    )
    everyone = []
    try:
        yield launcher
    finally:
        with suppress(psutil.NoSuchProcess):
            everyone = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        launcher.wait()
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def reports(folder: Path, launcher: subprocess.Popen) -> list[dict]:
    """What both ranks wrote, once they have."""
    files = [folder / "rank0", folder / "rank1"]
    deadline = time.monotonic() + 2 * A_MINUTE
    while not all(file.exists() and file.read_text().endswith("}") for file in files):
        assert launcher.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return [json.loads(file.read_text()) for file in files]


def test_under_nohup_a_closed_terminal_is_nothing_and_a_killed_launcher_takes_all_with_it(tmp_path):
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with launched(tmp_path, RANK, port=free_port(), **nohup) as launcher:
        told = reports(tmp_path, launcher)
        assert [report["listening"] for report in told] == [["127.0.0.1"]] * 2
        everyone = [psutil.Process(pid) for report in told for pid in report["pids"]]
        assert len(everyone) == 4, "two ranks and two data workers"

        for process in [*everyone, launcher]:
            process.send_signal(signal.SIGHUP)
        time.sleep(2)
        assert all(process.is_running() for process in everyone) and launcher.poll() is None

        launcher.kill()  # and does not wait for it: it stays a zombie, as in many containers
        _, alive = psutil.wait_procs(everyone, timeout=A_MINUTE)
        assert not alive
    assert (tmp_path / "log").read_text().count("the launcher is gone") == 2


def test_a_closed_terminal_asks_all_to_stop_and_a_taken_port_changes_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with launched(tmp_path, RANK, port=port) as launcher:
            told = reports(tmp_path, launcher)
            assert [report["listening"] for report in told] == [["127.0.0.1"]] * 2
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.send_signal(signal.SIGHUP)
            launcher.send_signal(signal.SIGHUP)
            assert launcher.wait(A_MINUTE) == 75
    assert "SIGHUP: finishing the step" in (tmp_path / "log").read_text()


def test_a_terminal_that_is_closed_does_not_change_the_exit_code(tmp_path):
    """It takes with it what the launcher says last. (The ranks here say nothing.)"""
    rank = """\
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with open(sys.argv[1] + os.environ["RANK"], "w") as file:
            file.write("{}")
        time.sleep(600)
    """
    ours, its = os.openpty()

    def on_its_terminal():
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        for stream in range(3):
            os.dup2(its, stream)

    with launched(tmp_path, rank, port=0, preexec_fn=on_its_terminal, pass_fds=[its]) as launcher:
        os.close(its)
        reports(tmp_path, launcher)
        os.close(ours)  # the kernel sends SIGHUP
        assert launcher.wait(A_MINUTE) == 75


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("sys.exit(2)", 2, "error: what is wrong"),  # nothing follows what the user can mend
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was killed, most likely because"),
    ],
)
def test_the_last_line_says_what_to_do(tmp_path, end, code, last):
    rank = f"""\
        import os, signal, sys, time
        if os.environ["RANK"] == "0":
            signal.pause()
        print("error: what is wrong", file=sys.stderr, flush=True)
        {end}
    """
    with launched(tmp_path, rank, port=0) as launcher:
        assert launcher.wait(A_MINUTE) == code
    said = (tmp_path / "log").read_text()
    assert last in said.splitlines()[-1], said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_launchers_first_seconds_is_try_again(tmp_path, number):
    """It comes when the launcher begins to import torch, long before there is a rank."""
    hook = f"""\
        import os, sys

        class Signalled:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    os.kill(os.getpid(), {int(number)})

        sys.meta_path.insert(0, Signalled())
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hook))
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with launched(tmp_path, "never", port=0, environment=path) as launcher:
        assert launcher.wait(A_MINUTE) == 75, (tmp_path / "log").read_text()
