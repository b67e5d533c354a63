"""Tables of events and of items as they are published, read a row at a time: CSV and TSV, Parquet,
JSON lines; RecBole's atomic files, MovieLens, the Amazon reviews of 2014, 2018 and 2023.

What a column is tells its name. A name may be given where it is another.
"""

import ast
import csv
import itertools
import json
import math
import numbers
import pathlib
import re
from collections.abc import Iterator

import pandas as pd

from sidlab.checks import from_extra
from sidlab.data.lines import DataIssues
from sidlab.files import numbered_lines

# What columns are called, in lower case, letters and digits alone; of several the first counts
ROLES = {
    "user": "userid user uid reviewerid customerid visitorid sessionid useridx authorid username",
    "item": (
        "parentasin itemid item iid asin movieid productid videoid songid trackid businessid bookid"
        " articleid goodsid sku"
    ),
    "time": (
        "timestamp unixreviewtime unixtime time datetime date ts eventtime createdat reviewtime"
    ),
    "title": "title movietitle name itemname producttitle productname",
    "brand": "brand store manufacturer",
    "categories": "categories category genres genre class",
    "price": "price",
    "text": "text",
}
EVENT = ("user", "item", "time")
ITEM = ("item", "title", "brand", "categories", "price", "text")
# Columns of a MovieLens table that hold 1 where the genre is the film's
GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
# Files without a line of names: what stands between columns, and their names
NAMELESS = {
    "u.data": ("\t", ["user", "item", "rating", "timestamp"]),
    "u.item": ("|", ["item", "title", "date", "video", "address", *GENRES]),
    "ratings.dat": ("::", ["user", "item", "rating", "timestamp"]),
    "movies.dat": ("::", ["item", "title", "genres"]),
}
# MovieLens wrote titles before UTF-8 was common
LATIN = ("u.item", "movies.dat")
TAB = (".tsv", ".inter", ".item")
HEAD = 1000  # lines of JSON that tell which keys there are
SUFFIXES = (".csv", ".tsv", ".inter", ".item", ".data", ".dat", ".json", ".jsonl", ".parquet")


