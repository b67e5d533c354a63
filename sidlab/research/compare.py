"""Compare methods fairly: the same windows in the same batches, the same number of updates, each
run in a process of its own.

`compare` is what `notebooks/reproduce.ipynb` calls. A run is one (method, seed); see `sweeps` for
how it is done and kept. There are two protocols, and no table mixes them:

* "continue": one unpruned base per seed learns from every item of every history (`targets="all"`).
  From it every method goes on for the same few updates, the unpruned one too. A row "base", and a
  row "base-METHOD" for each pruner, show the base as it is: unpruned, and pruned only when it
  recommends. A model that works is pruned here, in minutes.
* "scratch": every method trains from nothing, one target a window (`targets=1`), as both papers
  did.
"""

import fractions
import pathlib
import re
import shlex

import pandas as pd

from sidlab.checks import SHARE, integer, one_of
from sidlab.config import DENSE, PRESETS, ROWS, TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.metrics import rank_of_target, stored
from sidlab.research.baselines import NeighbourTable, Popularity
from sidlab.research.cost import cost
from sidlab.research.machine import hardware, versions
from sidlab.research.runs import clip_max_items, config_with, run_all, spec, write_json
from sidlab.research.sid_tables import sid_table, sids_of
from sidlab.research.summary import COSTS, Run, metrics_of, summarise
from sidlab.windows import leave_one_out, training_windows

METHODS = {
    "padded": "nothing pruned, every history filled up to a fixed number of slots, as published",
    "unpadded": "nothing pruned and next to no padding: the baseline for every pruner",
    "recent": "keeps the newest tokens",
    "random": "keeps tokens at random",
    "rastp": (
        "keeps the tokens with most attention received × size of hidden state (RASTP, STAMP's SAP)"
    ),
    "rastp-l2": "as rastp, the size of the hidden state being its Euclidean norm",
    "rastp-visible": (
        "as rastp, the attention received being divided by how many tokens see the token: older"
        " ones are seen by more"
    ),
    "rastp-reference": "padded, and pruned as RASTP's published code does it",
    "pool": "averages neighbouring tokens down to the kept share",
    "norm": "keeps the tokens with the largest hidden states",
    "centrality": "keeps the tokens that receive most attention",
    "oracle": "keeps the tokens that truly hold most information",
    "map": "prunes nothing, also learns to predict further items (STAMP's MAP)",
    "stamp": "rastp and map together",
    "sasrec": (
        "causal self-attention over item ids, without semantic IDs: what a practitioner would try"
        " first"
    ),
}
BASELINES = {
    "popularity": "the most popular items, the same for everyone",
    "neighbours": "what stood next to the history's items in training: a table, no network",
    "bayes": "the best list for one who knows how the planted world works: a ceiling",
}
SETTINGS = {  # by name, as in `runs.sweep`, where they are not a scorer's name
    "padded": {"padding": "fixed"},
    "unpadded": {},
    "rastp-reference": {"padding": "fixed", "pruning.mode": "reference"},
    "pool": {"pruning.reduce": "pool"},
    "map": {"map.steps": 2},
    "stamp": {"pruning.scorer": "rastp", "map.steps": 2},
}
PRUNERS = tuple(name for name in METHODS if name not in ("padded", "unpadded", "map", "sasrec"))
DEFAULT_METHODS = "padded unpadded recent random rastp rastp-visible map stamp sasrec"
PARAMETERS = (
    "dataset",
    "preset",
    "methods",
    "seeds",
    "output_dir",
    "sids",
    "arch",
    "protocol",
    "cluster",
)
PROTOCOLS = ("continue", "scratch")
# The row of the unpruned model that the others continue, and in front of a pruner's name: that
# model, pruned so
BASE = "base"


