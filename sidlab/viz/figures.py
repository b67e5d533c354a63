"""Figures: pure functions from data to a plotly Figure. `results` is what `comparison.py` writes as results.json.

Nothing rests on colour alone: methods differ by symbol and dash, published numbers are hollow, pruned tokens hatched.
They are light or dark as `theme.use_theme` says. Of partial results, what is missing is left out.
"""

import html
import textwrap

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sidlab.papers import RASTP_CLAIMS, STAMP_CLAIMS, published
from sidlab.viz.theme import BLUE, GREY, ORANGE, VERMILLION, looks, template

COST, MEMORY = "seconds_per_1k_windows", "peak_memory_mb"


def with_cost(results: dict) -> list[dict]:
    """The summary rows whose training time is known (baselines have none)."""
    return [row for row in results["summary"] if row.get(COST)]


def reference(results: dict) -> dict:
    """The row that costs are relative to: "unpadded", or where it was not run the first one with a cost."""
    rows = with_cost(results)
    if not rows:
        raise ValueError(f"results must hold a method with {COST}, got {[row['method'] for row in results['summary']]}")
    return next((row for row in rows if row["method"] == "unpadded"), rows[0])


def span(row: dict, metric: str, digits: int = 4) -> str:
    """The row's interval as text, or nothing. `digits`: as many decimals as the value beside it has."""
    ends = row.get(f"{metric}_interval")
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def _marks(results):
    """{method: its mark}, the same in all figures of these results."""
    names = list(dict.fromkeys(row["method"] for part in ("summary", "curves") for row in results.get(part, ())))
    return dict(zip(names, looks(names)))


def quality(results: dict) -> go.Figure:
    """recall@10 and ndcg@10 of every method: mean and 95 % interval, single seeds as dots, published numbers hollow."""
    rows, paper = results["summary"], published(results["dataset"])
    names = [row["method"] for row in rows]
    places = list(range(len(rows)))
    marks = _marks(results)
    seeds = [row for row in results["rows"] if row["seed"] is not None and row["method"] in names]
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=("recall@10", "ndcg@10"))
    for column, metric in enumerate(("recall@10", "ndcg@10"), start=1):
        common = {"mode": "markers", "showlegend": column == 1, "row": 1, "col": column}
        figure.add_scatter(
            x=[row[metric] for row in rows], y=places, error_x=error_bars(rows, metric), name="mean and 95 % interval",
            marker_symbol=[marks[name].symbol for name in names], marker_color=[marks[name].color for name in names], marker_size=11,
            marker_line_width=1, marker_line_color=GREY, legendgroup="mean",
            customdata=[[row["method"], span(row, metric)] for row in rows],
            hovertemplate="%{customdata[0]}: %{x:.4f} %{customdata[1]}<extra></extra>", **common)
        figure.add_scatter(
            x=[row[metric] for row in seeds], y=[names.index(row["method"]) + 0.3 for row in seeds], marker_size=4,
            marker_color=GREY, name="single seeds", customdata=[[row["method"], row["seed"]] for row in seeds],
            legendgroup="seeds", hovertemplate="%{customdata[0]}, seed %{customdata[1]}: %{x:.4f}<extra></extra>",
            **common)
        if len(paper):
            figure.add_scatter(
                x=paper[metric].tolist(), y=[len(rows) + i for i in range(len(paper))], legendgroup="published",
                marker_symbol="circle-open", marker_size=10, marker_color=GREY, marker_line_width=2,
                name="published (no interval)", customdata=paper[["method", "source"]].to_numpy(),
                hovertemplate="%{customdata[0]}, %{customdata[1]}: %{x:.4f}<extra></extra>", **common)
        low, high = _window(results, metric, paper[metric].tolist())
        for place, row in zip(places, rows):
            if row[metric] < low:  # a number at the edge, so that one far value does not squeeze all others
                figure.add_annotation(x=low, y=place, text=f"◂ {row[metric]:.4f}", xanchor="left", showarrow=False,
                                      row=1, col=column)
            elif row[metric] > high:
                figure.add_annotation(x=high, y=place, text=f"{row[metric]:.4f} ▸", xanchor="right", showarrow=False,
                                      row=1, col=column)
            if row["method"] == "unpadded":
                figure.add_vline(row[metric], line_color=GREY, line_width=1.5, line_dash="dot", layer="below",
                                 row=1, col=column)
        figure.update_xaxes(range=[low, high], row=1, col=column)
    labels = names + [f"{p.method}, {p.source.split(' (arXiv')[0]}" for p in paper.itertuples()]
    height = 130 + 32 * len(labels)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, range=[len(labels) - 0.4, -0.6],
                        zeroline=False)
    return figure.update_layout(template=template(), height=height, legend=_below(height))


