"""All ranks get one answer: from one rank's work, from a signal that one of them got, from one clock."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp

from anchor_context import command_line
from anchor_context.attention.patterns import check_pattern
from anchor_context.run import agreement, preemption
from anchor_context.run.agreement import on_each_machine, on_one_rank
from anchor_context.run.preemption import PreemptionGuard


def start(ranks: int, job, folder: Path):
    """Start `job(rank, folder, accelerator)` on gloo processes."""
    port = random.SystemRandom().randrange(20000, 60000)
    return mp.spawn(_rank_main, args=(ranks, port, job, folder), nprocs=ranks, join=False)


def _rank_main(rank: int, ranks: int, port: int, job, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    job(rank, folder, accelerator)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


class Awkward(Exception):
    """As libraries write them: it pickles, but does not come back."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


def errors_arrive(rank: int, accelerator) -> None:
    def fails_awkwardly():
        raise Awkward("trouble", "the cellar")

    with pytest.raises(Exception) as caught:
        on_one_rank(accelerator, fails_awkwardly)
    if rank == 0:
        assert type(caught.value) is Awkward and str(caught.value) == "trouble in the cellar"
    else:
        assert type(caught.value) is agreement.ErrorElsewhere
        assert str(caught.value) == "Awkward: trouble in the cellar"
        assert "in fails_awkwardly" in caught.value.__cause__.tb

    def moves():
        os.rename("/nowhere/a", "/nowhere/b")

    with pytest.raises(FileNotFoundError, match="'/nowhere/a' -> '/nowhere/b'"):
        on_one_rank(accelerator, moves)

    # What a command says of an error is the same on all ranks: ours in one line, a library's not.
    with pytest.raises(ValueError) as ours:
        on_one_rank(accelerator, lambda: check_pattern("nonsense", "none"))
    assert command_line._mistake(ours.value) == str(ours.value)
    assert "nonsense" in str(ours.value)
    with pytest.raises(ValueError) as librarys:
        on_one_rank(accelerator, lambda: json.loads("{"))
    assert command_line._mistake(librarys.value) is None
    assert "Expecting property name" in str(librarys.value)


def agree(rank: int, folder: Path, accelerator) -> None:
    agreement.HEARTBEAT_SECONDS = 0.02  # several beats before the work is done
    threads = threading.active_count()
    ran = []

    def slow():
        ran.append(rank)
        threading.Event().wait(0.1)
        return {"rank": rank}

    assert on_one_rank(accelerator, slow, rank=1) == {"rank": 1}
    assert ran == ([1] if rank == 1 else [])

    def fails():
        raise FileNotFoundError(2, "No such file", "/somewhere")

    with pytest.raises(FileNotFoundError) as caught:
        on_one_rank(accelerator, fails)
    assert (caught.value.errno, caught.value.filename) == (2, "/somewhere")
    assert on_one_rank(accelerator, lambda: None) is None
    errors_arrive(rank, accelerator)
    each_machine_once(rank, accelerator)

    signalled_at_the_door(rank)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with PreemptionGuard() as guard:
        assert not guard.requested()
        assert guard.main_decides(rank == 0)
        assert not guard.main_decides(rank == 1)
        if rank == 1:
            for _ in range(3):  # a launcher's and a scheduler's, of one request
                os.kill(os.getpid(), signal.SIGTERM)
            while guard.received is None:
                threading.Event().wait(0.01)
        assert guard.requested()
        assert guard.received == (signal.SIGTERM if rank == 1 else None)
        child = os.fork()
        if child == 0:  # a data worker's signals are its own
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        worker = os.fork()  # outlives the guard, and holds a copy of its socket
        if worker == 0:
            signal.pause()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert threading.active_count() == threads
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    (folder / f"done{rank}").touch()


def each_machine_once(rank: int, accelerator) -> None:
    """Two ranks of one machine, then as if each were a machine's first, with a cache of its own."""
    ran = []
    assert on_each_machine(accelerator, lambda: ran.append(rank) or f"of {rank}") == "of 0"
    assert ran == [0][: 1 - rank]

    def prepares_for_longer_on_the_second() -> str:
        threading.Event().wait(0.1 * rank)
        ran.append("own")
        return f"of {rank}"

    machine = SimpleNamespace(is_local_main_process=True)
    assert on_each_machine(machine, prepares_for_longer_on_the_second) == f"of {rank}"
    assert ran[-1] == "own"
    together = [None, None]
    torch.distributed.all_gather_object(together, ran)
    assert together == [[0, "own"], ["own"]]

    def fails_on_the_second() -> None:
        if rank == 1:
            raise ValueError("rows.jsonl, line 3: broken")

    with pytest.raises(ValueError, match="line 3"):
        on_each_machine(machine, fails_on_the_second)


def signalled_at_the_door(rank: int) -> None:
    """Rank 1 is signalled as soon as the signal no longer ends it; all ranks learn of it."""
    install = signal.signal

    def install_and_be_signalled(number, handler):
        previous = install(number, handler)
        if rank == 1 and number == signal.SIGTERM and callable(handler):
            os.kill(os.getpid(), signal.SIGTERM)
        return previous

    signal.signal = install_and_be_signalled
    try:
        with PreemptionGuard() as guard:
            for _ in range(100):
                if guard.received is None and rank == 1:
                    threading.Event().wait(0.05)
            assert guard.requested()
    finally:
        signal.signal = install


def blocked(rank: int, folder: Path, accelerator) -> None:
    """Rank 0 waits in a collective for rank 1, which signals it twice instead of coming."""
    preemption.SAME_REQUEST_SECONDS = -1.0  # every further signal is a second one
    pids = [None, None]
    torch.distributed.all_gather_object(pids, os.getpid())
    with PreemptionGuard():
        accelerator.wait_for_everyone()
        if rank == 0:
            torch.distributed.barrier()
            raise AssertionError("nobody came")
        os.kill(pids[0], signal.SIGTERM)
        threading.Event().wait(0.5)  # else the two would be one
        os.kill(pids[0], signal.SIGTERM)
        threading.Event().wait(5)  # the other is gone long before


def test_ranks_agree(tmp_path):
    start(2, agree, tmp_path).join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done0", "done1"]


def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(tmp_path):
    context = start(2, blocked, tmp_path)
    with pytest.raises(mp.ProcessExitedException) as caught:
        context.join()
    assert (caught.value.error_index, caught.value.exit_code) == (0, 128 + signal.SIGTERM)
