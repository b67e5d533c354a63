"""Runs in processes of their own, kept on disk and never repeated: what `compare` and the sweeps of
the notebooks stand on.

A run is a spec, as `spec` makes it. Its result is a file in `folder/runs`, written when the run is
complete. Results that are there already are read, and a killed run goes on from its last
checkpoint. What one run does stands in `one_run`, how runs are handed out to workers in `jobs`.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import time

import numpy as np
import pandas as pd
import torch
import transformers
from filelock import FileLock

from sidlab.checks import integer
from sidlab.config import PARTS, ROWS, TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.data.load import load_catalogue
from sidlab.fast.precision import sizes, unmeasured
from sidlab.files import read_json, write, write_json
from sidlab.model_building import weights_digest
from sidlab.research import sasrec
from sidlab.research.jobs import Queue, file_of, path_of, result_of
from sidlab.research.machine import code_digest
from sidlab.research.sid_tables import SIDS, check_sids, sid_table
from sidlab.research.summary import SECONDS
from sidlab.saliency import named_scorer, own_source
from sidlab.training_plan import measured_precision
from sidlab.windows import leave_one_out, training_windows

CHANGED = "the package or the scorer's module has changed since this sweep began: start it again"


def sweep(
    grid,
    folder,
    *,
    dataset: str = "planted",
    preset: str = "quick",
    seeds: int = 3,
    executor=None,
) -> pd.DataFrame:
    """Train every setting of a grid with every seed, each in a process of its own.

    Args: `grid`, `dataset`, `preset` and `seeds`: as in `grid_specs`; `folder`: where results are
    kept; what is there already is not run again, and two sweeps may work in one folder at the same
    time; `executor`: as in `run_all`.
    Returns a row a run: the settings, "seed", metrics, costs and "file", which holds ranks and
    learning curve too. The same table grows in `folder/rows.csv` (that of the latest sweep there)
    while it runs. Raises ValueError before anything is trained.

    >>> grid = {"pruning.keep": [1 / 3, 2 / 3], "pruning.after_layer": [1, 2, 3]}
    >>> sweep(grid, "runs/layers")  # doctest: +SKIP
    """
    specs, rows = grid_specs(grid, dataset=dataset, preset=preset, seeds=seeds)
    done = []
    for name, result in zip(specs, run_all(specs, folder, executor)):
        file = file_of(path_of(folder, name), ".json")
        done.append({**rows[name], "file": str(file), **result["row"]})
        frame = frame_of(done)
        write(pathlib.Path(folder) / "rows.csv", frame.to_csv(index=False))
    return frame


def frame_of(rows: list[dict]) -> pd.DataFrame:
    """Rows of runs as a table. A column of None alone would be no column of numbers."""
    frame = pd.DataFrame(rows)
    return frame.astype({cost: float for cost in SECONDS if cost in frame})


def grid_specs(
    grid,
    *,
    dataset: str = "planted",
    preset: str = "quick",
    seeds: int = 3,
    continued: bool = False,
) -> tuple[dict[str, dict], dict[str, dict]]:
    """The runs of a grid by name: their specs, as `run_all` takes them, and rows, which hold the
    settings and "seed".

    Args: `grid`: {name: values}, all combinations, or a list of dicts {name: value}. A name is a
    field of `TrainConfig`, of its parts ("pruning.keep", "strategy.kind", "map.steps") or of the
    SIDs ("sids.levels", see `sid_table`). `dataset` and `preset` as in `compare`; `seeds`: how
    many, from 0 on. `continued`: every run continues a model with dense targets, as under the
    protocol "continue" of `compare`: one for each SIDs and seed, whose run comes first and has
    no row. Raises ValueError for what is no grid.
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
    # What tells the models apart that runs with other SIDs continue
    varied = {
        key
        for setting in settings
        for key, value in setting.items()
        if key.startswith("sids.") and any(other.get(key) != value for other in settings)
    }
    rows = {}
    specs = {}
    for seed in range(integer("seeds", seeds)):
        for setting in settings:
            setting = {
                key: value.item() if isinstance(value, np.generic) else value
                for key, value in setting.items()
            }
            told = "".join(f"{key}={_short(value)}-" for key, value in setting.items())
            name = f"{pathlib.Path(dataset).name}-{preset}-{told}seed{seed}"
            # The SIDs are the run's, the rest its configuration's
            sids = {}
            fields = {}
            for key, value in setting.items():
                part = sids if key.startswith("sids.") else fields
                part[key.removeprefix("sids.")] = value
            if name in specs:
                raise ValueError(f"the grid holds {name} twice")
            start = None
            if continued:
                arch = {"arch": fields.get("arch", "t5")}
                told = "".join(f"{key}={setting[key]}-" for key in setting if key in varied)
                start = f"base-{told}seed{seed}"
                specs[start] = spec(
                    dataset, config_with(preset, seed, arch | {"targets": "all"}), sids
                )
                # Told, so that the cost model knows it too
                row, _, needed = ROWS[arch["arch"]]
                fields |= {row: needed}
            specs[name] = spec(
                dataset, config_with(preset, seed, fields, continued=continued), sids, start
            )
            rows[name] = {**setting, "seed": seed}
    return specs, rows


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
    found = dataset != "planted" and os.path.exists(dataset)
    made = {
        "dataset": os.path.abspath(dataset) if found else dataset,
        "sids": sids or {},
        "config": config,
    }
    return made | ({"start": start} if start else {})


