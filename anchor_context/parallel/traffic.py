"""Traffic: the bytes that this rank's attention really sent and received, by kind.

Guarantees: an entry is made where a message is posted, with the size of the tensor posted, so what is
counted is what was sent. With gradient checkpointing the forward runs twice and so do its messages: they
count twice, because they are sent twice. The traffic of data parallelism (gradients and ZeRO
partitions, DeepSpeed's) is not attention's and not counted. Costs a few integer additions per layer.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

KINDS = ("ring_kv", "ring_grad", "ulysses")
"""Keys and values to the ranks whose queries see them; their gradients back; Ulysses' all-to-alls."""


class Traffic:
    """Running sums until `take()`."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, int]] = defaultdict(
            lambda: {"sent": 0, "received": 0, "exchanges": 0}
        )

    def add(self, kind: str, *, sent: int, received: int) -> None:
        """Count the messages of one layer in one direction, `sent` and `received` bytes together."""
        assert kind in KINDS
        sums = self._sums[kind]
        sums["sent"] += sent
        sums["received"] += received
        sums["exchanges"] += 1

    def take(self) -> dict[str, dict[str, int]]:
        """The sums since the last call, `{kind: {"sent", "received", "exchanges"}}`; starts afresh.

        Bytes per layer are `sent / exchanges`: `ring_kv` makes one exchange per layer and forward,
        `ring_grad` one per layer and backward, `ulysses` four of each.
        """
        taken = {kind: dict(sums) for kind, sums in self._sums.items()}
        self._sums.clear()
        return taken


def size_in_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
