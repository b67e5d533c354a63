"""Figures of a comparison: pure functions from `results`, what `compare` gives, to a plotly Figure.

Of partial results, what is missing is left out.
"""

import numpy as np

from sidlab.checks import from_extra
from sidlab.figures.charts import (
    COST,
    MEMORY,
    error_bars,
    interval_of,
    legend_below,
    marks_of,
    span,
)
from sidlab.figures.theme import BLUE, GREY, ORANGE, VERMILLION, template
from sidlab.research.papers import RASTP_CLAIMS, STAMP_CLAIMS, published

with from_extra("course"):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots


def with_cost(results: dict) -> list[dict]:
    """The summary rows whose training time is known (baselines have none)."""
    return [row for row in results["summary"] if row.get(COST)]


def reference(results: dict) -> dict:
    """The row that costs are relative to: "unpadded", or where it was not run the first one with a
    cost.
    """
    rows = with_cost(results)
    if not rows:
        raise ValueError(
            f"results must hold a method with {COST}, got"
            f" {[row['method'] for row in results['summary']]}"
        )
    return next((row for row in rows if row["method"] == "unpadded"), rows[0])


def quality(results: dict) -> go.Figure:
    """recall@10 and ndcg@10 of every method: mean and 95 % interval, single seeds as dots,
    published numbers hollow.
    """
    rows = results["summary"]
    paper = published(results["dataset"])
    names = [row["method"] for row in rows]
    places = list(range(len(rows)))
    marks = marks_of(results)
    seeds = [row for row in results["rows"] if row["seed"] is not None and row["method"] in names]
    figure = make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=("recall@10", "ndcg@10")
    )
    for column, metric in enumerate(("recall@10", "ndcg@10"), start=1):
        common = {"mode": "markers", "showlegend": column == 1, "row": 1, "col": column}
        figure.add_scatter(
            x=[row[metric] for row in rows],
            y=places,
            error_x=error_bars(rows, metric),
            name="mean and 95 % interval",
            marker_symbol=[marks[name].symbol for name in names],
            marker_color=[marks[name].color for name in names],
            marker_size=11,
            marker_line_width=1,
            marker_line_color=GREY,
            legendgroup="mean",
            customdata=[[row["method"], span(row, metric)] for row in rows],
            hovertemplate="%{customdata[0]}: %{x:.4f} %{customdata[1]}<extra></extra>",
            **common,
        )
        figure.add_scatter(
            x=[row[metric] for row in seeds],
            y=[names.index(row["method"]) + 0.3 for row in seeds],
            marker_size=4,
            marker_color=GREY,
            name="single seeds",
            customdata=[[row["method"], row["seed"]] for row in seeds],
            legendgroup="seeds",
            hovertemplate="%{customdata[0]}, seed %{customdata[1]}: %{x:.4f}<extra></extra>",
            **common,
        )
        if len(paper):
            figure.add_scatter(
                x=paper[metric].tolist(),
                y=[len(rows) + i for i in range(len(paper))],
                legendgroup="published",
                marker_symbol="circle-open",
                marker_size=10,
                marker_color=GREY,
                marker_line_width=2,
                name="published (no interval)",
                customdata=paper[["method", "source"]].to_numpy(),
                hovertemplate="%{customdata[0]}, %{customdata[1]}: %{x:.4f}<extra></extra>",
                **common,
            )
        low, high = _window(results, metric, paper[metric].tolist())
        for place, row in zip(places, rows):
            # A number at the edge, so that one far value does not squeeze all others
            if row[metric] < low:
                figure.add_annotation(
                    x=low,
                    y=place,
                    text=f"◂ {row[metric]:.4f}",
                    xanchor="left",
                    showarrow=False,
                    row=1,
                    col=column,
                )
            elif row[metric] > high:
                figure.add_annotation(
                    x=high,
                    y=place,
                    text=f"{row[metric]:.4f} ▸",
                    xanchor="right",
                    showarrow=False,
                    row=1,
                    col=column,
                )
            if row["method"] == "unpadded":
                figure.add_vline(
                    row[metric],
                    line_color=GREY,
                    line_width=1.5,
                    line_dash="dot",
                    layer="below",
                    row=1,
                    col=column,
                )
        figure.update_xaxes(range=[low, high], row=1, col=column)
    labels = names + [f"{p.method}, {p.source.split(' (arXiv')[0]}" for p in paper.itertuples()]
    height = 130 + 32 * len(labels)
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        range=[len(labels) - 0.4, -0.6],
        zeroline=False,
    )
    return figure.update_layout(template=template(), height=height, legend=legend_below(height))


