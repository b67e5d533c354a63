"""How figures look: the Okabe–Ito palette, Cividis for scales, a light and a dark template, one
mark per method.

Importing this registers the plotly templates "sidlab" and "sidlab_dark". Colours are legible on
both. Every method has its own marker symbol and its own dash, so a figure can be read without its
colours.
"""

import re
from fractions import Fraction
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io as pio

from sidlab.checks import SHARE, one_of

# Okabe and Ito, "Color Universal Design" (2008), and a grey that is legible on white and on
# near-black.
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#7F7F7F"
SCALE = "Cividis"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Mark(NamedTuple):
    """A method's `color` (hex), plotly marker `symbol` and plotly line `dash`."""

    color: str
    symbol: str
    dash: str


MARKS = {
    "padded": Mark(GREY, "square", "dash"),
    "unpadded": Mark(GREY, "circle", "solid"),
    "recent": Mark(ORANGE, "triangle-left", "dot"),
    "random": Mark(PURPLE, "x", "2px,5px"),
    "rastp": Mark(BLUE, "diamond", "longdash"),
    "map": Mark(GREEN, "triangle-up", "dashdot"),
    "stamp": Mark(VERMILLION, "star", "longdashdot"),
    "norm": Mark(SKY, "pentagon", "8px,2px"),
    "centrality": Mark(YELLOW, "cross", "12px,3px,2px,3px,2px,3px"),
    "rastp-l2": Mark(BLUE, "diamond-tall", "4px,4px"),
    "rastp-reference": Mark(GREY, "diamond-wide", "longdash"),
    "pool": Mark(SKY, "hexagon2", "8px,2px,2px,2px"),
    "sasrec": Mark(PURPLE, "octagon", "24px,4px"),
    "oracle": Mark(GREEN, "star-diamond", "16px,5px"),
    "popularity": Mark(GREY, "triangle-down", "1px,3px"),
    "neighbours": Mark(ORANGE, "hourglass", "1px,8px"),
    "bayes": Mark(BLUE, "bowtie", "20px,3px"),
}


def mark(method: str) -> Mark:
    """The mark of a method; one with a kept share of its own, such as "rastp@1/2", has a dot and
    dashes that long.

    A method without a mark is a grey hexagon.
    """
    base, _, keep = method.partition("@")
    look = MARKS.get(base, Mark(GREY, "hexagon", "solid"))
    if re.fullmatch(SHARE, keep):
        look = look._replace(
            symbol=look.symbol + "-dot", dash=f"{2 + 24 * float(Fraction(keep)):.0f}px,3px"
        )
    return look


def looks(names) -> list[Mark]:
    """A mark for each of the names in one figure: its own, or if it has none, one that no other has
    (first come, first served).
    """
    known = {name: mark(name) for name in names if name.partition("@")[0] in MARKS}
    spare = (
        look
        for look in dict.fromkeys([MARKS["unpadded"], *MARKS.values()])
        if look not in known.values()
    )
    made = {name: next(spare, mark(name)) for name in dict.fromkeys(names) if name not in known}
    return [(known | made)[name] for name in names]


def _template(ink, paper, grid):
    axis = {
        "gridcolor": grid,
        "linecolor": GREY,
        "zerolinecolor": grid,
        "ticks": "outside",
        "tickcolor": GREY,
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 20, "r": 20, "t": 40, "b": 20},
            "colorway": [BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY],
            "colorscale": {"sequential": SCALE, "sequentialminus": SCALE},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "hoverlabel": {"font": {"family": FONT}},
        }
    )


pio.templates["sidlab"] = _template(ink="#222222", paper="#FFFFFF", grid="#E4E4E4")
pio.templates["sidlab_dark"] = _template(ink="#E6E6E6", paper="#14171A", grid="#33383D")

TEMPLATES = {"light": "sidlab", "dark": "sidlab_dark"}


def use_theme(theme: str) -> None:
    """Draw figures and explorers from now on for a "light" or a "dark" page."""
    one_of("theme", theme, TEMPLATES)
    pio.templates.default = TEMPLATES[theme]


def template() -> str:
    """The plotly template of the theme in use."""
    return "sidlab_dark" if pio.templates.default == "sidlab_dark" else "sidlab"
