"""Explorers of cost: what of RASTP's saving is padding, and what a training run of any size costs
in time and memory.
"""

import functools
import itertools

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from sidlab.figures.tables import table
from sidlab.figures.theme import BLUE, GREEN, GREY, ORANGE, VERMILLION, template
from sidlab.pruning import PruningConfig
from sidlab.research.calibration import Speed, calibrate, one_batch, plain_config
from sidlab.research.cost import recommend_flops
from sidlab.viz.explorer import Explorer

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
                ("tokens per history, after the pruner", "{:.0f}".format, full.slots, batch.kept),
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
            f" keeping {self.value('keep'):.0%} after layer {config.pruning.after_layer} of"
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
