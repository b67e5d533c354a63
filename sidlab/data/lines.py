"""What is wrong with some lines of a file."""

import warnings

from sidlab.checks import one_of


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
            raise ValueError(f"{kind}: {path} line {line_number}: {shown!r}")
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


def find_file(folder, name):
    """The file of that name in `folder`, gzipped or not; ValueError unless there is just one."""
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold either {name}.gz or {name}, found {[path.name for path in found]};"
            f" there are {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return found[0]
