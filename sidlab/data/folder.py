"""The open folder format: bring your own data as two text files.

    items.jsonl(.gz)     one JSON object a line: item_id 1, 2, 3 …, optional title, brand, text
                         (str), categories (list), source_id (what your data call the item)
    sequences.txt(.gz)   one user a line: user_id item item item …, oldest first; a tab after an id
                         that holds spaces
    embeddings.npy       optional: numbers [n_items, d], row 0 is item 1; .npz, .safetensors, .pt
                         and .parquet will do, and rows by id (`sidlab.data.embeddings`)

Other fields of an item are ignored, and HTML entities are decoded. Real files have dirty lines:
these are counted by kind and the first of each kind is named with file and line; what happens to it
depends on what it breaks:

    unparsable JSON, not an object,
    item_id missing, duplicate item_id        the line is skipped
    a field of the wrong type                 the item stays, without the field
    item_id out of order                      the item is put in its place
    a non-integer id, an unknown item,
    an empty sequence, a known user           the whole sequence is skipped

Ids are positions, so a gap that is left in the item ids is an error, and so are ids that start at
0, and a file with an event a line (`sidlab.data.events` reads those).
"""

import gzip
import html
import io
import json
import pathlib
import re
import warnings

import numpy as np
import pandas as pd

from sidlab.data.catalogue import COLUMNS, Catalogue, compose_text
from sidlab.data.embeddings import beside
from sidlab.data.lines import DataIssues, find_file
from sidlab.data.tables import as_id
from sidlab.files import numbered_lines, write


def read_folder(folder, *, embeddings=None, on_dirty="warn") -> Catalogue:
    """The catalogue in `folder`, named after it; `embeddings` replaces its embeddings.npy. See the
    module's text.

    on_dirty: "warn" gives one warning with the count and the first example of each kind (also in
    `Catalogue.dirty`), "raise" a ValueError at the first dirty line. ValueError too for a gap in
    the item ids and for unreadable files.
    """
    folder = pathlib.Path(folder)
    issues = DataIssues(on_dirty)
    items, ids = _read_items(find_file(folder, "items.jsonl"), issues)
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
    own, others = beside(folder)
    if len(own) > 1:
        raise ValueError(
            f"{folder} must hold one file of embeddings, found {[path.name for path in own]}"
        )
    if embeddings is None and own:
        embeddings = own[0]
    elif embeddings is None and others:
        warnings.warn(
            f"{folder}: not read is {', '.join(path.name for path in others)[:160]}; give"
            f" embeddings={str(others[0])!r} to use it",
            stacklevel=3,
        )
    return Catalogue(
        folder.resolve().name,
        items,
        histories,
        user_ids,
        dirty=issues.kinds,
        embeddings=embeddings,
        item_ids=ids,
    )


def save_catalogue(catalogue: Catalogue, folder) -> None:
    """Write `catalogue` to `folder` in the open format, replacing a catalogue that is there.
    Embeddings are written only if they were given; those computed from text are computed again.
    `truth` is not part of the format.
    """
    for user in catalogue.user_ids:
        if user.strip() != user or not user or re.search(r"[\t\r\n\v\f]", user):
            raise ValueError(
                "user_ids must not be empty, begin or end with a space, or hold tabs or line breaks"
                f" in this format, got {user[:80]!r}"
            )
    folder = pathlib.Path(folder)
    records = [
        {
            name: [_escaped(part) for part in value] if name == "categories" else _escaped(value)
            for name, value in record.items()
        }
        for record in catalogue.items.to_dict("records")
    ]
    if not isinstance(catalogue.item_ids, range):
        for record, source_id in zip(records, catalogue.item_ids, strict=True):
            record["source_id"] = source_id
    items = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    sequences = "".join(
        user + ("\t" if " " in user else " ") + " ".join(map(str, history.tolist())) + "\n"
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


def _escaped(value):
    """A text that reads as it is, although what looks like an HTML entity is decoded."""
    is_text = isinstance(value, str)
    return value.replace("&", "&amp;") if is_text and html.unescape(value) != value else value


def _read_items(path, issues):
    rows = {}
    ids = {}
    highest = 0
    for line_number, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad_text = isinstance(error, UnicodeDecodeError)
            issues.add("not UTF-8" if bad_text else "unparsable JSON", path, line_number, line)
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
            fields[name] = html.unescape(fields[name] or "") or None
        categories = record.get("categories") or []
        if not isinstance(categories, list) or not all(
            isinstance(category, str) for category in categories
        ):
            issues.add("categories are not a list of texts", path, line_number, line)
            categories = []
        categories = [html.unescape(category) for category in categories]
        ids[item_id] = as_id(record.get("source_id"))
        text = fields["text"] or compose_text(fields["title"], fields["brand"], categories)
        rows[item_id] = (item_id, fields["title"], fields["brand"], categories, text)
    dirty = f". Dirty lines: {issues}" if issues.kinds else ""
    if not rows:
        raise ValueError(
            f"{path} holds no item; a line is a JSON object with an integer item_id{dirty}"[:400]
        )
    if min(rows) == 0:
        raise ValueError(
            f"the ids of {path} seem to start at 0; here they are 1..n, since 0 is padding: add 1"
            " to each, also in sequences.txt"
        )
    if min(rows) != 1 or highest != len(rows):
        gap = next(item_id for item_id in range(1, highest + 1) if item_id not in rows)
        raise ValueError(
            f"the item ids of {path} must be 1..n without a gap, since ids are positions:"
            f" {len(rows)} items with ids {min(rows)}..{highest}, first missing id {gap}{dirty}"
        )
    # Without a name of its own an item has its number
    names = None if None in ids.values() else [ids[item_id] for item_id in sorted(rows)]
    items = pd.DataFrame(
        [rows[item_id] for item_id in sorted(rows)], columns=list(COLUMNS), dtype=object
    )
    return items.astype({"item_id": np.int64}), names


def _read_sequences(path, n_items, issues):
    sequences = {}
    again = 0
    for line_number, line in numbered_lines(path):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            issues.add("not UTF-8", path, line_number, line)
            continue
        # A tab ends an id that holds spaces
        user, _, rest = text.partition("\t" if "\t" in text else " ")
        try:
            ids = [int(item.replace("_", "?")) for item in rest.split()]  # Python reads 1_2 as 12
        except ValueError:
            issues.add("an id that is no integer", path, line_number, line)
            continue
        if 0 in ids:
            raise ValueError(
                f"{path} line {line_number}: ids seem to start at 0; here items are 1..n, since 0"
                f" is padding: add 1 to each, got {text[:80]!r}"
            )
        if not ids:
            issues.add("empty sequence", path, line_number, line)
        elif user in sequences:
            again += 1
            issues.add("duplicate user", path, line_number, line)
        elif min(ids) < 1 or max(ids) > n_items:
            issues.add(f"an item outside 1..{n_items}", path, line_number, line)
        else:
            sequences[user] = np.array(ids, dtype=np.int64)
    if again and all(len(history) == 1 for history in sequences.values()):
        raise ValueError(
            f"{path} seems to hold an event a line, and not a user a line, `user item item …`:"
            f" {again} lines repeat a user, and all have one item. Read it with"
            " sidlab.catalogue_from_events(pandas.read_csv(path, sep=' ', names=['user', 'item']))"
        )
    return list(sequences), list(sequences.values())
