"""Event tables, the form that most people have: a row says that a user met an item at a time.

    catalogue_from_events("ratings.csv")
    catalogue_from_events(frame, user="visitor", item="sku", time="at", items="products.jsonl")

Formats: `sidlab.data.tables`. Users are numbered in the order of their first row that is kept. A
history is sorted by time; what happened at one time stays in the order of the table, and without a
column of times all does. Items are numbered as they first appear when the histories are read one
after the other. S3-Rec's sequence files follow the same rule.
"""

import array
import datetime
import html
import math
import numbers
import pathlib
import re

import numpy as np
import pandas as pd

from sidlab.checks import integer
from sidlab.data.catalogue import COLUMNS, Catalogue, compose_text
from sidlab.data.lines import DataIssues
from sidlab.data.tables import EVENT, ITEM, SUFFIXES, Table, as_id, suffix_of

LARGEST = 2**63 - 1


def catalogue_from_events(
    events,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    items=None,
    min_interactions: int = 5,
    name: str | None = None,
    embeddings=None,
    on_dirty: str = "warn",
) -> Catalogue:
    """A catalogue of a table of events.

    events: a data frame, or the path of a CSV, TSV, Parquet or JSON lines file, gzipped or not.
    user, item, time: names of its columns, where they are not among the usual ones
        (`tables.ROLES`). Times are numbers or dates. Without any, the order of the rows counts.
    items: a data frame or file that describes the items, with a column of the same ids and any of
        title, brand, categories, price, text; by default the file that usually stands beside
        `events`: `.item`, `movies.csv`, `u.item`, `meta_X.jsonl`.
    min_interactions: users and items with fewer events are left out, until there are none (k-core);
        1: all stay.
    name: of the catalogue; default: the file's.
    embeddings: float32 [n_items, d] in the order of `Catalogue.item_ids`.
    on_dirty: "warn" gives one warning with the count and the first row of each kind that was left
        out (also in `Catalogue.dirty`), "raise" a ValueError at the first that is broken.

    Ids may be texts or integers; a whole float counts as an integer. They are kept in
    `Catalogue.item_ids`, so `catalogue.ids_of(recommended)` are the caller's. Rows that are equal
    in user, item and time count once. Raises ValueError for missing columns, unreadable files, and
    where nothing is left.
    """
    min_interactions = integer("min_interactions", min_interactions)
    issues = DataIssues(on_dirty)
    table = Table(events, user=user, item=item, time=time)
    missing = [role for role in ("user", "item") if role not in table.roles]
    if missing:
        raise ValueError(
            f"no column of {table} is known as that of the {' and the '.join(missing)}: there are"
            f" {', '.join(table.names)[:120]!r}. Name them: user=, item=, time=; where a first line"
            " with names is missing, pass pandas.read_csv(path, names=[…])"
        )
    users, ids, rows, times = _read(table, issues)
    kept = k_core(rows[:, 0], rows[:, 1], min_interactions)
    if not kept.any():
        raise ValueError(
            f"min_interactions={min_interactions} leaves nothing of {table}: {len(rows):,} events"
            f" of {len(users):,} users and {len(ids):,} items, but none have that many among"
            f" themselves; give a smaller one. Left out: {issues}"
        )
    rows = rows[kept]
    for column, found, kind in ((0, users, "users"), (1, ids, "items")):
        gone = np.setdiff1d(np.arange(len(found)), rows[:, column])
        if len(gone):
            kind = f"{kind} with fewer than {min_interactions} interactions"
            issues.count(kind, repr(found[gone[0]]), len(gone))
    known_users, known_items, histories = numbered(rows[:, 0], rows[:, 1], times[kept])
    ids = [ids[one] for one in known_items]
    described = _described(table, items, ids, issues)
    issues.warn(table)
    frame = pd.DataFrame(
        [(number, *described[str(one)]) for number, one in enumerate(ids, start=1)],
        columns=list(COLUMNS),
        dtype=object,
    )
    return Catalogue(
        name or (table.path.name.partition(".")[0] if table.path else "events"),
        frame.astype({"item_id": np.int64}),
        histories,
        [users[one] for one in known_users],
        dirty=issues.kinds,
        embeddings=embeddings,
        item_ids=ids,
    )


