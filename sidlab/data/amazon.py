"""The Amazon review data of 2014 (McAuley et al. 2015; He and McAuley 2016) from the raw files, as
they were published.

    reviews_X_5.json.gz   one JSON object a line: reviewerID, asin, unixReviewTime (in whole days:
                          ties are common), …
    meta_X.json.gz        one Python dict literal a line: asin, title, brand, price, categories (a
                          list of paths), …

X is the category, e.g. Sports_and_Outdoors. In place of the first file the unfiltered
reviews_X.json.gz will do, since the 5-core filter is always applied; it removes nothing from a
5-core file. Every review is one event, whatever its rating. Users are numbered in the order of
their first kept line; a history is sorted by time, ties stay in the order of the file; items are
numbered as they first appear when the histories are read one after the other. S3-Rec's sequence
files follow the same rule.

Texts hold the first category path only; HTML entities are decoded and white space is squeezed. Of
dirty lines each kind is counted and its first is named: a line that can't be used is skipped, a
field of the wrong type is left out, and an item without metadata stays, without a text. Metadata of
other items, most of the file, is not even parsed.
"""

import array
import ast
import http.client
import json
import os
import pathlib
import re
import shutil
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sidlab.data.catalogue import COLUMNS, Catalogue, compose_text
from sidlab.data.events import k_core, numbered, tidy
from sidlab.data.lines import DataIssues, find_file
from sidlab.data.text import cache_folder
from sidlab.files import numbered_lines

ADDRESS = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
PREFIX = "amazon-2014-"  # of the names that `load_catalogue` takes
SHORT = {"beauty": "Beauty", "sports": "Sports_and_Outdoors", "toys": "Toys_and_Games"}
_ASIN = re.compile(r"""asin['"]\s*:\s*u?['"]([^'"]+)""")
_FIELDS = {
    "title": lambda value: isinstance(value, str),
    "brand": lambda value: isinstance(value, str),
    "price": lambda value: isinstance(value, int | float),
    "categories": (
        lambda value: (
            isinstance(value, list)
            and isinstance(value[0], list)
            and all(isinstance(name, str) for name in value[0])
        )
    ),
}


def read_amazon(folder, *, embeddings=None, on_dirty="warn") -> Catalogue:
    """The catalogue of the one category whose files are in `folder`, named after the folder. See
    the module's text.

    on_dirty: "warn" gives one warning with the count and the first example of each kind (also in
    `Catalogue.dirty`), "raise" a ValueError at the first. ValueError too for missing or damaged
    files, two categories, and an empty 5-core.
    """
    folder, issues, found = pathlib.Path(folder), DataIssues(on_dirty), find_reviews(folder)
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold the files of one category, reviews_X_5.json.gz and meta_X.json.gz;"
            f" found {sorted(found)}"
        )
    ((category, reviews),) = found.items()
    meta = find_file(folder, f"meta_{category}.json")
    user_names, asins, events = _read_reviews(reviews, issues)
    events = events[k_core(events[:, 0], events[:, 1])]
    if len(events) == 0:
        raise ValueError(
            f"no 5-core in {reviews}: no users and items with 5 events among themselves. Dirty"
            f" lines: {issues}"
        )
    known_users, known_items, histories = numbered(events[:, 0], events[:, 1], events[:, 2])

    asins = [asins[item] for item in known_items]
    described = _read_meta(meta, set(asins), issues)
    # Where an item is first named
    first = dict(zip(events[::-1, 1], events[::-1, 3]))
    for item, asin in zip(known_items, asins, strict=True):
        if asin not in described:
            line = asin.encode(errors="replace")
            issues.add("item without metadata", reviews, first[item], line)
    issues.warn(folder)
    rows = [
        (item_id, *described.get(asin, (None, None, [], None)))
        for item_id, asin in enumerate(asins, start=1)
    ]
    items = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).astype({"item_id": np.int64})
    user_ids = [user_names[user] for user in known_users]
    return Catalogue(
        folder.resolve().name,
        items,
        histories,
        user_ids,
        dirty=issues.kinds,
        embeddings=embeddings,
        item_ids=asins,
    )


def find_reviews(folder) -> dict:
    """{category: path} of the reviews in `folder`; the 5-core file where the unfiltered one is
    there, too.
    """
    # X.json, X.json.gz, X_5.json, X_5.json.gz: the last one counts
    paths = sorted(pathlib.Path(folder).glob("reviews_*"))
    matches = [
        (re.fullmatch(r"reviews_(\w+?)(_5)?\.json(\.gz)?", path.name), path) for path in paths
    ]
    return {match[1]: path for match, path in matches if match}