def compare(
    dataset: str = "planted",
    preset: str = "quick",
    methods=DEFAULT_METHODS,
    seeds: int = 3,
    output_dir: str = "",
    sids: str = "",
    arch: str = "t5",
    protocol: str = "",
    executor=None,
) -> dict:
    """Train and test every method with every seed; write `results.json` into `output_dir`; return
    the results, of which `page.write_page` makes a page.

    Args: `dataset`: what `load_catalogue` takes; `preset`: of `TrainConfig`; `methods`: names of
    `METHODS`, separated by spaces or in a list, or "module:function", a custom scorer (see
    `saliency.named_scorer`); a pruning method may carry its kept share, as in "rastp@1/2" (default
    1/3); `seeds`: how many, from 0 on; `output_dir`: default runs/<dataset>-<preset>; `sids`: a
    published SID file or "behaviour" (`runs.sids_of`; default: of the embeddings); `arch`: "t5" or
    "qwen", decoder-only; `protocol`: "continue" or "scratch" (see the module; default: "continue",
    but "scratch" for the preset "paper"); `executor`: where runs are done side by side (see
    `runs.run_all`). Raises ValueError naming what is valid before anything is trained.
    """
    asked = Comparison(dataset, preset, methods, seeds, sids, arch, protocol)
    folder = folder_of(dataset, preset, output_dir, arch, asked.protocol)
    results = asked.results(list(run_all(asked.specs, folder, executor)), folder)
    write_json(folder / "results.json", results)
    return results


class Comparison:
    """What `compare` was asked for (its arguments), checked. `runs`: a pair (method, seed) each;
    `specs`: what they are made from, {name: spec}, as `runs.run_all` takes it.
    """

    def __init__(
        self,
        dataset,
        preset="quick",
        methods=DEFAULT_METHODS,
        seeds=3,
        sids="",
        arch="t5",
        protocol="",
    ):
        names = methods.split() if isinstance(methods, str) else list(methods)
        if not names:
            raise ValueError(f"give at least one method, got methods={methods!r}")
        if made := [name for name in names if name.partition("-")[0] == BASE]:
            raise ValueError(
                f"methods={methods!r} names {made[0]}, a row that protocol='continue' adds by"
                " itself; leave it out"
            )
        seeds = integer("seeds", seeds)
        one_of("preset", preset, PRESETS)
        protocol = protocol or default_protocol(preset)
        one_of("protocol", protocol, PROTOCOLS)
        if protocol == "continue" and preset not in DENSE:
            raise ValueError(
                f"preset={preset!r} trains from scratch, as published: protocol must be 'scratch',"
                f" got {protocol!r}"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"methods={methods!r} names {', '.join(twice)} twice")
        self.dataset = dataset
        self.preset = preset
        self.names = rows_of(names, protocol)
        self.sids = sids
        self.arch = arch
        self.protocol = protocol
        # Seeds outside: a comparison cut short compares
        self.runs = [(name, seed) for seed in range(seeds) for name in self.names]
        self.specs = {f"{name}-seed{seed}": self._spec(name, seed) for name, seed in self.runs}

    def _spec(self, name, seed):
        continued = self.protocol == "continue" and name not in (BASE, "sasrec")
        return spec(
            self.dataset,
            method_config(name, self.preset, seed, self.arch, self.protocol),
            sids_of(self.sids),
            f"{BASE}-seed{seed}" if continued else None,
        )

    def against(self, name: str) -> str | None:
        """The method that the differences of a row are to: of a base that is pruned the base, of
        all others the unpruned model.
        """
        other = BASE if name.startswith(f"{BASE}-") else "unpadded"
        return other if other in self.names and other != name else None

    def results(self, found: list[dict], folder) -> dict:
        """What `compare` returns, from the result of each of `runs`, in their order, which hold the
        same seeds for all methods; the SIDs are kept in `folder`.
        """
        catalogue = load_catalogue(self.dataset)
        table, report = sid_table(catalogue, folder, sids_of(self.sids))
        runs = [
            {"method": name, "seed": seed, **result}
            for (name, seed), result in zip(self.runs, found)
        ]
        rows = [{"method": r["method"], "seed": r["seed"], **r["row"]} for r in runs]
        baselines = _baselines(catalogue)
        nothing = dict.fromkeys([*COSTS, "kept_informative"])
        rows += [
            {"method": name, "seed": None, **metrics_of(ranks), **nothing}
            for name, ranks in baselines.items()
        ]
        known = [Run(r["method"], r["seed"], r) for r in sorted(runs, key=lambda r: r["seed"])]
        known += [Run(name, None, stored(ranks)) for name, ranks in baselines.items()]
        summary = [{"method": row.pop("label"), **row} for row in summarise(known, self.against)]
        for entry in summary:
            predicted = self._predicted(entry["method"], runs, catalogue, table)
            entry["predicted_flops"] = predicted and predicted.training
            entry["predicted_activation_mb"] = predicted and predicted.activation_bytes / 2**20
        busy = _busy(runs)
        return {
            "dataset": str(self.dataset),
            "preset": self.preset,
            "arch": self.arch,
            "protocol": self.protocol,
            "hardware": hardware(),
            "versions": versions(),
            "command": self.command,
            "precision": sorted({r["precision"] for r in runs} - {None}),
            "users": len(runs[0]["ranks"]),
            "sids": report,
            "rows": rows,
            "summary": summary,
            "curves": [
                {"method": r["method"], "seed": r["seed"], **r["curve"]} for r in runs if r["curve"]
            ],
        } | ({"busy": busy} if busy else {})

    def _predicted(self, name, runs, catalogue, table):
        """What the cost model says of a method; None of what it doesn't know."""
        if name not in self.names:
            return None
        config = method_config(name, self.preset, 0, self.arch, self.protocol)
        if not isinstance(config, TrainConfig):
            return None
        config = clip_max_items(config, catalogue)
        windows = training_windows(leave_one_out(catalogue.histories).train, config)
        # As it was trained, for that says how many bytes are kept.
        in_bf16 = any(r["precision"] == "bf16" for r in runs if r["method"] == name)
        return cost(config, table.widths, windows, bf16=in_bf16)

    @property
    def command(self) -> str:
        """What makes these results."""
        asked = [name for name in self.names if name.partition("-")[0] != BASE]
        return (
            f"make reproduce DATASET={shlex.quote(str(self.dataset))} PRESET={self.preset}"
            f' METHODS="{" ".join(asked)}" '
            + f"SEEDS={len(self.runs) // len(self.names)}"
            + f" SIDS={shlex.quote(str(self.sids))}" * bool(self.sids)
            + f" ARCH={self.arch}" * (self.arch != "t5")
            + f" PROTOCOL={self.protocol}" * (self.protocol != default_protocol(self.preset))
        )


