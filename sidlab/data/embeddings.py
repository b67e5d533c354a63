"""Embeddings as people bring them: arrays, tensors, frames and files, by position or by id."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from sidlab.data.tables import ROLES, as_id, parquet_file, plain_name
from sidlab.files import ARRAYS, read_arrays

NAME = "embeddings"  # of the file in a catalogue's folder
SUFFIXES = (*ARRAYS, ".parquet")
# What arrays of ids are called beside one of vectors
IDS = {*ROLES["item"].split(), "id", "ids", "itemids", "items", "keys"}


def as_embeddings(given, item_ids) -> np.ndarray:
    """float32 [n, d], row 0 is the first of `item_ids`.

    given: [n, d] of any type of numbers, an array, a tensor or lists; or {id: vector [d]}, an array
    of ids with one of vectors, a data frame with a column of ids and numbers, whose rows are put
    into the order of the items; or the path of a file with one of these (`SUFFIXES`). ValueError
    for another shape, for what is not finite, and for items without a row.
    """
    where = "embeddings"
    if isinstance(given, str | os.PathLike):
        where = str(given)
        given = _read(pathlib.Path(given))
    if callable(given):
        raise TypeError(
            f"{where} are an array [n, d]: call the function that makes them with the texts"
        )
    if isinstance(given, pd.DataFrame):
        given = _of_frame(where, given)
    if isinstance(given, Mapping):
        given = _of_mapping(where, given, item_ids)
    if hasattr(given, "detach"):  # a tensor, wherever it is
        given = given.detach().cpu().float().numpy()
    try:
        rows = np.ascontiguousarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be numbers [n, d]: {str(error)[:120]}") from error
    n_items = len(item_ids)
    if rows.ndim != 2 or len(rows) != n_items:
        hint = ""
        if len(rows.shape) and len(rows) == n_items + 1:
            hint = " (one row too many: drop the padding row with embeddings[1:])"
        elif rows.ndim == 2 and rows.shape[1] == n_items:
            hint = " (one column an item: turn it with embeddings.T)"
        raise ValueError(
            f"{where} must have the shape [{n_items}, d], got {list(rows.shape)}{hint}"
        )
    if not np.isfinite(rows).all():
        item = np.argmin(np.isfinite(rows).all(axis=1))
        raise ValueError(f"{where} must be finite; item {item_ids[item]!r} is not")
    return rows


def beside(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The files in a folder that are its embeddings by their name, and those that look like some
    and are not read.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    own = [path for path in found if path.stem == NAME]
    return own, [path for path in found if path not in own and "emb" in path.name.lower()]


def _read(path):
    if not path.is_file():
        raise ValueError(f"embeddings={str(path)!r} is no file")
    if path.suffix == ".parquet":
        return parquet_file(path).read().to_pandas()
    if path.suffix not in ARRAYS:
        raise ValueError(
            f"embeddings={str(path)!r} must be a file of the kinds {', '.join(SUFFIXES)}"
        )
    arrays = read_arrays(path)
    return arrays[""] if arrays.keys() == {""} else arrays


def _of_frame(where, frame):
    """{id: vector} where a column holds ids, else the numbers."""
    frame = frame.rename(columns=str)
    key = next((name for name in frame.columns if plain_name(name) in IDS), None)
    rest = frame if key is None else frame.drop(columns=key)
    # One column of lists, or a column each dimension
    vectors = rest.iloc[:, 0].tolist() if rest.shape[1] == 1 else rest.to_numpy()
    if key is None:
        return vectors
    if frame[key].duplicated().any():
        twice = frame[key][frame[key].duplicated()].iloc[0]
        raise ValueError(f"{where} has two rows for {key}={twice!r}")
    return dict(zip(frame[key].tolist(), vectors))


def _of_mapping(where, given, item_ids):
    """The vectors in the order of the items."""
    key = next((name for name in given if plain_name(str(name)) in IDS), None)
    if key is not None and len(given) == 2:
        vectors = next(value for name, value in given.items() if name != key)
        if len(given[key]) != len(vectors):
            raise ValueError(
                f"{where} has {len(given[key])} ids in {key!r} for {len(vectors)} vectors"
            )
        given = dict(zip(np.asarray(given[key]).tolist(), vectors))
    elif len(given) == 1 and np.ndim(next(iter(given.values()))) == 2:
        return next(iter(given.values()))
    rows = {str(as_id(name)): value for name, value in given.items()}
    missing = [one for one in item_ids if str(one) not in rows]
    if missing:
        raise ValueError(
            f"{where} has no row for {len(missing)} of {len(item_ids)} items, the first is"
            f" {str(missing[0])[:40]!r}; it has rows for {str(list(rows)[:3])[:80]} …"
        )
    found = []
    for one in item_ids:
        row = rows[str(one)]
        row = row.detach().cpu().float().numpy() if hasattr(row, "detach") else np.asarray(row)
        if found and row.shape != found[0].shape:
            raise ValueError(
                f"{where} must have vectors of one length, got {list(row.shape)} for the item"
                f" {str(one)[:40]!r} and {list(found[0].shape)} for those before"
            )
        found.append(row)
    return np.stack(found)
