"""Load a catalogue by name or from a folder, whatever its format."""

import dataclasses
import os
import pathlib

from sidlab.data.amazon import PREFIX, fetch_amazon, find_reviews, read_amazon
from sidlab.data.catalogue import Catalogue
from sidlab.data.folder import read_folder
from sidlab.data.planted import planted_catalogue


def load_catalogue(
    name_or_folder, *, embeddings=None, text_encoder=None, on_dirty="warn", **options
) -> Catalogue:
    """A catalogue by name or from a folder.

    name_or_folder: "planted" (the synthetic world; `options` go to `planted_catalogue`), a folder
        in the open format (`sidlab.data.folder`) or with the raw files of one Amazon category
        (`sidlab.data.amazon`), or the name of such a folder inside the folder that the environment
        variable SIDLAB_DATA points to, e.g. "amazon-beauty". Otherwise "amazon-2014-beauty",
        "-sports", "-toys" or another category, "amazon-2014-Office_Products", is downloaded once.
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
    if options:
        raise ValueError(
            f"options {sorted(options)} are for 'planted' only, not for {str(name_or_folder)!r}"
        )

    root = os.environ.get("SIDLAB_DATA")
    tried = [pathlib.Path(name_or_folder)] + ([pathlib.Path(root) / name_or_folder] if root else [])
    for folder in tried:
        if folder.is_dir():
            raw = find_reviews(folder) and not any(folder.glob("items.jsonl*"))
            return (read_amazon if raw else read_folder)(
                folder, embeddings=embeddings, on_dirty=on_dirty
            )
    if str(name_or_folder).startswith(PREFIX):
        return read_amazon(
            fetch_amazon(str(name_or_folder).removeprefix(PREFIX)),
            embeddings=embeddings,
            on_dirty=on_dirty,
        )
    raise ValueError(
        f"no catalogue {str(name_or_folder)!r}: neither 'planted' nor a folder (looked at"
        f" {', '.join(str(folder.absolute()) for folder in tried)}). A folder holds items.jsonl.gz"
        " (one JSON object a line: item_id 1, 2, 3 …, optional title, brand, categories, text),"
        " sequences.txt.gz (one user a line: user_id item item …, oldest first) and optionally"
        " embeddings.npy. Raw Amazon files load from a folder, too, or by a name such as"
        " 'amazon-2014-beauty' (see sidlab.data.amazon). For a name such as 'amazon-beauty' set"
        " the environment variable SIDLAB_DATA to the folder that holds amazon-beauty/ (now"
        f" {root!r})."
    )
