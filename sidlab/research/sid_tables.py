"""The SIDs of a catalogue: of its embeddings, of behaviour too, or from a published file."""

import hashlib
import json
import math
import numbers
import os
import pathlib

from filelock import FileLock

import sidlab
from sidlab.checks import one_of
from sidlab.data.catalogue import Catalogue
from sidlab.files import write_json
from sidlab.research.machine import code_digest
from sidlab.sids.fusion import collaborative_embeddings, fuse_embeddings
from sidlab.sids.table import SidTable
from sidlab.windows import leave_one_out

ENCODERS = {"residual-kmeans": "ResidualKMeans", "rqvae": "RQVAE", "opq": "OPQ"}
SIDS = ("encoder", "levels", "width", "collisions", "file", "behaviour")
BEHAVIOUR = "behaviour"  # in place of a SID file: SIDs made here of text and behaviour


def sids_of(text: str) -> dict:
    """What commands take as `sids`: "", made here of the items' embeddings; "behaviour", of these
    and of what stands together in training histories; or the name of a published SID file.
    """
    if text == BEHAVIOUR:
        return {BEHAVIOUR: 1.0}
    return {"file": os.path.abspath(text)} if text else {}


def check_sids(sids):
    if not isinstance(sids, dict) or set(sids) - set(SIDS):
        raise ValueError(f"sids={sids!r} must hold some of {', '.join(SIDS)}, as {{name: value}}")
    if "file" in sids and {"encoder", "levels", BEHAVIOUR} & set(sids):
        raise ValueError(
            f"sids={sids!r}: a published file has its own levels and needs no encoder and no"
            " embeddings; leave them out, or the file"
        )
    weight = sids.get(BEHAVIOUR, 0.0)
    if not isinstance(weight, numbers.Real) or not 0 <= weight < math.inf:
        raise ValueError(f"sids.behaviour must be a weight, finite and at least 0, got {weight!r}")
    if "file" in sids and not os.path.isfile(sids["file"]):
        raise ValueError(
            f"sids={sids['file']!r} is no file; give a published table with a line `item_id c1 c2"
            " …` per item, or leave it out"
        )


def sid_table(catalogue: Catalogue, folder, sids: dict | None = None) -> tuple[SidTable, dict]:
    """The SIDs of a catalogue and their report, made once and kept in `folder`.

    `sids`: "encoder" ("residual-kmeans", "rqvae", "opq"), "levels", "width", "collisions"; or
    "file", a published table; "behaviour", the weight of what stands together in training
    histories beside 1 of the catalogue's embeddings (`fusion.fuse_embeddings`; default 0: these
    alone). By default residual k-means with 3 levels of 256 codes, or as many levels and codes as a
    planted tree has.
    """
    sids = dict(sids or {})
    made_by = code_digest()
    if "file" in sids:
        # A file may name the items as the caller's data do
        content = (
            pathlib.Path(sids["file"]).read_bytes() + json.dumps(list(catalogue.item_ids)).encode()
        )
        made_by = hashlib.sha256(content).hexdigest()
    name = hashlib.sha256(
        json.dumps([sids, catalogue.fingerprint(), made_by]).encode()
    ).hexdigest()[:12]
    folder = pathlib.Path(folder) / "sids" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "report.json").exists():  # written last
            _make_sids(catalogue, folder, sids)
    return SidTable.load(folder), json.loads((folder / "report.json").read_text())


def _make_sids(catalogue, folder, sids):
    collisions = sids.get("collisions", "extend")
    if "file" in sids:
        table = SidTable.from_file(sids["file"], sids.get("width"), collisions, catalogue.item_ids)
        if table.n_items != catalogue.n_items:
            raise ValueError(
                f"{sids['file']} has {table.n_items} items, the catalogue {catalogue.name!r}"
                f" {catalogue.n_items}"
            )
        report = table.report()
    else:
        planted = catalogue.truth is not None and not sids
        width = sids.get("width") or (
            tuple(int(w) for w in catalogue.truth.tree.max(axis=0) + 1)
            if planted
            else min(256, max(2, catalogue.n_items // 8))
        )
        name = sids.get("encoder", "residual-kmeans")
        one_of("sids.encoder", name, ENCODERS)
        embeddings = _embeddings(catalogue, sids.get(BEHAVIOUR, 0.0))
        encoder = getattr(sidlab, ENCODERS[name])(
            levels=sids.get("levels", 3), width=width, seed=0
        ).fit(embeddings)
        table = SidTable(encoder.encode(embeddings), width=width, collisions=collisions)
        report = table.report(encoder, embeddings)
        encoder.save(folder)
    table.save(folder)
    write_json(folder / "report.json", dict(report))


def _embeddings(catalogue, behaviour):
    """Those of the catalogue, with training histories beside where `behaviour` has weight."""
    if not behaviour:
        return catalogue.embeddings
    train = leave_one_out(catalogue.histories).train
    beside = collaborative_embeddings(train, catalogue.n_items)
    sources = {"items": catalogue.embeddings, BEHAVIOUR: beside}
    return fuse_embeddings(sources, {"items": 1.0, BEHAVIOUR: behaviour})
