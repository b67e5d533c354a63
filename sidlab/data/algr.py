"""AL-GR / FORGE (Taobao; arXiv 2509.20904): histories as text with semantic IDs inside, three
levels of 8,192 codes.

    rows          system, user, answer (commas; tabs in the sample, with an id in front): an
                  instruction; a sentence that holds the history, oldest first, as C{a}C{b}C{c} an
                  item; the next item's SID
    item table    base62_string, codebook_lv1, codebook_lv2, codebook_lv3: an item and its codes,
                  each from 0
    raw rows      user_history, target_item: item ids, separated by semicolons

In the text level l's codes begin at 8,192 · (l − 1); here, as everywhere in this package, each
level's begin at 0. Files may be gzipped and are streamed; a row is one line, as no field holds a
line break; lines that cannot be used are counted by kind and the first of each is named, as in
`data.folder`. `write_algr` makes files of exactly this format, of any size. The published files
(AL-GR-Tiny: 61 GB) come from the Hugging Face hub by `fetch_algr`, or lie in a folder.
"""

import contextlib
import csv
import gzip
import pathlib
import re
import zlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from sidlab.data.catalogue import COLUMNS, Catalogue
from sidlab.data.lines import DataIssues
from sidlab.sids.table import SidTable

WIDTH = 8192
LEVELS = 3
RAW_COLUMNS = ("user_history", "target_item")
ITEM_COLUMNS = ("base62_string", *(f"codebook_lv{level}" for level in range(1, LEVELS + 1)))
SYSTEM = (
    "你是一个推荐系统，根据用户的历史行为，预测用户在电商场景的下一步行为。"
    "我会给你一串连续行为的语义编码，按照用户点击的时间顺序排列，每个行为用三个词表示。"
)
USER = "当前用户的历史行为如下：{}，请预测用户在电商推荐场景后续行为的语义编码"
_SID = re.compile(r"C(\d+)", re.ASCII)
_ALL_CODES = re.compile(r"(?:C\d+[\s,;，；、]*)+", re.ASCII)
# From the first to the last thing like a code, with what is written onto them: a damaged code (C-1,
# Cnan, c5) must not pass for prose.
_LIKE = r"C[-+]?\.?(?:\d|nan|none|null|inf)"
_STRETCH = re.compile(
    rf"(?<![\w.+-])[\w.+-]*?{_LIKE}(?:.*{_LIKE})?(?:[\w.+-]*[\w+-])?",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
_INTEGER = re.compile(r"-?\d+(?:\.0*)?", re.ASCII)  # pandas writes integers beside gaps as 7.0


def read_rows(
    path, *, width: int = WIDTH, on_dirty: str = "warn"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """History int64 [M, 3] and answer int64 [3] of each row of a table of text, in the file's
    order, one at a time.

    `width`: codes per level. `on_dirty`: "warn" leaves dirty rows out and warns at the end, also at
    an early one, "raise" stops at the first (ValueError). ValueError, too, for a file without the
    columns or one that is damaged.
    """
    issues = DataIssues(on_dirty)
    try:
        for _, _, history, answer in _rows(path, width, issues):
            yield history, answer
    finally:
        issues.warn(path)


def _rows(path, width, issues):
    """(line number, line, history, answer) of the rows that `read_rows` gives."""
    for number, line, row in _table(path, ("user", "answer"), issues):
        history, answer = found = [_codes(row[name], width) for name in ("user", "answer")]
        wrong = next(
            (
                f"{name}: {value}"
                for name, value in zip(("user", "answer"), found)
                if isinstance(value, str)
            ),
            None,
        )
        if wrong is None and len(answer) != 1:
            wrong = "answer: not one SID"
        if wrong is None:
            yield number, line, history, answer[0]
        else:
            issues.add(wrong, pathlib.Path(path), number, line)


def read_raw_rows(path, *, on_dirty: str = "warn") -> Iterator[tuple[list[str], list[str]]]:
    """History and targets (item ids, str) of each raw row; the order in a history is the file's.
    Arguments and errors as in `read_rows`.
    """
    issues = DataIssues(on_dirty)
    try:
        for _, _, history, targets in _raw_rows(path, issues):
            yield history, targets
    finally:
        issues.warn(path)


def _raw_rows(path, issues):
    for number, line, row in _table(path, RAW_COLUMNS, issues):
        history, targets = (row[name].strip().strip(";").split(";") for name in RAW_COLUMNS)
        if all(history) and all(targets):
            yield number, line, history, targets
        else:
            issues.add(
                "no history or no target" if [""] in (history, targets) else "an empty id",
                pathlib.Path(path),
                number,
                line,
            )


def read_items(path, *, width: int = WIDTH, on_dirty: str = "warn") -> tuple[list[str], np.ndarray]:
    """The ids (str) of an item table and their codes int64 [n, 3]. Items without all codes, with
    one that is no integer in 0..width−1, or named twice are dirty. Arguments and errors as in
    `read_rows`.
    """
    issues = DataIssues(on_dirty)
    found = _items(path, width, issues)
    issues.warn(path)
    return found


def _items(path, width, issues):
    rows = {}
    for number, line, row in _table(path, ITEM_COLUMNS, issues):
        item, *texts = (row[name].strip() for name in ITEM_COLUMNS)
        # Float: 30 digits are outside, not an overflow
        codes = [float(text) if _INTEGER.fullmatch(text) else None for text in texts]
        kind = (
            "no item id"
            if not item
            else (
                "a code is missing"
                if "" in texts
                else (
                    "a code that is no integer"
                    if None in codes
                    else (
                        f"a code outside 0..{width - 1}"
                        if not 0 <= min(codes) <= max(codes) < width
                        else "duplicate item"
                        if item in rows
                        else None
                    )
                )
            )
        )
        if kind is None:
            rows[item] = codes
        else:
            issues.add(kind, pathlib.Path(path), number, line)
    if not rows:
        raise ValueError(
            f"{path} holds no item" + (f". Dirty lines: {issues}" if issues.kinds else "")
        )
    return list(rows), np.array(list(rows.values()), np.int64)


def algr_catalogue(
    rows, items, *, limit: int | None = None, width: int = WIDTH, on_dirty: str = "warn"
) -> tuple[Catalogue, SidTable]:
    """A catalogue and its shared SIDs from a table of rows, of text or raw, and an item table,
    ready for `train`.

    Items are numbered in the order of the item table, their title is their id. A row is a user
    whose last item is the answer, of a raw row the first target; as text gives SIDs, such a history
    holds the first item of each. `limit`: so many rows, 1 or more. Rows with a SID that no item
    has, or an id that is not in the item table, are dirty. Under leave-one-out the answers are the
    test targets, and training uses the prefixes of the histories; the published runs train on the
    answers of other rows instead.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all rows, got {limit}")
    issues = DataIssues(on_dirty)
    histories = []
    ids, codes = _items(items, width, issues)
    table = SidTable(codes, width, collisions="share")
    number_of = {item: number for number, item in enumerate(ids, start=1)}
    raw = set(RAW_COLUMNS) <= set(_header(rows)[1])
    for number, line, history, answer in (
        _raw_rows(rows, issues) if raw else _rows(rows, width, issues)
    ):
        if raw:
            numbers = np.array([number_of.get(item, 0) for item in (*history, answer[0])], np.int64)
        else:
            leaves, found = table.trie.find(np.concatenate([history, answer[None]]))
            numbers = torch.where(found, table.trie.item[table.trie.first_item[leaves]], 0).numpy()
        if numbers.all():
            histories.append(numbers)
        else:
            issues.add(
                "an id that no item has" if raw else "a SID that no item has",
                pathlib.Path(rows),
                number,
                line,
            )
        if len(histories) == limit:
            break
    if not histories:
        raise ValueError(
            f"{rows} holds no row whose items are all in {items}, with {width} codes a level. Dirty"
            f" lines: {issues}"
        )
    issues.warn(rows)
    frame = pd.DataFrame(
        {
            "item_id": np.arange(1, len(ids) + 1),
            "title": ids,
            "brand": None,
            "categories": [[]] * len(ids),
            "text": None,
        }
    )
    name = pathlib.Path(rows).name.split(".")[0]
    return (
        Catalogue(
            name,
            frame[list(COLUMNS)],
            histories,
            [str(n) for n in range(len(histories))],
            dirty=issues.kinds,
        ),
        table,
    )


def hit_rate(items, targets, ks=(20, 100, 500, 1000)) -> dict[int, float]:
    """HR@k as AL-GR scores it: of each row's true items, the share among its first k recommended
    ones; the mean over rows.

    `items`: int [B, K ≥ max(ks)], 0 where fewer were found, SIDs expanded to all items that share
    them, as `recommend` gives them; `targets`: for each row the true items: ints, or arrays of them
    (all sharers, where only the SID is known).
    """
    items = np.asarray(items)
    if items.ndim != 2 or len(items) != len(targets) or items.shape[1] < max(ks):
        raise ValueError(
            f"items must be [{len(targets)}, K] with K at least {max(ks)}, got {list(items.shape)}"
        )
    hits = [np.isin(row, np.atleast_1d(true)) for row, true in zip(items, targets)]
    return {
        k: float(
            np.mean([hit[:k].sum() / np.unique(true).size for hit, true in zip(hits, targets)])
        )
        for k in ks
    }


def write_algr(
    folder,
    n_rows: int,
    n_items: int,
    *,
    width: int = WIDTH,
    longest: int = 100,
    follow: float = 0.6,
    seed: int = 0,
) -> None:
    """Write `rows.csv.gz`, `items.csv.gz` and `raw.csv.gz` of a synthetic world into `folder`, in
    AL-GR's format.

    Items form clusters of like SIDs, some share one; each item has one successor, which follows it
    with the probability `follow`, so there is something to learn; otherwise the next item is
    popular. Histories have 1 to `longest` items, 81 % of that in the middle.
    """
    if n_rows < 1 or n_items < 2 or width < 2 or longest < 1:
        raise ValueError(
            f"n_rows, longest must be at least 1 and n_items, width at least 2, got {n_rows},"
            f" {longest}, {n_items}, {width}"
        )
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    codes = np.stack(
        [
            rng.integers(0, min(width, max(2, n_items // 8)), n_items),
            rng.integers(0, width, n_items),
            rng.integers(0, width, n_items),
        ],
        axis=1,
    )
    shares = rng.random(n_items) < 0.02  # these take the SID of the item before
    shares[0] = False
    codes[shares] = codes[np.flatnonzero(shares) - 1]
    ids = [_base62(number) for number in rng.permutation(n_items) + 62**4]
    with _writing(folder / "items.csv.gz") as file:
        file.writerow(ITEM_COLUMNS)
        file.writerows((item, *sid) for item, sid in zip(ids, codes.tolist()))
    text = ["C{}C{}C{}".format(*sid) for sid in (codes + np.arange(LEVELS) * width).tolist()]
    successor = rng.permutation(n_items)
    with _writing(folder / "rows.csv.gz") as rows, _writing(folder / "raw.csv.gz") as raw:
        rows.writerow(("system", "user", "answer"))
        raw.writerow(RAW_COLUMNS)
        for begin in range(0, n_rows, 10_000):
            lengths = np.clip(
                rng.normal(0.81 * longest, 0.2 * longest, min(10_000, n_rows - begin)).round(),
                1,
                longest,
            ).astype(int)
            for length in lengths:
                # The low numbers often
                popular = (n_items * rng.random(length + 1) ** 3).astype(int)
                follows = rng.random(length + 1) < follow
                history = [int(popular[0])]
                for step in range(1, length + 1):
                    history.append(int(successor[history[-1]] if follows[step] else popular[step]))
                *history, target = history
                rows.writerow(
                    (SYSTEM, USER.format("".join(text[item] for item in history)), text[target])
                )
                raw.writerow((";".join(ids[item] for item in history), ids[target]))


def fetch_algr(name: str, repo: str = "AL-GR/AL-GR-Tiny") -> pathlib.Path:
    """The local path of a published file, such as "item_info/tiny_item_sid_final.csv" or
    "train_data/s1_tiny.csv" (24 GB), downloaded once. Raises ValueError without a network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return pathlib.Path(hf_hub_download(repo, name, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"{name!r} of {repo} can't be downloaded: {error}\nWithout a network, take the file"
            f" from https://huggingface.co/datasets/{repo} elsewhere and give its path to"
            " read_rows, read_items or algr_catalogue"
        ) from error


def _codes(text, width):
    """Codes int64 [M, 3] of the SIDs in `text`, each from 0; or what is wrong with them."""
    stretch = _STRETCH.search(text)
    if stretch is None:
        return "no SID"
    if not _ALL_CODES.fullmatch(stretch[0]):
        return "something else among the codes"
    numbers = _SID.findall(stretch[0])
    if len(numbers) % LEVELS:
        return f"{LEVELS} codes an item expected"
    outside = f"a code outside its level's {width}"
    if max(map(len, numbers)) > 18:  # more than int64 holds
        return outside
    codes = np.array(numbers, dtype=np.int64).reshape(-1, LEVELS) - np.arange(LEVELS) * width
    return outside if codes.min() < 0 or codes.max() >= width else codes


def _open(path):
    return (gzip.open if path.suffix == ".gz" else open)(
        path, "rt", encoding="utf-8", newline="\n", errors="replace"
    )


def _header(path):
    """Delimiter, a comma or a tab, and the columns' names."""
    with _open(pathlib.Path(path)) as file:
        header = file.readline()
    delimiter = "\t" if "\t" in header else ","
    return delimiter, next(csv.reader([header], delimiter=delimiter), [])


def _table(path, columns, issues):
    """(line number, line, {column: text}) of each data line of a table with commas or tabs; lines
    with a stray quote, or with other than the header's number of fields, are dirty.
    """
    path = pathlib.Path(path)
    try:
        delimiter, names = _header(path)
        if missing := [name for name in columns if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; its header is"
                f" {delimiter.join(names)[:200]!r}"
            )
        with _open(path) as file:
            next(file)
            for number, line in enumerate(file, start=2):
                fields = _fields(line, delimiter)
                begin = line[:80].encode()
                if isinstance(fields, str):
                    issues.add(fields, path, number, begin)
                elif len(fields) != len(names):
                    issues.add(f"other than {len(names)} fields", path, number, begin)
                else:
                    yield number, begin, dict(zip(names, fields))
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def _fields(line, delimiter):
    """The fields of one line, read by itself so that a stray quote costs no other row; or what is
    wrong with it.
    """
    if line.count('"') % 2:  # csv takes one inside a field for text
        return "a stray quote"
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return "not a row of CSV"


@contextlib.contextmanager
def _writing(path):
    """A csv writer into a gzipped file, which has its name once it is whole."""
    beside = path.with_name(path.name + ".tmp")
    with gzip.open(beside, "wt", encoding="utf-8", newline="", compresslevel=3) as file:
        yield csv.writer(file)
    beside.replace(path)


def _base62(number):
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    out = ""
    while number:
        number, digit = divmod(int(number), 62)
        out = digits[digit] + out
    return out
