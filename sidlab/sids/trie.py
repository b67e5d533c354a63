"""The set of valid semantic IDs as sorted arrays: which codes may follow a prefix, without a loop
over items or beams.

A trie over `n` items and `L` levels. The nodes at depth `l` are the distinct prefixes of length `l`
(depth 0 the root, depth `L` the leaves), numbered 0.. in lexicographic order. So the children of a
node are neighbours, and two arrays per depth (compressed sparse rows) hold everything: node `v` at
depth `l` has the children `first_child[l][v]` to `first_child[l][v + 1] - 1` at depth `l + 1`, and
`child_code[l]` says the code of each. Memory is O(items × levels); a look-up is O(log items) per
level.
"""

import copy

import numpy as np
import torch

from sidlab.checks import integer


def as_widths(width, levels: int) -> tuple[int, ...]:
    """The number of codes of each level, `levels` ints: from one int for all or a sequence with one
    per level.
    """
    widths = tuple(width) if np.iterable(width) else (width,) * levels
    if len(widths) != levels:
        raise ValueError(
            f"width must be one int or one per level, got {len(widths)} for {levels} levels:"
            f" {width}"
        )
    return tuple(integer("width", w) for w in widths)


def as_codes(codes, width) -> tuple[np.ndarray, tuple[int, ...]]:
    """Checked codes int64 [n, L] and their widths; ValueError names the first code that does not
    fit.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"codes must be integers of shape [n_items, levels], got {codes.dtype}"
            f" {list(codes.shape)}"
        )
    widths = as_widths(width, codes.shape[1])
    wrong = np.argwhere((codes < 0) | (codes >= np.array(widths)))
    if len(wrong):
        row, level = wrong[0].tolist()
        raise ValueError(
            f"codes must lie in 0..width-1: item {row + 1} has code {codes[row, level]} at level "
            f"{level + 1}, whose width is {widths[level]} ({len(wrong)} such codes)"
        )
    return codes.astype(np.int64), widths


class Trie:
    """The prefix tree of `codes` int [n, L] (row 0 is item 1), each in 0..widths[l]-1.

    Attributes: `widths`, `levels`; per depth 0..L `n_nodes` (tuple); per depth 0..L-1
    `max_children` (tuple), `first_child[l]` int64 [n_l + 1] and `child_code[l]` int64 [n_(l+1)];
    `first_item` int64 [n_L + 1] and `item` int64 [n]: leaf `v` holds the item ids
    `item[first_item[v] : first_item[v + 1]]`, ascending; `max_items`, the largest such group.

    >>> trie = Trie(np.array([[0, 1], [3, 1], [0, 2], [3, 1]]), widths=(4, 4))
    >>> trie.n_nodes
    (1, 2, 3)
    >>> trie.allowed(0, torch.tensor(0))
    tensor([ True, False, False,  True])
    >>> node, found = trie.find(torch.tensor([3, 1]))
    >>> trie.leaf_items(node)
    (tensor([2, 4]), tensor([True, True]))
    """

    def __init__(self, codes, widths):
        codes, self.widths = as_codes(codes, widths)
        self.levels = len(self.widths)
        order = np.lexsort(codes.T[::-1])  # stable: items that share a SID stay in ascending order
        first_child = []
        child_code = []
        keys = []
        max_children = []
        n_nodes = [1]
        node = np.zeros(len(codes), np.int64)  # the depth-l node of each item, in sorted order
        for level, width in enumerate(self.widths):
            column = codes[order, level]
            starts = np.ones(len(codes), bool)  # where a new child begins
            starts[1:] = (node[1:] != node[:-1]) | (column[1:] != column[:-1])
            parent = node[starts]
            code = column[starts]
            first = np.searchsorted(parent, np.arange(n_nodes[-1] + 1))
            first_child.append(first)
            child_code.append(code)
            keys.append(parent * width + code)  # ascending, so `find` is one binary search
            max_children.append(int(np.diff(first).max()))
            n_nodes.append(len(code))
            node = np.cumsum(starts) - 1
        first_item = np.searchsorted(node, np.arange(n_nodes[-1] + 1))
        self.n_nodes = tuple(n_nodes)
        self.max_children = tuple(max_children)
        self.max_items = int(np.diff(first_item).max())
        self.first_child = [torch.from_numpy(a) for a in first_child]
        self.child_code = [torch.from_numpy(a) for a in child_code]
        self._keys = [torch.from_numpy(a) for a in keys]
        self.first_item = torch.from_numpy(first_item)
        self.item = torch.from_numpy(order + 1)

    @property
    def device(self) -> torch.device:
        return self.item.device

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        return sum(
            a.nbytes
            for a in (*self.first_child, *self.child_code, *self._keys, self.first_item, self.item)
        )

    def to(self, device) -> "Trie":
        """A trie on `device`; like `torch.Tensor.to`, this one stays as it is."""
        moved = copy.copy(self)
        for name in ("first_child", "child_code", "_keys"):
            setattr(moved, name, [a.to(device) for a in getattr(self, name)])
        moved.first_item = self.first_item.to(device)
        moved.item = self.item.to(device)
        return moved

    def children(self, depth: int, nodes):
        """The children of `nodes` int64 [...] at `depth` 0..L-1, in ascending order of code.

        Returns `codes` int64 [..., C], `nodes` int64 [..., C] (at depth + 1) and `valid` bool [...,
        C], where C is `max_children[depth]`; codes and nodes are 0 where `valid` is false.
        """
        if not 0 <= depth < self.levels:
            raise ValueError(
                f"depth must lie in 0..{self.levels - 1} (only these nodes have children), got"
                f" {depth}"
            )
        child, valid = self._spans(self.first_child[depth], nodes, self.max_children[depth])
        return self.child_code[depth][child] * valid, child, valid

    def allowed(self, depth: int, nodes) -> torch.Tensor:
        """Which codes may follow `nodes` int64 [...] at `depth` 0..L-1: bool [..., W] with W =
        `widths[depth]`.
        """
        codes, _, valid = self.children(depth, nodes)
        width = self.widths[depth]
        mask = torch.zeros(*codes.shape[:-1], width + 1, dtype=torch.bool, device=self.device)
        # The column beyond the codes takes the padding
        mask.scatter_(-1, codes.masked_fill(~valid, width), True)
        return mask[..., :width]

    def leaf_items(self, leaves, most: int | None = None):
        """The items of `leaves` int64 [...], ascending, of each the first `most` (None: all).

        Returns ids from 1, int64 [..., M], and `valid` bool [..., M], where M is `max_items` or
        `most`; ids are 0 where `valid` is false.
        """
        place, valid = self._spans(
            self.first_item, leaves, min(self.max_items, most or self.max_items)
        )
        return self.item[place] * valid, valid

    def find(self, codes):
        """The nodes at depth l of the prefixes `codes` int [..., l], l = 0..L.

        Returns `nodes` int64 [...] and `found` bool [...]; an unknown prefix (codes out of range
        included) has node 0.
        """
        codes = torch.as_tensor(codes, device=self.device).long()
        if codes.ndim == 0 or codes.shape[-1] > self.levels:
            raise ValueError(
                f"codes must have the shape [..., 0..{self.levels}], got {list(codes.shape)}"
            )
        node = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=self.device)
        found = torch.ones_like(node, dtype=torch.bool)
        for code, width, keys in zip(codes.unbind(-1), self.widths, self._keys):
            key = node * width + code
            child = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            found = found & (code >= 0) & (code < width) & (keys[child] == key)
            node = child.where(found, 0)
        return node, found

    def items_per_node(self, depth: int) -> torch.Tensor:
        """How many items stand below each node at `depth` 0..L: int64 [n_nodes[depth]]."""
        bounds = self.first_item
        for first in reversed(self.first_child[depth:]):
            bounds = bounds[first]
        return bounds.diff()

    def _spans(self, first, rows, length):
        """The numbers first[row] .. first[row + 1] - 1 of each row, 0 beyond: int64 [..., length],
        and their mask.
        """
        rows = torch.as_tensor(rows, device=self.device)
        span = first[rows].unsqueeze(-1) + torch.arange(length, device=self.device)  # [..., length]
        valid = span < first[rows + 1].unsqueeze(-1)
        return span * valid, valid
