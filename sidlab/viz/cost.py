"""Explorers of cost: what of RASTP's saving is padding, and what a training run of any size costs
in time and memory.
"""

import functools
import itertools
import textwrap

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import torch
from scipy.optimize import brentq

from sidlab.checks import one_of
from sidlab.config import TrainConfig
from sidlab.figures.tables import table
from sidlab.figures.theme import BLUE, GREEN, GREY, ORANGE, VERMILLION, template
from sidlab.pruning import PruningConfig, kept_count
from sidlab.research.calibration import Speed, calibrate, one_batch, plain_config
from sidlab.research.cost import flops_by_part, recommend_flops
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
    """FLOPs of a training step of RASTP's model per window of so many slots, kept behind the
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


# Settings of the calculator that belong together, by name. Beauty: its mean history, training
# prefixes and items; four levels, for RASTP adds a digit to three.
PRESETS = {
    "my shop": {
        "items": 20,
        "levels": 3,
        "width": 256,
        "d_model": 128,
        "layers": 4,
        "keep": 1 / 3,
        "after": 2,
        "slots": 4096,
        "windows": 100_000,
        "epochs": 10,
        "catalogue": 10_000,
    },
    "Amazon Beauty": {
        "items": 9,
        "levels": 4,
        "width": 256,
        "d_model": 128,
        "layers": 4,
        "keep": 1 / 3,
        "after": 2,
        "slots": 4096,
        "windows": 131_413,
        "epochs": 20,
        "catalogue": 12_101,
    },
    "a million items": {
        "items": 50,
        "levels": 3,
        "width": 1024,
        "d_model": 256,
        "layers": 6,
        "keep": 1 / 3,
        "after": 2,
        "slots": 16384,
        "windows": 1e8,
        "epochs": 3,
        "catalogue": 1e6,
    },
    "a step that mostly waits": {
        "items": 2,
        "levels": 3,
        "width": 16,
        "d_model": 32,
        "layers": 4,
        "keep": 1 / 3,
        "after": 2,
        "slots": 256,
        "windows": 10_000,
        "epochs": 10,
        "catalogue": 1000,
    },
    "wide and deep": {
        "items": 100,
        "levels": 3,
        "width": 256,
        "d_model": 1024,
        "layers": 12,
        "keep": 1 / 3,
        "after": 2,
        "slots": 65536,
        "windows": 1e7,
        "epochs": 3,
        "catalogue": 100_000,
    },
}
FIRST = ("preset", "items", "d_model", "layers", "keep")  # controls that are always shown


class CostCalculator(Explorer):
    """What a training run of any size costs, with and without pruning: seconds on this machine,
    GPU-hours, memory, FLOPs. The menu of presets sets all controls but the GPU's at once.

    Args: `speed`: how fast this machine is (default: `calibrate()` measures it now, which takes
    seconds); the others set controls, among them `items` of every history, `levels` and `width` of
    the SIDs, `layers` of the encoder and of the decoder, `slots` a batch, `windows` an epoch,
    `catalogue` items, `tflops` that a GPU sustains, in 10¹² FLOPs a second. The model is
    `calibration.plain_config`.
    """

    heading = "What will a training run cost?"
    exported = "items"

    def __init__(
        self,
        speed: Speed | None = None,
        *,
        items=20,
        levels=3,
        width=256,
        d_model=128,
        layers=4,
        keep=1 / 3,
        after=2,
        slots=4096,
        windows=100_000,
        epochs=10,
        catalogue=10_000,
        tflops=10.0,
    ):
        self.speed = speed or calibrate()
        self._following = False
        self._step = functools.lru_cache(4096)(self._step)
        integer = widgets.IntSlider
        choice = widgets.SelectionSlider
        power = functools.partial(widgets.FloatLogSlider, step=0.1, readout_format=",.0f")
        controls = {
            "preset": widgets.Dropdown(
                options=[("own settings", ""), *((name, name) for name in PRESETS)],
                value="",
                description="preset",
            ),
            "items": integer(value=items, min=1, max=200, description="items per history"),
            "levels": integer(value=levels, min=1, max=12, description="SID levels (L)"),
            "width": choice(
                value=width, options=[2**k for k in range(2, 15)], description="codes per level (W)"
            ),
            "d_model": choice(
                value=d_model, options=[2**k for k in range(5, 11)], description="model width (d)"
            ),
            "layers": integer(value=layers, min=1, max=12, description="layers, each side"),
            "keep": widgets.FloatSlider(
                value=keep,
                min=0.05,
                max=1,
                step=0.01,
                description="kept share",
                readout_format=".0%",
            ),
            "after": integer(value=after, min=1, max=12, description="prune after layer"),
            "slots": choice(
                value=slots, options=[2**k for k in range(8, 18)], description="slots per batch"
            ),
            "windows": power(value=windows, min=3, max=9, description="windows an epoch"),
            "epochs": integer(value=epochs, min=1, max=100, description="epochs"),
            "catalogue": power(value=catalogue, min=2, max=7, description="items in the catalogue"),
            "tflops": widgets.BoundedFloatText(
                value=tflops, min=0.001, max=1e6, description="TFLOP/s that a GPU sustains"
            ),
        }
        # Before all other observers, so that these find everything in place and draw once.
        for name, control in controls.items():
            control.observe(self._take if name == "preset" else self._name, "value")
        super().__init__(controls)
        self._name()
        self.more = widgets.Checkbox(value=False, description="all settings", indent=False)
        row, *rest = self.children
        row.children = [*(controls[name] for name in FIRST), self.more]
        others = [control for name, control in controls.items() if name not in FIRST]
        folded = widgets.Box(
            others, layout=widgets.Layout(flex_flow="row wrap", grid_gap="4px 16px", display="none")
        )
        self.more.observe(
            lambda change: folded.layout.set_trait("display", "flex" if change["new"] else "none"),
            "value",
        )
        self.children = [row, folded, *rest]

    def _take(self, change):
        """Set all controls that the chosen preset knows."""
        self._quietly(PRESETS.get(change["new"], {}))

    def _name(self, change=None):
        """Show the preset that the controls make up, if they do."""
        self._quietly(
            {
                "preset": next(
                    (
                        name
                        for name, values in PRESETS.items()
                        if all(
                            np.isclose(self.value(control), value)
                            for control, value in values.items()
                        )
                    ),
                    "",
                )
            }
        )

    def _quietly(self, values):
        if self._following:
            return
        before = self._quiet
        self._quiet = True
        self._following = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._quiet = before
            self._following = False

    def _step(self, items, levels, width, d_model, layers, slots, pruning):
        """(config, cost of a batch, predicted seconds by part) of one training step."""
        config = plain_config(d_model, layers, items, pruning)
        batch = one_batch(config, (width,) * levels, slots)
        return config, batch, self.speed.parts(config, batch)

    def steps(self, items: int) -> list[tuple]:
        """A training step without and one with pruning, for histories of `items`: (config, cost of
        a batch, seconds by part) each.
        """
        rest = [self.value(name) for name in ("levels", "width", "d_model", "layers", "slots")]
        pruning = PruningConfig(
            after_layer=min(self.value("after"), self.value("layers")), keep=self.value("keep")
        )
        return [self._step(items, *rest, None), self._step(items, *rest, pruning)]

    def draw(self):
        items = self.value("items")
        lengths = sorted({1, 2, 4, 7, 10, 20, 40, 70, 100, 200, items})
        steps = {n: self.steps(n) for n in lengths}
        curves = {
            "seconds, predicted": [
                sum(pruned[2].values()) / sum(plain[2].values()) for plain, pruned in steps.values()
            ],
            "FLOPs": [pruned[1].training / plain[1].training for plain, pruned in steps.values()],
            "activations": [
                pruned[1].activation_bytes / plain[1].activation_bytes
                for plain, pruned in steps.values()
            ],
        }
        parts = [
            {name: 1000 * seconds / batch.windows for name, seconds in parts.items()}
            for _, batch, parts in steps[items]
        ]
        too_much = [n for n, ratio in zip(lengths, curves["seconds, predicted"]) if ratio >= 1]
        pays = [n for n in lengths if n > max(too_much, default=0)]
        return cost_figure(parts, lengths, curves, items), self._text(*steps[items], pays)

    def _text(self, plain, pruned, pays):
        full_config, full, full_parts = plain
        config, batch, parts = pruned
        widths = (self.value("width"),) * self.value("levels")
        windows = self.value("windows") * self.value("epochs")
        updates = windows / full.windows
        n_items = round(self.value("catalogue"))
        tflops = self.value("tflops")
        before = sum(full_parts.values())
        after = sum(parts.values())
        largest = max(full_parts, key=full_parts.get)
        used = expected_prefixes(n_items, widths)[-1]
        rows = [
            (name, form(a), form(b), f"{b / a:.0%}")
            for name, form, a, b in (
                ("tokens per history, behind the pruner", "{:.0f}".format, full.slots, batch.kept),
                (
                    "milliseconds a training step, here",
                    "{:,.1f}".format,
                    1000 * before,
                    1000 * after,
                ),
                (
                    f"time here, {updates:,.0f} updates",
                    _duration,
                    updates * before,
                    updates * after,
                ),
                (
                    f"GPU-hours at {tflops:g} TFLOP/s",
                    "{:,.3g}".format,
                    *(c.training * windows / tflops / 3.6e15 for c in (full, batch)),
                ),
                (
                    "GFLOPs a training step",
                    "{:,.2f}".format,
                    *(c.training * c.windows / 1e9 for c in (full, batch)),
                ),
                (
                    "MB of activations",
                    "{:,.0f}".format,
                    *(c.activation_bytes / 2**20 for c in (full, batch)),
                ),
                (
                    "MB of parameters, gradients, AdamW",
                    "{:,.0f}".format,
                    *(c.state_bytes / 2**20 for c in (full, batch)),
                ),
                (
                    "MFLOPs to recommend to one user",
                    "{:,.0f}".format,
                    *(
                        recommend_flops(c, widths, [config.max_items]) / 1e6
                        for c in (full_config, config)
                    ),
                ),
            )
        ]
        verdict = "saves" if after < before else "costs"
        when = (
            "at no length shown"
            if not pays
            else f"from {pays[0]} items on"
            if pays[0] > 1
            else "at every length shown"
        )
        head = (f"{full.windows} histories a batch", "nothing pruned", "pruned", "ratio")
        possible = float(np.prod(widths, dtype=float))
        return (
            f"<p><b>Pruning {verdict} {abs(1 - after / before):.0%} of the time of a training"
            f" step</b> where it saves {1 - batch.training / full.training:.0%} of the FLOPs,"
            f" keeping {self.value('keep'):.0%} behind layer {config.pruning.after_layer} of"
            f" {config.num_layers}. Unpruned, {full_parts[largest] / before:.0%} of a step is"
            f" {largest}; the pruner itself takes {1000 * parts['pruner']:.1f} ms. It pays"
            f" {when}.</p>{table(head, rows)}<p>The catalogue: {n_items:,} items with random SIDs"
            f" use about {used:,.0f} of {possible:,.3g} possible ones; table and trie take"
            f" {table_bytes(n_items, widths) / 2**20:,.1f} MB. The model does not grow with the"
            f" catalogue.</p><p>Seconds are predicted for: {self.speed.device}. The fit is off by"
            f" at most {self.speed.error:.0%} on the {len(self.speed.steps)} steps that it was made"
            " from; far larger models are an extrapolation. GPU-hours are FLOPs alone, as if"
            " nothing else took time.</p>"
        )


PARTS = (
    ("arithmetic", BLUE, ""),
    ("memory traffic", ORANGE, "/"),
    ("fixed price of layers", GREY, "."),
    ("pruner", VERMILLION, "x"),
)
LOOKS = ((VERMILLION, "solid", "circle"), (BLUE, "dash", "square"), (GREEN, "dot", "triangle-up"))


def cost_figure(parts, lengths, curves, items) -> go.Figure:
    """Seconds per 1,000 windows by part, unpruned and pruned, and what pruning leaves of the cost
    at other lengths of history.

    Args: `parts`: two dicts {part: seconds}, unpruned and pruned; `lengths`: items of history;
    `curves`: three, {name: ratio at each length}; `items`: the length that is chosen, one of
    `lengths`.
    """
    bars = [
        go.Bar(
            x=[of[name] for of in parts],
            y=["nothing<br>pruned", "pruned"],
            orientation="h",
            name=name,
            width=0.6,
            marker={
                "color": color,
                "pattern": {"shape": shape, "solidity": 0.3},
                "line": {"color": color, "width": 1},
            },
            hovertemplate=f"%{{y}}: %{{x:.3g}} s<extra>{name}</extra>",
        )
        for name, color, shape in PARTS
    ]
    right = {"xaxis": "x2", "yaxis": "y2", "legend": "legend2"}
    lines = [
        go.Scatter(
            x=lengths,
            y=ratios,
            name=name,
            mode="lines+markers",
            line={"color": color, "dash": dash},
            marker={"symbol": symbol, "size": 7},
            hovertemplate=f"{name}, %{{x}} items: %{{y:.2f}} ×<extra></extra>",
            **right,
        )
        for (name, ratios), (color, dash, symbol) in zip(curves.items(), LOOKS)
    ]
    seconds = next(iter(curves.values()))
    ring = go.Scatter(
        x=[items],
        y=[seconds[lengths.index(items)]],
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 18, "color": VERMILLION, "line": {"width": 3}},
        **right,
    )
    top = 1.08 * max(1.1, *(ratio for ratios in curves.values() for ratio in ratios))
    line = {
        "type": "line",
        "xref": "x2 domain",
        "yref": "y2",
        "x0": 0,
        "x1": 1,
        "y0": 1,
        "y1": 1,
        "line": {"color": GREY, "width": 2},
    }
    note = {
        "text": "above: pruning costs more",
        "xref": "x2 domain",
        "yref": "y2",
        "x": 0.99,
        "y": 1,
        "xanchor": "right",
        "yanchor": "bottom",
        "showarrow": False,
    }
    # Above and not beside the axis: there are the bars.
    title = {
        "text": "pruned ÷ nothing pruned",
        "xref": "x2 domain",
        "yref": "y2 domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 14},
    }
    layout = {
        "template": template(),
        "barmode": "stack",
        "height": 450,
        "margin": {"l": 20, "r": 30, "t": 70, "b": 40},
        "uirevision": "same",
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.08,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "legend2": {"orientation": "h", "x": 1, "xanchor": "right", "y": -0.24, "yanchor": "top"},
        "shapes": [line],
        "annotations": [note, title],
        "xaxis": {
            "domain": [0, 0.46],
            "anchor": "y",
            "title": {"text": "seconds per 1,000 windows"},
            "tickangle": 0,
            "nticks": 5,
        },
        "yaxis": {"anchor": "x", "range": [1.5, -0.5], "showgrid": False},
        "xaxis2": {
            "domain": [0.56, 1],
            "anchor": "y2",
            "type": "log",
            "title": {"text": "items per history"},
            "tickvals": [1, 4, 20, 100],
            "tickangle": 0,
        },
        "yaxis2": {"anchor": "x2", "range": [0, top]},
    }
    return go.Figure([*bars, *lines, ring], layout)


def expected_prefixes(n_items: int, widths) -> list[float]:
    """How many distinct prefixes of 1..L codes `n_items` random SIDs have, in the mean."""
    possible = np.cumprod(np.asarray(widths, float))
    return (-possible * np.expm1(n_items * np.log1p(-1 / np.maximum(possible, 1 + 1e-9)))).tolist()


def table_bytes(n_items: int, widths) -> float:
    """Bytes of a `SidTable` of `n_items` random SIDs and of its trie, all int64: codes and token
    ids of every item; per depth the first child of each node, and each child's code and key; the
    items by leaf.
    """
    nodes = [1, *expected_prefixes(n_items, widths)]
    trie = (
        sum(parents + 1 + 2 * children for parents, children in itertools.pairwise(nodes))
        + nodes[-1]
        + 1
        + n_items
    )
    return 8 * (trie + (2 * n_items + 1) * len(widths))


def _duration(seconds):
    return (
        f"{seconds:,.1f} s"
        if seconds < 100
        else f"{seconds / 60:,.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:,.1f} h"
    )
