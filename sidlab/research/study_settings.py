"""The studies: each a question, a grid of settings, and what the papers say of it."""

import dataclasses
import itertools
from collections.abc import Callable

from sidlab.map_loss import MapConfig
from sidlab.pruning import PruningConfig
from sidlab.research.papers import RASTP_CLAIMS, RASTP_POOLING, STAMP_CLAIMS

KEEPS = (0.1, 0.2, 1 / 3, 0.5, 0.7)
LARGE = 5000  # items; 16 codes a level would hardly tell more of them apart
NOTHING = {}  # pruned; the setting that the others are compared with
POOL = {2: "pool", 1: "pool after layer 1", 3: "pool after layer 3"}
# Wide enough for mixed precision
FAST = {"d_model": 128, "d_ff": 256, "dropout": 0.1, "max_updates": 400, "eval_every": 40}


@dataclasses.dataclass(frozen=True)
class Study:
    """`settings`: {label: settings by name, as in `runs.sweep`}, the first the one to compare
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
        """What the figure shows: on a CPU no memory, which is resident there and hardly
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
                "the libraries' attention and dropout": {"stock_kernels": True},
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