def quality_cost(results: dict) -> go.Figure:
    """recall@10 with its interval against seconds per 1,000 training windows (log); lines: methods without a cost."""
    reference(results)  # raises where nothing has a cost
    costs = np.log10([row[COST] for row in with_cost(results)])
    low, high = _window(results, "recall@10")
    figure, lines, marks = go.Figure(), 0, _marks(results)
    for row in results["summary"]:
        name, value, look = row["method"], row["recall@10"], marks[row["method"]]
        if row.get(COST):
            figure.add_scatter(
                x=[row[COST]], y=[value], error_y=error_bars([row], "recall@10"), name=name, mode="markers+text",
                text=[name.partition("@")[2]], textposition="middle right", marker_symbol=look.symbol, marker_size=13,
                marker_color=look.color, marker_line_width=1, marker_line_color=GREY,
                hovertemplate=f"{name}: {value:.4f} {span(row, 'recall@10')}<br>%{{x:.3g}} s<extra></extra>")
            continue
        if name.startswith("base-"):  # as many lines as pruners would hide the others
            continue
        arrow = " ▾" if value < low else " ▴" if value > high else ""
        if not arrow:
            figure.add_hline(value, line_color=look.color, line_width=1.5, line_dash="dot", layer="below")
        # Side by side, so that lines of nearly one height keep readable names.
        figure.add_annotation(text=f"{name} {value:.4f}{arrow}", x=0.99 - 0.2 * lines, xref="x domain", xanchor="right",
                              y=min(max(value, low), high), yanchor="top" if value > high else "bottom",
                              showarrow=False)
        lines += 1
    room = max(0.1, 0.12 * np.ptp(costs))
    figure.update_xaxes(type="log", range=[float(costs.min() - room), float(costs.max() + room)], tickformat="~g",
                        title_text="training seconds per 1,000 windows (log scale; left is cheaper)")
    figure.update_yaxes(title_text="recall@10", title_standoff=12, range=[low, high])
    return figure.update_layout(template=template(), height=480, showlegend=True, margin_l=80)


def learning_curves(results: dict) -> go.Figure:
    """Validation recall@10 and training loss against updates: a line per method and seed, one look per method."""
    if not results.get("curves"):
        raise ValueError("results hold no curves")
    titles = ("validation recall@10", "training loss")
    figure, seen, marks = make_subplots(1, 2, horizontal_spacing=0.09, subplot_titles=titles), set(), _marks(results)
    for curve in results["curves"]:
        name, look = curve["method"], marks[curve["method"]]
        common = {"name": name, "legendgroup": name, "line_color": look.color, "line_dash": look.dash,
                  "line_width": 1.8, "opacity": 0.85, "row": 1,
                  "hovertemplate": f"{name}, seed {curve['seed']}, update %{{x}}: %{{y:.4f}}<extra></extra>"}
        figure.add_scatter(x=curve["eval_step"], y=curve["recall@10"], mode="lines+markers", marker_symbol=look.symbol,
                           marker_size=7, showlegend=name not in seen, col=1, **common)
        figure.add_scatter(x=curve["step"], y=curve["loss"], mode="lines", showlegend=False, col=2, **common)
        seen.add(name)
    figure.update_xaxes(title_text="updates", title_standoff=8)
    return figure.update_layout(template=template(), height=500, legend=_below(500, 85))