def quality_cost(results: dict) -> go.Figure:
    """recall@10 with its interval against seconds per 1,000 training windows (log); lines: methods
    without a cost.
    """
    reference(results)  # raises where nothing has a cost
    costs = np.log10([row[COST] for row in with_cost(results)])
    low, high = _window(results, "recall@10")
    figure = go.Figure()
    lines = 0
    marks = marks_of(results)
    for row in results["summary"]:
        name = row["method"]
        value = row["recall@10"]
        look = marks[row["method"]]
        if row.get(COST):
            figure.add_scatter(
                x=[row[COST]],
                y=[value],
                error_y=error_bars([row], "recall@10"),
                name=name,
                mode="markers+text",
                text=[name.partition("@")[2]],
                textposition="middle right",
                marker_symbol=look.symbol,
                marker_size=13,
                marker_color=look.color,
                marker_line_width=1,
                marker_line_color=GREY,
                hovertemplate=(
                    f"{name}: {value:.4f} {span(row, 'recall@10')}<br>%{{x:.3g}} s<extra></extra>"
                ),
            )
            continue
        if name.startswith("base-"):  # as many lines as pruners would hide the others
            continue
        arrow = " ▾" if value < low else " ▴" if value > high else ""
        if not arrow:
            figure.add_hline(
                value, line_color=look.color, line_width=1.5, line_dash="dot", layer="below"
            )
        # Side by side, so that lines of nearly one height keep readable names.
        figure.add_annotation(
            text=f"{name} {value:.4f}{arrow}",
            x=0.99 - 0.2 * lines,
            xref="x domain",
            xanchor="right",
            y=min(max(value, low), high),
            yanchor="top" if value > high else "bottom",
            showarrow=False,
        )
        lines += 1
    room = max(0.1, 0.12 * np.ptp(costs))
    figure.update_xaxes(
        type="log",
        range=[float(costs.min() - room), float(costs.max() + room)],
        tickformat="~g",
        title_text="training seconds per 1,000 windows (log scale; left is cheaper)",
    )
    figure.update_yaxes(title_text="recall@10", title_standoff=12, range=[low, high])
    return figure.update_layout(template=template(), height=480, showlegend=True, margin_l=80)


def cost_bars(results: dict) -> go.Figure:
    """Training time and peak memory relative to `unpadded`, with the kept share; RASTP's and
    STAMP's claims as lines.

    Both papers compare with a padded model, so their ratios are drawn from the bar of `padded`,
    where it was run.
    """
    base = reference(results)
    rows = with_cost(results)
    titles = (f"training time (× {base['method']})", f"peak memory (× {base['method']})")
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles)
    for column, (field, unit) in enumerate(
        ((COST, "s per 1,000 windows"), (MEMORY, "MB")), start=1
    ):
        known = {place: row for place, row in enumerate(rows) if row.get(field) and base.get(field)}
        ratio = [row[field] / base[field] for row in known.values()]
        figure.add_bar(
            x=ratio,
            y=list(known),
            orientation="h",
            width=0.62,
            showlegend=False,
            text=[f"{r:.2f}×" for r in ratio],
            textposition="inside",
            insidetextanchor="start",
            textfont_color="white",
            row=1,
            col=column,
            marker_color=[GREY if row is base else BLUE for row in known.values()],
            customdata=[[row["method"], row[field]] for row in known.values()],
            hovertemplate=(
                f"%{{customdata[0]}}: %{{customdata[1]:.4g}} {unit}, %{{x:.3f}}×<extra></extra>"
            ),
        )
        figure.add_vline(1, line_color=GREY, line_width=1, row=1, col=column)
        figure.update_xaxes(range=[0, 1.08 * max([1, *ratio])], row=1, col=column)
        for row in known.values():
            if row["method"] == "padded":
                _claims(
                    figure, field, row[field] / base[field], column, ends=(-0.5, len(rows) - 0.5)
                )
    labels = [
        (
            row["method"]
            if row.get("kept_token_fraction") is None
            else f"{row['method']} ({row['kept_token_fraction']:.0%} kept)"
        )
        for row in rows
    ]
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=labels, range=[len(rows) - 0.5, -0.5]
    )
    height = 150 + 34 * len(rows)
    return figure.update_layout(template=template(), height=height, legend=legend_below(height))


def _claims(figure, field, padded, column, ends):
    """What the papers claim, from the padded model on: STAMP's range as a hatched band, RASTP's
    number as a line.
    """
    if field == COST:
        near, far = (padded / speedup for speedup in STAMP_CLAIMS["speedup"])
        text = "STAMP: {}–{}× faster than padded".format(*STAMP_CLAIMS["speedup"])
        figure.add_scatter(
            x=[padded * (1 - RASTP_CLAIMS["time_saved"])] * 2,
            y=ends,
            mode="lines",
            hoverinfo="name",
            name=f"RASTP: {RASTP_CLAIMS['time_saved']:.1%} less time than padded",
            line_color=VERMILLION,
            line_width=3,
            line_dash="dash",
            row=1,
            col=column,
        )
    else:
        near, far = (padded * (1 - saved) for saved in STAMP_CLAIMS["memory_saved"])
        text = "STAMP: {:.1%}–{:.1%} less memory than padded".format(*STAMP_CLAIMS["memory_saved"])
    figure.add_scatter(
        x=[far, near, near, far],
        y=[ends[0], ends[0], ends[1], ends[1]],
        mode="lines",
        line_width=0,
        fill="toself",
        fillpattern_shape="\\",
        fillpattern_fgcolor=ORANGE,
        fillpattern_size=9,
        fillpattern_bgcolor="rgba(0,0,0,0)",
        name=text,
        hoverinfo="name",
        zorder=-1,
        row=1,
        col=column,
    )


def _window(results, metric, paper=()):
    """The range of an axis: all trained and published values, and whatever else is not far away
    from them.
    """
    trained = with_cost(results) or results["summary"]
    near = [end for row in trained for end in interval_of(row, metric)]
    near += [row[metric] for row in results["rows"] if row["seed"] is not None] + list(paper)
    low = min(near)
    high = max(near)
    reach = (high - low) or 0.1 * high or 1
    for row in results["summary"]:
        if low - reach <= row[metric] <= high + reach:
            near += interval_of(row, metric)
    room = 0.06 * (max(near) - min(near)) or 1
    return min(near) - room, max(near) + room
