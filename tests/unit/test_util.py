"""setup_debugpy: off unless asked for, one rank listens, on this machine only."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from anchor_context import util
from anchor_context.util import setup_debugpy
from tests.debug_client import DebugClient

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import os, sys
from pathlib import Path
from accelerate import Accelerator
from anchor_context.util import setup_debugpy

def work(rank):
    total = 40 + 2 * rank
    print(f"rank {rank} total {total}")

accelerator = Accelerator(cpu=True)
setup_debugpy(accelerator)
Path(f"passed{accelerator.process_index}").touch()
work(accelerator.process_index)
print("debugpy" in sys.modules)
accelerator.wait_for_everyone()
accelerator.end_training()
"""
BREAKPOINT = SCRIPT.splitlines().index('    print(f"rank {rank} total {total}")') + 1


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No setting from outside."""
    for name in [name for name in os.environ if name.startswith("DEBUGPY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Start the script on so many ranks with these settings; what is left over is killed."""
    processes = []

    def start_ranks(ranks: int, **settings: str) -> list[subprocess.Popen]:
        (tmp_path / "script.py").write_text(SCRIPT)
        master = str(free_port())
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
            }
            env = os.environ | {name: str(value) for name, value in place.items()} | settings
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": master, "PYTHONPATH": str(ROOT)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "script.py"],
                    cwd=tmp_path,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return processes[-ranks:]

    yield start_ranks
    for process in processes:
        process.kill()
        process.wait()


def wait_for_server(port: int, process: subprocess.Popen) -> None:
    """Until the debug port is open."""
    while not any(
        socket.status == psutil.CONN_LISTEN and socket.laddr.port == port
        for socket in psutil.net_connections("tcp")
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def test_an_editor_attaches_to_one_rank_and_the_others_wait(start, port, tmp_path):
    settings = {"DEBUGPY": "1", "DEBUGPY_RANK": "1", "DEBUGPY_PORT": str(port)}
    ranks = start(2, **settings)
    wait_for_server(port, ranks[1])
    assert not list(tmp_path.glob("passed*"))

    client = DebugClient(port)
    thread = client.run_to(tmp_path / "script.py", BREAKPOINT)
    assert client.evaluate("total", thread) == "42"
    client.go_on_and_leave(tmp_path / "script.py", thread)

    told = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    assert "rank 0 total 40" in told[0] and told[0].endswith("False\n"), (
        "only rank 1 imports debugpy"
    )
    assert "rank 1 total 42" in told[1] and told[1].endswith("True\n")
    assert f"rank 1 waits for a debugger on localhost:{port}" in told[1]


def test_force_leaves_what_holds_the_port_alone(port, monkeypatch):
    monkeypatch.setenv("DEBUGPY", "1")
    monkeypatch.setattr(util, "on_one_rank", lambda _, work, rank: work())
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match="is taken: set DEBUGPY_PORT to another, or end"):
            one = SimpleNamespace(num_processes=1, process_index=0)
            setup_debugpy(one, port=port, force=True)
        socket.create_connection(("127.0.0.1", port)).close()


def test_a_taken_port_fails_every_rank_with_its_number(start, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        ranks = start(2, DEBUGPY="1", DEBUGPY_RANK="1", DEBUGPY_PORT=str(port))
        for process in ranks:
            told = process.communicate()[0]
            assert process.returncode == 1
            assert f"ValueError: DEBUGPY_PORT={port} on localhost is taken" in told


@pytest.mark.parametrize("setting", ["", "0"])
def test_off_does_nothing(monkeypatch, setting):
    monkeypatch.setenv("DEBUGPY", setting)
    monkeypatch.setenv("DEBUGPY_PORT", "nonsense")
    monkeypatch.setitem(sys.modules, "debugpy", None)  # importing it would raise
    setup_debugpy(None)


@pytest.mark.parametrize("endpoint", ["0.0.0.0", "192.0.2.1"])
def test_remote_is_refused_unless_allowed(monkeypatch, port, endpoint):
    with pytest.raises(ValueError, match=f"DEBUGPY_ENDPOINT={endpoint} is not a loopback address"):
        util._listen(endpoint, port)
    monkeypatch.setenv("DEBUGPY_ALLOW_REMOTE", "1")
    opened = []
    debugpy = SimpleNamespace(configure=lambda **_: None, listen=opened.append)
    monkeypatch.setitem(sys.modules, "debugpy", debugpy)
    monkeypatch.setattr(util, "_is_free", lambda address, port: True)
    util._listen(endpoint, port)
    assert opened == [(endpoint, port)]


@pytest.mark.parametrize(
    "name, value", [("DEBUGPY_PORT", "http"), ("DEBUGPY_PORT", "70000"), ("DEBUGPY_RANK", "2")]
)
def test_a_bad_number_is_named(monkeypatch, name, value):
    monkeypatch.setenv("DEBUGPY", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} must be a whole number"):
        setup_debugpy(SimpleNamespace(num_processes=2, process_index=0))


def test_the_editors_settings_attach_where_a_run_listens():
    text = (ROOT / ".vscode/launch.json").read_text()
    settings = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    attach, *others = settings["configurations"]
    assert (attach["type"], attach["request"]) == ("debugpy", "attach")
    default = inspect.signature(setup_debugpy).parameters
    assert attach["connect"] == {
        "host": default["endpoint"].default,
        "port": default["port"].default,
    }
    assert attach["pathMappings"][0].keys() == {"localRoot", "remoteRoot"}
    assert attach["name"] in inspect.getsource(setup_debugpy), "what a waiting run tells"
    tests = [entry for entry in others if entry.get("module") == "pytest"]
    assert tests and all(entry["request"] == "launch" for entry in tests)
    assert "\n# export DEBUGPY=1\n" in (ROOT / "demo_llama.sh").read_text()


def test_an_unknown_host_is_named():
    with pytest.raises(ValueError, match=r"DEBUGPY_ENDPOINT=nowhere\.invalid"):
        util._listen("nowhere.invalid", 5678)


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("::1", "DEBUGPY_ENDPOINT=::1 has no IPv4 address, .*use localhost"),
        (
            "192.0.2.1",
            "DEBUGPY_ENDPOINT=192.0.2.1 .*cannot be listened on: Cannot assign requested",
        ),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_not_called_taken(monkeypatch, endpoint, says):
    monkeypatch.setenv("DEBUGPY_ALLOW_REMOTE", "1")
    with pytest.raises(ValueError, match=says):
        util._listen(endpoint, free_port())
