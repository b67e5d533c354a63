"""The sweeps that the papers plot, and what they leave open: each a grid of settings, a question,
and the way to look at the runs.

`notebooks/study.ipynb` runs a study and shows what it found (`make study STUDY=map`): `run` does
what is not done yet and `summarise` makes a row a setting, with intervals, its cost, and its
difference to the first setting. Studies in one folder share the settings that they have in common.
"""

import json
import pathlib
import shlex

import numpy as np
import pandas as pd

import sidlab
from sidlab.checks import integer, one_of
from sidlab.config import PARTS
from sidlab.data.load import load_catalogue
from sidlab.files import read_json, write_json
from sidlab.metrics import ranks_of
from sidlab.research.cost import cost
from sidlab.research.machine import hardware, versions
from sidlab.research.runs import clip_max_items, config_with, sweep
from sidlab.research.sid_tables import sids_of
from sidlab.research.study_settings import STUDIES
from sidlab.research.summary import COSTS, Run, difference, hits, metrics_of
from sidlab.research.summary import summarise as summarise_runs
from sidlab.windows import leave_one_out, training_windows

# The summaries that the course's explorers show, as `save` writes them
COURSE = pathlib.Path(sidlab.__file__).parent / "course" / "data"


def run(
    name: str,
    folder,
    *,
    dataset: str = "planted",
    preset: str = "quick",
    seeds: int = 2,
    arch: str = "t5",
    sids: str = "",
    only: int | None = None,
    executor=None,
) -> pd.DataFrame:
    """Do the study's runs that `folder` does not hold yet: a row a run, as `described` gives it.

    `sids`: as `runs.sids_of` takes it; `only`: the first settings, for a quick look; `executor`:
    where runs are done side by side (see `runs.run_all`). Raises ValueError for an unknown study.
    """
    settings = settings_of(name, dataset, arch, sids, only)
    frame = sweep(
        list(settings.values()),
        folder,
        dataset=dataset,
        preset=preset,
        seeds=seeds,
        executor=executor,
    )
    return described(frame, settings, dataset, preset)


def settings_of(
    name: str, dataset: str, arch: str = "t5", sids: str = "", only: int | None = None
) -> dict[str, dict]:
    """{label: settings by name} of a study on a data set (arguments as in `run`)."""
    one_of("study", name, STUDIES)
    if only is not None:
        integer("only", only)
    shared = ({"arch": arch} if arch != "t5" else {}) | (
        {f"sids.{name}": value for name, value in sids_of(sids).items()}
    )
    found = STUDIES[name].settings_for(load_catalogue(dataset).n_items)
    return {label: shared | setting for label, setting in list(found.items())[:only]}


def described(
    frame: pd.DataFrame, settings: dict[str, dict], dataset: str, preset: str
) -> pd.DataFrame:
    """The rows of runs, settings inside seeds, as `runs.sweep` gives them, with "label", and
    "mflops", predicted for a training window (None where lengths do not tell). A part that is
    switched on has its defaults, too, so that rows speak for themselves.
    """
    catalogue = load_catalogue(dataset)
    seeds = len(frame) // len(settings)
    mflops = [
        _mflops(preset, setting, catalogue, read_json(file))
        for setting, file in zip(settings.values(), frame["file"])
    ]
    return _with_defaults(frame).assign(label=list(settings) * seeds, mflops=mflops * seeds)


def _mflops(preset, setting, catalogue, result):
    """Of a training window, by the cost model; None where it depends on what the model learns."""
    own = {key: value for key, value in setting.items() if not key.startswith("sids.")}
    config = clip_max_items(config_with(preset, 0, own), catalogue)
    windows = training_windows(leave_one_out(catalogue.histories).train, config)
    try:
        return cost(config, result["sids"]["widths"], windows).training / 1e6
    except ValueError:  # a strategy, or a share of the mass
        return None


