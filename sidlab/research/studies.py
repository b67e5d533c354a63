"""The sweeps that the papers plot, and what they leave open: each a grid of settings, a question,
and the way to look at the runs.

`notebooks/study.ipynb` runs a study and shows what it found (`make study STUDY=map`): `run` does
what is not done yet and `summarise` makes a row a setting, with intervals, its cost, and its
difference to the first setting. Studies in one folder share the settings that they have in common.
"""

import dataclasses
import itertools
import json
import pathlib
import shlex
from collections.abc import Callable

import numpy as np
import pandas as pd

import sidlab
from sidlab.checks import integer, one_of
from sidlab.config import PARTS
from sidlab.data.load import load_catalogue
from sidlab.files import read_json, write_json
from sidlab.map_loss import MapConfig
from sidlab.metrics import ranks_of
from sidlab.pruning import PruningConfig
from sidlab.research.compare import hardware, versions
from sidlab.research.cost import cost
from sidlab.research.papers import RASTP_CLAIMS, RASTP_POOLING, STAMP_CLAIMS
from sidlab.research.runs import config_with, fitted, sids_of, sweep
from sidlab.research.summary import COSTS, Run, difference, hits, metrics_of
from sidlab.research.summary import summarise as summarise_runs
from sidlab.windows import leave_one_out, training_windows

KEEPS = (0.1, 0.2, 1 / 3, 0.5, 0.7)
# The summaries that the course's explorers show, as `save` writes them
COURSE = pathlib.Path(sidlab.__file__).parent / "course" / "data"
LARGE = 5000  # items; 16 codes a level would hardly tell more of them apart
NOTHING = {}  # pruned; the setting that the others are compared with
POOL = {2: "pool", 1: "pool after layer 1", 3: "pool after layer 3"}
# Wide enough for mixed precision
FAST = {"d_model": 128, "d_ff": 256, "dropout": 0.1, "max_updates": 400, "eval_every": 40}


@dataclasses.dataclass(frozen=True)
class Study:
    """`settings`: {label: settings by name, as in `sweeps.sweep`}, the first the one to compare
    with; `large`: those for catalogues of over `LARGE` items, where others are needed. `x`: a
    setting or a cost, the axis of the figure; None: the labels. `published`: what the papers say of
    it, in words, with its source; `values`: {label: recall@5 on Amazon Beauty}, where they give it.
    `pairs`: what else is compared, from {label: share of the work}: triples of a label, the name of
    the other side, and that side as {label: weight}. The work is that of the pruned stack, in
    tokens × layers: those after the pruner have only what was kept. `quality`: whether recall is
    looked at. `reading`: how its figure and its pairs are read, in words; `shows`: what is shown
    beside them, of "schedules", "ended", "strata" and "curves".
    """

    title: str
    question: str
    settings: dict[str, dict]
    published: str
    x: str | None = None
    large: dict[str, dict] | None = None
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    pairs: Callable[[dict[str, float]], list[tuple[str, str, dict[str, float]]]] = lambda work: []
    quality: bool = True
    reading: str = ""
    shows: tuple[str, ...] = ()

    def settings_for(self, n_items: int) -> dict[str, dict]:
        """The settings for a catalogue of `n_items`."""
        return self.large if self.large is not None and n_items > LARGE else self.settings

    def panels(self, gpu: bool) -> list[str]:
        """What the figure shows: on a processor no memory, which is resident there and hardly
        repeats.
        """
        return ["recall@10"] * self.quality + ["seconds_per_1k_windows"] + ["peak_memory_mb"] * gpu

    def about(self) -> str:
        """What a reader has to know before the first figure, in markdown."""
        return (
            f"## {self.title}\n\n**{self.question}** {len(self.settings)} settings.\n\n*What the"
            f" papers say.* {self.published}\n\n*How to read it.* {self.reading}"
        )


def _pruned(keep=1 / 3, **fields):
    """Defaults are left out, so that the same setting has the same name in every study."""
    return {"pruning.keep": keep} | {
        f"pruning.{name}": value
        for name, value in fields.items()
        if value != getattr(PruningConfig, name)
    }


def _sids(levels, widths):
    return {
        f"{n} × {width}{', stamp' * stamp}": (
            {"sids.levels": n, "sids.width": width, "sids.collisions": "extend"}
            | ({"pruning.keep": 1 / 3, "map.steps": 2} if stamp else {})
        )
        for n in levels
        for width in widths
        for stamp in (False, True)
    }


def _map(tokens, **shared):
    """`tokens`: also steps within the target; `shared`: settings that all have."""
    kinds = [("item", steps, weight) for steps in (1, 2, 4) for weight in (0.1, 0.3, 1.0)]
    kinds += [("token", steps, 0.3) for steps in (1, 2)] * tokens
    return {"no MAP": shared} | {
        f"{steps} {'step' if unit == MapConfig.unit else unit}{'s' * (steps > 1)}, weight"
        f" {weight:g}": shared
        | {"map.steps": steps, "map.weight": weight}
        | ({"map.unit": unit} if unit != MapConfig.unit else {})
        for unit, steps, weight in kinds
    }


