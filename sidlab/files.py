"""Files that are whole or not there, and lines of text as people have them."""

import codecs
import contextlib
import gzip
import json
import os
import pathlib
import uuid
import zlib
from collections.abc import Iterator

from safetensors import SafetensorError

# Of two that begin alike the longer comes first
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def write(path, content: str | bytes) -> pathlib.Path:
    """Writes `content` beside `path`, in a folder that is made where need be, and renames it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Threads and machines may share a process id
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)
    return path


def write_json(path, content) -> None:
    write(path, json.dumps(content, indent=1))


@contextlib.contextmanager
def reading(path):
    """A missing or damaged file becomes a ValueError that names `path`, the file or its folder."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        SafetensorError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(f"{path} can't be read, it is missing or damaged: {error}") from error


def read_json(path, *fields) -> dict:
    """The object in `path`, which may end in .gz; ValueError where it can't be read or lacks one of
    `fields`.
    """
    with reading(path):
        content = pathlib.Path(path).read_bytes()
        content = json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)
    if not isinstance(content, dict) or set(fields) - content.keys():
        raise ValueError(
            f"{path} must hold a JSON object with {', '.join(fields) or 'fields'}, got"
            f" {str(content)[:80]}"
        )
    return content


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


# Of files that `read_arrays` reads
ARRAYS = (".npy", ".npz", ".safetensors", ".pt", ".pth")


def read_arrays(path) -> dict:
    """{name: array} of a file, a tensor alone having the name "": NumPy's, bfloat16 as float32.
    Nothing in the file is run. ValueError where it can't be read or holds something else.
    """
    # Here, since workers import this module, and nothing large with it
    import numpy as np
    import torch
    from safetensors.torch import load_file

    path = pathlib.Path(path)
    try:
        if path.suffix in (".npy", ".npz"):
            content = np.load(path, allow_pickle=False)
            content = dict(content) if path.suffix == ".npz" else content
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Whatever class the readers have for what they refuse, pickled code among it
    except Exception as error:
        raise ValueError(
            f"{path} can't be read as an array, which {', '.join(ARRAYS)} hold without any pickled"
            f" object: {type(error).__name__}: {str(error)[:80]}"
        ) from error
    arrays = content if isinstance(content, dict) else {"": content}
    found = {}
    for name, one in arrays.items():
        if isinstance(one, torch.Tensor):
            one = one.detach()
            found[name] = (one.float() if one.dtype == torch.bfloat16 else one).numpy()
        elif isinstance(one, np.ndarray) and one.dtype.kind != "O":
            found[name] = one
        else:
            raise ValueError(f"{path} must hold arrays, got a {type(one).__name__} in it")
    return found
