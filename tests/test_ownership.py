"""Which rank has which nodes of a tree, and what comes from the others; ranks are threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

from gpu_hodlr import errors
from gpu_hodlr.distributed import Communicator, Halo, OneRank, OrderedSum, Ownership, Siblings
from gpu_hodlr.distributed.deal import Deal
from gpu_hodlr.distributed.ownership import shares
from gpu_hodlr.factor.ulv_coordinates import ULVCoordinates
from gpu_hodlr.structures.hodlr_blocks import add_low_rank

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13)


class Ranks(OneRank):
    """A rank of many that never sends."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def leaves(depth: int, m: int = 3) -> Any:
    """A tree's leaves in random order, some with padding."""
    rng = np.random.default_rng(depth)
    n = (1 << depth) * m - (1 << depth) // 2
    out = np.full((1 << depth, m), -1)
    real = np.ones(out.shape, bool)
    real[::2, -1] = False
    out[real] = rng.permutation(n)
    return out


def together(size: int, function: Any, depth: int = 5) -> list[Any]:
    """What `function(owners)` gives on every rank."""

    def job(comm: Communicator) -> Any:
        return function(Ownership(comm if size > 1 else OneRank(), leaves(depth)))

    results = on_threads(size, job)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [4, 6])
def test_every_rank_works_on_its_nodes_and_those_above(size: int, depth: int):
    owners = [Ownership(Ranks(rank, size), leaves(depth)) for rank in range(size)]
    cut = owners[0].cut
    for level in range(depth + 1):
        nodes = np.arange(1 << level)
        mine = [nodes[o.mine(level)] for o in owners]
        counted = [nodes[o.counted(level)] for o in owners]
        np.testing.assert_array_equal(np.concatenate(counted), nodes)
        assert [o.counted(level, 1 % size) for o in owners] == [owners[1 % size].counted(level)] * (
            size
        )
        first, last = owners[0].holders(level, nodes)
        for rank, part in enumerate(mine):
            np.testing.assert_array_equal(part, nodes[(first <= rank) & (rank < last)])
        if level >= cut:
            assert sum(map(len, mine)) == len(nodes)
            assert min(map(len, mine)) >= 1
        if level:
            for o, part in zip(owners, mine, strict=True):
                parents = np.arange(1 << (level - 1))[o.mine(level - 1)]
                np.testing.assert_array_equal(np.unique(part // 2), parents)
                family = nodes[o.family(level)]
                np.testing.assert_array_equal(family, np.sort(np.r_[2 * parents, 2 * parents + 1]))
                assert len(family) - len(part) <= (2 if level <= cut else 0)
    rows = owners[0].rows.of
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(owners[0].n))
    most = max(len(np.arange(1 << cut)[o.mine(cut)]) for o in owners)
    assert most * size <= 1.25 * (1 << cut) or cut == depth


def test_more_ranks_than_leaves_are_refused():
    with pytest.raises(errors.ArgumentError, match="8 leaves cannot be spread over 9 ranks"):
        Deal(3, 9)
    assert [Deal(5, p).cut for p in (1, 2, 3, 4, 5, 6, 8)] == [0, 1, 3, 2, 3, 4, 3]


def test_a_rank_without_rows_is_refused():
    tree = np.array([[0], [1], [2], [-1]])
    with pytest.raises(errors.ArgumentError, match="no rows of 3"):
        Ownership(Ranks(0, 4), tree)


@pytest.mark.parametrize(("total", "ranks"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shares(total: int, ranks: int):
    parts = shares(total, ranks)
    assert len(parts) == ranks
    assert [i for part in parts for i in range(total)[part]] == list(range(total))
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1


# --- what comes from the others ----------------------------------------------------------------


def numbered(owners: Ownership, level: int, dtype: Any, width: int = 2) -> Any:
    """An array whose rows tell which of a level's nodes they are, of this rank's nodes."""
    every = (np.arange(1 << level)[:, None] * 10 + np.arange(width)).astype(dtype)
    return every[owners.mine(level)]


@pytest.mark.parametrize("size", SIZES)
def test_siblings_come_and_go(size: int):
    def job(owners: Ownership) -> int:
        for level in range(1, owners.depth + 1):
            sent = sum(owners.comm.messages.values())
            arrays = [
                numbered(owners, level, np.float64),
                numbered(owners, level, np.int64, 0),
                numbered(owners, level, np.float32, 3)[:, :, None],
                numbered(owners, level, np.int64, 1)[:, 0],
                numbered(owners, level, np.int64, 1) % 20 == 0,
            ]
            for k in (1, len(arrays)):
                for x, got in zip(arrays, owners.complete(level, *arrays[:k]), strict=False):
                    assert got.dtype == x.dtype
                    own = owners.own(got, level)
                    np.testing.assert_array_equal(own, x)
                    full = owners.family(level)
                    assert got.shape == (full.stop - full.start, *x.shape[1:])
                    if x.dtype == np.float64:
                        np.testing.assert_array_equal(got[:, 0] / 10, np.r_[full])
            sent = sum(owners.comm.messages.values()) - sent
            assert sent == (2 if level <= owners.cut else 0)  # one message a call
        return sum(owners.comm.sent.values())

    together(size, job)


@pytest.mark.parametrize("size", SIZES)
def test_sums_have_the_same_bits_on_any_number_of_ranks(size: int):
    values = [np.random.default_rng(level).standard_normal((1 << level, 4)) for level in range(6)]

    def job(owners: Ownership) -> list[Any]:
        for level, every in enumerate(values):
            np.testing.assert_array_equal(owners.gather(every[owners.mine(level)], level), every)
        return [
            owners.sum_of_nodes(every[owners.mine(level)], level)
            for level, every in enumerate(values)
        ]

    alone = together(1, job)[0]
    for sums in together(size, job):
        for got, want, every in zip(sums, alone, values, strict=True):
            np.testing.assert_array_equal(got, want)
            np.testing.assert_allclose(got, every.sum(axis=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_what_several_ranks_share_is_summed_once_each(size: int):
    def job(owners: Ownership) -> None:
        rank, ranks = owners.comm.rank, range(owners.comm.size)
        for level in range(owners.depth + 1):
            nodes = np.arange(1 << level)
            mine = nodes[owners.mine(level)]
            parts = 10.0 * mine[:, None] + np.array([rank, 1.0])
            want = np.zeros((1 << level, 2))
            for p in ranks:
                theirs = nodes[owners.mine(level, p)]
                want[theirs] += 10.0 * theirs[:, None] + np.array([p, 1.0])
            got = owners.sum_shared(parts, level)
            np.testing.assert_array_equal(got, want[owners.mine(level)])
        largest = owners.max(np.array([[-rank, rank], [2.0, 1 + rank]]))
        np.testing.assert_array_equal(largest, [[0, ranks[-1]], [2.0, len(ranks)]])

    together(size, job)


@pytest.mark.parametrize("count", [0, 1, 5, 16])
@pytest.mark.parametrize("size", SIZES)
def test_terms_are_added_one_after_the_other(size: int, count: int):
    """To the last bit the sum of one rank, also of ranks without a term or a row."""
    n, rng = 11, np.random.default_rng(0)
    terms = rng.standard_normal((count, n, 2)) * 10.0 ** rng.integers(-8, 9, (count, 1, 1))
    want = np.zeros((n, 2))
    for term in terms:
        want = want + term

    def job(comm: Communicator) -> tuple[slice, Any]:
        total = OrderedSum(comm, count, n)
        return total.own, total(iter(terms[total.own]), np.ones((n, 2)))

    for own, got in on_threads(size, job):
        assert own.stop - own.start in (count // size, -(-count // size))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_found_and_dealt_out(size: int):
    rng = np.random.default_rng(0)

    def job(owners: Ownership) -> None:
        n, mine, depth = owners.n, owners.rows.mine, owners.depth
        assert owners.num_rows(n) == len(mine)
        assert owners.total(len(mine)) == n
        index = np.arange(n)
        place = owners.places(index)
        held = np.isin(index, mine)
        np.testing.assert_array_equal(place[~held], -1)
        np.testing.assert_array_equal(mine[place[held]], index[held])
        own = owners.leaves[owners.mine(depth)]
        local = owners.local(own)
        np.testing.assert_array_equal(local < 0, own < 0)
        np.testing.assert_array_equal(mine[local[local >= 0]], own[own >= 0])
        assert owners.num_leaves(len(own)) == 1 << depth
        np.testing.assert_array_equal(owners.all_leaves(own), owners.leaves)

        x = np.arange(n * size, dtype=float).reshape(n, size)
        part = x[:, [owners.comm.rank]]
        into = np.zeros((len(mine), size))
        owners.from_columns([part], [1] * size, [into])
        np.testing.assert_array_equal(into, x[mine])
        np.testing.assert_array_equal(owners.by_rows(part, [1] * size), x[mine])
        x = np.concatenate([x, x], axis=1)
        wanted = slice(owners.comm.rank, owners.comm.rank + 2)  # one rank wants all
        np.testing.assert_array_equal(owners.to_columns(x[mine], wanted), x[:, wanted])
        given = owners.right_hand_side(x[mine], n, x.dtype, "cpu", "x")[0]
        np.testing.assert_array_equal(given, x[mine])

    together(size, job)

    every = leaves(5)
    sizes = (every >= 0).sum(axis=1)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    beside = rng.integers(-1, ends[-1], (ends[-1], 5))
    pairs = np.argwhere(beside >= 0)
    pairs[:, 1] = beside[pairs[:, 0], pairs[:, 1]]

    def crossing(owners: Ownership) -> Any:
        nodes = owners.mine(owners.depth)
        own = slice(ends[nodes.start], ends[nodes.stop])
        return owners.cut, owners.between_ranks(int(own.start), beside[own], sizes)

    for cut, found in together(size, crossing):
        node = (np.searchsorted(ends, pairs, side="right") - 1) >> (5 - cut)
        want = pairs[node[:, 0] != node[:, 1]]
        assert sorted(found.tolist()) == sorted(want.tolist())


@pytest.mark.parametrize("size", SIZES)
def test_siblings_in_pieces(size: int):
    """Nodes that span ranks are put together of their pieces, and taken apart again."""

    def job(owners: Ownership) -> None:
        depth, m, k = owners.depth, 3, 2
        every = np.arange((1 << depth) * m * k, dtype=float).reshape(1 << depth, m, k)
        own = every[owners.mine(depth)]
        for level in range(1, depth + 1):
            s = Siblings(owners, level)
            assert s.spread == (level <= owners.cut)
            nodes = every.reshape(1 << level, -1, k)
            even, odd = nodes[0::2][s.pairs], nodes[1::2][s.pairs]
            pieces = s.by_pieces(own)
            np.testing.assert_array_equal(s.index(every[:, :, 0]), pieces[:, :, 0])
            np.testing.assert_array_equal(s.merged(s.even(pieces), s.odd(pieces)), pieces)
            for got, want in zip(s.whole(pieces), (even, odd), strict=True):
                np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(s.own(even, odd), pieces)
            np.testing.assert_array_equal(s.whole_even(s.even(pieces)), even)
            np.testing.assert_array_equal(s.own_even(even), s.even(pieces))

            # What is of a pair: all its pieces get it, and sums over all of them make it.
            of_pieces = pieces.sum(axis=1, keepdims=True)
            sums = even.sum(axis=1, keepdims=True), odd.sum(axis=1, keepdims=True)
            np.testing.assert_array_equal(s.sum_even(s.even(of_pieces)), sums[0])
            np.testing.assert_array_equal(s.sum_odd(s.odd(of_pieces)), sums[1])
            pair = np.arange(s.pairs.start, s.pairs.stop, dtype=float)
            rows_of_pair = len(nodes[0]) * 2 * k  # numbers that a pair has in `every`
            np.testing.assert_array_equal(s.to_even(pair), s.even(pieces)[:, 0, 0] // rows_of_pair)
            np.testing.assert_array_equal(s.to_odd(pair), s.odd(pieces)[:, 0, 0] // rows_of_pair)
            if s.spread:
                for got, want in zip(s.sum_all(of_pieces), sums, strict=True):
                    np.testing.assert_array_equal(got, want)
                node = pieces[:, 0, 0] // (rows_of_pair // 2)
                np.testing.assert_array_equal(s.to_all(2 * pair, 2 * pair + 1), node)
                of_even = np.where(node % 2 == 0, node // 2 + 1, 0)
                np.testing.assert_array_equal(s.to_all(pair + 1, None), of_even)

    together(size, job)


@pytest.mark.parametrize("widths", [(2, 1, 3, 1, 2), (0, 2, 0, 1, 0), (0, 0, 0, 0, 3), (1,)])
@pytest.mark.parametrize("size", SIZES)
def test_low_rank_blocks_of_siblings(size: int, widths: tuple[int, ...]):
    """K_ab = L_a R_b^T for the siblings of every level, whichever ranks they are on."""
    depth, m, k = 5, 3, 2
    n, levels = (1 << depth) * m, (*widths, *[0] * (depth - len(widths)))
    rng = np.random.default_rng(0)
    U = rng.integers(-4, 5, (n, sum(levels))).astype(float)
    x, y = rng.integers(-4, 5, (2, 1 << depth, m, k)).astype(float)
    exact, first = np.zeros((n, n)), 0
    for level, width in enumerate(levels, 1):
        rows = n >> level
        for start in range(0, n, 2 * rows):
            a, b = slice(start, start + rows), slice(start + rows, start + 2 * rows)
            exact[a, b] = U[a, first : first + width] @ U[b, first : first + width].T
            exact[b, a] = exact[a, b].T
        first += width
    want = (y.reshape(n, k) + exact @ x.reshape(n, k)).reshape(x.shape)

    def job(owners: Ownership) -> None:
        mine = owners.mine(depth)
        own = U.reshape(1 << depth, m, -1)[mine].reshape(-1, U.shape[1])
        got = add_low_rank(own, levels, x[mine], y[mine].copy(), owners)
        np.testing.assert_array_equal(got, want[mine])

    together(size, job)


@pytest.mark.parametrize("widths", [(2, 3, 1, 2, 2), (1, 0, 1, 2, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_coordinates_of_a_factor(size: int, widths: tuple[int, ...]):
    """Numbered level by level; each is of one rank, and comes to all that work on its node."""
    serial = ULVCoordinates(leaves(5), widths, together(1, lambda owners: owners)[0], "cpu")
    n = len(serial.rows.mine)
    assert n == (leaves(5) >= 0).sum()
    z = np.arange(1.0, n + 1)[:, None]
    every, top = serial.split(z)
    numbers = np.concatenate([part.ravel() for part in (*every, top)])
    np.testing.assert_array_equal(numbers[numbers > 0], z[:, 0])

    def job(owners: Ownership) -> Any:
        own = ULVCoordinates(leaves(5), widths, owners, "cpu")
        mine = z[own.rows.mine]
        parts, root = own.split(mine)
        for i, (part, whole) in enumerate(zip(parts, every, strict=True)):
            np.testing.assert_array_equal(part, whole[owners.mine(5 - i)])
        np.testing.assert_array_equal(root, top)
        np.testing.assert_array_equal(own.join(parts, root), mine)
        return own.rows.mine

    found = together(size, job)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(n))


def random_pairs(level: int, count: int) -> Any:
    """Pairs of different nodes, each once, the smaller first, sorted."""
    rng = np.random.default_rng(level)
    pairs = np.unique(np.sort(rng.integers(0, 1 << level, (count, 2)), axis=1), axis=0)
    return pairs[pairs[:, 0] != pairs[:, 1]]


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_halos_bring_all_partners(size: int, siblings: bool):
    def job(owners: Ownership) -> None:
        for level in range(1, owners.depth + 1):
            pairs = random_pairs(level, 3 << level)
            halo = Halo(owners, pairs, level, *([] if siblings else [False]))
            base = owners.family(level) if siblings else owners.mine(level)
            assert halo.base == base
            own = numbered(owners, level, np.float64)
            x, ones = halo.extend(own, np.ones(len(own)))
            nodes = x[:, 0] / 10
            assert len(ones) == len(x)
            np.testing.assert_array_equal(nodes[: halo.count], np.r_[base])
            np.testing.assert_array_equal(nodes[halo.pairs], pairs[halo.chosen])
            inside = (pairs >= base.start) & (pairs < base.stop)
            np.testing.assert_array_equal(halo.chosen, np.nonzero(inside.any(axis=1))[0])
            if not owners.alone:
                assert set(nodes) == {*range(base.start, base.stop), *pairs[halo.chosen].ravel()}

    together(size, job)


@pytest.mark.parametrize("size", SIZES[1:])
def test_siblings_take_few_bytes(size: int):
    """At most two blocks a rank and level: within 4 P log2(P), whatever P."""
    deal = Deal(7, size)

    def job(owners: Ownership) -> int:
        for level in range(owners.cut, 0, -1):
            owners.complete(level, numbered(owners, level, np.float64, 1))
        return sum(owners.comm.sent.values())

    sent = sum(together(size, job, 7))
    assert sent == 8 * sum(deal.lacking(level) for level in range(1, deal.cut + 1))
    assert sent <= 4 * 8 * size * math.log2(size)