def folder_of(
    dataset: str, preset: str, output_dir: str = "", arch: str = "t5", protocol: str = ""
) -> pathlib.Path:
    """Where `compare` keeps its runs and results: `output_dir`, or runs/<dataset>-<preset> with
    what else is not the default.
    """
    usual = protocol in ("", default_protocol(preset))
    parts = [
        pathlib.Path(dataset).name,
        preset,
        *([arch] if arch != "t5" else []),
        *([] if usual else [protocol]),
    ]
    return pathlib.Path(output_dir or f"runs/{'-'.join(parts)}")


def default_protocol(preset: str) -> str:
    """ "continue", but "scratch" for a preset that has no dense targets, the published one."""
    return "continue" if preset in DENSE else "scratch"


def rows_of(methods, protocol: str = "continue") -> list[str]:
    """The trained rows of a comparison of `methods`, names in a list or separated by spaces: under
    "continue" with those of the base.
    """
    names = methods.split() if isinstance(methods, str) else list(methods)
    if protocol != "continue" or set(names) == {"sasrec"}:
        return names
    return [BASE, *names, *(f"{BASE}-{name}" for name in names if _prunes(name))]


def describe(name: str) -> str:
    """What a method does, in words, with its kept share."""
    if name == BASE:
        return (
            "nothing pruned, every item of every history taught: the model that the others continue"
        )
    if name.startswith(f"{BASE}-"):
        return (
            "the base, not trained further, which recommends pruned as"
            f" {name.removeprefix(f'{BASE}-')}"
        )
    base, _, keep = name.partition("@")
    return (METHODS | BASELINES).get(base, "custom scorer" * (":" in base)) + (
        f"; {keep} of them" if keep else ""
    )


def unknown_parameters(namespace: dict, valid=PARAMETERS) -> list[str]:
    """Names in a notebook's namespace that are no parameter of it. papermill takes any name in
    silence; the notebook asks here.
    """
    given = {name for name in namespace if not name.startswith("_")}
    return sorted(
        given
        - {
            *valid,
            "In",
            "Out",
            "get_ipython",
            "exit",
            "quit",
            "open",
            "comparison",
            "charts",
            "figures",
            "page",
        }
    )


