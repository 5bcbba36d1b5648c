"""The rank grid: data × ring × Ulysses, over yunchang's process groups.

Rank r stands at r = (data · ring_degree + ring) · ulysses_degree + ulysses: Ulysses ranks are
neighbours (their all-to-all wants the fastest links), then the ring, then the data groups. The
sequence-parallel group of a rank, ring × Ulysses, holds the same rows; each data group its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RankGrid:
    """This rank's place in the grid, as plain integers (safe to send to loader workers)."""

    data_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1
    data_rank: int = 0
    ring_rank: int = 0
    ulysses_rank: int = 0

    @property
    def sequence_degree(self) -> int:
        """Ranks that share one row."""
        return self.ring_degree * self.ulysses_degree

    def __str__(self) -> str:
        return f"data {self.data_degree} × ring {self.ring_degree} × Ulysses {self.ulysses_degree}"


def make_grid(*, rank: int, world_size: int, ring_degree: int, ulysses_degree: int) -> RankGrid:
    """Place `rank` in the grid.

    Raises:
        ValueError: the degrees do not divide the number of ranks; the message prints all factors.
    """
    sequence_degree = ring_degree * ulysses_degree
    if min(ring_degree, ulysses_degree) < 1 or world_size % sequence_degree:
        raise ValueError(
            f"--ring_degree {ring_degree} × --ulysses_degree {ulysses_degree} = {sequence_degree} "
            f"ranks per row does not divide the {world_size} ranks launched; "
            "change a degree or --num_processes"
        )
    return RankGrid(
        data_degree=world_size // sequence_degree,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
        data_rank=rank // sequence_degree,
        ring_rank=rank % sequence_degree // ulysses_degree,
        ulysses_rank=rank % ulysses_degree,
    )


def make_groups(grid: RankGrid, *, rank: int, world_size: int) -> tuple[ProcessGroup, ProcessGroup]:
    """The (ring, Ulysses) process groups of this rank. Collective: every rank calls it once."""
    from yunchang.globals import PROCESS_GROUP, set_seq_parallel_pg

    set_seq_parallel_pg(grid.ulysses_degree, grid.ring_degree, rank, world_size)
    return PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG
