"""Runs in processes of their own, kept on disk and never repeated: what `compare` and the sweeps of
the notebooks stand on.

A run is a spec, as `spec` makes it. Its result is a file in `folder/runs`, written when the run is
complete. Results that are there already are read, and a killed run goes on from its last
checkpoint. `python -m sidlab.research.runs FOLDER NAME` is the child process that does one run.
"""

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
import transformers
from filelock import FileLock
from transformers import TrainerCallback

import sidlab
from sidlab.checks import integer, one_of
from sidlab.config import PARTS, TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.data.load import load_catalogue
from sidlab.decoding import encode_histories
from sidlab.fast.meter import Meter, device_name
from sidlab.fast.precision import sizes, unmeasured
from sidlab.files import read_json, write, write_json
from sidlab.metrics import (
    METRICS,
    SeedNoise,
    bootstrap_interval,
    per_user,
    pooled_seed_noise,
    rank_of_target,
    stored,
)
from sidlab.pruning import PruningConfig
from sidlab.research import sasrec
from sidlab.saliency import named_scorer, own_source
from sidlab.sids.table import SidTable
from sidlab.training import evaluate, load_model, measured_precision, train, weights_digest
from sidlab.windows import leave_one_out, training_windows, truth_tokens

COSTS = (
    "train_seconds",
    "seconds_per_1k_windows",
    "real_token_fraction",
    "kept_token_fraction",
    "peak_memory_mb",
    "evaluation_seconds",
    "windows",
    "updates",
)
ENCODERS = {"residual-kmeans": "ResidualKMeans", "rqvae": "RQVAE", "opq": "OPQ"}
# Rooms that no run goes through: they come after training.
BESIDE = ("research", "course", "figures", "viz")
CHANGED = "the package or the scorer's module has changed since this sweep began: start it again"
SIDS = ("encoder", "levels", "width", "collisions", "file")


def sweep(
    grid, folder, *, dataset: str = "planted", preset: str = "quick", seeds: int = 3
) -> pd.DataFrame:
    """Train every setting of a grid with every seed, each in a process of its own.

    Args: `grid`: {name: values}, all combinations, or a list of dicts {name: value}. A name is a
    field of `TrainConfig`, of its parts ("pruning.keep", "strategy.kind", "map.steps") or of the
    SIDs ("sids.levels", see `sid_table`). `folder`: where results are kept; what is there already
    is not run again, and two sweeps may work in one folder at the same time. `dataset` and `preset`
    as in `compare`; `seeds`: how many, from 0 on.
    Returns a row a run: the settings, "seed", metrics, costs and "file", which holds ranks and
    learning curve too. The same table grows in `folder/rows.csv` (that of the latest sweep there)
    while it runs. Raises ValueError before anything is trained.

    >>> grid = {"pruning.keep": [1 / 3, 2 / 3], "pruning.after_layer": [1, 2, 3]}
    >>> sweep(grid, "runs/layers")  # doctest: +SKIP
    """
    for name, values in grid.items() if isinstance(grid, dict) else ():
        if isinstance(values, str) or not np.iterable(values):
            raise ValueError(
                f"a grid holds lists of values, {{name: [value, …]}}; got {values!r} for {name}"
            )
    settings = (
        list(grid)
        if not isinstance(grid, dict)
        else [dict(zip(grid, v)) for v in itertools.product(*grid.values())]
    )
    if not settings:
        raise ValueError(f"give at least one setting, got grid={grid!r}")
    seeds = integer("seeds", seeds)
    rows = []
    specs = {}
    for seed in range(seeds):
        for setting in settings:
            setting = {
                key: value.item() if isinstance(value, np.generic) else value
                for key, value in setting.items()
            }
            name = "-".join(
                [
                    pathlib.Path(dataset).name,
                    preset,
                    *(f"{k}={_short(v)}" for k, v in setting.items()),
                    f"seed{seed}",
                ]
            )
            sids = {
                key.removeprefix("sids."): value
                for key, value in setting.items()
                if key.startswith("sids.")
            }
            config = config_with(
                preset,
                seed,
                {key: value for key, value in setting.items() if not key.startswith("sids.")},
            )
            if name in specs:
                raise ValueError(f"the grid holds {name} twice")
            specs[name] = spec(dataset, config, sids)
            rows.append({**setting, "seed": seed, "file": str(_file(_path(folder, name), ".json"))})

    done = []
    for row, result in zip(rows, run_all(specs, folder)):
        done.append(row | result["row"])
        frame = pd.DataFrame(done)
        write(pathlib.Path(folder) / "rows.csv", frame.to_csv(index=False))
    return frame