def _against_random(work):
    """Every way to choose against as many random tokens."""
    pairs = []
    for label in work:
        name, _, share = label.partition(", ")
        other = f"random, {share}" if share else "random"
        if other in work and name not in ("unpruned", "random"):
            pairs.append((label, other, {other: 1}))
    return pairs


def _finer(work):
    """All SIDs against coarser ones."""
    size = {label: tuple(map(int, label.split(" × "))) for label in work if "stamp" not in label}
    return [
        (fine, coarse, {coarse: 1})
        for coarse in size
        for fine in size
        if coarse != fine and all(a <= b for a, b in zip(size[coarse], size[fine]))
    ]


def _equal_cost(work):
    """What adapts against a constant share at equal work: between the two constant ones beside it,
    in proportion.
    """
    constant = sorted(
        (label for label in work if label.startswith(("constant", "unpruned"))), key=work.get
    )
    pairs = []
    for label in (one for one in work if one not in constant):
        beside = [
            (low, high)
            for low, high in itertools.pairwise(constant)
            if work[low] <= work[label] <= work[high]
        ]
        for low, high in beside[:1]:
            part = (work[label] - work[low]) / (work[high] - work[low])
            pairs.append(
                (label, f"constant, {work[label]:.0%} of the work", {low: 1 - part, high: part})
            )
    return pairs


