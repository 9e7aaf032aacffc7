"""The sum up a tree: one result whoever adds what, and a small error."""

import numpy as np
import pytest

from miniconvit.engine.pieces import Tree


def added(left, right):
    left += right


def total(pieces, order=None):
    tree = Tree(added)
    for index in range(len(pieces)) if order is None else order:
        tree.put(0, int(index), pieces[index].copy())
    return tree.root()


def test_the_sum_of_five_is_the_one_on_paper():
    """((a + b) + (c + d)) + e, in a precision that tells the orders apart."""
    a, b, c, d, e = pieces = np.array([[1.0], [2**-24], [2**-24], [2**-24], [2**-23]], "float32")
    assert total(pieces) == ((a + b) + (c + d)) + e != (((a + b) + c) + d) + e


@pytest.mark.parametrize("contiguous", [True, False])
def test_whoever_adds_what_in_whatever_order_the_bits_are_the_same(contiguous):
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, ranks = int(rng.integers(1, 70)), int(rng.integers(1, 9))
        scales = 10.0 ** rng.integers(-6, 7, (n, 1))
        pieces = (rng.normal(size=(n, 9)) * scales).astype("float32")
        owners = np.arange(n) * ranks // n if contiguous else rng.integers(0, ranks, n)
        shares = [Tree(added) for _ in range(ranks)]
        for index in rng.permutation(n):
            shares[owners[index]].put(0, int(index), pieces[index].copy())
        whole = Tree(added)
        for rank in rng.permutation(ranks):
            for (height, index), x in shares[rank].nodes.items():
                whole.put(height, index, x)
        assert whole.root().tobytes() == total(pieces).tobytes()
        assert len(whole.nodes) == 0


def test_a_sum_stands_where_its_first_piece_stood():
    """And sums that have no neighbour are in order: here 3, 4 to 7, and 8."""
    pieces = np.arange(9.0)[:, None]
    for order in ((8, 7, 3, 6, 4, 5), (3, 4, 5, 6, 7, 8)):
        tree = Tree(added)
        for index in order:
            tree.put(0, index, pieces[index].copy() if index != 4 else (four := pieces[4].copy()))
        assert list(tree.ordered()) == [(0, 3), (2, 1), (0, 8)]
        assert tree.nodes[2, 1] is four and four == 4 + 5 + 6 + 7


def test_an_even_share_is_one_node():
    """So that as little as possible is sent: the volume of an all-reduce."""
    for n, ranks in ((4, 2), (16, 4), (64, 8), (64, 64)):
        for rank in range(ranks):
            tree = Tree(added)
            for index in range(n * rank // ranks, n * (rank + 1) // ranks):
                tree.put(0, index, np.ones(1))
            assert len(tree.nodes) == 1


def test_the_error_grows_with_the_logarithm():
    """Against float64. Every addition rounds by a share of its result: on each of log2 n levels
    results of variance n in all, and from left to right 2 + 3 + ... + n, about n^2 / 2."""
    rng = np.random.default_rng(1)
    for n in (16, 256):
        pieces = rng.normal(size=(n, 20_000)).astype("float32")
        exact = pieces.astype("float64").sum(axis=0)
        left_to_right = pieces[0].copy()
        for x in pieces[1:]:
            left_to_right += x
        tree, line = (np.sqrt(((x - exact) ** 2).mean()) for x in (total(pieces), left_to_right))
        assert tree / line == pytest.approx(np.sqrt(np.log2(n) / (n / 2)), rel=0.15)