def config_with(preset: str, seed: int, settings: dict, *, continued: bool = False) -> TrainConfig:
    """A preset with settings by name; "pruning.keep" sets a field of a part, which is then switched
    on. `continued`: as in `TrainConfig.preset`.
    """
    valid = {f.name for f in dataclasses.fields(TrainConfig)} - {"seed"}
    fields = {}  # seeds are counted, not set
    valid |= {f"{name}.{f.name}" for name, part in PARTS.items() for f in dataclasses.fields(part)}
    if unknown := settings.keys() - valid:
        raise ValueError(
            f"settings {sorted(unknown)} are unknown; use {', '.join(sorted(valid))}, or"
            f" sids.{', sids.'.join(SIDS)}"
        )
    for key, value in settings.items():
        head, _, tail = key.partition(".")
        if head in fields and not (tail and isinstance(fields[head], dict)):
            raise ValueError(
                f"settings hold both {head!r} and one of its parts, in {sorted(settings)}: give one"
                " of them"
            )
        fields[head] = fields.get(head, {}) | {tail: value} if tail else value
    made = {
        name: PARTS[name](**value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return TrainConfig.preset(preset, continued=continued, seed=seed, **made)


def spec(
    dataset: str, config: TrainConfig | dict, sids: dict | None = None, start: str | None = None
) -> dict:
    """What a run is made from, ready for JSON.

    `dataset` as `load_catalogue` takes it, `sids` as `sid_table` does. `start`: the name of the run
    whose model this one continues. `config` may also be {"sasrec": arguments of `SASRec`}; or, with
    `start`, {"recommend": width of the beam, "pruning": fields of `PruningConfig`}: then nothing is
    trained, and the model of `start` recommends pruned.
    """
    check_sids(sids or {})
    if isinstance(config, TrainConfig):
        if config.pruning is not None and callable(config.pruning.scorer):
            raise ValueError(
                "a run in a process of its own takes a scorer by name, also as module:function;"
                " train() takes any callable"
            )
        if config.pruning is not None:
            if config.pruning.scorer.startswith("__main__:"):
                raise ValueError(
                    f"scorer={config.pruning.scorer!r}: a run in a process of its own finds"
                    " functions in files alone"
                )
            named_scorer(config.pruning.scorer)
        config = config.to_dict()
    folder = dataset != "planted" and os.path.isdir(dataset)
    made = {
        "dataset": os.path.abspath(dataset) if folder else dataset,
        "sids": sids or {},
        "config": config,
    }
    return made | ({"start": start} if start else {})


def check_sids(sids):
    if not isinstance(sids, dict) or set(sids) - set(SIDS):
        raise ValueError(f"sids={sids!r} must hold some of {', '.join(SIDS)}, as {{name: value}}")
    if "file" in sids and {"encoder", "levels"} & set(sids):
        raise ValueError(
            f"sids={sids!r}: a published file has its own levels and needs no encoder; leave them"
            " out, or the file"
        )
    if "file" in sids and not os.path.isfile(sids["file"]):
        raise ValueError(
            f"sids={sids['file']!r} is no file; give a published table with a line `item_id c1 c2"
            " …` per item, or leave it out"
        )


def run_all(specs: dict[str, dict], folder):
    """Do every run, {name: spec}, one after the other; yields {"row", "curve", "ranks"} of each,
    and "sharers" where items share SIDs (`metrics.stored`), as it is there. A run that others start
    from is done before them.

    All runs of a model size train in one precision. Where specs ask for "auto", it is measured
    before the first run, for the first spec of each size, and kept in `folder/precision.json`. A
    run's spec and key hold the answer, not "auto". So a folder stays with what it began with, also
    on another CPU, and its finished runs are found whatever would be measured now. Where the file
    is deleted and the answer changes, or where a CPU has no bfloat16 and bf16 is what the folder
    began with, the runs are done again: methods in two precisions would not compare.
    """
    folder = pathlib.Path(folder)
    begin = time.monotonic()
    fresh = 0
    paths = {name: _path(folder, name) for name in specs}
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"two runs would share a file: {sorted(p.name for p in paths.values())}")
    catalogues = {
        dataset: load_catalogue(dataset) for dataset in {one["dataset"] for one in specs.values()}
    }
    specs, tables, versions = (
        dict(specs),
        {},
        {name: _version(one["config"]) for name, one in specs.items()},
    )
    for name, one in specs.items():  # everything that may be refused is, before anything is trained
        catalogue = catalogues[one["dataset"]]
        if '"oracle"' in json.dumps(one["config"]) and catalogue.truth is None:
            raise ValueError(
                "scorer 'oracle' needs a catalogue whose truth is known: dataset='planted', not"
                f" {one['dataset']!r}"
            )
        first = one.get("start")
        if first is not None and (first not in specs or "start" in specs[first]):
            raise ValueError(
                f"start={first!r} of the run {name!r} must name one of these runs, one that starts"
                " from nothing itself"
            )
        if first is not None and any(
            one[part] != specs[first][part] for part in ("dataset", "sids")
        ):
            raise ValueError(
                f"the run {name!r} must have the dataset and the sids of its start={first!r}, got"
                f" {one['dataset']!r} with {one['sids']} and {specs[first]['dataset']!r} with"
                f" {specs[first]['sids']}"
            )
        if first is None and "recommend" in one["config"]:
            raise ValueError(
                f"the run {name!r} recommends with the model of another run: it needs a start"
            )
        tables[name] = sid_table(catalogue, folder, one["sids"])[0]
        specs[name] = _in_one_precision(one, catalogue, tables[name], folder)
    results = {}
    waiting = list(specs)
    starts = {one.get("start") for one in specs.values()}
    for number, name in enumerate(sorted(specs, key=lambda name: "start" in specs[name]), start=1):
        one = specs[name]
        path = paths[name]
        if _version(one["config"]) != versions[name]:
            raise RuntimeError(CHANGED)
        base = weights_digest(paths[one["start"]]) if "start" in one else None
        key = _key(one, catalogues[one["dataset"]], tables[name], base)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another sweep in this folder may be at the same run: then its result is taken
        with FileLock(_file(path, ".lock")):
            result = _finished(path, key)
            if name in starts and not (path / "model.safetensors").exists():
                result = None  # its weights are needed, too
            if result is None:
                stamp = _file(path, ".spec")
                # A killed run of other data, settings or code
                if stamp.exists() and json.loads(stamp.read_text())["key"] != key:
                    shutil.rmtree(path, ignore_errors=True)
                write_json(stamp, one | {"key": key, "code": versions[name]})
                result = _run_child(folder, name, f"[{number}/{len(specs)}] {name}")
                fresh = fresh + 1
                spent = time.monotonic() - begin
                print(
                    f"[{number}/{len(specs)}] {spent:.0f} s so far, at most about"
                    f" {spent / fresh * (len(specs) - number):.0f} s left",
                    flush=True,
                )
        results[name] = result
        while waiting and waiting[0] in results:
            yield results.pop(waiting.pop(0))


def _in_one_precision(one, catalogue, table, folder):
    """A spec with "fp32" or "bf16" for "auto", the same for all of a size (see `run_all`)."""
    if one["config"].get("precision") != "auto":
        return one
    precision = unmeasured("cuda" if torch.cuda.is_available() else "cpu")
    if precision is None:
        path = pathlib.Path(folder) / "precision.json"
        config = fitted(TrainConfig.from_dict(one["config"]), catalogue)
        # Another sweep in this folder may be measuring the same.
        with FileLock(path.with_suffix(".lock")):
            known = read_json(path) if path.exists() else {}
            if sizes(config) not in known:
                train_part = leave_one_out(catalogue.histories).train
                windows = training_windows(train_part, config)
                known[sizes(config)] = measured_precision(config, table, windows)
                write_json(path, known)
        precision = known[sizes(config)]
    return one | {"config": one["config"] | {"precision": precision}}


def sid_table(catalogue: Catalogue, folder, sids: dict | None = None) -> tuple[SidTable, dict]:
    """The SIDs of a catalogue and their report, made once and kept in `folder`.

    `sids`: "encoder" ("residual-kmeans", "rqvae", "opq"), "levels", "width", "collisions"; or
    "file", a published table. By default residual k-means with 3 levels of 256 codes, or as many
    levels and codes as a planted tree has.
    """
    sids = dict(sids or {})
    made_by = (
        hashlib.sha256(pathlib.Path(sids["file"]).read_bytes()).hexdigest()
        if "file" in sids
        else code_digest()
    )
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
        table = SidTable.from_file(sids["file"], sids.get("width"), collisions)
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
        encoder = getattr(sidlab, ENCODERS[name])(
            levels=sids.get("levels", 3), width=width, seed=0
        ).fit(catalogue.embeddings)
        table = SidTable(encoder.encode(catalogue.embeddings), width=width, collisions=collisions)
        report = table.report(encoder, catalogue.embeddings)
        encoder.save(folder)
    table.save(folder)
    write_json(folder / "report.json", dict(report))


def run(folder, name: str) -> None:
    """Train, test and write one run; the child process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = _path(folder, name)
    one = json.loads(_file(path, ".spec").read_text())
    if one["code"] != _version(one["config"]):
        raise RuntimeError(CHANGED)
    catalogue = load_catalogue(one["dataset"])
    kinds = {"sasrec": _run_sasrec, "recommend": _run_recommend}
    run_one = next((kinds[kind] for kind in kinds if kind in one["config"]), _run_model)
    result = run_one(one, catalogue, folder, path)
    result["busy"] = result.get("busy", False) or _busy()
    write_json(
        _file(path, ".json"),
        {
            "key": one["key"],
            "device": device_name(),
            "precision": one["config"].get("precision"),
            **result,
        },
    )
    row = result["row"]
    trained = f", trained {row['train_seconds']:.0f} s" if row["train_seconds"] is not None else ""
    say(f"recall@10 {row['recall@10']:.4f} on {len(result['ranks'])} test users{trained}")


def _run_sasrec(one, catalogue, folder, path):
    split = leave_one_out(catalogue.histories)
    meter = Meter()
    meter.resume()
    model = sasrec.SASRec(**one["config"]["sasrec"]).fit(
        split.train, catalogue.n_items, split.cases("validation")
    )
    meter.pause()
    histories, targets = split.cases("test")
    begin = time.perf_counter()
    ranks = rank_of_target(model.recommend(histories), targets)
    # Its seconds include validation, and one row of it predicts several windows, so they make no
    # seconds per window.
    row = {
        **metrics_of(ranks),
        **dict.fromkeys(COSTS),
        "train_seconds": meter.seconds,
        "peak_memory_mb": meter.peak,
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    return {"row": row, "curve": None, **stored(ranks)}


def fitted(config: TrainConfig, catalogue: Catalogue) -> TrainConfig:
    """`config` without slots that no history can fill: padding that nobody would add."""
    return dataclasses.replace(
        config, max_items=min(config.max_items, max(len(h) for h in catalogue.histories) - 1)
    )


def truth_for(config, catalogue):
    return (
        catalogue.truth
        if config.pruning is not None and config.pruning.scorer == "oracle"
        else None
    )


def _start_of(one, folder):
    """The folder of the model that a run starts from, or None."""
    return _path(folder, one["start"]) if "start" in one else None


def _run_recommend(one, catalogue, folder, path):
    """The model of another run, pruned as it never was in training."""
    pruning = PruningConfig(**one["config"]["pruning"])
    model = load_model(_start_of(one, folder))
    model.set_pruning(pruning)
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    truth = catalogue.truth if pruning.scorer == "oracle" else None
    begin = time.perf_counter()
    ranks = evaluate(model, histories, targets, beam=one["config"]["recommend"], truth=truth)
    row = {
        **metrics_of(ranks),
        **dict.fromkeys(COSTS),
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    if catalogue.truth is not None and pruning.reduce == "select":
        row["kept_informative"] = kept_informative(model, catalogue.truth, histories)
    return {"row": row, "curve": None, **stored(ranks)}


def _run_model(one, catalogue, folder, path):
    table, report = sid_table(catalogue, folder, one["sids"])
    config = fitted(TrainConfig.from_dict(one["config"]), catalogue)
    progress = _Progress()
    result = train(
        config,
        catalogue,
        table,
        output_dir=path,
        start_from=_start_of(one, folder),
        progress=False,
        callbacks=[progress],
    )
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    begin = time.perf_counter()
    ranks = evaluate(
        result.model, histories, targets, beam=config.beam, truth=truth_for(config, catalogue)
    )
    row = {
        **metrics_of(ranks),
        **result.timing,
        **result.tokens,
        "peak_memory_mb": result.peak_memory,
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    prunes = (
        config.pruning is not None
        and config.pruning.reduce == "select"
        and config.pruning.at_inference
    )
    if catalogue.truth is not None and prunes:
        row["kept_informative"] = kept_informative(result.model, catalogue.truth, histories)
    evaluations = [e for e in result.log if "recall@10" in e]
    losses = [e for e in result.log if "loss" in e]
    curve = {
        "step": [e["step"] for e in losses],
        "loss": [e["main_loss"] for e in losses],
        "eval_step": [e["step"] for e in evaluations],
        "recall@10": [e["recall@10"] for e in evaluations],
    }
    shutil.rmtree(path)  # the checkpoints
    result.model.save_pretrained(path)
    sids = {
        "widths": list(table.widths),
        "collision_rate": report["collision_rate"],
        "perplexity": [level["perplexity"] for level in report["per_level"]],
    }
    pruning = result.model.pruning
    agreement = [e["agreement"] for e in result.log if "agreement" in e]
    ended = pruning and {
        "keep": pruning.keep,
        "after_layer": pruning.after_layer,
        "layers": result.model.stack.config.num_hidden_layers,
        "agreement": agreement[0] if agreement else None,
    }
    return {
        "row": row,
        "curve": curve,
        **stored(ranks),
        "sids": sids,
        "ended": ended,
        "busy": progress.busy,
    }


@torch.no_grad()
def kept_informative(model, truth, histories, batch_size: int = 256) -> dict:
    """How well a pruned model keeps the truly informative tokens of planted histories:
    {"precision", "recall"} over all tokens.
    """
    kept_total = informative_total = both = 0
    for begin in range(0, len(histories), batch_size):
        part = [h[-model.config.max_items :] for h in histories[begin : begin + batch_size]]
        out = encode_histories(model, part, truth)
        kept = out.attention_mask.bool().cpu()  # [B, K]
        informative = (
            truth_tokens(
                truth.informative(part),
                model.table.levels,
                model.config.separators,
                out.importance.shape,
            )
            > 0
        )
        kept_total = kept_total + kept.sum().item()
        informative_total = informative_total + informative.sum().item()
        both += (informative.gather(1, out.positions.cpu()) & kept).sum().item()
    return {"precision": both / max(kept_total, 1), "recall": both / max(informative_total, 1)}


def metrics_of(ranks, noise: dict | None = None) -> dict:
    """Recall and NDCG at 5 and 10 of ranks [U] (or [S, U], one row a seed), each with its interval.
    `noise`: that of seeds, by name of the metric, where other settings tell of it.
    """
    out = {}
    for name, values in per_user(ranks).items():
        out[name] = float(values.mean())
        interval = bootstrap_interval(values, noise=noise and noise[name])
        # Of two seeds it may reach beyond
        out[f"{name}_interval"] = np.clip(interval, 0, 1).tolist()
    return out


def seed_noise(ranks):
    """What all settings, each with its ranks [S, U], tell together of seeds (`pooled_seed_noise`):
    {metric: `SeedNoise` of a setting}, and a function that gives that of a difference of recall@10
    in which settings have weights whose squares add up to its argument. Of one seed, or one
    setting: None each.
    """
    ranks = list(ranks)
    if len(ranks) < 2 or min(map(len, ranks)) < 2:
        return None, lambda squares: None
    means = [
        {name: values.mean(axis=1) for name, values in per_user(of_setting).items()}
        for of_setting in ranks
    ]
    found = {name: pooled_seed_noise([one[name] for one in means]) for name in METRICS}
    own = found["recall@10"][1]
    return {name: both for name, (both, _) in found.items()}, lambda squares: SeedNoise(
        own.deviation * squares**0.5, own.freedom
    )


def say(text: str) -> None:
    """A progress line, marked so that the parent process passes it on."""
    print(f"» {text}", flush=True)


def _short(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _path(folder, name):
    name = re.sub(r"[^\w.=@+-]+", "-", name)
    if len(name) > 180:  # a file's name has 255 at most, with what is put behind
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return pathlib.Path(folder) / "runs" / name


def _file(path, suffix):
    # With_suffix would cut the name at its last dot, as in keep=0.5-seed0
    return path.with_name(path.name + suffix)


def _key(one, catalogue, table, base=None):
    """What a finished run depends on: changes when the data, the SIDs, the configuration, a
    pretrained folder's files, the weights that it starts from (`base`, their digest), the code, a
    custom scorer's or the libraries do, or where a GPU does what a CPU did, for their costs are no
    one's to compare.
    """
    pretrained = one["config"].get("checkpoint")
    files = (
        sorted(pathlib.Path(pretrained).glob("*"))
        if pretrained and os.path.isdir(pretrained)
        else []
    )
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = [
        one["config"],
        files,
        catalogue.fingerprint(),
        table.fingerprint(),
        _version(one["config"]),
        torch.__version__,
        transformers.__version__,
        torch.cuda.is_available(),
        *([base] if base else []),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _version(config):
    """`code_digest`, and the text of a custom scorer's module or SASRec's."""
    own = own_source((config.get("pruning") or {}).get("scorer", "rastp"))
    if "sasrec" in config:
        own = pathlib.Path(sasrec.__file__).read_text(encoding="utf-8")
    return (
        code_digest()
        if own is None
        else f"{code_digest()} {hashlib.sha256(own.encode()).hexdigest()}"
    )


@functools.cache
def code_digest():
    """A digest of the parts of this package that a run goes through, comments, docstrings and
    layout aside: rounding differs between versions, and a table of old and new runs would compare
    that too.
    """
    home = pathlib.Path(sidlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0].removesuffix(".py") not in BESIDE:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                    and ast.get_docstring(node) is not None
                ):
                    del node.body[0]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _finished(path, key):
    file = _file(path, ".json")
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    if result["key"] != key:
        print(f"{file} was made with other data, SIDs, settings or code and is done again")
        return None
    print(f"{path.name}: already in {file}")
    return result


def _run_child(folder, name, label):
    """One run in a process of its own, its progress lines passed on as they come."""
    path = _path(folder, name)
    process = subprocess.Popen(
        [sys.executable, "-m", "sidlab.research.runs", str(folder), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("» "):
                print(f"{label}: {line[2:]}", end="", flush=True)
        process.wait()
    finally:
        process.kill()  # where the notebook is interrupted, its child stops too
        _file(path, ".log").write_text("".join(lines))
    if process.returncode:
        raise RuntimeError(
            f"{name} failed (exit status {process.returncode}); its output is in "
            f"{_file(path, '.log')} and ends with\n{''.join(lines[-15:])}"
        )
    return json.loads(_file(path, ".json").read_text())


def _busy():
    """Whether other jobs ran in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads() + 0.5


class _Progress(TrainerCallback):
    """Tells how far training is, and `busy`: whether other jobs ran beside."""

    busy = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.busy = self.busy or _busy()
        loss = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), float("nan"))
        say(
            f"update {state.global_step}/{state.max_steps}, loss {loss:.3f}, validation recall@10"
            f" {metrics['eval_recall@10']:.4f}"
        )


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2])
