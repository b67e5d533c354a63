"""Files that are whole or not there."""

import contextlib
import gzip
import json
import os
import pathlib
import uuid
import zlib

from safetensors import SafetensorError


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
