"""A catalogue: items, what users did with them, and a vector for every item. Everything downstream
starts here.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np
import pandas as pd

from sidlab.checks import as_histories
from sidlab.data.embeddings import as_embeddings
from sidlab.data.tables import as_id
from sidlab.data.text import text_embeddings

# How much each part of a text weighs in the TF-IDF embeddings. Where categories weigh as much as
# the title, items of one category look alike, and SIDs collide. `python results/sids.py FOLDER …`
# on Amazon's Beauty and Scientific, residual k-means with 3 levels of 256 codes: items that share
# their SID, neighbours (in the same embeddings) with the same first code, and how often the next
# item in a training history has the same first code and the same first two (chance is below 1 % and
# 0.3 %).
#
#   title, brand, category, rest │ Beauty                          │ Scientific
#                                │ collide    near  next 1  next 2 │ collide    near  next 1  next 2
#   all as one text              │  36.1 %  90.7 %  12.5 %   3.2 % │  46.8 %  79.3 %  12.9 %   7.7 %
#   1     1     1     1          │  62.6 %  95.0 %  12.2 %   4.2 % │  55.5 %  86.7 %  14.8 %   8.8 %
#   1     0.5   0.5   0.5        │  38.7 %  92.6 %  12.4 %   3.3 % │  47.3 %  84.6 %  14.7 %   8.7 %
#   1     0.5   0.25  0.25       │  35.2 %  87.6 %  14.6 %   3.2 % │  48.4 %  81.9 %  14.5 %   9.6 %
#   1     0.25  0.25  0.25       │  30.1 %  84.8 %  13.4 %   2.6 % │  43.3 %  80.0 %  14.6 %   8.8 %
#   1     0.1   0.1   0.1        │  26.8 %  79.5 %  12.5 %   2.3 % │  38.2 %  76.3 %  14.1 %   7.8 %
#   1     0     0     0          │  23.9 %  72.8 %  10.2 %   2.3 % │  36.4 %  73.7 %  13.8 %   7.2 %
#
# A quarter each: no row has both fewer collisions and next items that are found more often by the
# first code, on both.
WEIGHTS = {"title": 1.0, "brand": 0.25, "categories": 0.25, "rest": 0.25}
COLUMNS = ("item_id", "title", "brand", "categories", "text")


@dataclass(eq=False, repr=False)
class Catalogue:
    """Items and histories, checked when built.

    items: one row per item: `item_id` (1..n in order), `title`, `brand`, `text` (str or None),
        `categories` (list of str, root first). Row 0 is item 1.
    histories: one int64 array of item ids per user, oldest first, never empty.
    user_ids: one unique str per history.
    truth: what a synthetic world knows about itself; None for real data.
    dirty: what the reader had to skip or repair,
        `{kind: {"count": int, "first": "file line n: what"}}`.
    embeddings: float32 [n_items, d], row 0 is item 1; given in any form, also by id, or as the path
        of a file (`embeddings.as_embeddings`). Where none are given, they are computed from
        `text` when first read (`sidlab.data.text`), with `text_encoder` if that is given;
        ValueError then, if no item has a text. In `dataclasses.replace` give `embeddings=None`, or
        what was computed counts as given.
    item_ids: what the caller's data call each item, a list of str or int, each once; where none are
        given, a range 1..n.
    """

    name: str
    items: pd.DataFrame
    histories: list
    user_ids: list
    truth: object = None
    dirty: dict = field(default_factory=dict)
    embeddings: InitVar[np.ndarray | None] = None
    text_encoder: str | None = None
    item_ids: Sequence | None = None

    def __post_init__(self, embeddings):
        self.items = _checked_items(self.items)
        self.histories = as_histories(self.histories)
        for user, history in enumerate(self.histories):
            if history.size == 0 or history.min() < 1 or history.max() > self.n_items:
                raise ValueError(
                    f"histories[{user}] must be non-empty and hold the catalogue's item ids"
                    f" 1..{self.n_items}, got"
                    f" {history[(history < 1) | (history > self.n_items)][:5].tolist()}"
                )
        self.user_ids = [str(user) for user in self.user_ids]
        if len(self.user_ids) != len(self.histories) or len(set(self.user_ids)) != len(
            self.user_ids
        ):
            raise ValueError(
                f"user_ids must name each of the {len(self.histories)} histories once, got "
                f"{len(self.user_ids)} ids, {len(set(self.user_ids))} of them different"
            )
        # A range stands for want of ids, also where `dataclasses.replace` hands it on
        own = self.item_ids is not None and not isinstance(self.item_ids, range)
        self.item_ids = list(self.item_ids) if own else range(1, self.n_items + 1)
        # "1" and 1 are one id: in files they look alike
        self._item_of = {str(one): item for item, one in enumerate(self.item_ids, start=1)}
        if len(self.item_ids) != self.n_items or len(self._item_of) != self.n_items:
            raise ValueError(
                f"item_ids must name each of the {self.n_items} items once, got"
                f" {len(self.item_ids)} ids, {len(self._item_of)} of them different"
            )
        self.given_embeddings = (
            None if embeddings is None else as_embeddings(embeddings, self.item_ids)
        )
        self._embeddings = self.given_embeddings

    def __repr__(self):
        events = sum(map(len, self.histories))
        return (
            f"Catalogue({self.name!r}: {self.n_items:,} items, {len(self.histories):,} users,"
            f" {events:,} interactions)"
        )

    @property
    def n_items(self) -> int:
        return len(self.items)

    def ids_of(self, items) -> np.ndarray:
        """What the caller's data call these items: object, of the shape of `items` (item ids, int),
        such as what `recommend` returns; None for 0, no item. ValueError for what is no item id.

        >>> catalogue.ids_of(recommend(model, histories)[0])  # doctest: +SKIP
        """
        items = np.asarray(items)
        whole = items.dtype.kind in "iu"
        if items.size and not (whole and 0 <= items.min() and items.max() <= self.n_items):
            raise ValueError(f"items must be item ids 0..{self.n_items}, got {str(items)[:80]}")
        return np.array([None, *self.item_ids], dtype=object)[items]

    def items_of(self, ids) -> np.ndarray:
        """int64 [n], the item ids of n items, given by what the caller's data call them; ValueError
        for an unknown one.
        """
        unknown = [one for one in ids if str(as_id(one)) not in self._item_of]
        if unknown:
            raise ValueError(
                f"ids must be among `item_ids` ({str(list(self.item_ids[:3]))[:80]} …), got"
                f" {str(unknown[0])[:80]!r} and {len(unknown) - 1} more unknown ones"
            )
        return np.array([self._item_of[str(as_id(one))] for one in ids], dtype=np.int64)

    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over histories, item texts, text encoder and given embeddings:
        two catalogues with the same fingerprint train the same models, so results can be matched to
        data.
        """
        digest = hashlib.sha256(json.dumps(self.items["text"].tolist()).encode())
        digest.update(np.array([len(history) for history in self.histories], dtype="<i8").tobytes())
        for history in self.histories:
            digest.update(history.astype("<i8", copy=False).tobytes())
        if self.text_encoder is not None:
            digest.update(str(self.text_encoder).encode())
        if self.given_embeddings is not None:
            digest.update(str(self.given_embeddings.shape).encode())
            digest.update(self.given_embeddings.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()[:16]

    def _embeddings_or_compute(self) -> np.ndarray:
        """float32 [n_items, d], row 0 is item 1."""
        if self._embeddings is None:
            texts = self.items["text"].tolist()
            if not any(texts):
                raise ValueError(
                    f"no item of catalogue {self.name!r} has a text to embed: pass embeddings="
                    f" (float32 [{self.n_items}, d], row 0 is item 1) or put an embeddings.npy in"
                    " its folder"
                )
            if self.text_encoder is None:
                self._embeddings = text_embeddings(text_parts(self.items), weights=WEIGHTS.values())
            else:
                self._embeddings = text_embeddings(texts, encoder=self.text_encoder)
        return self._embeddings


# The constructor takes `embeddings`, the instance computes them late: a dataclass can't declare
# both under one name.
Catalogue.embeddings = property(Catalogue._embeddings_or_compute)


def compose_text(
    title: str | None, brand: str | None, categories: list, price: float | None = None
) -> str | None:
    """The text of an item whose source has none: `Title: …; Brand: …; Categories: A > B; Price: …`
    without what is missing.
    """
    parts = {"Title": title, "Brand": brand, "Categories": " > ".join(categories), "Price": price}
    return "; ".join(f"{label}: {value}" for label, value in parts.items() if value) or None


def text_parts(items: pd.DataFrame) -> list[tuple]:
    """The text of each of `items` in parts as in `WEIGHTS`, without the labels of `compose_text`
    and without the categories that head every path, which say nothing. The rest: what comes after
    those three. A text of another form is all title.
    """
    paths = [path for path in items["categories"] if path]
    shared = len(os.path.commonprefix(paths)) if len(paths) > 1 else 0
    parts = []
    for title, brand, path, text in zip(*(items[column] for column in COLUMNS[1:])):
        head = compose_text(title, brand, path) or ""
        if text and text.startswith(head) and text[len(head) : len(head) + 1] in ("", ";"):
            parts.append(
                (title, brand, " ".join(path[shared:]), re.sub(r"^; \w+: ", "", text[len(head) :]))
            )
        else:
            parts.append((text, None, None, None))
    return parts


def _checked_items(items):
    if not isinstance(items, pd.DataFrame):
        raise TypeError(
            f"items must be a DataFrame with the columns {list(COLUMNS)}, got a"
            f" {type(items).__name__}"
        )
    missing = [column for column in COLUMNS if column not in items.columns]
    if missing or len(items) == 0:
        raise ValueError(
            f"items must be a non-empty DataFrame with the columns {list(COLUMNS)}; "
            f"{len(items)} rows, missing columns {missing}"
        )
    if not np.array_equal(items["item_id"].to_numpy(), np.arange(1, len(items) + 1)):
        raise ValueError(
            f"items.item_id must be 1..{len(items)} in order, since ids are positions; "
            f"got {items['item_id'].tolist()[:5]} …"
        )
    items = items.loc[:, list(COLUMNS)].reset_index(drop=True)
    for column in ("title", "brand", "text"):  # pandas' str dtype turns None into NaN
        values = items[column].astype(object)
        items[column] = values.where(values.notna(), None)
    items["categories"] = [
        list(path) if isinstance(path, tuple | np.ndarray) else path for path in items["categories"]
    ]
    kinds = dict.fromkeys(
        COLUMNS[1:], (lambda value: isinstance(value, str | None), "a str or None")
    )
    kinds["categories"] = (
        lambda path: isinstance(path, list) and all(isinstance(name, str) for name in path),
        "a list of str",
    )
    for column, (is_right, what) in kinds.items():
        for item, value in enumerate(items[column], start=1):
            if not is_right(value):
                raise ValueError(
                    f"items.{column} must be {what} for every item, got {value!r} for item {item}"
                )
    return items
