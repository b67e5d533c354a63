"""SIDs as they are published: lines of numbers, `*.index.json`, arrays and tensors.

1 12 3 200                               a line an item: its id from 1, its codes
{"0": ["<a_12>", "<b_3>", "<c_200>"]}    LC-Rec, LETTER, MiniOneRec: ids from 0 or from 1, or
                                         what the data call the items
.npy .npz .safetensors .pt .pth          integers [items, levels] or [levels, items]
"""

import json
import pathlib
import re
import warnings

import numpy as np

from sidlab.files import ARRAYS, numbered_lines, read_arrays

_TOKEN = re.compile(r"<?[A-Za-z]*_?(\d+)>?", re.ASCII)


def read_sids(path, item_ids=None) -> np.ndarray:
    """int64 [n, L], row 0 is item 1: the codes in a file.

    item_ids: what the data call the items, in their order; where a file names them so, its rows are
    put into that order. ValueError says what is wrong, with the line or item. Warns where it had to
    choose how a file is meant.
    """
    path = pathlib.Path(path)
    if path.suffix in ARRAYS:
        return _of_array(path)
    lines = numbered_lines(path)
    try:
        first = next(lines, None)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if first is None:
        raise ValueError(f"{path}: no items, the file is empty")
    if first[1].lstrip()[:1] in (b"{", b"["):
        rows = _of_json(path)
    else:
        rows = _of_lines(path)
    codes = [rows[name] for name in _order(path, rows, item_ids)]
    return np.array(codes, dtype=np.int64)


def _of_lines(path):
    rows = {}
    levels = None
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        got = f"got {line[:80].decode(errors='replace').rstrip()!r}"
        try:
            # Python reads 1_2 as 12
            item, *sid = map(int, line.decode().replace("_", "?").split())
        except ValueError:
            raise ValueError(f"{where}: expected `item_id c1 c2 …` (integers), {got}") from None
        if item == 0:
            raise ValueError(f"{where}: ids seem to start at 0, here items are 1..n: add 1, {got}")
        if item < 1 or item in rows or not sid:
            raise ValueError(f"{where}: expected a new item id from 1 and its codes, {got}")
        levels = levels or len(sid)
        if len(sid) != levels:
            raise ValueError(
                f"{where}: item {item} has {len(sid)} codes, the lines before have {levels}"
            )
        _within(where, sid)
        rows[item] = sid
    return rows


def _of_json(path):
    try:
        text = b"".join(line for _, line in numbered_lines(path))
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, an object of items: {str(error)[:120]}") from error
    if isinstance(content, list):
        content = dict(enumerate(content))
    rows = {}
    levels = None
    if not content:
        raise ValueError(f"{path}: no items, the file is empty")
    for item, tokens in content.items():
        listed = tokens if isinstance(tokens, list) and tokens else [None]
        matches = [_TOKEN.fullmatch(str(token)) for token in listed]
        if listed is not tokens or None in matches:
            raise ValueError(
                f'{path}: item {str(item)[:40]!r} must have a list such as ["<a_12>", "<b_3>"], got'
                f" {str(tokens)[:80]}"
            )
        sid = [int(match[1]) for match in matches]
        levels = levels or len(sid)
        if len(sid) != levels:
            raise ValueError(
                f"{path}: item {str(item)[:40]!r} has {len(sid)} codes, those before have {levels}:"
                " all SIDs must be of one length"
            )
        _within(f"{path}: item {str(item)[:40]!r}", sid)
        rows[int(item) if re.fullmatch(r"\d+", str(item), re.ASCII) else item] = sid
    if len(rows) != len(content):
        raise ValueError(f"{path} names an item twice, as in 1 and 01")
    return rows


def _once(pairs):
    """An object without a name twice, of which JSON's reader would keep the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is named twice")
    return made


def _within(where, sid):
    """Refuses what no integer array would hold."""
    if max(map(abs, sid)) >= 2**31:
        raise ValueError(f"{where}: codes must be below 2,147,483,648, got {str(max(sid))[:40]}")


def _order(path, rows, item_ids):
    """The names in `rows` in the order of the items."""
    named = None if item_ids is None else {str(one): one for one in item_ids}
    by_name = {str(name): name for name in rows}
    if named is not None and by_name.keys() == named.keys():
        return [by_name[one] for one in named]
    strange = next((name for name in rows if not isinstance(name, int)), None)
    if strange is not None:
        missing = [one for one in named or () if one not in by_name]
        what = "give item_ids=catalogue.item_ids, for the file names items by them"
        if missing:
            first = missing[0][:40]
            what = f"{len(missing)} of the {len(named)} items are missing, the first is {first!r}"
        raise ValueError(f"{path}: {what}; the file names {str(strange)[:40]!r}")
    first = 0 if 0 in rows else 1
    wanted = range(first, first + len(rows))
    highest = max(rows)
    missing = highest - wanted[-1]
    if missing:
        lacking = next(item for item in range(first, highest) if item not in rows)
        raise ValueError(
            f"{path}: {missing} of the items {first}..{highest} are missing, the first is item"
            f" {lacking}"
        )
    if first == 0:
        warnings.warn(
            f"{path}: ids 0..{highest} are taken for the items 1..{highest + 1}", stacklevel=4
        )
    return wanted


def _of_array(path):
    codes = _array(path)
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(
            f"{path} must hold integers [items, levels] or [levels, items], got the shape"
            f" {list(codes.shape)}"
        )
    number = codes.dtype.kind in "iu" or codes.dtype.kind == "f" and np.isfinite(codes).all()
    whole = codes.astype(np.int64) if number else codes
    if not number or not np.array_equal(whole, codes):
        raise ValueError(f"{path} must hold integers, got {codes.dtype} such as {codes.flat[0]}")
    if codes.shape[0] < codes.shape[1]:
        levels, items = codes.shape
        warnings.warn(
            f"{path}: its shape {list(codes.shape)} is taken for {levels} levels, {items:,} items",
            stacklevel=4,
        )
        whole = whole.T
    return np.ascontiguousarray(whole)


def _array(path):
    """The one array of a file."""
    arrays = read_arrays(path)
    if len(arrays) != 1:
        raise ValueError(
            f"{path} must hold one array, got {len(arrays)}: {', '.join(map(str, arrays))[:80]}"
        )
    return next(iter(arrays.values()))
