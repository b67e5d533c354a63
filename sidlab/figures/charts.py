"""What figures have in common: learning curves, error bars, labels, names of costs.

Nothing rests on colour alone: methods differ by symbol and dash, published numbers are hollow,
pruned tokens hatched. They are light or dark as `theme.use_theme` says.
"""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sidlab.figures.theme import GREY, looks, template

COST = "seconds_per_1k_windows"
MEMORY = "peak_memory_mb"


def span(row: dict, metric: str, digits: int = 4) -> str:
    """The row's interval as text, or nothing. `digits`: as many decimals as the value beside it
    has.
    """
    ends = row.get(f"{metric}_interval")
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def marks_of(results):
    """{method: its mark}, the same in all figures of these results."""
    names = list(
        dict.fromkeys(
            row["method"] for part in ("summary", "curves") for row in results.get(part, ())
        )
    )
    return dict(zip(names, looks(names)))


def learning_curves(results: dict) -> go.Figure:
    """Validation recall@10 and training loss against updates: a line per method and seed, one look
    per method.
    """
    if not results.get("curves"):
        raise ValueError("results hold no curves")
    titles = ("validation recall@10", "training loss")
    figure = make_subplots(1, 2, horizontal_spacing=0.09, subplot_titles=titles)
    seen = set()
    marks = marks_of(results)
    for curve in results["curves"]:
        name = curve["method"]
        look = marks[curve["method"]]
        common = {
            "name": name,
            "legendgroup": name,
            "line_color": look.color,
            "line_dash": look.dash,
            "line_width": 1.8,
            "opacity": 0.85,
            "row": 1,
            "hovertemplate": (
                f"{name}, seed {curve['seed']}, update %{{x}}: %{{y:.4f}}<extra></extra>"
            ),
        }
        figure.add_scatter(
            x=curve["eval_step"],
            y=curve["recall@10"],
            mode="lines+markers",
            marker_symbol=look.symbol,
            marker_size=7,
            showlegend=name not in seen,
            col=1,
            **common,
        )
        figure.add_scatter(
            x=curve["step"], y=curve["loss"], mode="lines", showlegend=False, col=2, **common
        )
        seen.add(name)
    figure.update_xaxes(title_text="updates", title_standoff=8)
    return figure.update_layout(template=template(), height=500, legend=legend_below(500, 85))


def shorten(title: str, width: int = 40) -> str:
    """`title`, cut to `width` characters."""
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def interval_of(row, metric):
    """The row's interval; where there is none, one of no length."""
    return row.get(f"{metric}_interval") or (row[metric], row[metric])


def error_bars(rows, metric):
    """Asymmetric error bars of the rows' intervals."""
    ends = [(row[metric], *interval_of(row, metric)) for row in rows]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for mean, _, high in ends],
        "arrayminus": [mean - low for mean, low, _ in ends],
        "thickness": 1.6,
        "width": 4,
        "color": GREY,
    }


def legend_below(height, gap=55):
    """A horizontal legend under the x axis of a figure of that height, `gap` pixels down."""
    return {"orientation": "h", "x": 0, "y": -gap / max(height - 100, 1), "yanchor": "top"}