def fetch_amazon(category: str) -> pathlib.Path:
    """The folder in the cache ($SIDLAB_CACHE, default ~/.cache/sidlab) with the files of `category`
    ("beauty", "sports", "toys", or as in the file names: "Office_Products"), after downloading what
    isn't there yet.

    What a broken transfer has brought stays in a `.part` file, and the next call goes on from
    there; a file gets its name when it is whole and intact. ConnectionError if a file can't be had;
    ValueError for a bad category or a damaged file.
    """
    # One folder for both names
    category = next((short for short, full in SHORT.items() if full == category), category)
    full = SHORT.get(category, category)
    if not re.fullmatch("[A-Za-z_]+", full):
        raise ValueError(
            f"category must be one of {list(SHORT)} or as in the file names, e.g."
            f" 'Office_Products', got {category!r}"
        )
    folder = cache_folder() / f"{PREFIX}{category}"
    names = (f"reviews_{full}_5.json.gz", f"meta_{full}.json.gz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pattern in zip(names, ("reviews_*.json*", "meta_*.json*"), strict=True):
            # Else it is there, perhaps in another form
            if all(path.suffix == ".part" for path in folder.glob(pattern)):
                _download(ADDRESS + name, folder / name)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not download {category!r} ({type(error).__name__}: {error}). Try again, which"
            f" goes on where it broke off, or put {' and '.join(ADDRESS + name for name in names)}"
            f" into {folder} by hand."
        ) from error
    return folder


def _download(url, path):
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        part.unlink()  # nothing comes after these bytes: too many, or all but never checked
        return _download(url, path)
    with response:
        # Else the whole file comes
        rest = re.fullmatch(rf"bytes {done}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        # 0: the server doesn't say
        total = int(rest[1] if rest else response.headers.get("Content-Length") or 0)
        counted = tqdm.wrapattr(
            response, "read", desc=path.name, total=total or None, initial=done if rest else 0
        )
        with counted as stream, part.open("ab" if rest else "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 16)
    done = part.stat().st_size
    if done == 0 or total not in (0, done):
        raise OSError(f"{url} broke off: {done} of {total} bytes")
    try:
        for _ in numbered_lines(part):  # to the end, for gzip's checksum
            pass
    except ValueError as error:
        part.unlink()
        raise ValueError(
            f"{url} was downloaded, but {error}; deleted, so that the next call starts anew"
        ) from error
    os.replace(part, path)


def _read_reviews(path, issues):
    """Names of users, asins of items, and int64 [n, 4]: user, item (both as positions among the
    names), time, line number.
    """
    users = {}
    asins = {}
    events = array.array("q")
    for line_number, line in numbered_lines(path):
        try:
            record = json.loads(line)
            user, asin, time = (record[name] for name in ("reviewerID", "asin", "unixReviewTime"))
            right = (
                isinstance(user, str)
                and isinstance(asin, str)
                and user
                and asin
                and type(time) is int
                and 0 <= time < 2**63
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if right:
            events.extend(
                (
                    users.setdefault(user, len(users)),
                    asins.setdefault(asin, len(asins)),
                    time,
                    line_number,
                )
            )
        else:
            issues.add(
                "no review with reviewerID, asin and unixReviewTime", path, line_number, line
            )
    return list(users), list(asins), np.array(events, dtype=np.int64).reshape(-1, 4)


def _read_meta(path, wanted, issues):
    """{asin: (title, brand, categories, text)} of the asins in `wanted`."""
    described = {}
    for line_number, line in numbered_lines(path):
        try:
            literal = line.decode()
            named = _ASIN.findall(literal)
            if named and wanted.isdisjoint(named):
                continue
            record = ast.literal_eval(literal)  # slow, so only where it is needed; and never eval
            asin = record["asin"]
        except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
            asin = None
        if not isinstance(asin, str) or asin in described:
            issues.add(
                "duplicate asin" if isinstance(asin, str) else "no dict with an asin",
                path,
                line_number,
                line,
            )
        elif asin in wanted:
            fields = {name: record.get(name) or None for name in _FIELDS}
            for name, is_right in _FIELDS.items():
                if fields[name] is not None and not is_right(fields[name]):
                    issues.add(f"{name} of the wrong type", path, line_number, line)
                    fields[name] = None
            title, brand = (tidy(fields[name]) for name in ("title", "brand"))
            categories = [tidy(name) or "" for name in (fields["categories"] or [[]])[0]]
            described[asin] = (
                title,
                brand,
                categories,
                compose_text(title, brand, categories, fields["price"]),
            )
    return described
