"""Compare methods fairly: the same windows in the same batches, the same number of updates, each run in a process of its own.

`compare` is what `notebooks/reproduce.ipynb` calls. A run is one (method, seed); its result is a file in `output_dir/runs`,
written when the run is complete. Runs that are there already are not repeated, and a killed run goes on from its last
checkpoint. `python -m sidlab.comparison OUTPUT_DIR METHOD SEED` is the child process that does one run.
"""

import dataclasses
import fractions
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
import transformers
from transformers import TrainerCallback

from sidlab.baselines import NeighbourTable, Popularity
from sidlab.data.catalogue import Catalogue, load_catalogue
from sidlab.decoding import encode_histories
from sidlab.map_loss import MapConfig
from sidlab.metrics import bootstrap_interval, ndcg_at, paired_test, rank_of_target, recall_at
from sidlab.pruning import PruningConfig
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.training import TrainConfig, evaluate, train
from sidlab.windows import leave_one_out, truth_tokens

METHODS = {
    "padded": "nothing pruned, every history filled up to a fixed number of slots, as published",
    "unpadded": "nothing pruned and next to no padding: the baseline for every pruner",
    "recent": "keeps the newest tokens",
    "random": "keeps tokens at random",
    "rastp": "keeps the tokens with most attention received × size of hidden state (RASTP, STAMP's SAP)",
    "rastp-l2": "as rastp, the size of the hidden state being its Euclidean norm",
    "rastp-reference": "padded, and pruned as RASTP's published code does it",
    "pool": "averages neighbouring tokens down to the kept share",
    "norm": "keeps the tokens with the largest hidden states",
    "centrality": "keeps the tokens that receive most attention",
    "oracle": "keeps the tokens that truly hold most information",
    "map": "prunes nothing, also learns to predict further items (STAMP's MAP)",
    "stamp": "rastp and map together",
}
BASELINES = {
    "popularity": "the most popular items, the same for everyone",
    "neighbours": "what stood next to the history's items in training: a table, no network",
    "bayes": "the best list for one who knows how the planted world works: a ceiling",
}
PRUNERS = tuple(name for name in METHODS if name not in ("padded", "unpadded", "map"))
DEFAULT_METHODS = "padded unpadded recent random rastp map stamp"
PARAMETERS = ("dataset", "preset", "methods", "seeds", "output_dir")
METRICS = {"recall@5": (recall_at, 5), "recall@10": (recall_at, 10), "ndcg@5": (ndcg_at, 5), "ndcg@10": (ndcg_at, 10)}
COSTS = ("train_seconds", "seconds_per_1k_windows", "real_token_fraction", "kept_token_fraction", "peak_memory_mb",
         "evaluation_seconds", "windows", "updates")


def compare(dataset: str = "planted", preset: str = "quick", methods=DEFAULT_METHODS, seeds: int = 3, output_dir: str = "") -> dict:
    """Train and test every method with every seed; write `results.json` and `index.html` into `output_dir`; return the results.

    Args: `dataset`: what `load_catalogue` takes; `preset`: of `TrainConfig`; `methods`: names of `METHODS`, separated by spaces or
    in a list; a pruning method may carry its kept share, as in "rastp@1/2" (default 1/3); `seeds`: how many, from 0 on;
    `output_dir`: default runs/<dataset>-<preset>. Raises ValueError naming what is valid before anything is trained.
    """
    names = methods.split() if isinstance(methods, str) else list(methods)
    for name in names:
        method_config(name, preset, 0)
    if not names or int(seeds) < 1:
        raise ValueError(f"give at least one method and one seed, got methods={methods!r} and seeds={seeds!r}")
    catalogue = load_catalogue(dataset)
    if any("oracle" in name for name in names) and catalogue.truth is None:
        raise ValueError(f"method 'oracle' needs a catalogue whose truth is known: dataset='planted', not {dataset!r}")
    folder = pathlib.Path(output_dir or f"runs/{pathlib.Path(dataset).name}-{preset}")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    source = dataset if dataset == "planted" else os.path.abspath(dataset) if os.path.isdir(dataset) else dataset
    _write_json(folder / "comparison.json", {"dataset": source, "preset": preset})
    table = sid_table(catalogue, folder / "sids")

    runs = []
    for seed in range(int(seeds)):  # seeds outside, so that a comparison cut short compares
        for name in names:
            runs.append(_finished(folder, name, seed, catalogue, table, preset) or _run_child(folder, name, seed))
    results = _collect(dataset, preset, names, runs, catalogue, table)
    _write_json(folder / "results.json", results)
    from sidlab.viz.page import write_page  # the one step to the right: the page shows what was just written

    write_page(results, folder / "index.html")
    return results


def unknown_parameters(namespace: dict) -> list[str]:
    """Names in a notebook's namespace that are no parameter of it. papermill takes any name in silence; the notebook asks here."""
    given = {name for name in namespace if not name.startswith("_")}
    return sorted(given - {*PARAMETERS, "In", "Out", "get_ipython", "exit", "quit", "open", "comparison"})