def cost_bars(results: dict) -> go.Figure:
    """Training time and peak memory relative to `unpadded`, with the kept share; RASTP's and STAMP's claims as lines.

    Both papers compare with a padded model, so their ratios are drawn from the bar of `padded`, where it was run."""
    base, rows = reference(results), with_cost(results)
    titles = (f"training time (× {base['method']})", f"peak memory (× {base['method']})")
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles)
    for column, (field, unit) in enumerate(((COST, "s per 1,000 windows"), (MEMORY, "MB")), start=1):
        known = {place: row for place, row in enumerate(rows) if row.get(field) and base.get(field)}
        ratio = [row[field] / base[field] for row in known.values()]
        figure.add_bar(
            x=ratio, y=list(known), orientation="h", width=0.62, showlegend=False, text=[f"{r:.2f}×" for r in ratio],
            textposition="inside", insidetextanchor="start", textfont_color="white", row=1, col=column,
            marker_color=[GREY if row is base else BLUE for row in known.values()],
            customdata=[[row["method"], row[field]] for row in known.values()],
            hovertemplate=f"%{{customdata[0]}}: %{{customdata[1]:.4g}} {unit}, %{{x:.3f}}×<extra></extra>")
        figure.add_vline(1, line_color=GREY, line_width=1, row=1, col=column)
        figure.update_xaxes(range=[0, 1.08 * max([1, *ratio])], row=1, col=column)
        for row in known.values():
            if row["method"] == "padded":
                _claims(figure, field, row[field] / base[field], column, ends=(-0.5, len(rows) - 0.5))
    labels = [row["method"] if row.get("kept_token_fraction") is None
              else f"{row['method']} ({row['kept_token_fraction']:.0%} kept)" for row in rows]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, range=[len(rows) - 0.5, -0.5])
    height = 150 + 34 * len(rows)
    return figure.update_layout(template=template(), height=height, legend=_below(height))


def _claims(figure, field, padded, column, ends):
    """What the papers claim, from the padded model on: STAMP's range as a hatched band, RASTP's number as a line."""
    if field == COST:
        near, far = (padded / speedup for speedup in STAMP_CLAIMS["speedup"])
        text = "STAMP: {}–{}× faster than padded".format(*STAMP_CLAIMS["speedup"])
        figure.add_scatter(x=[padded * (1 - RASTP_CLAIMS["time_saved"])] * 2, y=ends, mode="lines", hoverinfo="name",
                           name=f"RASTP: {RASTP_CLAIMS['time_saved']:.1%} less time than padded", line_color=VERMILLION,
                           line_width=3, line_dash="dash", row=1, col=column)
    else:
        near, far = (padded * (1 - saved) for saved in STAMP_CLAIMS["memory_saved"])
        text = "STAMP: {:.1%}–{:.1%} less memory than padded".format(*STAMP_CLAIMS["memory_saved"])
    figure.add_scatter(x=[far, near, near, far], y=[ends[0], ends[0], ends[1], ends[1]], mode="lines", line_width=0,
                       fill="toself", fillpattern_shape="\\", fillpattern_fgcolor=ORANGE, fillpattern_size=9,
                       fillpattern_bgcolor="rgba(0,0,0,0)", name=text, hoverinfo="name", zorder=-1, row=1, col=column)


def short_title(title, columns):
    """An axis label: few columns leave room for three lines, many for one short one."""
    few = columns <= 6
    width = 16 if few else 24
    words = " ".join(shorten(word, width - 1) for word in title.split())  # or of a longer word nothing would be left
    lines = textwrap.wrap(words, width, max_lines=3 if few else 1, placeholder="…")
    return "<br>".join(html.escape(line) for line in lines)


def shorten(title: str, width: int = 40) -> str:
    """`title`, cut to `width` characters."""
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def _interval(row, metric):
    """The row's interval; where there is none, one of no length."""
    return row.get(f"{metric}_interval") or (row[metric], row[metric])


def _window(results, metric, paper=()):
    """The range of an axis: all trained and published values, and whatever else is not far away from them."""
    trained = with_cost(results) or results["summary"]
    near = [end for row in trained for end in _interval(row, metric)]
    near += [row[metric] for row in results["rows"] if row["seed"] is not None] + list(paper)
    low, high = min(near), max(near)
    reach = (high - low) or 0.1 * high or 1
    for row in results["summary"]:
        if low - reach <= row[metric] <= high + reach:
            near += _interval(row, metric)
    room = 0.06 * (max(near) - min(near)) or 1
    return min(near) - room, max(near) + room


def error_bars(rows, metric):
    """Asymmetric error bars of the rows' intervals."""
    ends = [(row[metric], *_interval(row, metric)) for row in rows]
    return {"type": "data", "symmetric": False, "array": [high - mean for mean, _, high in ends],
            "arrayminus": [mean - low for mean, low, _ in ends], "thickness": 1.6, "width": 4, "color": GREY}


def _below(height, gap=55):
    """A horizontal legend under the x axis of a figure of that height, `gap` pixels down."""
    return {"orientation": "h", "x": 0, "y": -gap / max(height - 100, 1), "yanchor": "top"}
