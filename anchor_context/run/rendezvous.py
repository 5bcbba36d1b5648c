"""Where the ranks of one machine meet: on its loopback interface, where nobody else can knock.

torchrun's rendezvous is a key-value store without a password that listens on all interfaces, and gloo and
NCCL listen on the first network they find. One machine needs none of that. Several machines do, and
`run/README.md` says how to fence them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

TIMEOUT = timedelta(minutes=10)


def meet_on_loopback() -> None:
    """From now on, a launch on one machine meets there, whatever rendezvous torchrun was told to use."""
    registry.get_rendezvous_handler = _on_loopback_if_alone(registry.get_rendezvous_handler)


def _on_loopback_if_alone(
    elsewhere: Callable[[RendezvousParameters], RendezvousHandler],
) -> Callable[[RendezvousParameters], RendezvousHandler]:
    def get_rendezvous_handler(parameters: RendezvousParameters) -> RendezvousHandler:
        if parameters.max_nodes > 1:
            return elsewhere(parameters)
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
        return LoopbackRendezvous(parameters)

    return get_rendezvous_handler


def loopback_interface() -> str:
    """Its name: `lo` on Linux."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    raise RuntimeError("this machine has no loopback interface")


class LoopbackRendezvous(RendezvousHandler):
    """A store on 127.0.0.1, at the port of the launcher's flags (0: any free one), for one launcher."""

    def __init__(self, parameters: RendezvousParameters):
        self._backend, self._run_id = parameters.backend, parameters.run_id
        _, self._port = parse_rendezvous_endpoint(parameters.endpoint, 0)
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            # TCPStore by itself binds to all interfaces, so it is handed a socket that is bound.
            listener = socket.create_server(("127.0.0.1", self._port))
            self._port = listener.getsockname()[1]
            self._store = TCPStore(
                "127.0.0.1",
                self._port,
                is_master=True,
                timeout=TIMEOUT,
                multi_tenant=True,
                master_listen_fd=listener.detach(),
            )
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return self._backend

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True