def find_events(folder: pathlib.Path, **given) -> pathlib.Path | None:
    """The file with the table of events in a folder, None where there is none; ValueError where it
    is not clear which. `given`: names of columns, as in `catalogue_from_events`.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if suffix_of(path) in SUFFIXES and path.is_file() and not path.name.startswith("."):
            try:
                table = Table(path, **given)
            except ValueError:  # of another kind, whatever its name says
                continue
            if {"user", "item"} <= table.roles.keys():
                found.append(path)
    # Ratings stand beside tags, the 5-core beside all reviews
    names = r"ratings|u\.data|.*_5\.json|.*\.inter$"
    usual = [path for path in found if re.match(names, path.name)]
    if len(found) > 1 and len(usual) != 1:
        names = ", ".join(path.name for path in found)[:200]
        raise ValueError(
            f"{folder} holds several tables of events, {names}: give the path of one of them"
        )
    return (usual or found or [None])[0]


def k_core(users, items, k: int = 5) -> np.ndarray:
    """bool [n]: which of n events stay when users and items with fewer than `k` events are removed
    until there are none. users, items: int64 [n], not negative. One (user, item) pair may have
    several events.
    """
    keep = np.ones(len(users), dtype=bool)
    while True:
        rare = np.any(
            [
                np.bincount(ids[keep], minlength=ids.max(initial=0) + 1)[ids] < k
                for ids in (users, items)
            ],
            axis=0,
        )
        if not (keep & rare).any():
            return keep
        keep &= ~rare


def numbered(users, items, times) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Users, items (the numbers they were given as, in their new order) and histories, item ids
    from 1 on; see the module's text. users, items: int64 [n]; times [n].
    """
    row_users, known_users = pd.factorize(users)
    order = np.lexsort((times, row_users))  # stable, as ties need
    row_items, known_items = pd.factorize(items[order])
    histories = np.split(row_items + 1, np.flatnonzero(np.diff(row_users[order])) + 1)
    return known_users, known_items, histories


def _read(table, issues):
    """Users and items; int64 [n, 2], both as positions among these; and times [n]."""
    users = {}
    items = {}
    given = {}
    rows = array.array("q")
    times = []
    dated = None
    for number, line, (user, item, time) in table.rows(EVENT, issues):
        user = as_id(user)
        item = as_id(item)
        if user is None or item is None:
            table.add(issues, f"no {'user' if user is None else 'item'}", number, line)
            continue
        if "time" in table.roles:
            moment, is_date = _moment(time)
            # Numbers and dates do not compare: the first row says which they are
            dated = is_date if dated is None else dated
            if moment is None or is_date != dated:
                table.add(issues, "a time that can't be read", number, line)
                continue
        else:
            moment = number
        # "1" and 1 are one item, known as it was first
        given.setdefault(str(item), item)
        user = users.setdefault(str(user), len(users))
        rows.extend((user, items.setdefault(str(item), len(items)), number))
        times.append(moment)
    if not rows:
        raise ValueError(f"{table} holds no event. Left out: {str(issues) or 'nothing'}")
    rows = np.array(rows, dtype=np.int64).reshape(-1, 3)
    # Integers stay exact, as nanoseconds need, unless there are parts of a second
    times = np.array(times)
    again = pd.DataFrame({"user": rows[:, 0], "item": rows[:, 1], "time": times}).duplicated()
    again = again.to_numpy()
    if again.any():
        issues.count("rows that were there before", f"row {rows[again][0, 2]}", int(again.sum()))
    return list(users), list(given.values()), rows[~again, :2], times[~again]


