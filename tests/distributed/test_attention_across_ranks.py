"""Ring, Ulysses and hybrid attention on real processes against the dense reference on one.

One spawn of four processes runs every case; the tests then look at what it found.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from ranks import Traffic, run_ranks
from rows import KINDS, PATTERNS, ROW, UNITS, layout_of

from anchor_context.attention import reference
from anchor_context.engine import make_engine
from anchor_context.parallel.groups import make_grid, make_groups
from anchor_context.parallel.shard import shard_batch

HEAD_DIM = 16
ROWS = [*((kind,) for kind in KINDS), ("primes", "one"), ("many", "one_token_at_edge"), UNITS]
CASES = [(rows, pattern, None) for pattern in PATTERNS for rows in ROWS]
WINDOW = 37
WINDOWED = [  # what a window leaves of a document lies on several ranks
    (rows, pattern, WINDOW)
    for pattern in PATTERNS
    if pattern[0] in ("anchor", "intra_doc")
    for rows in (("one",), ("primes", "one"), UNITS)
]
LAYOUTS = {  # name -> ranks, ring degree, Ulysses degree, heads, key/value heads
    "ring 2": (2, 2, 1, 4, 2),
    "ring 4": (4, 4, 1, 4, 1),
    "hybrid 2 x 2": (4, 2, 2, 4, 2),
    "hybrid 2 x 2, one key/value head": (4, 2, 2, 4, 1),
    "Ulysses 2": (2, 1, 2, 4, 2),
    "Ulysses 4, two key/value heads": (4, 1, 4, 4, 2),
    "flex, Ulysses 2": (2, 1, 2, 4, 2),
    "Ulysses 2, sinks": (2, 1, 2, 4, 2),
    "flex, Ulysses 2, sinks": (2, 1, 2, 4, 2),
    "ring 2, sinks": (2, 2, 1, 4, 2),
    "hybrid 2 x 2, sinks": (4, 2, 2, 4, 2),
    "one rank, bfloat16": (1, 1, 1, 4, 2),
    "ring 4, bfloat16": (4, 4, 1, 4, 2),
    "hybrid 2 x 2, bfloat16": (4, 2, 2, 4, 2),
}


def engine_of(name: str) -> str:
    return "flex" if name.startswith("flex") else "flash"


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith("bfloat16") else torch.float32


def sinks_of(name: str, heads: int) -> torch.Tensor | None:
    """(heads,) float32 logits, other ones for each head."""
    return torch.linspace(-1, 3, heads) if name.endswith("sinks") else None


FLOAT32 = [name for name in LAYOUTS if dtype_of(name) == torch.float32]


def placement_of(name: str, pattern: tuple[str, str]) -> str:
    """Flex takes the placement of which only it is capable: one anchor, visible to all ranks' tokens."""
    return "shared" if engine_of(name) == "flex" and pattern[0] == "anchor" else pattern[1]


