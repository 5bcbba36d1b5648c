"""Two "hosts" on one machine, as network namespaces: each starts its own launcher, as two nodes would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, losses

ADDRESSES = ("10.213.7.1", "10.213.7.2")
FLAGS = ("--max-train-steps", "5", "--parallel_mode", "ring_attn")


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


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
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one(hosts, launch, tiny, row_cache, tmp_path):
    launch(2, tmp_path / "one_host", *FLAGS)

    launchers = []
    for machine_rank, host in enumerate(hosts):
        command = [
            *("ip", "netns", "exec", host),
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", "accelerate_configs/two_node.yaml", "--num_processes", "2"),
            *("--machine_rank", str(machine_rank), "--main_process_ip", ADDRESSES[0]),
            "train.py",
            *("--model_name_or_path", str(tiny.model), "--dataset", str(tiny.documents)),
            *("--seq-length", "256", "--learning-rate", "1e-3", "--mixed_precision", "no"),
            *("--output-dir", str(tmp_path / "two_hosts"), "--cache_dir", str(row_cache), *FLAGS),
        ]
        # gloo and NCCL take the interface of the host's name unless told; a namespace shares its name.
        network = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
        with Path(tmp_path / f"{host}.log").open("w") as log:
            launchers.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"} | network,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [launcher.wait(timeout=300) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert codes == [0, 0], logs
    two, one = losses(tmp_path / "two_hosts"), losses(tmp_path / "one_host")
    assert len(two) == 5 and two == pytest.approx(one, rel=1e-5)
