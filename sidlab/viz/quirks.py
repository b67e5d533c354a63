"""The seven quirks of RASTP's published code as switches: what each does to a few histories,
computed live on a small model.
"""

import functools
import html
import textwrap

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from sidlab.figures.tables import folded, table
from sidlab.figures.theme import BLUE, SCALE, VERMILLION, template
from sidlab.viz.explorer import Explorer, demo_or
from sidlab.viz.quirk_evidence import (
    DRAWS,
    EMPTY,
    FILLED,
    KEPT,
    MODES,
    PRUNED,
    QUIRKS,
    Evidence,
    Subject,
)

SYMBOLS = {KEPT: "●", PRUNED: "×", FILLED: "○", EMPTY: "·"}


class QuirkExplorer(Explorer):
    """Each quirk of RASTP's published code, switched on ("reference") and off ("corrected"), with
    what it does.

    Args: `model`, `catalogue`: a `SidT5` with its table, of three encoder layers or more, and the
    catalogue that it was trained on (default: the bundled demo); `quirk` 1..7 and `mode` set
    controls.
    """

    heading = "What does the published code really do?"
    exported = "quirk"

    def __init__(self, model=None, catalogue=None, *, quirk=1, mode="reference"):
        self.subject, self.evidence = (
            Subject(*demo_or(model, catalogue)),
            functools.lru_cache(len(QUIRKS))(self.evidence),
        )
        options = [(name, number) for number, (name, *_) in enumerate(QUIRKS, start=1)]
        super().__init__(
            {
                "quirk": widgets.Dropdown(options=options, value=quirk, description="quirk"),
                "mode": widgets.ToggleButtons(options=MODES, value=mode, description="the code"),
            },
            slow=("quirk",),
        )

    def evidence(self, quirk: int) -> dict[str, Evidence]:
        """What quirk 1..7 does in either mode."""
        return {mode: QUIRKS[quirk - 1][1](self.subject, mode) for mode in MODES}

    def draw(self):
        quirk = self.value("quirk")
        mode = self.value("mode")
        evidence = self.evidence(quirk)
        return quirk_figure(evidence, mode), self._text(QUIRKS[quirk - 1], evidence, mode)

    def _text(self, quirk, evidence, mode):
        _, _, published, consequence, corrected = quirk
        shown = evidence[mode]
        bars = table(
            (shown.measure, *MODES),
            [(name, *(_number(evidence[m].bars[name]) for m in MODES)) for name in shown.bars],
        )
        named = list(zip(shown.rows, shown.z))
        if isinstance(shown.legend, dict):
            head = ("", *shown.legend.values())
            rows = [
                (name, *(int((row == fate).sum()) for fate in shown.legend)) for name, row in named
            ]
        else:
            head = ("", "least", "mean", "most")
            rows = [
                (name, *(f"{f(row):.3f}" for f in (np.min, np.mean, np.max)))
                for name, row in named
                if np.isfinite(row).all()
            ]
        return (
            f"<p><b>The published code {published}.</b> So {consequence}. The corrected code"
            f" {corrected}.</p>{bars}<p>The picture ({mode}):"
            f" {html.escape(_key(shown.legend))}.</p>"
            + folded("The picture as a table", table(head, rows))
        )


def _number(value):
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _key(legend, between="; "):
    """What a picture's numbers or symbols mean."""
    return (
        legend
        if isinstance(legend, str)
        else between.join(f"{SYMBOLS[fate]} {meaning}" for fate, meaning in legend.items())
    )


def quirk_figure(evidence: dict[str, Evidence], mode: str) -> go.Figure:
    """The picture of one mode beside the bars of both, those of `mode` framed. `evidence`: {mode:
    `Evidence`}.
    """
    shown = evidence[mode]
    fates = isinstance(evidence[mode].legend, dict)
    known = np.concatenate([e.z.ravel() for e in evidence.values()])
    # One scale for both modes
    ends = (EMPTY, KEPT) if fates else (float(np.nanmin(known)), float(np.nanmax(known)))
    symbols = (
        [[SYMBOLS[float(v)] for v in row] for row in shown.z]
        if fates
        else [[""] * shown.z.shape[1]] * len(shown.z)
    )
    hover = "%{y}, %{x}: %{text}<extra></extra>" if fates else "%{y}, %{x}: %{z:.3f}<extra></extra>"
    z = np.where(np.isnan(shown.z), None, shown.z)  # NaN is no JSON
    picture = go.Heatmap(
        z=z,
        x=list(range(1, shown.z.shape[1] + 1)),
        y=list(range(len(shown.rows))),
        text=symbols,
        texttemplate="%{text}",
        zmin=ends[0],
        zmax=ends[1],
        colorscale=SCALE,
        showscale=not fates,
        colorbar={"x": 0.51, "thickness": 12},
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=hover,
    )
    bars = []
    for name, color, shape in zip(MODES, (VERMILLION, BLUE), ("/", "")):
        values = list(evidence[name].bars.values())
        look = {
            "color": color,
            "pattern": {"shape": shape, "solidity": 0.4},
            "line": {"color": color, "width": 1 + 3 * (name == mode)},
        }
        groups = [
            "<br>".join(textwrap.wrap(group, 6, break_long_words=False))
            for group in evidence[name].bars
        ]
        bars.append(
            go.Bar(
                y=groups,
                x=values,
                name=name,
                marker=look,
                xaxis="x2",
                yaxis="y2",
                orientation="h",
                textposition="outside",
                text=[f"{round(v, 3):.2g}" for v in values],
                cliponaxis=False,
                constraintext="none",
                textfont_size=11,
                hovertemplate=f"{name}, %{{y}}: %{{x:.4f}}<extra></extra>",
            )
        )
    top = 1.25 * max(max(e.bars.values()) for e in evidence.values())
    names = shown.rows
    every = list(range(0, len(names), 1 if len(names) <= DRAWS + 1 else 4))
    bare = {"showgrid": False, "zeroline": False}
    outside = {"xref": "paper", "yref": "paper", "yanchor": "bottom", "showarrow": False}
    key = {
        "text": f"<b>{mode} code</b><br>" + _key(shown.legend, "<br>"),
        "x": 0,
        "y": 1.02,
        "xanchor": "left",
        "align": "left",
    }
    measure = {
        "text": "<br>".join(textwrap.wrap(shown.measure, 32)),
        "x": 0.85,
        "y": 1.1,
        "xanchor": "center",
    }
    layout = {
        "template": template(),
        "height": 450,
        "margin": {"l": 20, "r": 20, "t": 100, "b": 40},
        "barmode": "group",
        "legend": {
            "x": 0.85,
            "xanchor": "center",
            "y": 1.0,
            "yanchor": "bottom",
            "orientation": "h",
            "traceorder": "normal",
        },
        "annotations": [outside | key, outside | measure],
        "xaxis": (
            bare
            | {
                "domain": [0, 0.6 if fates else 0.5],
                "anchor": "y",
                "title": {"text": shown.columns},
                "visible": shown.z.shape[1] > 1,
            }
        ),
        "yaxis": (
            bare
            | {
                "anchor": "x",
                "tickvals": every,
                "ticktext": [names[i] for i in every],
                "range": [len(names) - 0.5, -0.5],
            }
        ),
        "xaxis2": {
            "domain": [0.72, 1],
            "anchor": "y2",
            "range": [0, top or 1],
            "tickangle": 0,
            "nticks": 4,
        },
        "yaxis2": {"anchor": "x2", "autorange": "reversed", "showgrid": False},
    }
    return go.Figure([picture, *bars], layout)