def full_tensors(rows: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, for whole rows."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(rows, h, ROW, HEAD_DIM) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def on_ranks(rank: int, world: int) -> dict:
    found = {}
    for name, (_, ring_degree, ulysses_degree, heads, kv_heads) in LAYOUTS.items():
        grid = make_grid(
            rank=rank, world_size=world, ring_degree=ring_degree, ulysses_degree=ulysses_degree
        )
        ring_group, ulysses_group = make_groups(grid, rank=rank, world_size=world)
        engine = make_engine(
            engine_of(name),
            device=torch.device("cpu"),
            dtype=dtype_of(name),
            grid=grid,
            ring_group=ring_group,
            ulysses_group=ulysses_group,
        )
        for rows, (pattern, placement), window in CASES + WINDOWED:
            placement = placement_of(name, (pattern, placement))
            layout = layout_of(rows, pattern=pattern, placement=placement)
            index = torch.arange(ROW).expand(len(rows), -1)
            whole = {"input_ids": index, "labels": index, "position_ids": index, "layout": layout}
            batch = shard_batch(whole, grid=grid, windows=(None, WINDOW))
            mine = batch["input_ids"]  # the row indices of this rank's tokens
            tensors = [
                torch.take_along_dim(x, mine[:, None, :, None], dim=2).to(dtype_of(name))
                for x in full_tensors(len(rows), heads, kv_heads)
            ]
            q, k, v = (x.requires_grad_() for x in tensors[:3])
            engine.traffic.take()
            leaves = [q, k, v]
            if (sinks := sinks_of(name, heads)) is not None:
                leaves.append(sinks.requires_grad_())
            with Traffic() as forward:
                out = engine.attend(
                    q, k, v, batch["layout"], scale=0.3, sliding_window=window, sinks=sinks
                )
            with Traffic() as backward:
                out.backward(tensors[3])
            schedule = batch["layout"].schedule_of(window) if ring_degree > 1 else None
            found[name, rows, pattern, window] = {
                "tokens": mine,
                "tensors": [out.detach(), *(x.grad for x in leaves)],
                "account": engine.traffic.take(),
                "traffic": (forward.bytes, backward.bytes),
                "predicted": None
                if schedule is None
                else (schedule.my_sent_tokens, schedule.my_received_tokens, schedule.sent_tokens),
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(on_ranks, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def expected():
    """The dense reference in float64, once for each case and number of heads."""
    results = {}

    def compute(name, rows, pattern, placement, window):
        *_, heads, kv_heads = LAYOUTS[name]
        sinks = sinks_of(name, heads)
        key = rows, pattern, placement, window, heads, kv_heads, sinks is None
        if key not in results:
            layout = layout_of(rows, pattern=pattern, placement=placement)
            q, k, v, dout = (x.double() for x in full_tensors(len(rows), heads, kv_heads))
            leaves = [q, k, v] if sinks is None else [q, k, v, sinks.double()]
            leaves = [x.requires_grad_() for x in leaves]
            settings = {"sliding_window": window, "sinks": None if sinks is None else leaves[3]}
            out = reference.attend(*leaves[:3], layout, scale=0.3, **settings)
            out.backward(dout)
            results[key] = [out.detach(), *(x.grad for x in leaves)]
        return results[key]

    return compute


def errors(found, expected, name, rows, pattern, window=None) -> list[list[float]]:
    """Largest error of out, dq, dk and dv, as a share of the true tensor's largest entry: per data group.

    And of the sinks' gradient, which is summed over ranks as that of every weight."""
    ranks = LAYOUTS[name][0]
    truth = expected(name, rows, pattern[0], placement_of(name, pattern), window)
    of_groups = []
    for first in range(0, 4, ranks):  # each data group computes the same rows here
        parts = [
            found[rank][name, rows, pattern[0], window] for rank in range(first, first + ranks)
        ]
        tokens = torch.cat([part["tokens"] for part in parts], dim=1)
        assert (tokens.sort(dim=1).values == torch.arange(ROW)).all(), "a token is lost or doubled"
        of_tensors = []
        for i, true in enumerate(truth):
            of_ranks = [part["tensors"][i].double() for part in parts]
            if true.ndim == 1:
                error = (torch.stack(of_ranks).sum(0) - true).abs().max()
                of_tensors.append((error / true.abs().max()).item())
                continue
            together = torch.cat(of_ranks, dim=2)
            whole = torch.empty_like(true)
            whole.scatter_(2, tokens[:, None, :, None].expand_as(together), together)
            of_tensors.append(((whole - true).abs().max() / true.abs().max()).item())
        of_groups.append(of_tensors)
    return of_groups


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p[0])
@pytest.mark.parametrize("rows", ROWS, ids="+".join)
@pytest.mark.parametrize("name", FLOAT32)
def test_outputs_and_gradients_equal_the_reference(found, expected, name, rows, pattern):
    for of_group in errors(found, expected, name, rows, pattern):
        assert max(of_group) < 1e-5


@pytest.mark.parametrize(("rows", "pattern", "window"), WINDOWED)
@pytest.mark.parametrize("name", FLOAT32)
def test_outputs_and_gradients_through_a_window(found, expected, name, rows, pattern, window):
    for of_group in errors(found, expected, name, rows, pattern, window):
        assert max(of_group) < 1e-5


@pytest.mark.parametrize("rows", ROWS, ids="+".join)
@pytest.mark.parametrize("name", ["ring 4, bfloat16", "hybrid 2 x 2, bfloat16"])
def test_bfloat16_rounds_little_more_than_on_one_rank(found, expected, name, rows):
    """Parts are rounded before they are merged, and gradients before they travel: twice, not more."""
    for pattern in PATTERNS:
        (ours,) = errors(found, expected, name, rows, pattern)
        theirs = errors(found, expected, "one rank, bfloat16", rows, pattern)[0]
        assert all(our <= 3 * their for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [name for name in FLOAT32 if LAYOUTS[name][1] > 1])
def test_really_sent_bytes_are_the_predicted_ones(found, name):
    ranks, _, ulysses_degree, _, kv_heads = LAYOUTS[name]
    heads_here = max(1, kv_heads // ulysses_degree)
    per_token = 2 * heads_here * HEAD_DIM * 4  # keys and values, float32
    for rows, (pattern, _), window in CASES + WINDOWED:
        parts = [found[rank][name, rows, pattern, window] for rank in range(ranks)]
        for part in parts:
            sent, received, _ = part["predicted"]
            kv, grad = part["account"]["ring_kv"], part["account"]["ring_grad"]
            assert kv == {
                "sent": sent * per_token,
                "received": received * per_token,
                "exchanges": 1,
            }
            assert grad == {
                "sent": received * per_token,
                "received": sent * per_token,
                "exchanges": 1,
            }
        total = sum(part["predicted"][0] for part in parts) // ulysses_degree
        assert total == parts[0]["predicted"][2]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_enters_torch_distributed_is_what_the_account_says(found, name):
    """Of an all-to-all's input and output, a rank's own part stays where it is."""
    _, ring_degree, ulysses_degree, _, _ = LAYOUTS[name]
    nothing = {"sent": 0, "received": 0}
    kinds = Counter()
    for rows, (pattern, _), window in CASES + WINDOWED:
        for rank in range(4):
            part = found[rank][name, rows, pattern, window]
            forward, backward = part["traffic"]
            kv, grad, ulysses = (
                part["account"].get(kind, nothing) for kind in ("ring_kv", "ring_grad", "ulysses")
            )
            traded = forward["alltoall_base_"] + backward["alltoall_base_"]
            assert (forward["send"], forward["recv_"]) == (kv["sent"], kv["received"])
            assert (backward["send"], backward["recv_"]) == (grad["sent"], grad["received"])
            travels = traded // ulysses_degree * (ulysses_degree - 1)
            assert travels == ulysses["sent"] + ulysses["received"]
            kinds += forward + backward
    expected = {"send", "recv_"} if ring_degree > 1 else set()
    assert set(kinds) == expected | ({"alltoall_base_"} if ulysses_degree > 1 else set())


def test_one_document_makes_every_rank_send(found):
    """The cases are not vacuous: something crosses ranks, and no more than a plain ring's."""
    for name, ranks in (("ring 2", 2), ("ring 4", 4)):
        _, _, total = found[0][name, ("one",), "anchor", None]["predicted"]
        assert 0 < total <= (ranks - 1) * ROW
        _, _, through_window = found[0][name, ("one",), "anchor", WINDOW]["predicted"]
        assert 0 < through_window < total


def test_ulysses_bytes_by_hand(found):
    """Four ranks trade three quarters of q, k, v and out, there and back; the two heads become four."""
    account = found[0]["Ulysses 4, two key/value heads", ("one",), "anchor", None]["account"]
    tensor = ROW // 4 * 4 * HEAD_DIM * 4
    assert account == {
        "ulysses": {"sent": 8 * tensor * 3 // 4, "received": 8 * tensor * 3 // 4, "exchanges": 8}
    }
