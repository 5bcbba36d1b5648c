"""Attach a debugger to one rank of a running job, with `export DEBUGPY=1`.

Guarantees: debugpy is imported only then, and only on the rank that is debugged. It listens on this
machine only, unless told otherwise: whoever reaches a debug port can run any code as you.
Costs: without DEBUGPY=1, nothing.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from pathlib import Path

from accelerate import Accelerator
from termcolor import colored

from anchor_context.agreement import on_one_rank


def setup_debugpy(
    accelerator: Accelerator,
    endpoint: str = "localhost",
    port: int = 5678,
    rank: int = 0,
    force: bool = False,
) -> None:
    """With DEBUGPY=1, let one rank listen for a debugger, and all ranks wait until it is attached.

    Collective. DEBUGPY_ENDPOINT, DEBUGPY_PORT and DEBUGPY_RANK take precedence over the arguments.

    Args:
        endpoint: address or host name to listen on. Other than loopback needs DEBUGPY_ALLOW_REMOTE=1.
        rank: the process that listens.
        force: if the port is held by a debug server that an earlier run of this project started, end
            that server. Anything else that holds the port is left alone.

    Raises:
        ValueError: an endpoint, port or rank that cannot be, or a taken port; on all ranks.
    """
    if os.environ.get("DEBUGPY") != "1":
        return
    endpoint = os.environ.get("DEBUGPY_ENDPOINT", endpoint)
    port = _whole_number("DEBUGPY_PORT", port, 1, 65535)
    rank = _whole_number("DEBUGPY_RANK", rank, 0, accelerator.num_processes - 1)

    problem = None
    if accelerator.process_index == rank:
        try:
            # Here and not in `on_one_rank`: debugpy follows the thread that calls it.
            _listen(endpoint, port, force=force)
        except ValueError as error:
            problem = error
        else:
            _say(
                f"rank {rank} waits for a debugger on {endpoint}:{port} (in VS Code: "
                '"Attach to train.py (DEBUGPY=1)"); the other ranks wait for it',
                "yellow",
            )
    on_one_rank(accelerator, lambda: _wait_for_client(problem), rank=rank)
    if accelerator.process_index == rank:
        _say(f"debugger attached to rank {rank}", "green")


def _listen(endpoint: str, port: int, *, force: bool) -> None:
    """Open the debug port; ValueError if that cannot or must not be."""
    address = _resolve(endpoint)
    if (
        not ipaddress.ip_address(address).is_loopback
        and os.environ.get("DEBUGPY_ALLOW_REMOTE") != "1"
    ):
        raise ValueError(
            f"DEBUGPY_ENDPOINT={endpoint} is not a loopback address: whoever reaches a debug port can run "
            "any code as you. Use localhost and an SSH tunnel, or set DEBUGPY_ALLOW_REMOTE=1"
        )
    if force and not _is_free(address, port):
        _end_our_server(port)
    if not _is_free(address, port):
        raise ValueError(
            f"DEBUGPY_PORT={port} on {endpoint} is taken: set DEBUGPY_PORT to another, or end the process "
            "that holds it (setup_debugpy(force=True) ends a debug server of an earlier run)"
        )
    import debugpy

    # A data worker, forked later, would wait for an editor of its own, and the rank for the worker.
    debugpy.configure(subProcess=False)
    debugpy.listen((address, port))
    server = _debug_server(port)
    if server is not None:
        record = {"pid": server.pid, "started": server.create_time()}
        _record_file(port).parent.mkdir(parents=True, exist_ok=True)
        _record_file(port).write_text(json.dumps(record))


def _wait_for_client(problem: ValueError | None) -> None:
    if problem is not None:
        raise problem
    import debugpy

    debugpy.wait_for_client()


def _end_our_server(port: int) -> None:
    """End the debug server on `port` if the record says that this project started it."""
    server, record = _debug_server(port), _record_file(port)
    if server is None or not record.exists():
        return
    if json.loads(record.read_text()) == {"pid": server.pid, "started": server.create_time()}:
        _say(
            f"ending the debug server of an earlier run on port {port} (process {server.pid})",
            "yellow",
        )
        server.kill()
        server.wait(timeout=10)
        record.unlink()


def _debug_server(port: int):
    """The `psutil.Process` of this user's debugpy adapter that serves `port`; None if there is none."""
    import psutil

    for process in psutil.process_iter(["cmdline", "uids"]):
        command = process.info["cmdline"] or []
        is_adapter = any(Path(part).parts[-2:] == ("debugpy", "adapter") for part in command)
        mine = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if is_adapter and mine and _follows(command, "--port", str(port)):
            return process
    return None


def _follows(command: list[str], option: str, value: str) -> bool:
    return option in command and command[command.index(option) + 1 :][:1] == [value]


def _record_file(port: int) -> Path:
    """Where the server's process id is kept. The home folder may be shared between machines."""
    return Path.home() / ".cache/anchor_context" / f"debugpy-{socket.gethostname()}-{port}.json"


def _resolve(endpoint: str) -> str:
    try:
        return socket.getaddrinfo(endpoint, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise ValueError(f"DEBUGPY_ENDPOINT={endpoint}: {error.strerror}") from error


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed one may linger
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _whole_number(name: str, default: int, lowest: int, highest: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise ValueError(f"{name}={text} must be a whole number from {lowest} to {highest}")
    return int(text)


def _say(message: str, color: str) -> None:
    print(colored(message, color), file=sys.stderr, flush=True)
