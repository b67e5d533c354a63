"""What of RASTP's saving is padding: the explorer, and what it computes."""

import functools
import textwrap

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import torch
from scipy.optimize import brentq

from sidlab.checks import one_of
from sidlab.config import TrainConfig
from sidlab.figures.tables import table
from sidlab.figures.theme import BLUE, GREEN, GREY, VERMILLION, template
from sidlab.pruning import PruningConfig, kept_count
from sidlab.research.cost import flops_by_part
from sidlab.viz.explorer import Explorer

# RASTP's: items of history, for the target counts among the 30 that 150 slots hold; tokens an item
# (4 codes and a separator)
MAX_ITEMS = 29
TOKENS = 5
SLOTS = (MAX_ITEMS + 1) * TOKENS
LAST = 10  # and the cheap alternative: the last ten items only
# Its codes; how wide the de-duplication digit is, is not published, and costs next to nothing
WIDTHS = (256, 256, 256, 10)
USERS = 32
LIMIT = 512  # of a batch of its: users, and windows drawn from them at most
# What the figure can be held against: FLOPs relative to 150 slots always, on Beauty's own lengths
# in the published batches (tests/test_cost.py computes them), and the share of padding in RASTP's
# batches of Amazon data.
ON_BEAUTY = (1.0, 0.65, 0.77, 0.34, 0.28, None)
PADDING = (0.73, 0.79)
HISTORIES = {
    "published": "training, as published: all stretches",
    "prefixes": "training, as here: all prefixes",
    "test": "test histories",
}


def five_core_lengths(mean: float, users: int = 3200) -> np.ndarray:
    """Lengths of histories shaped like the Amazon 5-core sets: P(n) ∝ n⁻ᵃ from 5 items to 300, with
    the exponent that gives `mean`.

    An approximation: at Beauty's mean of 8.9 it has 33 % of users with 5 items, and Beauty 32 %.
    int64 [users].
    """
    n = np.arange(5, 301)
    if not 5 < mean < n.mean():
        raise ValueError(
            f"mean must lie above 5, the least number of items, and below {n.mean()}, got {mean}"
        )

    def share(exponent):
        weight = (n / 5.0) ** -exponent
        return weight / weight.sum()

    exponent = brentq(lambda a: (share(a) * n).sum() - mean, 0, 60)
    quantiles = (np.arange(users) + 0.5) / users  # even steps instead of a draw
    return n[np.searchsorted(np.cumsum(share(exponent)), quantiles).clip(max=len(n) - 1)]


def windows_of_batches(lengths, which: str = "published", seed: int = 0) -> np.ndarray:
    """How many windows of 1..29 items each batch of 32 users, put together at random, has: int64
    [batches, 29]; the last column counts all that are cut to 29.

    `lengths`: items per user, 3 or more; the last two are held out. `which`: "published" (all
    contiguous stretches, 512 drawn from each batch), "prefixes" (each prefix once) or "test" (one
    history per user, all but its last item).
    """
    one_of("which", which, HISTORIES)
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    items = np.arange(1, MAX_ITEMS + 1)
    train = rng.permutation(lengths[lengths >= 3])[:, None] - 2
    longer = (train[:, 0] - MAX_ITEMS).clip(min=0)  # prefixes of 29 items and more
    if which == "test":
        of_user = ((train + 1).clip(max=MAX_ITEMS) == items).astype(np.int64)  # [users, 29]
    elif which == "prefixes":
        of_user = (train > items).astype(np.int64)
        of_user[:, -1] = longer
    else:
        of_user = (train - items).clip(min=0)
        of_user[:, -1] = longer * (longer + 1) // 2
    batches = np.add.reduceat(of_user, np.arange(0, len(of_user), USERS))
    if which == "published":
        batches = np.array(
            [rng.multivariate_hypergeometric(b, LIMIT) if b.sum() > LIMIT else b for b in batches]
        )
    if not batches.any():
        raise ValueError(
            "lengths leave no window: a user needs two items before the two that are held out"
        )
    return batches


def _training_flops(slots, kept, pruning=None):
    """FLOPs of a training step of RASTP's model per window of so many slots, kept after the
    pruner: both int64, any shape.
    """
    flops = flops_by_part(
        TrainConfig.preset("paper", pruning=pruning, padding="fixed"), WIDTHS, slots, kept
    )
    return 3 * sum(flops.values())