def _with_defaults(frame):
    """Where a part of the configuration is switched on, its missing fields are the default ones."""
    frame = frame.copy()
    for part, config in PARTS.items():
        names = [name for name in frame if name.startswith(f"{part}.")]
        on = frame[names].notna().any(axis=1)
        for name in names:
            default = getattr(config, name.removeprefix(f"{part}."))
            frame[name] = frame[name].where(frame[name].notna() | ~on, default)
    return frame


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: what `summary.summarise` says of its runs, the difference being that to the
    first setting, and the setting itself. "curve": validation recall@10 by "updates", its "mean",
    "lowest" and "highest" over seeds, and the mean "loss" of the next item by "loss_updates";
    "seconds_to_recall": training seconds until that mean reaches 95 % of the first setting's last
    (None: never). "sids": their number of codes by level and the share of items whose codes others
    have, too. "ended": kept share and layer of each seed's best checkpoint, which a strategy chose.
    "busy" also where the runs were made on several devices.
    """
    runs = [
        Run(row["label"], row["seed"], read_json(row["file"])) for row in frame.to_dict("records")
    ]
    devices = {run.result["device"] for run in runs}
    first = frame["label"].iloc[0]
    of_runs = ["label", "seed", "file", "kept_informative", *COSTS]
    settings = frame.drop(columns=of_runs, errors="ignore").assign(label=frame["label"])
    settings = settings.drop_duplicates("label").set_index("label").to_dict("index")
    rows = []
    aim = None
    for row in summarise_runs(runs, lambda label: None if label == first else first):
        found = [run.result for run in runs if run.label == row["label"]]
        # A seed may have stopped early
        length = min(len(one["curve"]["recall@10"]) for one in found)
        curves = np.array([one["curve"]["recall@10"][:length] for one in found])  # [S, evaluations]
        curve = curves.mean(axis=0)
        steps = found[0]["curve"]["eval_step"][:length]
        logged = min(len(one["curve"]["loss"]) for one in found)
        losses = np.array([one["curve"]["loss"][:logged] for one in found])  # [S, logged]
        aim = 0.95 * curve[-1] if aim is None else aim
        reached = np.flatnonzero(curve >= aim)
        # Of runs side by side there are no seconds.
        per_update = None if row["train_seconds"] is None else row["train_seconds"] / row["updates"]
        timed = len(reached) and per_update is not None
        rows.append(
            {
                "label": row["label"],
                **settings[row["label"]],
                **row,
                "curve": {
                    "updates": steps,
                    "mean": curve.tolist(),
                    "lowest": curves.min(0).tolist(),
                    "highest": curves.max(0).tolist(),
                    "loss_updates": found[0]["curve"]["step"][:logged],
                    "loss": losses.mean(axis=0).tolist(),
                },
                "seconds_to_recall": steps[reached[0]] * per_update if timed else None,
                "sids": found[0]["sids"],
                "ended": [one.get("ended") for one in found],
                "busy": row["busy"] or len(devices) > 1,
            }
        )
    return pd.DataFrame(rows)


def versus(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The pairs of a study (its field `pairs`) on the same users and seeds: rows "label",
    "against", and what `summary.difference` says of recall@10. Empty for a study without.
    """
    found = {}
    work = {}
    for label, runs in frame.groupby("label", sort=False):
        results = _results(runs)
        found[label] = hits(ranks_of(results))
        works = [
            _work(one["ended"], kept) for one, kept in zip(results, runs["kept_token_fraction"])
        ]
        work[label] = float(np.mean(works))
    rows = []
    for label, against, other in STUDIES[name].pairs(work):
        mixed = sum(weight * found[one] for one, weight in other.items())
        rows.append({"label": label, "against": against, **difference(found[label], mixed)})
    return pd.DataFrame(rows, columns=["label", "against", *difference(None, None)])


def _results(runs):
    return [read_json(file) for file in runs["file"]]


def _work(ended, kept):
    if ended is None:  # nothing pruned
        return 1.0
    in_front = ended["after_layer"] / ended["layers"]
    return in_front + (1 - in_front) * kept


