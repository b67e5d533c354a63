"""What the benchmark measured, as a page: the waterfall from the published configuration to ours.

`results` is what `python -m sidlab.research.bench --json` writes.
"""

import pandas as pd

from sidlab.checks import from_extra
from sidlab.figures.theme import BLUE, GREY, ORANGE, TEMPLATES
from sidlab.files import write
from sidlab.research.study_figures import curves_figure
from sidlab.research.templates import render

with from_extra("course"):
    import plotly.graph_objects as go

TRAINING = "Beauty lengths"


def steps(results: dict) -> list[dict]:
    """The rows of the waterfall: its first is the published configuration without pruning, its last
    ours with it.
    """
    return [
        row
        for row in results["rows"]
        if row["workload"] == TRAINING and not row["variant"].startswith("Hugging Face")
    ]


def figure(results: dict) -> go.Figure:
    """Seconds per 1,000 windows of each step: measured, with quartiles, and what the cost model's
    FLOPs make of the first one.
    """
    rows = steps(results)
    seconds = [row["seconds_per_1k_windows"] for row in rows]
    names = [
        f"{row['variant']}<br>{value:.3g} s, {seconds[0] / value:.3g}×"
        for row, value in zip(rows, seconds)
    ]
    low, high = zip(*(row["quartiles"] for row in rows))
    first = rows[0]
    predicted = [
        first["seconds_per_1k_windows"]
        * row["gflops_per_1k_windows"]
        / first["gflops_per_1k_windows"]
        for row in rows
    ]
    fig = go.Figure(
        layout={
            "template": TEMPLATES["light"],
            "height": 420,
            "xaxis": {"title": "seconds per 1,000 training windows"},
            "yaxis": {"autorange": "reversed"},
            "legend": {"orientation": "h", "y": 1.1},
            "bargap": 0.35,
        }
    )
    fig.add_bar(
        y=names,
        x=seconds,
        orientation="h",
        name="measured",
        marker={"color": BLUE},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [h - s for h, s in zip(high, seconds)],
            "arrayminus": [s - v for s, v in zip(seconds, low)],
            "color": GREY,
        },
    )
    fig.add_scatter(
        y=names,
        x=predicted,
        mode="markers",
        name="predicted from FLOPs alone, at the speed of the first",
        marker={"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": ORANGE}},
    )
    return fig


def write_page(results: dict, path, studies=()) -> None:
    """Writes one self-contained HTML file: the waterfall, the targets, every row. `studies`:
    results of the study "fast", which say whether what makes it fast leaves learning alone.
    """
    curves = [curves_figure(pd.DataFrame(study["rows"])) for study in studies]
    page = render(
        "bench.html.j2",
        results=results,
        waterfall=figure(results),
        studies=list(zip(studies, curves)),
    )
    write(path, page)