def padding_rows(batches, keep: float) -> list[dict]:
    """What becomes of the slots of an average history, a dict for each way to train on `batches`
    (from `windows_of_batches`): `name`, slots that are "real_kept", "real_lost", "padding_kept",
    "padding_dropped", and `flops` relative to 150 slots always.
    """
    tokens = TOKENS * np.arange(1, MAX_ITEMS + 1)
    weight = batches.sum(0)
    of_batch = batches.sum(1)
    longest = tokens[MAX_ITEMS - 1 - (batches[:, ::-1] > 0).argmax(1)]  # of each batch
    own = kept_count(torch.from_numpy(tokens), keep).numpy()
    pruning = PruningConfig(keep=keep)
    slots = int(keep * SLOTS + 1e-6)
    last = TOKENS * LAST
    full = _training_flops(SLOTS, SLOTS)

    def mean(of_length):
        return float(np.average(of_length, weights=weight))

    def row(name, kept, filled, flops, dropped=0.0):
        return {
            "name": name,
            "real_kept": kept,
            "real_lost": real - kept,
            "padding_kept": filled - kept,
            "padding_dropped": dropped,
            "flops": float(flops / full),
        }

    real = mean(tokens)
    survivors = mean(np.minimum(tokens, slots))
    own_kept = mean(own)
    of_longest = np.average(_training_flops(longest, longest), weights=of_batch)
    return [
        row("150 slots, nothing pruned", real, SLOTS, full),
        row(
            f"RASTP as published: {slots} of 150 slots",
            survivors,
            slots,
            _training_flops(SLOTS, slots, pruning),
            dropped=SLOTS - real - (slots - survivors),
        ),
        row(
            "padded to the batch's longest",
            real,
            float(np.average(longest, weights=of_batch)),
            of_longest,
        ),
        row(
            f"the last {LAST} items, {last} slots",
            mean(np.minimum(tokens, last)),
            last,
            _training_flops(last, last),
        ),
        row("no padding, nothing pruned", real, real, mean(_training_flops(tokens, tokens))),
        row(
            f"no padding, {keep:.0%} of each row's own",
            own_kept,
            own_kept,
            mean(_training_flops(tokens, own, pruning)),
        ),
    ]


FATES = (
    ("real_kept", "real tokens kept", {"color": BLUE, "line": {"color": BLUE, "width": 1}}),
    (
        "real_lost",
        "real tokens lost",
        {
            "color": "rgba(213,94,0,0.15)",
            "line": {"color": VERMILLION, "width": 1},
            "pattern": {"shape": "x", "fgcolor": VERMILLION, "size": 6},
        },
    ),
    (
        "padding_kept",
        "padding that every layer computes",
        {"color": "rgba(127,127,127,0.55)", "line": {"color": GREY, "width": 1}},
    ),
    (
        "padding_dropped",
        "padding that the pruner drops",
        {
            "color": "rgba(127,127,127,0.08)",
            "line": {"color": GREY, "width": 1},
            "pattern": {"shape": "/", "fgcolor": GREY, "size": 9},
        },
    ),
)


def padding_figure(rows) -> go.Figure:
    """Slots of an average history by their fate, and FLOPs beside them with the reference numbers
    hollow. `rows`: from `padding_rows`.
    """
    names = [row["name"] for row in rows]
    places = list(range(len(rows)))
    flops = [row["flops"] for row in rows]
    bars = [
        go.Bar(
            x=[row[key] for row in rows],
            y=places,
            orientation="h",
            name=name,
            customdata=names,
            width=0.66,
            marker=look,
            hovertemplate=f"%{{customdata}}: %{{x:.1f}} slots<extra>{name}</extra>",
        )
        for key, name, look in FATES
    ]
    right = {"xaxis": "x2", "yaxis": "y2"}
    bars.append(
        go.Bar(
            x=flops,
            y=places,
            orientation="h",
            name="FLOPs, × 150 slots",
            marker_color=GREEN,
            width=0.66,
            **right,
            text=[f"{f:.2f}" for f in flops],
            textposition="auto",
            insidetextanchor="start",
            textangle=0,
            insidetextfont_color="white",
            hovertemplate="%{x:.3f} ×<extra></extra>",
        )
    )
    known = [(x, y) for x, y in zip(ON_BEAUTY, places) if x is not None]
    bars.append(
        go.Scatter(
            x=[x for x, _ in known],
            y=[y for _, y in known],
            mode="markers",
            name="reference: Beauty, a third kept",
            marker={
                "symbol": "diamond-open",
                "size": 11,
                "color": VERMILLION,
                "line": {"width": 2.5},
            },
            **right,
            hovertemplate="Beauty: %{x:.2f} ×<extra></extra>",
        )
    )
    down = {"range": [len(rows) - 0.5, -0.5], "showgrid": False, "zeroline": False}
    across = {"text": "slots of a history"}
    far = {"text": "FLOPs, × 150 slots"}
    lines = ["<br>".join(textwrap.wrap(name, 20)) for name in names]
    layout = {
        "template": template(),
        "barmode": "stack",
        "height": 450,
        "margin": {"l": 20, "r": 30, "t": 70, "b": 40},
        "uirevision": "same",
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "xaxis": {"domain": [0, 0.6], "anchor": "y", "range": [0, 1.02 * SLOTS], "title": across},
        "yaxis": down | {"anchor": "x", "tickvals": places, "ticktext": lines},
        "xaxis2": {
            "domain": [0.68, 1],
            "anchor": "y2",
            "range": [0, 1.1],
            "title": far,
            "nticks": 3,
        },
        "yaxis2": down | {"anchor": "x2", "tickvals": places, "showticklabels": False},
    }
    return go.Figure(bars, layout)