def run_all(specs: dict[str, dict], folder, executor=None):
    """Do every run, {name: spec}; yields {"row", "curve", "ranks"} of each, and "sharers" where
    items share SIDs (`metrics.stored`), as it is there. A run that others start from is done before
    them.

    `executor`: None, one run after the other; or where runs are done side by side, a
    `concurrent.futures.Executor` or a function that makes one (see `jobs.Queue`). Its workers share
    `folder`, and stand on machines like this one, which chooses the precision. A run that fails
    there is submitted once more. Runs side by side carry no seconds. Runs that were done before are
    taken as they are, with seconds or without.

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
    paths = {name: path_of(folder, name) for name in specs}
    if len(set(paths.values())) < len(paths):
        raise ValueError(f"two runs would share a file: {sorted(p.name for p in paths.values())}")
    catalogues = {
        dataset: load_catalogue(dataset) for dataset in {spec["dataset"] for spec in specs.values()}
    }
    specs = dict(specs)
    tables = {}
    versions = {name: version(spec["config"]) for name, spec in specs.items()}
    # Everything that may be refused is, before anything is trained.
    for name, spec in specs.items():
        catalogue = catalogues[spec["dataset"]]
        if '"oracle"' in json.dumps(spec["config"]) and catalogue.truth is None:
            raise ValueError(
                "scorer 'oracle' needs a catalogue whose truth is known: dataset='planted', not"
                f" {spec['dataset']!r}"
            )
        first = spec.get("start")
        if first is not None and (first not in specs or "start" in specs[first]):
            raise ValueError(
                f"start={first!r} of the run {name!r} must name one of these runs, one that starts"
                " from nothing itself"
            )
        if first is not None and any(
            spec[part] != specs[first][part] for part in ("dataset", "sids")
        ):
            raise ValueError(
                f"the run {name!r} must have the dataset and the sids of its start={first!r}, got"
                f" {spec['dataset']!r} with {spec['sids']} and {specs[first]['dataset']!r} with"
                f" {specs[first]['sids']}"
            )
        if first is None and "recommend" in spec["config"]:
            raise ValueError(
                f"the run {name!r} recommends with the model of another run: it needs a start"
            )
        tables[name] = sid_table(catalogue, folder, spec["sids"])[0]
        specs[name] = _in_one_precision(spec, catalogue, tables[name], folder)
    results = {}
    starts = {spec.get("start") for spec in specs.values()}

    def request(name):
        """What a worker is asked for; the run that it starts from is done."""
        spec = specs[name]
        if version(spec["config"]) != versions[name]:
            raise RuntimeError(CHANGED)
        base = weights_digest(paths[spec["start"]]) if "start" in spec else None
        return spec | {
            "key": _key(spec, catalogues[spec["dataset"]], tables[name], base),
            "code": versions[name],
            "weights": name in starts,
            "beside": executor is not None,
            "cwd": os.getcwd(),
        }

    waiting = list(specs)
    # What starts from another run waits here until that is done, not in a worker
    left = sorted(specs, key=lambda name: "start" in specs[name])
    done = {None}
    with Queue(folder, executor) as queue:
        while left or queue.running:
            for name in [name for name in left if specs[name].get("start") in done]:
                if queue.full:
                    break
                left.remove(name)
                spec = request(name)
                result = result_of(paths[name], spec)
                if result is not None:
                    print(f"{name}: already in {file_of(paths[name], '.json')}")
                    results[name] = result
                    done.add(name)
                else:
                    if file_of(paths[name], ".json").exists():
                        print(f"{name} is done again: data, SIDs, settings or code were others")
                    queue.submit(name, spec, f"[{len(specs) - len(left)}/{len(specs)}] {name}")
            if queue.running:
                name, results[name] = queue.next()
                done.add(name)
                fresh += 1
                spent = time.monotonic() - begin
                still = len(left) + len(queue.running)
                print(
                    f"[{len(specs) - still}/{len(specs)}] {spent:.0f} s so far, at most about"
                    f" {spent / fresh * still:.0f} s left",
                    flush=True,
                )
            while waiting and waiting[0] in results:
                yield results.pop(waiting.pop(0))


def _in_one_precision(spec, catalogue, table, folder):
    """A spec with "fp32" or "bf16" for "auto", the same for all of a size (see `run_all`)."""
    if spec["config"].get("precision") != "auto":
        return spec
    precision = unmeasured("cuda" if torch.cuda.is_available() else "cpu")
    if precision is None:
        path = pathlib.Path(folder) / "precision.json"
        config = clip_max_items(TrainConfig.from_dict(spec["config"]), catalogue)
        # Another sweep in this folder may be measuring the same.
        with FileLock(path.with_suffix(".lock")):
            known = read_json(path) if path.exists() else {}
            if sizes(config) not in known:
                train_part = leave_one_out(catalogue.histories).train
                windows = training_windows(train_part, config)
                known[sizes(config)] = measured_precision(config, table, windows)
                write_json(path, known)
        precision = known[sizes(config)]
    return spec | {"config": spec["config"] | {"precision": precision}}


def clip_max_items(config: TrainConfig, catalogue: Catalogue) -> TrainConfig:
    """`config` without slots that no history can fill: padding that nobody would add."""
    longest = max(len(h) for h in catalogue.histories)
    padded = config.padded_items
    return dataclasses.replace(
        config,
        max_items=min(config.max_items, longest - 1),
        # The published one has a place for the target's item, too
        padded_items=None if padded is None else min(padded, longest),
    )


def truth_for(config, catalogue):
    return (
        catalogue.truth
        if config.pruning is not None and config.pruning.scorer == "oracle"
        else None
    )


def _short(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _key(spec, catalogue, table, base=None):
    """What a finished run depends on: changes when the data, the SIDs, the configuration, a
    pretrained folder's files, the weights that it starts from (`base`, their digest), the code, a
    custom scorer's or the libraries do, or where a GPU does what a CPU did, for their costs are no
    one's to compare.
    """
    pretrained = spec["config"].get("checkpoint")
    files = (
        sorted(pathlib.Path(pretrained).glob("*"))
        if pretrained and os.path.isdir(pretrained)
        else []
    )
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = [
        spec["config"],
        files,
        catalogue.fingerprint(),
        table.fingerprint(),
        version(spec["config"]),
        torch.__version__,
        transformers.__version__,
        torch.cuda.is_available(),
        *([base] if base else []),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def version(config):
    """`code_digest`, and the text of a custom scorer's module or SASRec's."""
    own = own_source((config.get("pruning") or {}).get("scorer", "rastp"))
    if "sasrec" in config:
        own = pathlib.Path(sasrec.__file__).read_text(encoding="utf-8")
    return (
        code_digest()
        if own is None
        else f"{code_digest()} {hashlib.sha256(own.encode()).hexdigest()}"
    )
