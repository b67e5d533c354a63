"""Lines of text files as people have them, and what is wrong with some."""

import codecs
import gzip
import pathlib
import warnings
import zlib
from collections.abc import Iterator

from sidlab.checks import one_of

# Of two that begin alike the longer comes first
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class DataIssues:
    """Counts what is wrong by kind, or stops at the first."""

    def __init__(self, on_dirty):
        one_of("on_dirty", on_dirty, ("warn", "raise"))
        self.on_dirty = on_dirty
        self.kinds = {}

    def add(self, kind, path, line_number, line):
        """A dirty line of the file at `path`."""
        shown = line[:80].decode(errors="replace").strip()
        if self.on_dirty == "raise":
            raise ValueError(f"{kind}: {path.parent / path.name} line {line_number}: {shown!r}")
        self.count(kind, f"{path.name} line {line_number}: {shown!r}")

    def count(self, kind, first, number=1):
        """What is left out and no fault; `first`: an example."""
        self.kinds.setdefault(kind, {"count": 0, "first": first})["count"] += number

    def warn(self, where):
        """One warning with all that was found in `where`, if anything was."""
        if self.kinds:
            warnings.warn(f"dirty lines in {where}: {self}", stacklevel=4)

    def __str__(self):
        return "; ".join(
            f"{kind}: {found['count']:,} (first: {found['first']})"
            for kind, found in self.kinds.items()
        )


def numbered_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, gzipped or not, with their numbers from 1 on; without the blank ones at
    the end and without UTF-8's byte-order mark. ValueError for a damaged file, and for one in an
    encoding of two or four bytes a character, which is named.
    """
    with path.open("rb") as file:
        zipped = ".gz" in path.suffixes or file.read(2) == b"\x1f\x8b"
    blank = []
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = _without_mark(line, path)
                if line.strip():
                    yield from blank
                    blank = []
                    yield number, line
                else:
                    blank.append((number, line))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def _without_mark(line, path):
    encoding = next((name for mark, name in MARKS.items() if line.startswith(mark)), None)
    if encoding or b"\0" in line:
        raise ValueError(
            f"{path} must be UTF-8, it looks like {encoding or 'UTF-16'}: save it anew"
        )
    return line.removeprefix(codecs.BOM_UTF8)


def find_file(folder, name):
    """The file of that name in `folder`, gzipped or not; ValueError unless there is just one."""
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold either {name}.gz or {name}, found {[path.name for path in found]};"
            f" there are {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return found[0]