def method_config(name: str, preset: str, seed: int) -> TrainConfig:
    """The configuration of a method: `preset` and what the method changes of it."""
    base, _, keep = name.partition("@")
    if base not in METHODS:
        raise ValueError(f"method {name!r} is unknown; use some of {' '.join(METHODS)}")
    prunes = base in PRUNERS
    if keep and not (prunes and re.fullmatch(r"\d+(/\d+|\.\d+)?", keep)):
        raise ValueError(f"method {name!r}: only a pruning method takes a kept share, written as in rastp@1/2 or rastp@0.5")
    changes = {}
    if prunes:
        share = {"keep": float(fractions.Fraction(keep))} if keep else {}
        how = {"pool": {"reduce": "pool"}, "rastp-reference": {"mode": "reference"}, "stamp": {}}
        changes["pruning"] = PruningConfig(**how.get(base, {"scorer": base}), **share)
    if base in ("map", "stamp"):
        changes["map"] = MapConfig()
    if base in ("padded", "rastp-reference"):
        changes["padding"] = "fixed"
    return TrainConfig.preset(preset, seed=seed, **changes)


def sid_table(catalogue: Catalogue, folder) -> SidTable:
    """The SIDs of a catalogue by residual k-means (3 levels of 256; of a planted world, its own widths), kept in `folder`."""
    stamp = pathlib.Path(folder) / "of.json"
    if stamp.exists() and json.loads(stamp.read_text()) == catalogue.fingerprint():
        return SidTable.load(folder)
    if catalogue.truth is not None:
        width = tuple(int(w) for w in catalogue.truth.tree.max(axis=0) + 1)
    else:
        width = min(256, max(2, catalogue.n_items // 8))
    encoder = ResidualKMeans(levels=3, width=width, seed=0).fit(catalogue.embeddings)
    table = SidTable(encoder.encode(catalogue.embeddings), width=width)
    table.save(folder)
    _write_json(stamp, catalogue.fingerprint())
    return table


def _config_for(name, preset, seed, catalogue):
    config = method_config(name, preset, seed)
    # Slots no history can fill would be padding that nobody would add.
    return dataclasses.replace(config, max_items=min(config.max_items, max(len(h) for h in catalogue.histories) - 1))


def _key(config, catalogue, table):
    """What a finished run depends on: changes when the data, the SIDs, the configuration or the library's version do."""
    import sidlab

    what = [config.to_dict(), catalogue.fingerprint(), table.fingerprint(), sidlab.__version__]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _path(folder, name, seed):
    return pathlib.Path(folder) / "runs" / f"{name.replace('/', '-')}-seed{seed}"


def _finished(folder, name, seed, catalogue, table, preset):
    path = _path(folder, name, seed).with_suffix(".json")
    if not path.exists():
        return None
    run = json.loads(path.read_text())
    if run["key"] != _key(_config_for(name, preset, seed, catalogue), catalogue, table):
        print(f"{path} was made with other data, SIDs or settings and is done again")
        return None
    print(f"{name}, seed {seed}: already in {path}")
    return run


def _run_child(folder, name, seed):
    """One run in a process of its own, its progress lines passed on as they come."""
    path = _path(folder, name, seed)
    command = [sys.executable, "-m", "sidlab.comparison", str(folder), name, str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"{name}, seed"):
                print(line, end="", flush=True)
        process.wait()
    finally:
        process.kill()  # where the notebook is interrupted, its child stops too
        path.with_suffix(".log").write_text("".join(lines))
    if process.returncode:
        raise RuntimeError(f"{name}, seed {seed} failed (exit status {process.returncode}); its output is in "
                           f"{path.with_suffix('.log')} and ends with\n{''.join(lines[-15:])}")
    return json.loads(path.with_suffix(".json").read_text())


def run(folder, name: str, seed: int) -> None:
    """Train, test and write one run; the child process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spec = json.loads((pathlib.Path(folder) / "comparison.json").read_text())
    catalogue = load_catalogue(spec["dataset"])
    table = sid_table(catalogue, pathlib.Path(folder) / "sids")
    config, path = _config_for(name, spec["preset"], seed, catalogue), _path(folder, name, seed)
    result = train(config, catalogue, table, output_dir=path, progress=False, callbacks=[_Progress(f"{name}, seed {seed}")])
    truth = catalogue.truth if config.pruning is not None and config.pruning.scorer == "oracle" else None
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    begin = time.perf_counter()
    ranks = evaluate(result.model, histories, targets, beam=config.beam, truth=truth)
    row = {"method": name, "seed": seed, **_metrics(ranks), **result.timing, **result.tokens, "peak_memory_mb": result.peak_memory,
           "evaluation_seconds": time.perf_counter() - begin, "kept_informative": None}
    if catalogue.truth is not None and config.pruning is not None and config.pruning.reduce == "select":
        row["kept_informative"] = kept_informative(result.model, catalogue.truth, histories)
    evaluations = [e for e in result.log if "recall@10" in e]
    losses = [e for e in result.log if "loss" in e]
    curve = {"method": name, "seed": seed, "step": [e["step"] for e in losses], "loss": [e["main_loss"] for e in losses],
             "eval_step": [e["step"] for e in evaluations], "recall@10": [e["recall@10"] for e in evaluations]}
    shutil.rmtree(path)  # the checkpoints
    result.model.save_pretrained(path)
    _write_json(path.with_suffix(".json"), {"key": _key(config, catalogue, table), "row": row, "curve": curve, "ranks": ranks.tolist()})
    print(f"{name}, seed {seed}: recall@10 {row['recall@10']:.4f} on {len(ranks)} test users, trained {row['train_seconds']:.0f} s")


@torch.no_grad()
def kept_informative(model, truth, histories, batch_size: int = 256) -> dict:
    """How well a pruned model keeps the truly informative tokens of planted histories: {"precision", "recall"} over all tokens."""
    kept_total = informative_total = both = 0
    for begin in range(0, len(histories), batch_size):
        part = [h[-model.config.max_items :] for h in histories[begin : begin + batch_size]]
        out = encode_histories(model, part, truth)
        shape = out.importance.shape
        kept = torch.zeros(shape, dtype=torch.bool)
        rows, slots = out.attention_mask.bool().nonzero(as_tuple=True)
        kept[rows, out.positions[rows, slots]] = True
        informative = truth_tokens(truth.informative(part), model.table.levels, model.config.separators, shape) > 0
        kept_total, informative_total = kept_total + kept.sum().item(), informative_total + informative.sum().item()
        both += (kept & informative).sum().item()
    return {"precision": both / max(kept_total, 1), "recall": both / max(informative_total, 1)}


def _metrics(ranks):
    out = {}
    for name, (function, k) in METRICS.items():
        values = function(ranks, k)
        out[name] = float(values.mean())
        out[f"{name}_interval"] = [float(x) for x in bootstrap_interval(values)]
    return out


def _collect(dataset, preset, names, runs, catalogue, table):
    ranks = {name: np.array([r["ranks"] for r in runs if r["row"]["method"] == name]) for name in names}  # [S, U]
    ranks |= _baselines(catalogue)
    rows = [r["row"] for r in runs]
    rows += [{"method": name, "seed": None, **_metrics(ranks[name][0]), **dict.fromkeys(COSTS), "kept_informative": None}
             for name in ranks if name not in names]
    summary = []
    for name, of_method in ranks.items():
        entry = {"method": name, "seeds": len(of_method)}
        for metric, (function, k) in METRICS.items():
            values = np.array([function(r, k) for r in of_method])
            entry[metric] = float(values.mean())
            entry[f"{metric}_interval"] = [float(x) for x in bootstrap_interval(values)]
        own = [row for row in rows if row["method"] == name]
        for cost in COSTS:
            entry[cost] = None if own[0][cost] is None else float(np.median([row[cost] for row in own]))
        entry["kept_informative"] = None if own[0]["kept_informative"] is None else {
            what: float(np.mean([row["kept_informative"][what] for row in own])) for what in ("precision", "recall")}
        entry["versus_unpadded"] = None
        if "unpadded" in ranks and name != "unpadded":
            test = paired_test(*(np.array([recall_at(r, 10) for r in ranks[m]]) for m in (name, "unpadded")))
            entry["versus_unpadded"] = {"difference": float(test.difference), "interval": [float(x) for x in test.interval],
                                        # It knows nothing of other seeds: of several, only the interval is shown.
                                        "p_value": float(test.p_value) if len(of_method) == 1 else None}
        summary.append(entry)
    return {
        "dataset": str(dataset), "preset": preset, "hardware": hardware(), "versions": _versions(),
        "command": f'make reproduce DATASET={dataset} PRESET={preset} METHODS="{" ".join(names)}" SEEDS={len(runs) // len(names)}',
        "users": ranks[names[0]].shape[1], "sids": dict(table.report()), "rows": rows, "summary": summary,
        "curves": [r["curve"] for r in runs],
    }


def _baselines(catalogue):
    split = leave_one_out(catalogue.histories)
    histories, targets = split.cases("test")
    lists = {"popularity": Popularity().fit(split.train, catalogue.n_items).recommend(histories, k=10),
             "neighbours": NeighbourTable().fit(split.train, catalogue.n_items).recommend(histories, k=10)}
    if catalogue.truth is not None:
        lists["bayes"] = catalogue.truth.recommend(histories, k=10)
    return {name: rank_of_target(items, targets)[None] for name, items in lists.items()}


def hardware() -> dict:
    """What this machine is: processor, cores this process may use, memory in GB, GPU or None."""
    info = pathlib.Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.exists():
        name = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {"processor": name, "cores": cores, "memory_gb": memory and round(memory, 1), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def _versions():
    import sidlab

    return {"sidlab": sidlab.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}


def _write_json(path, content):
    beside = pathlib.Path(path).with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, path)


class _Progress(TrainerCallback):
    """A line a validation, for a parent process that reads them."""

    def __init__(self, name):
        self.name = name

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        loss = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), float("nan"))
        print(f"{self.name}: update {state.global_step}/{state.max_steps}, loss {loss:.3f}, "
              f"validation recall@10 {metrics['eval_recall@10']:.4f}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
