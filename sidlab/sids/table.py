"""SidTable: which item has which semantic ID, and which token ids spell it. Collisions are resolved
here, nowhere else.

Token ids: PAD 0, BOS 1, SEP 2, then the codes level by level: code `c` of level `l` is `offsets[l]
+ c`. There is no EOS, since a SID has a fixed length.
"""

import functools
import hashlib
import json
import warnings

import numpy as np
import pandas as pd
import torch

from sidlab.checks import one_of
from sidlab.sids.encoder import CHUNK, checked, load_arrays, save_arrays
from sidlab.sids.published import read_sids
from sidlab.sids.trie import Trie, as_codes

PAD = 0
BOS = 1
SEP = 2
FIRST_CODE = 3  # the token id of code 0 of level 1
NEIGHBOURS = 10
QUERIES = 2000  # what the report's neighbour_overlap looks at


class SidTable:
    """The semantic IDs of a catalogue.

    Args:
        codes: int [n, L], row 0 is item 1, each in 0..width-1.
        width: codes per level, an int or one int per level.
        collisions: what to do with items that share a SID. "extend" adds one level to every item
            if any two collide: 0 for the first of a group by item id, 1.. for the others (the
            de-duplication digit of TIGER, arXiv 2305.05065); its width is the largest group.
            "share" leaves them (as in AL-GR / FORGE): `recommend` lists sharers by id with equal
            scores, and metrics are expectations over a random order among them.

    Attributes: `codes` int64 [n, L'], `widths` (tuple), `levels` L', `base_levels` L, `n_items`,
    `vocab_size`, `offsets` (tuple: the token id of code 0 of each level), `item_tokens` torch int64
    [n + 1, L'] (row = item id, row 0 is PAD), `collisions`.

    >>> table = SidTable(np.array([[0, 1], [3, 1], [0, 1]]), width=4)
    >>> table.widths, table.vocab_size
    ((4, 4, 2), 13)
    >>> table.item_tokens[3]
    tensor([ 3,  8, 12])
    >>> table.items_of([[3, 1, 0], [3, 1, 1]])
    [[2], []]
    """

    def __init__(self, codes, width=256, collisions: str = "extend"):
        one_of("collisions", collisions, ("extend", "share"))
        base, base_widths = as_codes(codes, width)
        self.collisions = collisions
        self.base_levels = base.shape[1]
        self._base_trie = Trie(base, base_widths)
        self._tries = {}
        self.codes = base
        self.widths = base_widths
        largest = self._base_trie.max_items
        if collisions == "extend" and largest > 2**16:
            raise ValueError(
                f"codes: {largest:,} of {len(base):,} items share one SID, more than the 65,536"
                ' that an added level tells apart; use other codes, or collisions="share"'
            )
        if collisions == "extend" and largest > 1:
            # Among those with its SID
            rank = (
                pd.DataFrame(base)
                .groupby(list(range(base.shape[1])), sort=False)
                .cumcount()
                .to_numpy()
            )
            self.codes = np.concatenate([base, rank[:, None]], axis=1)
            self.widths = (*base_widths, largest)
        self.n_items, self.levels = self.codes.shape
        starts = np.cumsum((FIRST_CODE, *self.widths)).tolist()
        self.offsets = tuple(starts[:-1])
        self.vocab_size = starts[-1]
        tokens = np.full((self.n_items + 1, self.levels), PAD)
        tokens[1:] = self.codes + np.array(self.offsets)
        self.item_tokens = torch.from_numpy(tokens)

    @functools.cached_property
    def trie(self) -> Trie:
        """The set of valid SIDs."""
        return self._base_trie if self.levels == self.base_levels else Trie(self.codes, self.widths)

    @functools.cached_property
    def sid_numbers(self) -> np.ndarray | None:
        """int64 [n + 1]: the number from 1 of each item's SID, equal for those that share one; item
        0 has 0. None where none do.
        """
        if self.trie.max_items == 1:
            return None
        return np.concatenate([[0], 1 + self.trie.find(self.codes)[0].numpy()])

    def trie_on(self, device: torch.device) -> Trie:
        """`trie` on `device`, moved there once: with a million items that takes longer than a
        search.
        """
        if device not in self._tries:
            self._tries[device] = self.trie.to(device)
        return self._tries[device]

    def __getstate__(self):
        return self.__dict__ | {"_tries": {}}  # what lies on a device stays there

    def items_of(self, codes):
        """The ids of the items with each SID of `codes` int [..., L']: sorted lists, nested like
        the leading axes.
        """
        if np.shape(codes)[-1:] != (self.levels,):
            raise ValueError(
                f"codes must have the shape [..., {self.levels}], got {list(np.shape(codes))}"
            )
        leaves, found = self.trie.find(codes)
        items, valid = self.trie.leaf_items(leaves)
        return _ragged(items, valid & found.unsqueeze(-1))

    def report(self, encoder=None, embeddings=None) -> "SidReport":
        """The quality of the SIDs: a dict of plain values that prints as a table.

        Of the codes as given, before any level was added: `unique_sids`, `collision_rate` (share of
        the items whose SID another item has too), `largest_group`. `per_level`, a dict for each
        level: `width`, `used` codes, `utilisation` = used / width, `perplexity` = exp(entropy of
        the code usage over items), the distinct `prefixes` up to that level, and the `mean_group`
        and `largest_group` of items that share one. With `embeddings` float [n, d] also
        `neighbour_overlap`, the share of an item's 10 nearest neighbours (cosine, over at most
        2,000 items) with its prefix, and `chance_overlap`, that of any other item. With their
        `encoder`, too, `reconstruction_error` = Σ ‖x − decode(prefix)‖² / Σ ‖x − mean‖², the share
        of the variance that the codes do not explain: 1 is as good as one code for all, whatever
        all embeddings have in common. None at the added level and where all embeddings are equal.
        """
        if encoder is not None and embeddings is None:
            raise ValueError(
                "an encoder is judged by its embeddings: got encoder without embeddings"
            )
        if embeddings is not None and len(embeddings) != self.n_items:
            raise ValueError(
                f"embeddings must have one row per item ({self.n_items}), got {len(embeddings)}"
            )
        embeddings = None if embeddings is None else checked(embeddings)
        items, neighbours = (
            _neighbours(embeddings) if embeddings is not None and self.n_items > 1 else (None, None)
        )
        variance = None if encoder is None else _variance(embeddings)
        groups = self._base_trie.items_per_node(self.base_levels)
        per_level = []
        for level, width in enumerate(self.widths, start=1):
            usage = np.bincount(self.codes[:, level - 1])
            share = usage[usage > 0] / self.n_items
            prefix = self.trie.items_per_node(level)
            row = {
                "level": level,
                "width": width,
                "used": len(share),
                "utilisation": len(share) / width,
                "perplexity": float(np.exp(-(share * np.log(share)).sum())),
                "prefixes": len(prefix),
                "mean_group": self.n_items / len(prefix),
                "largest_group": int(prefix.max()),
            }
            if items is not None:
                # [queries, k]
                same = (self.codes[neighbours, :level] == self.codes[items, None, :level]).all(-1)
                row["neighbour_overlap"] = float(same.mean()) if same.size else None
                row["chance_overlap"] = int((prefix * (prefix - 1)).sum()) / (
                    self.n_items * (self.n_items - 1)
                )
            if encoder is not None:
                row["reconstruction_error"] = None
                if level <= self.base_levels:
                    error = 0.0
                    for start in range(0, self.n_items, CHUNK):
                        x = np.asarray(embeddings[start : start + CHUNK], np.float64)
                        error += float(
                            (
                                (x - encoder.decode(self.codes[start : start + CHUNK, :level])) ** 2
                            ).sum()
                        )
                    row["reconstruction_error"] = error / variance if variance else None
            per_level.append(row)
        return SidReport(
            n_items=self.n_items,
            levels=self.levels,
            unique_sids=len(groups),
            collision_rate=float(groups[groups > 1].sum() / self.n_items),
            largest_group=int(groups.max()),
            per_level=per_level,
        )

    def fingerprint(self) -> str:
        """12 hex digits (SHA-256) that change with the codes, the widths and the way collisions are
        resolved.
        """
        digest = hashlib.sha256(
            json.dumps([self.codes.shape, self.widths, self.collisions]).encode()
        )
        digest.update(self.codes.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def save(self, folder) -> None:
        """Writes `sids.safetensors` (`codes` [n, L']) and `sids.json` into `folder`."""
        meta = {
            "widths": self.widths,
            "base_levels": self.base_levels,
            "collisions": self.collisions,
            "fingerprint": self.fingerprint(),
        }
        save_arrays(folder, "sids", {"codes": self.codes}, meta)

    @classmethod
    def load(cls, folder) -> "SidTable":
        """The table that `save` wrote into `folder`; ValueError where its two files do not belong
        together.
        """
        arrays, meta = load_arrays(
            folder, "sids", "widths", "base_levels", "collisions", "fingerprint"
        )
        base = meta["base_levels"]
        table = cls(arrays["codes"][:, :base], meta["widths"][:base], meta["collisions"])
        if table.fingerprint() != meta["fingerprint"]:
            raise ValueError(
                f"{folder}: sids.safetensors does not match sids.json (fingerprint"
                f" {table.fingerprint()}, expected {meta['fingerprint']})"
            )
        return table

    @classmethod
    def from_file(cls, path, width=None, collisions: str = "extend", item_ids=None) -> "SidTable":
        """Reads published SIDs: lines `item_id c1 c2 …`, `*.index.json`, an array or a tensor (see
        `published`). `width`: 256, or as the highest code needs, up to 65,536. `item_ids`: of the
        catalogue, where the file names items so.

        What is not of this form, a missing item or a code outside its width is a ValueError that
        says where. Warns where most items share one SID.
        """
        codes = read_sids(path, item_ids)
        try:
            table = cls(codes, width or min(max(256, int(codes.max()) + 1), 2**16), collisions)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        largest = table._base_trie.max_items
        if largest > 1 and largest > table.n_items / 2:
            warnings.warn(
                f"{path}: {largest:,} of {table.n_items:,} items share one SID; such SIDs tell them"
                " apart no more than chance does",
                stacklevel=2,
            )
        return table


class SidReport(dict):
    """`SidTable.report()`: a dict that shows itself as a sentence and a table, in a terminal and in
    a notebook.
    """

    def frame(self) -> pd.DataFrame:
        """`per_level` as a data frame, one row per level."""
        return pd.DataFrame(self["per_level"]).set_index("level")

    def _summary(self) -> str:
        return (
            f"{self['n_items']:,} items, {self['unique_sids']:,} distinct SIDs;"
            f" {self['collision_rate']:.1%} of the items share theirs, the largest group counts"
            f" {self['largest_group']}"
        )

    def __str__(self) -> str:
        return f"{self._summary()}\n{self.frame().to_string(float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._summary()}</p>{self.frame().to_html(float_format='{:.3f}'.format)}"


def _neighbours(embeddings):
    """At most QUERIES random items with an embedding other than zero: rows [q]; their nearest
    others by cosine: [q, k].
    """
    # Here: every model has a table, and only this report needs faiss.
    import faiss

    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.asarray(embeddings / np.where(norm > 0, norm, 1), np.float32)
    items = np.random.default_rng(0).permutation(np.flatnonzero(norm))[:QUERIES]
    k = min(NEIGHBOURS, len(unit) - 1)
    found = faiss.knn(unit[items], unit, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]  # [q, k + 1]
    itself = found == items[:, None]
    itself[~itself.any(axis=1), -1] = True  # crowded out by k + 1 equal ones: the last of them goes
    return items, found[~itself].reshape(-1, k)


def _variance(embeddings) -> float:
    """Σ ‖x − mean‖² over the rows of `embeddings` float32 [n, d], in float64, a chunk at a time."""
    # Taken off before anything is summed: equal rows give exactly 0
    first = np.asarray(embeddings[0], np.float64)
    chunks = range(0, len(embeddings), CHUNK)
    mean = sum((embeddings[i : i + CHUNK] - first).sum(axis=0) for i in chunks) / len(embeddings)
    return float(sum(np.square(embeddings[i : i + CHUNK] - first - mean).sum() for i in chunks))


def _ragged(items, valid):
    """Nested lists of the valid entries of each row of `items` [..., M]."""
    if items.ndim == 1:
        return items[valid].tolist()
    return [_ragged(i, v) for i, v in zip(items, valid)]