# A third kept in every way that there is
THIRDS = (
    {"unpruned": NOTHING}
    | {
        scorer: _pruned(scorer=scorer)
        for scorer in ("rastp", "rastp-l2", "centrality", "norm", "recent", "random")
    }
    | {POOL[layer]: _pruned(after_layer=layer, reduce="pool") for layer in POOL}
)
STUDIES = {
    "strategies": Study(
        "Which tokens to keep",
        "A third of the tokens stays. Does it matter which, and is averaging neighbours as good?"
        " And with fewer or more?",
        THIRDS
        | {
            f"{scorer}, keep {keep:.2g}": _pruned(keep=keep, scorer=scorer)
            for scorer in ("rastp", "recent", "random")
            for keep in KEEPS
            if keep != 1 / 3
        },
        "RASTP's history holds an unadvertised comparison, on Beauty: nothing pruned, and pooling"
        " to a third after layer 1, 2, 3.",
        values={"unpruned": RASTP_POOLING["none"]}
        | {POOL[layer]: RASTP_POOLING[layer] for layer in POOL},
        large=THIRDS,
        pairs=_against_random,
        reading="The pairs say what a scorer is worth: against as many random tokens, on the same"
        " users and seeds.",
    ),
    "layer-ratio": Study(
        "Where to prune, and how much",
        "Earlier and harder is cheaper. From where on does it cost recall?",
        {"unpruned": NOTHING}
        | {
            f"layer {layer}, keep {keep:.2g}": _pruned(after_layer=layer, keep=keep)
            for layer in (1, 2, 3)
            for keep in KEEPS
        },
        "STAMP: up to two thirds can go without a loss, too low a ratio hurts; values and grid are"
        " not published. RASTP prunes after layer 2 of 4 and keeps a third.",
        x="pruning.keep",
        reading="A line for each layer. The share at which it leaves the band of the unpruned model"
        " is how far one may prune there.",
    ),
    "efficiency": Study(
        "What pruning saves",
        "Seconds and memory against the kept share. The runs are short: quality is not the point.",
        {"unpruned": {"max_updates": 60}}
        | {f"keep {keep:.2g}": {"max_updates": 60} | _pruned(keep=keep) for keep in KEEPS},
        "RASTP: {} times as fast. STAMP: {} to {} times, with {:.1%} to {:.1%} less memory. Both"
        " against models that pad.".format(
            RASTP_CLAIMS["speedup"], *STAMP_CLAIMS["speedup"], *STAMP_CLAIMS["memory_saved"]
        ),
        x="pruning.keep",
        quality=False,
        reading="The dotted line is the unpruned model, itself without padding: what is below it is"
        " saved by pruning alone.",
    ),
    "granularity": Study(
        "The dilution curve",
        "Finer SIDs make longer histories. Does accuracy rise with them, and does STAMP change"
        " that?",
        _sids((1, 2, 3, 4), (4, 8, 16, 32)),
        "STAMP: accuracy moves non-monotonically with granularity (the Semantic Dilution Effect);"
        " its settings and values are not published.",
        x="sids.levels",
        large=_sids((2, 3, 4), (64, 256)),
        pairs=_finer,
        reading="A line for each number of codes, with STAMP and without. The pairs compare finer"
        " SIDs with coarser ones, on the same users and seeds. A level that tells colliding items"
        " apart comes on top.",
    ),
    "map": Study(
        "Looking further ahead",
        "How many steps, with which weight?",
        # With curves worth looking at: an evaluation every 25 updates
        _map(tokens=True, eval_every=25),
        "STAMP: MAP alone beats the baseline. The number of steps and the weight are not"
        " published.",
        x="map.weight",
        large=_map(tokens=False),
        reading="A line for each number of steps; the dotted line is the model without MAP. The"
        " best of many settings is partly the luckiest.",
    ),
    "strata": Study(
        "Who loses",
        "Recall by length of the history and by popularity of the target: who pays for pruning?",
        {
            "unpruned": NOTHING,
            "recent": _pruned(scorer="recent"),
            "rastp": _pruned(),
            "stamp": _pruned() | {"map.steps": 2},
        },
        "Neither paper reports it. RASTP's published code cuts only histories over ten items, 15 %"
        " of Beauty's test users.",
        reading="The last figure has the recall of each third of the users by length of their"
        " history, and by popularity of what they took next: each third of the targets received a"
        " third of all training interactions.",
        shows=("strata",),
    ),
    "inference": Study(
        "Pruning in training only",
        "Whoever prunes only to train faster can keep all tokens when it recommends. Is that better"
        " or worse?",
        {"unpruned": NOTHING}
        | {
            f"keep {keep:.2g}, {'always' if always else 'in training only'}": _pruned(
                keep=keep, at_inference=always
            )
            for keep in (0.15, 1 / 3)
            for always in (True, False)
        },
        "RASTP's published code prunes at evaluation, too; neither paper compares.",
        reading="Two settings of one share are the same model, recommending from all its tokens or"
        " from those that it keeps.",
    ),
    "fast": Study(
        "Does speed disturb learning",
        "Batches of one length, mixed precision, cheap dropout and attention: does any of it cost"
        " recall?",
        {
            label: FAST | setting
            for label, setting in {
                "as it is": NOTHING,
                "fp32": {"precision": "fp32"},
                "the libraries' attention and dropout": {"plain": True},
                "a third kept": _pruned(),
                "mixed lengths, padded to the longest": {"bucketing": False},
                "padded to the fixed number of slots": {"padding": "fixed"},
            }.items()
        },
        "Both papers train in fp32 and pad every history to a fixed number of slots; RASTP prunes"
        " for speed.",
        reading="The curves are means over seeds, whiskers reach from the lowest to the highest."
        " What is faster has learned as well where its curve is as high after as many updates.",
        shows=("curves",),
    ),
    "adaptive": Study(
        "Ratios and layers that adapt",
        "Against constant shares: schedules, a share by row, one guided by the loss, a layer that"
        " settled.",
        {
            "unpruned": NOTHING,
            "constant 1/3": _pruned(),
            "constant 0.2": _pruned(keep=0.2),
            "constant 0.5": _pruned(keep=0.5),
        }
        | {
            f"{kind}, from {start:g}": _pruned() | {"strategy.kind": kind, "strategy.start": start}
            for kind, start in (("linear", 0.15), ("cosine", 0.15), ("stage", 0.15), ("stage", 0.6))
        }
        | {
            "mass 0.5": _pruned(keep=1.0, mass=0.5),
            "loss gap 0.02": _pruned(keep=0.2) | {"strategy.kind": "loss-gap"},
            "settled layer": _pruned() | {"strategy.kind": "settled-layer"},
        },
        "A summary of RASTP claims ratios that change with the stage of learning; its code has"
        " none. STAMP names ratios guided by learning signals and adaptive layers as future work.",
        x="kept_token_fraction",
        pairs=_equal_cost,
        reading="The schedules stand before the runs; what follows the loss or the ranking isn't"
        " known then. The pairs compare what adapts with the constant share after the second layer"
        " that leaves as much work (tokens × layers): between the two constant ones beside it."
        " Last, what the two that look at a probe had chosen when the best checkpoint was written,"
        " seed by seed; the settled layer with the rank correlation of each layer with the next.",
        shows=("schedules", "ended"),
    ),
}


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
    """Do the study's runs that `folder` does not hold yet: a row a run, as `sweeps.sweep` gives it,
    its "label", and "mflops", predicted for a training window (None where lengths do not tell). A
    part that is switched on has its defaults, too, so that rows speak for themselves.

    `sids`: as `runs.sids_of` takes it; `only`: the first settings, for a quick look; `executor`:
    where runs are done side by side (see `runs.run_all`). Raises ValueError for an unknown study.
    """
    one_of("study", name, STUDIES)
    if only is not None:
        integer("only", only)
    shared = ({"arch": arch} if arch != "t5" else {}) | (
        {f"sids.{name}": value for name, value in sids_of(sids).items()}
    )
    catalogue = load_catalogue(dataset)
    settings = dict(list(STUDIES[name].settings_for(catalogue.n_items).items())[:only])
    asked = [shared | setting for setting in settings.values()]
    frame = sweep(asked, folder, dataset=dataset, preset=preset, seeds=seeds, executor=executor)
    mflops = [
        _mflops(preset, setting, catalogue, read_json(file))
        for setting, file in zip(asked, frame["file"])
    ]
    return _with_defaults(frame).assign(label=list(settings) * seeds, mflops=mflops * seeds)


def _mflops(preset, setting, catalogue, result):
    """Of a training window, by the cost model; None where it depends on what the model learns."""
    own = {key: value for key, value in setting.items() if not key.startswith("sids.")}
    config = fitted(config_with(preset, 0, own), catalogue)
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