class Table:
    """A table in a file, or a data frame.

    `names`: of its columns, without RecBole's types; `roles`: {role: the name of its column}.
    ValueError where a file is of no known kind or holds no table.
    """

    def __init__(self, source, **given):
        self.frame = source if isinstance(source, pd.DataFrame) else None
        self.path = None if self.frame is not None else pathlib.Path(source)
        self.separator = None
        if self.frame is not None:
            self.names = [str(name) for name in self.frame.columns]
        elif self.kind == ".parquet":
            self.names = parquet_file(self.path).schema_arrow.names
        elif self.kind in (".json", ".jsonl"):
            # Lines need not have the same keys
            first = itertools.islice(self._records(DataIssues("warn")), HEAD)
            self.names = list(dict.fromkeys(name for _, _, record in first for name in record))
        else:
            self.names = self._text_names()
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise ValueError(f"{self} has the column {twice.pop()!r} twice; rename one")
        self.roles = self._find(given)

    def __str__(self):
        return "the data frame" if self.path is None else str(self.path)

    @property
    def kind(self) -> str:
        """The suffix of the file, without .gz."""
        return suffix_of(self.path)

    def rows(self, roles, issues: DataIssues) -> Iterator[tuple[int, bytes, list]]:
        """(number, line, values) of each row, a value for each of `roles`: None where the table has
        no such column. Rows that are none are counted in `issues`.
        """
        columns = [self.roles.get(role) for role in roles]
        if self.frame is not None or self.kind == ".parquet":
            frame = self.frame
            if frame is None:
                frame = parquet_file(self.path).read([name for name in columns if name]).to_pandas()
            frame = frame.rename(columns=str)
            nothing = [None] * len(frame)
            values = [nothing if name is None else frame[name].tolist() for name in columns]
            for number, row in enumerate(zip(*values), start=1):
                yield number, repr(row).encode(), list(row)
        elif self.separator is None:
            for number, line, record in self._records(issues):
                yield number, line, [record.get(name) for name in columns]
        else:
            places = [None if name is None else self.names.index(name) for name in columns]
            flags = self.names.index(GENRES[0]) if GENRES[0] in self.names else None
            for number, line, fields in self._fields(issues):
                row = [None if place is None else fields[place] for place in places]
                if flags is not None and "categories" in roles:
                    found = [name for name, flag in zip(GENRES, fields[flags:]) if flag == "1"]
                    row[roles.index("categories")] = found
                yield number, line, row

    def add(self, issues, kind, number, line):
        """Count a dirty row."""
        issues.add(kind, self.path or pathlib.Path("data frame"), number, line)

    def _find(self, given):
        plain = {plain_name(name): name for name in reversed(self.names)}
        found = {}
        for role, known in ROLES.items():
            name = given.get(role)
            if name is not None and name not in self.names:
                raise ValueError(
                    f"{role}={name!r} is no column of {self}; there are"
                    f" {', '.join(self.names)[:200]}"
                )
            name = name or next((plain[one] for one in known.split() if one in plain), None)
            if name is not None:
                found[role] = name
        return found

    def _text_names(self):
        name = self.path.name.removesuffix(".gz")
        if name in NAMELESS:
            self.separator, names = NAMELESS[name]
            return names
        _, line = next(numbered_lines(self.path), (0, b""))
        head = self._decoded(line)
        if head is None:
            raise ValueError(f"{self.path} must be UTF-8; line 1 is not: {line[:80]!r}")
        tab = self.kind in TAB
        self.separator = "\t" if tab else max(",;\t|", key=head.count)
        names = next(csv.reader([head], delimiter=self.separator), [])
        return [name.strip().partition(":")[0] for name in names]

    def _decoded(self, line):
        """The text of a line, or None."""
        latin = self.path.name.removesuffix(".gz") in LATIN
        try:
            return line.decode()
        except UnicodeDecodeError:
            return line.decode("latin-1") if latin else None

    def _fields(self, issues):
        """The fields of each row of a file of text."""
        at = 0, b""  # the line that was read last

        def texts():
            nonlocal at
            for at in numbered_lines(self.path):
                text = self._decoded(at[1])
                if text is None:
                    self.add(issues, "not UTF-8", *at)
                else:
                    yield text

        if len(self.separator) > 1:
            rows = (text.rstrip("\r\n").split(self.separator) for text in texts())
        else:
            # A field in quotes may go on in the next line
            quoting = csv.QUOTE_MINIMAL if self.separator in ",;" else csv.QUOTE_NONE
            rows = csv.reader(texts(), delimiter=self.separator, quoting=quoting)
        if self.path.name.removesuffix(".gz") not in NAMELESS:
            next(rows, None)
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:  # a quote that does not end
                self.add(issues, str(error), *at)
                continue
            if fields is None:
                return
            if len(fields) == len(self.names):
                yield *at, fields
            else:
                self.add(issues, f"{len(fields)} fields in place of {len(self.names)}", *at)

    def _records(self, issues):
        """The object of each line, or of one list."""
        for number, line in numbered_lines(self.path):
            if number == 1 and line.lstrip()[:1] == b"[":
                yield from self._list(issues)
                return
            record = _record(line)
            if record is None:
                self.add(issues, "no JSON object", number, line)
            else:
                yield number, line, record

    def _list(self, issues):
        try:
            records = json.loads(b"".join(line for _, line in numbered_lines(self.path)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} must be JSON, a list of objects: {error}") from error
        for number, record in enumerate(records, start=1):
            line = repr(record)[:80].encode()
            if isinstance(record, dict):
                yield number, line, record
            else:
                self.add(issues, "no JSON object", number, line)


def suffix_of(path) -> str:
    """The suffix of a file's name, in lower case, without .gz."""
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def as_id(value) -> str | int | None:
    """An id as it is kept: a text without white space around it, or an integer, which whole floats
    become; None where there is none.
    """
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if isinstance(value, numbers.Integral):
            return int(value)
        if math.isnan(value):
            return None
        return int(value) if float(value).is_integer() else str(value)
    return None if value is None or value is pd.NaT or value is pd.NA else str(value)


def plain_name(name: str) -> str:
    """The name of a column as `ROLES` has it."""
    return re.sub(r"[\W_]", "", name).lower()


def _record(line):
    """The object in a line of JSON, or of Python as in Amazon's metadata of 2014; or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.decode())  # never eval
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return record if isinstance(record, dict) else None


def parquet_file(path):
    """pyarrow's `ParquetFile`; ValueError where it is none."""
    with from_extra("research"):
        import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error
