"""Two "hosts" on one machine, as network namespaces: each starts its own launcher, as two nodes would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from runs import ROOT, losses

ADDRESSES = ("10.213.7.1", "10.213.7.2")
RING = ("--parallel_mode", "ring_attn")


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def kill_processes(host: str) -> None:
    """Every process in the namespace, at once."""
    for process in ip("netns", "pids", host).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by one cable, with an address each; no way to anything else."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian's iproute2)")
    names = tuple(f"host{i}-{os.getpid()}" for i in range(2))
    ends = tuple(f"veth{i}-{os.getpid()}"[:15] for i in range(2))
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        commands = [
            ("netns", "add", names[1]),
            ("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]),
        ]
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            commands += [
                ("link", "set", end, "netns", name),
                ("-n", name, "link", "set", end, "name", "eth0"),
                ("-n", name, "address", "add", f"{address}/24", "dev", "eth0"),
                ("-n", name, "link", "set", "eth0", "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                pytest.skip(f"`ip {' '.join(command)}` fails here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            kill_processes(name)
            ip("netns", "delete", name)


@pytest.fixture
def start_on(tiny, row_cache, tmp_path):
    """start_on(hosts, output, *flags) -> a launcher per host; what they print is in `tmp_path`."""
    launchers = []

    def start(hosts: tuple[str, str], output: Path, *flags: str) -> list[subprocess.Popen]:
        for machine_rank, host in enumerate(hosts):
            command = [
                *("ip", "netns", "exec", host),
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", "accelerate_configs/two_node.yaml", "--num_processes", "2"),
                *("--machine_rank", str(machine_rank), "--main_process_ip", ADDRESSES[0]),
                "train.py",
                *("--model_name_or_path", str(tiny.model), "--dataset", str(tiny.documents)),
                *("--seq-length", "256", "--learning-rate", "1e-3", "--mixed_precision", "no"),
                *("--output-dir", str(output), "--cache_dir", str(row_cache), *flags),
            ]
            # gloo and NCCL would take the interface of the host's name, and namespaces share a name.
            network = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
            with (tmp_path / f"{host}.log").open("w") as log:
                launchers.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | {"OMP_NUM_THREADS": "1"} | network,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return launchers

    yield start
    for launcher in launchers:
        launcher.kill()


def printed(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one(hosts, launch, start_on, tmp_path):
    flags = ("--max-train-steps", "5", *RING)
    launch(2, tmp_path / "one_host", *flags)
    launchers = start_on(hosts, tmp_path / "two_hosts", *flags)
    codes = [launcher.wait(timeout=300) for launcher in launchers]
    assert codes == [0, 0], printed(tmp_path)
    two, one = losses(tmp_path / "two_hosts"), losses(tmp_path / "one_host")
    assert len(two) == 5 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_host_whose_processes_die_stops_the_other_within_a_minute(hosts, start_on, tmp_path):
    output = tmp_path / "run"
    launchers = start_on(hosts, output, "--max-train-steps", "100000", *RING)
    for _ in range(300):  # until the first steps are done
        record = output / "metrics.jsonl"
        if record.exists() and record.read_text().count("\n") > 2:
            break
        assert launchers[0].poll() is None, printed(tmp_path)
        time.sleep(1)
    kill_processes(hosts[1])
    assert launchers[0].wait(timeout=60) != 0
