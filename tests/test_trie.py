"""Trie against a dictionary of prefixes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlab.sids.trie import Trie, as_widths

pytestmark = pytest.mark.filterwarnings("error")


class DictTrie:
    """The oracle: prefix → ids of the items below it, node numbers by sorting the prefixes."""

    def __init__(self, codes):
        self.items = {}
        for item, row in enumerate(codes.tolist(), start=1):
            for length in range(len(row) + 1):
                self.items.setdefault(tuple(row[:length]), []).append(item)
        self.levels = codes.shape[1]
        self.nodes = [
            sorted(p for p in self.items if len(p) == length) for length in range(self.levels + 1)
        ]

    def children(self, depth, node):
        """(code, child node) pairs of a node."""
        prefix = self.nodes[depth][node]
        return [(p[-1], child) for child, p in enumerate(self.nodes[depth + 1]) if p[:-1] == prefix]


@st.composite
def catalogues(draw):
    widths = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    rows = draw(
        st.lists(st.tuples(*[st.integers(0, w - 1) for w in widths]), min_size=1, max_size=30)
    )
    return np.array(rows), widths


@settings(max_examples=60)
@given(catalogues())
def test_nodes_children_and_items_equal_the_dictionary(catalogue):
    codes, widths = catalogue
    trie = Trie(codes, widths)
    oracle = DictTrie(codes)
    assert trie.n_nodes == tuple(map(len, oracle.nodes))
    for depth in range(trie.levels):
        nodes = torch.arange(trie.n_nodes[depth])
        code, child, valid = trie.children(depth, nodes)
        allowed = trie.allowed(depth, nodes)
        assert code.shape == child.shape == valid.shape and allowed.shape == (
            len(nodes),
            widths[depth],
        )
        want = [oracle.children(depth, node) for node in range(len(nodes))]
        assert code.shape[-1] == max(map(len, want)) == trie.max_children[depth]
        for node, pairs in enumerate(want):
            v = valid[node]
            assert list(zip(code[node][v].tolist(), child[node][v].tolist())) == pairs
            assert not code[node][~v].any() and not child[node][~v].any()
            assert allowed[node].nonzero().flatten().tolist() == [c for c, _ in pairs]
        below = [len(oracle.items[p]) for p in oracle.nodes[depth]]
        assert trie.items_per_node(depth).tolist() == below
    items, valid = trie.leaf_items(torch.arange(trie.n_nodes[-1]))
    groups = [oracle.items[p] for p in oracle.nodes[-1]]
    assert [row[v].tolist() for row, v in zip(items, valid)] == groups
    assert items.shape[-1] == trie.max_items == max(map(len, groups)) and not items[~valid].any()


@settings(max_examples=60)
@given(catalogues(), st.data())
def test_find_equals_the_dictionary(catalogue, data):
    codes, widths = catalogue
    trie = Trie(codes, widths)
    oracle = DictTrie(codes)
    length = data.draw(st.integers(0, trie.levels))
    # Queries out of range too: they must not be mistaken for another prefix.
    query = st.lists(st.integers(-2, 6), min_size=length, max_size=length)
    queries = data.draw(st.lists(query, min_size=1, max_size=20))
    queries += codes[:5, :length].tolist()
    nodes, found = trie.find(torch.tensor(queries, dtype=torch.int64).reshape(len(queries), length))
    for query, node, hit in zip(queries, nodes.tolist(), found.tolist()):
        assert hit == (tuple(query) in oracle.items)
        assert node == (oracle.nodes[length].index(tuple(query)) if hit else 0)


def test_leading_axes_are_kept():
    codes = np.array([[0, 0, 1], [2, 0, 0], [2, 1, 3], [2, 1, 0], [2, 1, 0]])
    trie = Trie(codes, (3, 2, 4))
    for shape in ((), (4,), (2, 2), (2, 1, 2)):
        rows = torch.from_numpy(codes[np.resize([0, 3, 4, 2], shape)])  # [*shape, 3]
        nodes, found = trie.find(rows[..., :2])
        assert nodes.shape == found.shape == shape and found.all()
        assert trie.allowed(2, nodes).shape == (*shape, 4)
        assert all(part.shape == (*shape, trie.max_children[2]) for part in trie.children(2, nodes))
        assert trie.leaf_items(trie.find(rows)[0])[0].shape == (*shape, 2)
        flat = trie.allowed(2, nodes.flatten()).reshape(*shape, 4)
        assert torch.equal(trie.allowed(2, nodes), flat)
    assert trie.find(np.array([[2, 1, 0]]))[0].tolist() == [2]  # leaves in order: 001 200 210 213


def test_to_leaves_the_original_where_it_is():
    trie = Trie(np.array([[0, 1], [1, 0]]), 2)
    moved = trie.to("meta")
    assert (
        moved.device.type == "meta"
        and moved.first_child[1].device.type == "meta"
        and trie.device.type == "cpu"
    )
    assert trie.to("cpu").find([[1, 0]])[1].tolist() == [True]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="item 2 has code 4 at level 1"):
        Trie(np.array([[0, 1], [4, 1]]), 4)
    with pytest.raises(ValueError, match="item 1 has code -1 at level 2"):
        Trie(np.array([[0, -1]]), 4)
    for codes in (np.zeros((2, 2)), np.zeros(3, int), np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="codes must be integers of shape"):
            Trie(codes, 4)
    with pytest.raises(ValueError, match="got 2 for 3 levels"):
        as_widths([4, 4], 3)
    with pytest.raises(ValueError, match="at least 1"):
        as_widths([4, 0], 2)
    for width in (8.0, None, ("4", "4")):
        with pytest.raises(TypeError, match="width must be an integer, got"):
            as_widths(width, 2)
    trie = Trie(np.array([[0, 1], [1, 0]]), 2)
    with pytest.raises(ValueError, match="depth must lie in 0..1"):
        trie.allowed(2, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"shape \[..., 0..2\], got \[1, 3\]"):
        trie.find(torch.zeros(1, 3, dtype=torch.int64))