class PaddingExplorer(Explorer):
    """What RASTP's published rule removes, a share of 150 padded slots, beside what a share of each
    row's own tokens removes.

    Args: `lengths`: {name: items per user} of real histories that join the menu; `mean`, `keep`,
    `which` and `source` set controls; FLOPs are those of RASTP's model, by `cost`; moving `keep`
    counts no history anew.
    """

    heading = "What does pruning a padded history remove?"
    exported = "mean"

    def __init__(
        self, lengths: dict | None = None, *, mean=8.9, keep=1 / 3, which="published", source=None
    ):
        self.lengths = lengths or {}
        self._batches = functools.lru_cache(256)(self._batches)
        # "", since a menu shows no None
        sources = [
            ("like Amazon 5-core, of that mean", ""),
            *((name, name) for name in self.lengths),
        ]
        super().__init__(
            {
                "mean": widgets.FloatSlider(
                    value=mean,
                    min=5.5,
                    max=40,
                    step=0.1,
                    description="mean items per history",
                    readout_format=".1f",
                ),
                "keep": widgets.FloatSlider(
                    value=keep,
                    min=0.05,
                    max=1,
                    step=0.01,
                    description="kept share",
                    readout_format=".0%",
                ),
                "source": widgets.Dropdown(
                    options=sources, value=source or "", description="lengths"
                ),
                "which": widgets.Dropdown(
                    options=[(text, name) for name, text in HISTORIES.items()],
                    value=which,
                    description="histories",
                ),
            },
            slow=("source", "which"),
        )

    def _batches(self, source, mean, which):
        return windows_of_batches(
            self.lengths[source] if source else five_core_lengths(mean), which
        )

    def draw(self):
        source = self.value("source")
        keep = self.value("keep")
        batches = self._batches(source, None if source else self.value("mean"), self.value("which"))
        self.rows = padding_rows(batches, keep)
        # Items of the longest history that the published rule leaves as it is
        whole = int(keep * SLOTS + 1e-6) // TOKENS
        losers = batches.sum(0)[whole:].sum() / batches.sum()
        return padding_figure(self.rows), self._text(losers)

    def _text(self, losers):
        plain, published, *_, unpadded, own = self.rows
        real = plain["real_kept"]
        removed = published["padding_dropped"] + published["real_lost"]
        padding = f"{published['padding_dropped'] / removed:.0%}" if removed else "None"
        cells = [
            (
                row["name"],
                *(f"{row[key]:.1f}" for key, *_ in FATES),
                f"{row['real_kept'] / real:.0%}",
                f"{row['flops']:.2f}",
                f"{known:.2f}" if known else "–",
            )
            for row, known in zip(self.rows, ON_BEAUTY)
        ]
        drawn = (
            ""
            if self.value("source")
            else " The lengths are an approximation of the 5-core sets, not the sets themselves."
        )
        head = (
            "",
            *(name for _, name, _ in FATES),
            "share of real tokens kept",
            "FLOPs ×",
            "reference: Beauty, a third kept",
        )
        return (
            f"<p><b>{plain['padding_kept'] / SLOTS:.0%} of the 150 slots are padding</b> (on"
            f" RASTP's Amazon data {PADDING[0]:.0%} to {PADDING[1]:.0%}). {padding} of what the"
            f" published rule drops is padding; {losers:.0%} of the histories lose a real token,"
            f" and {published['real_kept'] / real:.0%} of all real tokens stay. Without padding"
            f" nothing is lost, and training costs {unpadded['flops']:.2f} of the FLOPs; the"
            f" published rule costs {published['flops']:.2f}. Keeping {self.value('keep'):.0%} of"
            f" each row's own tokens costs {own['flops']:.2f}.{drawn}</p>" + table(head, cells)
        )
