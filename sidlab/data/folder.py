"""The open folder format: bring your own data as two text files.

    items.jsonl(.gz)     one JSON object a line: item_id 1, 2, 3 …, optional title, brand, text
                         (str), categories (list)
    sequences.txt(.gz)   one user a line: user_id item item item …, oldest first
    embeddings.npy       optional: float [n_items, d], row 0 is item 1

Other fields of an item are ignored. Real files have dirty lines: these are counted by kind and the
first of each kind is named with file and line; what happens to it depends on what it breaks:

    unparsable JSON, not an object,
    item_id missing, duplicate item_id        the line is skipped
    a field of the wrong type                 the item stays, without the field
    item_id out of order                      the item is put in its place
    a non-integer id, an unknown item,
    an empty sequence, a known user           the whole sequence is skipped

Ids are positions, so a gap that is left in the item ids is an error.
"""

import gzip
import io
import json
import pathlib
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd

from sidlab.checks import one_of
from sidlab.data.catalogue import COLUMNS, Catalogue, compose_text
from sidlab.files import write


class DataIssues:
    """Counts dirty lines by kind, or stops at the first."""

    def __init__(self, on_dirty):
        one_of("on_dirty", on_dirty, ("warn", "raise"))
        self.on_dirty = on_dirty
        self.kinds = {}

    def add(self, kind, path, line_number, line):
        first = f"{path.name} line {line_number}: {line[:80].decode(errors='replace').strip()!r}"
        if self.on_dirty == "raise":
            raise ValueError(f"{kind}: {path.parent / first}")
        self.kinds.setdefault(kind, {"count": 0, "first": first})["count"] += 1

    def warn(self, where):
        """One warning with all that was found in `where`, if anything was."""
        if self.kinds:
            warnings.warn(f"dirty lines in {where}: {self}", stacklevel=4)

    def __str__(self):
        return "; ".join(
            f"{kind}: {found['count']} (first: {found['first']})"
            for kind, found in self.kinds.items()
        )


def read_folder(folder, *, embeddings=None, on_dirty="warn") -> Catalogue:
    """The catalogue in `folder`, named after it; `embeddings` replaces its embeddings.npy. See the
    module's text.

    on_dirty: "warn" gives one warning with the count and the first example of each kind (also in
    `Catalogue.dirty`), "raise" a ValueError at the first dirty line. ValueError too for a gap in
    the item ids and for unreadable files.
    """
    folder = pathlib.Path(folder)
    issues = DataIssues(on_dirty)
    items = _read_items(find_file(folder, "items.jsonl"), issues)
    user_ids, histories = _read_sequences(
        path := find_file(folder, "sequences.txt"), len(items), issues
    )
    # Without users, but as it was saved: a gzip header
    if not histories and (issues.kinds or path.stat().st_size == 0):
        raise ValueError(
            f"{path} holds no history; a line is `user item item …`, with spaces. Dirty lines:"
            f" {str(issues) or 'none'}"
        )
    issues.warn(folder)
    if embeddings is None and (path := folder / "embeddings.npy").exists():
        try:
            embeddings = np.asarray(np.load(path, allow_pickle=False), np.float32)
        except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} must be numbers [items, d], as np.save writes them: {error}"
            ) from error
    return Catalogue(
        folder.resolve().name, items, histories, user_ids, dirty=issues.kinds, embeddings=embeddings
    )


def save_catalogue(catalogue: Catalogue, folder) -> None:
    """Write `catalogue` to `folder` in the open format, replacing a catalogue that is there.
    Embeddings are written only if they were given; those computed from text are computed again.
    `truth` is not part of the format.
    """
    for user in catalogue.user_ids:
        if user.split() != [user]:
            raise ValueError(
                f"user_ids must not be empty or hold white space in this format, got {user!r}"
            )
    folder = pathlib.Path(folder)
    records = catalogue.items.to_dict("records")
    items = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    sequences = "".join(
        f"{user} {' '.join(map(str, history.tolist()))}\n"
        for user, history in zip(catalogue.user_ids, catalogue.histories, strict=True)
    )
    for name, text in {"items.jsonl.gz": items, "sequences.txt.gz": sequences}.items():
        # Mtime=0: equal content, equal bytes
        write(folder / name, gzip.compress(text.encode(), mtime=0))
    if catalogue.given_embeddings is None:
        (folder / "embeddings.npy").unlink(missing_ok=True)
    else:
        array = io.BytesIO()
        np.save(array, catalogue.given_embeddings)
        write(folder / "embeddings.npy", array.getvalue())


def find_file(folder, name):
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold either {name}.gz or {name}, found {[path.name for path in found]};"
            f" there are {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return found[0]


def numbered_lines(path):
    try:
        with (gzip.open if ".gz" in path.suffixes else open)(path, "rb") as file:
            yield from enumerate(file, start=1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def _read_items(path, issues):
    rows = {}
    highest = 0
    for line_number, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except ValueError:  # bad JSON or bad UTF-8
            issues.add("unparsable JSON", path, line_number, line)
            continue
        item_id = record.get("item_id") if isinstance(record, dict) else None
        if type(item_id) is not int:  # a bool is an int, too
            issues.add("no integer item_id", path, line_number, line)
            continue
        if item_id in rows:
            issues.add("duplicate item_id", path, line_number, line)
            continue
        if item_id < highest:
            issues.add("item_id out of order", path, line_number, line)
        highest = max(highest, item_id)
        fields = {}
        for name in ("title", "brand", "text"):
            fields[name] = record.get(name) or None
            if not isinstance(fields[name], str | None):
                issues.add(f"{name} is not a text", path, line_number, line)
                fields[name] = None
        categories = record.get("categories") or []
        if not isinstance(categories, list) or not all(
            isinstance(category, str) for category in categories
        ):
            issues.add("categories are not a list of texts", path, line_number, line)
            categories = []
        text = fields["text"] or compose_text(fields["title"], fields["brand"], categories)
        rows[item_id] = (item_id, fields["title"], fields["brand"], categories, text)
    if not rows or min(rows) != 1 or highest != len(rows):
        gap = next((item_id for item_id in range(1, highest) if item_id not in rows), None)
        raise ValueError(
            f"the item ids of {path} must be 1..n without a gap, since ids are positions:"
            f" {len(rows)} items with ids {min(rows, default=None)}..{max(rows, default=None)},"
            f" first missing id {gap}" + (f". Dirty lines: {issues}" if issues.kinds else "")
        )
    items = pd.DataFrame(
        [rows[item_id] for item_id in sorted(rows)], columns=list(COLUMNS), dtype=object
    )
    return items.astype({"item_id": np.int64})


def _read_sequences(path, n_items, issues):
    sequences = {}
    for line_number, line in numbered_lines(path):
        try:
            user, *ids = line.decode().split() or [""]
            ids = [int(item.replace("_", "?")) for item in ids]  # Python reads 1_2 as 12
        except ValueError:  # bad UTF-8, too
            issues.add("an id that is no integer", path, line_number, line)
            continue
        if not ids:
            issues.add("empty sequence", path, line_number, line)
        elif user in sequences:
            issues.add("duplicate user", path, line_number, line)
        elif min(ids) < 1 or max(ids) > n_items:
            issues.add(f"an item outside 1..{n_items}", path, line_number, line)
        else:
            sequences[user] = np.array(ids, dtype=np.int64)
    return list(sequences), list(sequences.values())
