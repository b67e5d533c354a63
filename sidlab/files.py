"""Files that are whole or not there."""

import json
import os
import pathlib


def write(path, content: str | bytes) -> pathlib.Path:
    """Writes `content` beside `path`, in a folder that is made where need be, and renames it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)
    return path


def write_json(path, content) -> None:
    write(path, json.dumps(content, indent=1))
