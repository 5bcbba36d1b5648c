"""Attach a debugger to one rank of a running job, with `export DEBUGPY=1`.

Guarantees: debugpy is imported only then, and only on the rank that is debugged. It listens on this
machine only, unless told otherwise: whoever reaches a debug port can run any code as you.
Costs: without DEBUGPY=1, nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from accelerate import Accelerator

from anchor_context.files import warn
from anchor_context.run.agreement import on_one_rank


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
        force: for callers of the original, which killed all debug servers; here nothing is killed, and a
            taken port is an error that says what to do.

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
            _listen(endpoint, port)
        except ValueError as error:
            problem = error
        else:
            warn(
                f"rank {rank} waits for a debugger on {endpoint}:{port} (in VS Code: "
                '"Attach to train.py (DEBUGPY=1)"); the other ranks wait for it'
            )
    on_one_rank(accelerator, lambda: _wait_for_client(problem), rank=rank)
    if accelerator.process_index == rank:
        warn(f"debugger attached to rank {rank}")


def _listen(endpoint: str, port: int) -> None:
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
    try:
        free = _is_free(address, port)
    except OSError as error:
        raise ValueError(
            f"DEBUGPY_ENDPOINT={endpoint} (DEBUGPY_PORT={port}) cannot be listened on: {error.strerror}; "
            "use localhost, or another port"
        ) from error
    if not free:
        raise ValueError(
            f"DEBUGPY_PORT={port} on {endpoint} is taken: set DEBUGPY_PORT to another, or end the process "
            "that holds it"
        )
    import debugpy

    # A data worker, forked later, would wait for an editor of its own, and the rank for the worker.
    debugpy.configure(subProcess=False)
    debugpy.listen((address, port))


def _wait_for_client(problem: ValueError | None) -> None:
    if problem is not None:
        raise problem
    import debugpy

    debugpy.wait_for_client()


def _resolve(endpoint: str) -> str:
    try:
        found = socket.getaddrinfo(endpoint, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(f"DEBUGPY_ENDPOINT={endpoint}: {error.strerror}") from error
    for family, _, _, _, address in found:
        if family == socket.AF_INET:
            return address[0]
    raise ValueError(
        f"DEBUGPY_ENDPOINT={endpoint} has no IPv4 address, and the debugger listens on those alone: use "
        "localhost or 127.0.0.1"
    )


def _is_free(address: str, port: int) -> bool:
    """Raises `OSError` for an address that is not this machine's, or a port that takes other rights."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed one may linger
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def _whole_number(name: str, default: int, lowest: int, highest: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise ValueError(f"{name}={text} must be a whole number from {lowest} to {highest}")
    return int(text)