def _moment(value):
    """A number that grows with time, and whether it was a date; (None, False) if it is none."""
    if isinstance(value, str):
        value = value.strip()
        if re.fullmatch(r"[-+]?\d+", value):
            value = int(value)
        elif re.fullmatch(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?", value):
            value = float(value)
        else:
            value = _date(value)
    if isinstance(value, datetime.date | np.datetime64) and value is not pd.NaT:
        return pd.Timestamp(value).value, True
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return (value, False) if abs(value) <= LARGEST else (None, False)
    return None, False


def _date(text):
    try:
        date = pd.Timestamp(text)
    except ValueError:
        return None
    return None if date is pd.NaT else date.tz_localize(None) if date.tz is None else date


def _described(table, items, ids, issues):
    """{str of an id: title, brand, categories, text} of all `ids`."""
    rows = {}
    if items is None and table.path is not None:
        items = _beside(table.path)
    if items is not None:
        about = Table(items)
        if "item" not in about.roles:
            raise ValueError(
                f"items={about!s:.80} needs a column of the items' ids, as the events have one;"
                f" there are {', '.join(about.names)[:200]}"
            )
        wanted = set(map(str, ids))
        for number, line, row in about.rows(ITEM, issues):
            one = str(as_id(row[0]))
            if one not in wanted:
                continue
            if one in rows:
                about.add(issues, "an item that was there before", number, line)
                continue
            rows[one] = _fields(row[1:])
    # An events table may tell the items' titles in every row
    elif "title" in table.roles and "asin" not in table.roles["item"]:  # there it is a review's
        return _described_by_events(table, ids)
    lacking = [one for one in ids if str(one) not in rows]
    if items is not None and lacking:
        issues.count("items without a description", repr(lacking[0]), len(lacking))
    return {str(one): rows.get(str(one), (None, None, [], None)) for one in ids}


def _described_by_events(table, ids):
    wanted = set(map(str, ids))
    rows = {}
    for _, _, row in table.rows(ITEM, DataIssues("warn")):
        one = str(as_id(row[0]))
        if one in wanted and one not in rows:
            rows[one] = _fields(row[1:])
    return rows


def _beside(path):
    """The file that usually describes the items of the events in `path`, or None."""
    name = path.name
    stem = name.removesuffix(".gz")
    names = {
        "ratings.csv": "movies.csv",
        "ratings.dat": "movies.dat",
        "u.data": "u.item",
    }
    usual = [
        names.get(stem, ""),
        re.sub(r"\.inter$", ".item", stem),
        "meta_" + re.sub(r"^reviews_|_5(?=\.json)", "", stem),
    ]
    for one in usual:
        for other in (one, f"{one}.gz"):
            found = path.with_name(other) if one and one != stem else path
            if found != path and found.is_file():
                return found
    return None


def _fields(row):
    """Title, brand, categories and text of an item; what is of another type is left out."""
    title, brand, categories, price, text = row
    title = tidy(title)
    brand = tidy(brand)
    categories = _path(categories)
    price = _price(price)
    return title, brand, categories, tidy(text) or compose_text(title, brand, categories, price)


def tidy(text) -> str | None:
    """A text without HTML entities and without more white space than it needs; None without any."""
    return " ".join(html.unescape(text).split()) or None if isinstance(text, str) else None


def _path(value):
    """Categories, root first, of a list, of a list of such paths (the first counts) or a text."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        mark = next((mark for mark in ("|", " > ", ">", ";") if mark in value), None)
        value = value.split(mark) if mark else [value]
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list):
        return []
    return [name for name in map(tidy, value) if name and name != "(no genres listed)"]


def _price(value):
    """A price as it is told, or None: Amazon's of 2018 may be a piece of a page."""
    if isinstance(value, str):
        value = value.strip()
        return value if re.fullmatch(r"[$€£¥]?\s?\d[\d.,]*", value) else None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None
