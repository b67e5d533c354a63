"""Load a catalogue by name or from a folder, whatever its format."""

import dataclasses
import os
import pathlib

from sidlab.data.amazon import PREFIX, fetch_amazon, find_reviews, read_amazon
from sidlab.data.catalogue import Catalogue
from sidlab.data.events import catalogue_from_events, find_events
from sidlab.data.folder import read_folder
from sidlab.data.planted import planted_catalogue
from sidlab.data.tables import EVENT


def load_catalogue(
    name_or_folder, *, embeddings=None, text_encoder=None, on_dirty="warn", **options
) -> Catalogue:
    """A catalogue by name or from a folder.

    name_or_folder: "planted" (the synthetic world; `options` go to `planted_catalogue`); a folder
        in the open format (`sidlab.data.folder`) or with the raw files of one Amazon category of
        2014 (`sidlab.data.amazon`); a table of events, or a folder that holds one (`options` go to
        `catalogue_from_events`); or the name of such a folder inside the folder that the
        environment variable SIDLAB_DATA points to, e.g. "amazon-beauty". Otherwise
        "amazon-2014-beauty", "-sports", "-toys" or another category,
        "amazon-2014-Office_Products", is downloaded once.
    embeddings: float32 [n_items, d], row 0 is item 1; instead of the folder's embeddings.npy or the
        text embeddings.
    text_encoder: name or local folder of a Hugging Face model that embeds the texts
        (`sidlab.data.text`), instead of TF-IDF and of the folder's embeddings.npy.
    on_dirty: "warn" counts, skips and reports dirty lines, "raise" stops at the first (ValueError).
    """
    if text_encoder is not None:
        if embeddings is not None:
            raise ValueError(
                "embeddings and text_encoder both say what the embeddings are: give one of them"
            )
        catalogue = load_catalogue(name_or_folder, on_dirty=on_dirty, **options)
        return dataclasses.replace(catalogue, embeddings=None, text_encoder=text_encoder)
    if name_or_folder == "planted":
        catalogue = planted_catalogue(**options)
        return (
            catalogue
            if embeddings is None
            else dataclasses.replace(catalogue, embeddings=embeddings)
        )
    root = os.environ.get("SIDLAB_DATA")
    tried = [pathlib.Path(name_or_folder)] + ([pathlib.Path(root) / name_or_folder] if root else [])
    shared = dict(embeddings=embeddings, on_dirty=on_dirty)
    for path in tried:
        if path.is_file():
            return catalogue_from_events(path, **shared, **options)
        if not path.is_dir():
            continue
        own = any(path.glob("items.jsonl*")) or any(path.glob("sequences.txt*"))
        raw = find_reviews(path)
        names = {role: options.get(role) for role in EVENT}
        table = None if own or raw else find_events(path, **names)
        if table is not None:
            options = {"name": path.resolve().name} | options
            return catalogue_from_events(table, **shared, **options)
        if not own and not raw:
            raise ValueError(_not_understood(path))
        _refuse(options, name_or_folder)
        return (read_folder if own else read_amazon)(path, **shared)
    _refuse(options, name_or_folder)
    if str(name_or_folder).startswith(PREFIX):
        return read_amazon(
            fetch_amazon(str(name_or_folder).removeprefix(PREFIX)),
            embeddings=embeddings,
            on_dirty=on_dirty,
        )
    raise ValueError(
        f"no catalogue {str(name_or_folder)[:80]!r}: neither 'planted' nor a file or folder (looked"
        f" at {', '.join(str(path.absolute()) for path in tried)}). For a name such as"
        " 'amazon-beauty' set the environment variable SIDLAB_DATA to the folder that holds"
        f" amazon-beauty/ (now {root!r}). {FORMATS}"
    )


FORMATS = (
    "A folder holds items.jsonl and sequences.txt (see docs/data.md); or a table of events with"
    " columns of users, items and times (CSV, TSV, JSON lines, Parquet; RecBole, MovieLens, Amazon"
    " reviews); or Amazon's raw files of 2014, which 'amazon-2014-beauty' downloads."
)


def _not_understood(folder):
    """What is said of a folder of another kind."""
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:8])[:160] or "nothing"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"{folder} is no catalogue: it holds {found}{more}. {FORMATS} Anything else goes through"
        " pandas: sidlab.catalogue_from_events(pandas.read_csv(…), user='…', item='…', time='…')"
    )


def _refuse(options, name):
    if options:
        raise ValueError(
            f"options {sorted(options)} are for 'planted' and tables of events only, not for"
            f" {str(name)!r}"
        )