def save(
    name: str,
    frame: pd.DataFrame,
    folder,
    *,
    dataset: str,
    preset: str,
    seeds: int,
    arch: str,
    sids: str,
    only: int | None,
    keep: bool = False,
) -> None:
    """Write NAME-study.json into `folder`: where and how the runs of `frame` were made (arguments
    as in `run`), and all that is said of them here.

    `keep`: the same file also goes into results/studies, where `results/show.py` makes pages of it,
    and, where the course shows this study of the planted shop, into the package. Raises ValueError
    where that is asked of a look, or away from the repository.
    """
    made = {
        "study": name,
        "dataset": str(dataset),
        "preset": preset,
        "seeds": int(seeds),
        "arch": arch,
        "sids": sids,
    }
    files = [pathlib.Path(folder) / f"{name}-study.json"]
    if keep:
        files += _kept(made, only)
    parts = {"rows": summarise(frame), "versus": versus(name, frame)} | (
        {"groups": strata(frame, dataset)} if name == "strata" else {}
    )
    made |= {
        "only": only or 0,
        "command": command(made),
        "hardware": hardware(),
        "versions": versions(),
        **{part: json.loads(rows.to_json(orient="records")) for part, rows in parts.items()},
    }
    for file in files:
        write_json(file, made)


def command(summary: dict) -> str:
    """What makes a summary anew."""
    given = [
        f"{name.upper()}={shlex.quote(str(summary[name]))}"
        for name in ("study", "dataset", "preset", "seeds", "arch", "sids")
        if summary.get(name, "t5") not in ("", "t5")
    ]
    return " ".join(["make study", *given])


def _kept(made, only):
    """Where a summary is kept."""
    if only or made["preset"] == "smoke":
        raise ValueError(
            f"keep=True is for whole studies, got preset={made['preset']!r} and only={only}; use"
            " another preset and only=0"
        )
    results = pathlib.Path("results", "studies")
    if not results.is_dir():
        raise ValueError(
            f"keep=True writes into {results.absolute()}, which is no folder; run it from the"
            " repository's folder, as make does"
        )
    own = [made["arch"]] * (made["arch"] != "t5") + [made["preset"]] * (made["preset"] != "quick")
    data = pathlib.Path(made["dataset"]).name.removeprefix("amazon-")
    files = [results / f"{'-'.join([made['study'], data, *own])}.json"]
    shown = COURSE / f"{made['study']}.json"
    if made["dataset"] == "planted" and made["arch"] == "t5" and shown.exists():
        files.append(shown)
    return files


def strata(frame: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Recall@10 of every setting by third of history length and by popularity of the target: head
    (the most popular items, which receive a third of all training interactions), middle and tail.
    Columns "label", "by", "group", "users", "recall@10", its interval.
    """
    catalogue = load_catalogue(dataset)
    split = leave_one_out(catalogue.histories)
    histories, targets = split.cases("test")
    lengths = np.array([len(history) for history in histories])
    cuts = np.quantile(lengths, (1 / 3, 2 / 3))
    of_length = np.array(["short", "middle", "long"])[np.searchsorted(cuts, lengths)]
    count = np.bincount(np.concatenate(split.train), minlength=catalogue.n_items + 1)
    order = np.argsort(-count, kind="stable")
    before = (np.cumsum(count[order]) - count[order]) / max(count.sum(), 1)
    third = np.empty(len(count), np.int64)
    third[order] = np.minimum(before * 3, 2).astype(np.int64)
    of_target = np.array(["head", "middle", "tail"])[third[targets]]
    rows = []
    of_label = {
        label: ranks_of(_results(runs)) for label, runs in frame.groupby("label", sort=False)
    }
    for by, groups, names in (
        ("history length", of_length, ("short", "middle", "long")),
        ("target popularity", of_target, ("head", "middle", "tail")),
    ):
        for group in names:
            inside = groups == group
            if inside.any():
                for label, ranks in of_label.items():
                    found = metrics_of(ranks[:, inside])
                    rows.append(
                        {
                            "label": label,
                            "by": by,
                            "group": group,
                            "users": int(inside.sum()),
                            **{name: found[name] for name in ("recall@10", "recall@10_interval")},
                        }
                    )
    return pd.DataFrame(rows)