def predicted_and_measured(results: dict) -> pd.DataFrame:
    """The cost model beside the measurement, a row a method, each number relative to "unpadded" (or
    the first method with costs).
    """
    rows = [row for row in results["summary"] if row.get("predicted_flops")]
    base = next((row for row in rows if row["method"] == "unpadded"), rows[0])
    columns = {
        "predicted FLOPs ×": "predicted_flops",
        "measured seconds ×": "seconds_per_1k_windows",
        "predicted activations ×": "predicted_activation_mb",
        "measured memory ×": "peak_memory_mb",
    }
    # Some systems tell no peak memory: 0, of which there is no ratio; some runs no seconds.
    frame = pd.DataFrame(
        {
            title: [
                row[field] / base[field] if base[field] and row[field] is not None else None
                for row in rows
            ]
            for title, field in columns.items()
        },
        index=pd.Index([row["method"] for row in rows], name="method"),
        dtype=float,
    )
    frame.insert(0, "MFLOPs per window", [row["predicted_flops"] / 1e6 for row in rows])
    return frame


def _prunes(name):
    """Whether a method prunes in a way that a trained model can take on; the published code's needs
    a model built for it.
    """
    base = name.partition("@")[0]
    return (base in PRUNERS and base not in ("stamp", "rastp-reference")) or ":" in base


def method_config(
    name: str, preset: str, seed: int, arch: str = "t5", protocol: str = "scratch"
) -> TrainConfig | dict:
    """The configuration of a method: `preset` and what the method changes of it; of "sasrec" and
    "base-METHOD" what `runs.spec` takes.
    """
    if name == BASE:
        return config_with(preset, seed, {"arch": arch, "targets": "all"})
    if name.startswith(f"{BASE}-"):
        config = method_config(name.removeprefix(f"{BASE}-"), preset, seed, arch, protocol)
        return {"recommend": config.beam, "pruning": config.pruning.to_dict()}
    base, at, keep = name.partition("@")
    if base not in METHODS and ":" not in base:
        raise ValueError(
            f"method {name!r} is unknown; use some of {' '.join(METHODS)}, or a custom scorer as"
            " module:function"
        )
    if at and not ((base in PRUNERS or ":" in base) and re.fullmatch(SHARE, keep)):
        raise ValueError(
            f"method {name!r}: only a pruning method takes a kept share, written as in rastp@1/2 or"
            " rastp@0.5"
        )
    if base == "sasrec":
        short = {"epochs": 1} if preset == "smoke" else {}
        return {
            "sasrec": {"max_items": TrainConfig.preset(preset).max_items, "seed": seed, **short}
        }
    share = {"pruning.keep": float(fractions.Fraction(keep))} if keep else {}
    settings = {"arch": arch} | SETTINGS.get(base, {"pruning.scorer": base}) | share
    if protocol == "continue":  # told, so that the cost model knows it too
        row, _, needed = ROWS[arch]
        settings[row] = needed
    return config_with(preset, seed, settings, continued=protocol == "continue")


def _busy(runs):
    """What is to be said of the seconds of runs."""
    others = []
    if any(r.get("beside") for r in runs):
        others.append("Runs were done side by side: those carry no seconds.")
    if any(r["busy"] and not r.get("beside") for r in runs):
        others.append("Other jobs ran on the machine at the same time: the seconds say little.")
    if len(devices := sorted({r["device"] for r in runs})) > 1:
        others.append(
            f"The runs were made on {' and '.join(devices)}: their seconds do not compare."
        )
    return " ".join(others)


def _baselines(catalogue):
    split = leave_one_out(catalogue.histories)
    histories, targets = split.cases("test")
    lists = {
        "popularity": Popularity().fit(split.train, catalogue.n_items).recommend(histories, k=10),
        "neighbours": (
            NeighbourTable().fit(split.train, catalogue.n_items).recommend(histories, k=10)
        ),
    }
    if catalogue.truth is not None:
        lists["bayes"] = catalogue.truth.recommend(histories, k=10)
    return {name: rank_of_target(items, targets) for name, items in lists.items()}
