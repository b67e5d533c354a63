"""What the benchmark measured, as a page: the waterfall from the published configuration to ours.

`results` is what `python -m sidlab.research.bench --json` writes.
"""

import html
import pathlib

import pandas as pd

from sidlab.checks import from_extra
from sidlab.figures.theme import BLUE, GREY, ORANGE, TEMPLATES
from sidlab.files import write
from sidlab.research.page import captioned_table, document
from sidlab.research.study_figures import curves_figure

with from_extra("course"):
    import plotly.graph_objects as go
    import plotly.io as pio

TRAINING = "Beauty lengths"
HEAD = (
    "windows",
    "variant",
    "s per 1,000",
    "GFLOP per 1,000",
    "GFLOP/s",
    "activations MB, predicted",
    "peak MB, measured",
    "attention",
)
STYLE = """td:last-child, th:last-child { text-align: left; white-space: normal; min-width: 11rem }
#rows table { font-size: .85em } #rows :is(td, th):nth-child(2) { text-align: left }"""


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
    machine = results["hardware"]
    setting = (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
        if not machine["gpu"]
        else f"{machine['gpu']}"
    )
    targets = [
        (
            t["figure"],
            t["target"],
            _number(t["value"]),
            " – ".join(map(_number, t["spread"] or ())),
            t["verdict"],
        )
        for t in results["targets"]
    ]
    measured = [row for row in results["rows"] if "seconds_per_1k_windows" in row]
    rows = [
        (
            row["workload"],
            row["variant"],
            _number(row["seconds_per_1k_windows"]),
            _number(row["gflops_per_1k_windows"]),
            _number(row["achieved_gflops_per_second"]),
            _number(row["activation_mb_predicted"]),
            _number(row["peak_mb"]),
            row["attention"],
        )
        for row in measured
    ]
    tables = (
        captioned_table(
            "What was to be reached.",
            ("figure", "target", "value", "95 % interval", "verdict"),
            _cells(targets),
        ),
        captioned_table("Every row that was measured.", HEAD, _cells(rows)),
    )
    body = f"""<p>{html.escape(setting)}.
Ratios are of medians of runs that take turns in one process; \
intervals are 95 % of a bootstrap over rounds. Each
step of the waterfall changes one thing. FLOPs come from the cost model, not from the clock.</p>
<figure class="chart">{_chart(figure(results))}</figure>
<h2>Targets</h2>{tables[0]}
{"".join(map(_quality, studies))}
<h2>Training</h2><div id="rows">{tables[1]}</div>"""
    write(
        path, document("What training costs, from the published configuration to ours", body, STYLE)
    )


def _chart(fig):
    return pio.to_html(fig, include_plotlyjs=False, full_html=False)


def _quality(study):
    rows = pd.DataFrame(study["rows"])
    cells = [
        (
            row["label"],
            f"{row['recall@10']:.4f}",
            (
                ""
                if row["difference"] is None
                else "{:+.4f} [{:+.4f}, {:+.4f}]".format(
                    row["difference"], *row["difference_interval"]
                )
            ),
            _number(row["seconds_to_recall"]) or "never",
            _number(row["seconds_per_1k_windows"]),
        )
        for row in study["rows"]
    ]
    head = (
        "setting",
        "test recall@10",
        "against the first [95 %]",
        "s to 95 % of the first's validation recall",
        "s per 1,000 windows",
    )
    name = pathlib.PurePath(study["dataset"]).name
    seeds = study["seeds"]
    machine = study["hardware"]["gpu"] or study["hardware"]["processor"]
    table = captioned_table(
        f"{name}, preset {study['preset']}, {seeds} seed{'s' * (seeds > 1)}; {machine}.",
        head,
        _cells(cells),
    )
    return f"""<h2>Does it disturb learning? {html.escape(name)}</h2>{table}
<figure class="chart">{_chart(curves_figure(rows))}</figure>"""


def _number(value):
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _cells(rows):
    return [[html.escape(cell) for cell in row] for row in rows]
