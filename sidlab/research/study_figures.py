"""Figures of `sidlab.research.studies`: recall with its interval, and cost, of every setting."""

import itertools
import re

import pandas as pd

from sidlab.checks import from_extra
from sidlab.figures.charts import COST, MEMORY, error_bars
from sidlab.figures.theme import BLUE, GREEN, GREY, ORANGE, VERMILLION, template
from sidlab.strategy import SCHEDULES, Strategy, keep_at

with from_extra("course"):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

TITLES = {
    "pruning.keep": "kept share",
    "map.weight": "weight of the auxiliary loss",
    "sids.levels": "levels",
    "kept_token_fraction": "share of tokens kept in training",
}
LOOKS = [
    (color, symbol, dash)
    for dash, symbols in (
        ("solid", ("circle", "square", "diamond", "triangle-up")),
        ("dash", ("cross", "x", "star", "pentagon")),
        ("dot", ("hexagon", "bowtie")),
    )
    for color, symbol in zip((BLUE, VERMILLION, GREEN, ORANGE), symbols)
]
PANELS = {
    "recall@10": "test recall@10",
    COST: "s per 1,000 windows",
    MEMORY: "peak MB while training",
}


def study_figure(rows: pd.DataFrame, x: str | None = None, panels=tuple(PANELS)) -> go.Figure:
    """Test recall@10 with its 95 % interval, seconds per 1,000 training windows and peak memory of
    every setting of `rows` (what `studies.summarise` gives), single seeds as dots. `x`: the column
    on the axis, a line for each number of the other setting; None: settings by name, one below the
    other, and no memory. `panels`: which of `PANELS`, where there is an x. The first setting is the
    dotted line and its band.
    """
    records = rows.to_dict("records")
    first = records[0]
    if x is None:
        figure = make_subplots(
            1,
            2,
            shared_yaxes=True,
            column_widths=[0.65, 0.35],
            horizontal_spacing=0.03,
            subplot_titles=("test recall@10", PANELS[COST]),
        )
        places = list(range(len(records)))
        figure.add_scatter(
            x=[row["recall@10"] for row in records],
            y=places,
            error_x=error_bars(records, "recall@10"),
            mode="markers",
            marker_size=10,
            showlegend=False,
            row=1,
            col=1,
        )
        dots = [
            (value, place + 0.25) for place, row in enumerate(records) for value in _of_seeds(row)
        ]
        _add_seeds(figure, dots, 1)
        figure.add_bar(
            x=[row[COST] for row in records],
            y=places,
            orientation="h",
            showlegend=False,
            row=1,
            col=2,
        )
        figure.update_yaxes(
            tickvals=places,
            ticktext=[row["label"] for row in records],
            range=[len(records) - 0.5, -0.5],
            zeroline=False,
        )
        low, high = first["recall@10_interval"]
        figure.add_vrect(
            low, high, fillcolor=GREY, opacity=0.15, line_width=0, layer="below", row=1, col=1
        )
        return figure.update_layout(template=template(), height=130 + 34 * len(records))
    figure = make_subplots(
        1, len(panels), horizontal_spacing=0.07, subplot_titles=[PANELS[panel] for panel in panels]
    )
    points = [
        row for row in records if pd.notna(row.get(x)) and (row is not first or x == "sids.levels")
    ]
    names = {row["label"]: _line(row, x) for row in points}
    lines = list(dict.fromkeys(names.values()))
    places = [row[x] for row in points]
    span = max(places, default=0) - min(places, default=0)
    for number, (line, (color, symbol, dash)) in enumerate(zip(lines, itertools.cycle(LOOKS))):
        of_line = sorted(
            (row for row in points if names[row["label"]] == line), key=lambda row: row[x]
        )
        # So that no whisker hides another; a point alone stands where it was measured.
        beside = (number - (len(lines) - 1) / 2) * 0.012 * span if len(of_line) > 1 else 0
        for place, column in enumerate(panels, start=1):
            quality = column == "recall@10"
            figure.add_scatter(
                x=[row[x] + beside * quality for row in of_line],
                y=[row[column] for row in of_line],
                name=line,
                legendgroup=line,
                showlegend=place == 1,
                error_y=error_bars(of_line, column) if quality else None,
                mode="lines+markers" if len(of_line) > 1 else "markers",
                line_color=color,
                line_dash=dash,
                marker_symbol=symbol,
                marker_size=9,
                text=[row["label"] for row in of_line],
                hovertemplate="%{text}: %{y:.4g}<extra></extra>",
                row=1,
                col=place,
            )
    if "recall@10" in panels:
        dots = [(row[x], value) for row in points for value in _of_seeds(row)]
        _add_seeds(figure, dots, 1 + list(panels).index("recall@10"))
    of_settings = (
        sorted(set(places)) if x in ("sids.levels", "pruning.keep", "map.weight") else None
    )
    for place, column in enumerate(panels, start=1):
        # Runs side by side have no seconds
        if pd.notna(first[column]):
            figure.add_hline(
                first[column],
                line_dash="dot",
                line_color=GREY,
                annotation_text=first["label"],
                annotation_font_size=11,
                annotation_position="bottom right",
                row=1,
                col=place,
            )
        figure.update_xaxes(
            title_text=TITLES.get(x, x), tickvals=of_settings, tickformat=".2~f", row=1, col=place
        )
        figure.update_yaxes(
            rangemode="normal" if column == "recall@10" else "tozero", row=1, col=place
        )
        if column == "recall@10":
            low, high = first["recall@10_interval"]
            figure.add_hrect(
                low,
                high,
                fillcolor=GREY,
                opacity=0.15,
                line_width=0,
                layer="below",
                row=1,
                col=place,
            )
    return figure.update_layout(
        template=template(), height=460, legend={"orientation": "h", "y": -0.25, "yanchor": "top"}
    )


def schedule_figure(settings: dict[str, dict]) -> go.Figure:
    """The kept share over the course of training, of those settings ({label: settings by name})
    that say it before anything is trained: constant shares and schedules.
    """
    figure = go.Figure()
    progress = [step / 100 for step in range(101)]
    looks = itertools.cycle(LOOKS)
    for label, setting in settings.items():
        fields = {
            key.removeprefix("strategy."): value
            for key, value in setting.items()
            if key.startswith("strategy.")
        }
        keep = setting.get("pruning.keep", 1.0)
        schedule = fields.get("kind") in SCHEDULES
        if "pruning.mass" in setting or (fields and not schedule):
            continue
        shares = [
            keep_at(Strategy(**fields), keep, done) if schedule else keep for done in progress
        ]
        color, _, dash = next(looks) if schedule else (GREY, None, "dot")
        figure.add_scatter(
            x=progress,
            y=shares,
            name=label,
            mode="lines",
            line_color=color,
            line_dash=dash,
            showlegend=schedule,
        )
        if not schedule:
            figure.add_annotation(x=1, y=keep, text=label, showarrow=False, xanchor="left")
    figure.update_xaxes(title_text="updates done", tickformat=".0%")
    figure.update_yaxes(title_text="share of tokens kept", tickformat=".0%", range=[0, 1.05])
    return figure.update_layout(template=template(), height=400, margin_r=130)


def strata_figure(rows: pd.DataFrame) -> go.Figure:
    """Recall@10 of every setting by group of users, from `studies.strata`."""
    sides = list(dict.fromkeys(rows["by"]))
    figure = make_subplots(
        1, len(sides), horizontal_spacing=0.12, subplot_titles=[f"by {by}" for by in sides]
    )
    for label, (color, symbol, dash) in zip(dict.fromkeys(rows["label"]), itertools.cycle(LOOKS)):
        for place, by in enumerate(sides, start=1):
            part = rows[(rows["label"] == label) & (rows["by"] == by)].to_dict("records")
            figure.add_scatter(
                x=[f"{row['group']}<br>{row['users']:,} users" for row in part],
                y=[row["recall@10"] for row in part],
                name=label,
                legendgroup=label,
                showlegend=place == 1,
                error_y=error_bars(part, "recall@10"),
                mode="lines+markers",
                line_color=color,
                line_dash=dash,
                marker_symbol=symbol,
                marker_size=9,
                row=1,
                col=place,
            )
    for place, by in enumerate(sides, start=1):
        values = rows.loc[rows["by"] == by, "recall@10"]
        if values.max() > 10 * values[values > 0].min():
            # Equal distances are equal shares of recall.
            figure.update_yaxes(
                type="log", dtick="D2", title_text="test recall@10, log scale", row=1, col=place
            )
    figure.update_yaxes(title_text="test recall@10", row=1, col=1)
    return figure.update_layout(
        template=template(), height=440, legend={"orientation": "h", "y": -0.25, "yanchor": "top"}
    )


def curves_figure(rows: pd.DataFrame) -> go.Figure:
    """Validation recall@10 of every setting by update, the mean over seeds, with the lowest and the
    highest as whiskers.
    """
    figure = go.Figure()
    for row, (color, symbol, dash) in zip(rows.to_dict("records"), itertools.cycle(LOOKS)):
        curve = row["curve"]
        figure.add_scatter(
            x=curve["updates"],
            y=curve["mean"],
            name=row["label"],
            mode="lines+markers",
            line_color=color,
            line_dash=dash,
            marker_symbol=symbol,
            marker_size=8,
            error_y={
                "type": "data",
                "symmetric": False,
                "thickness": 1,
                "width": 3,
                "array": [high - mean for high, mean in zip(curve["highest"], curve["mean"])],
                "arrayminus": [mean - low for low, mean in zip(curve["lowest"], curve["mean"])],
            },
        )
    figure.update_xaxes(title_text="updates")
    figure.update_yaxes(title_text="validation recall@10")
    return figure.update_layout(
        template=template(), height=440, legend={"orientation": "h", "y": -0.2, "yanchor": "top"}
    )


def _add_seeds(figure, dots, column):
    """Single seeds, (x, y) each, as small dots."""
    if dots:
        figure.add_scatter(
            x=[x for x, _ in dots],
            y=[y for _, y in dots],
            name="single seeds",
            mode="markers",
            marker_size=4,
            marker_color=GREY,
            hoverinfo="x+y",
            row=1,
            col=column,
        )


def _of_seeds(row):
    """Recall@10 of each seed, where there are several. Older files do not hold it."""
    of_seed = row.get("recall@10_by_seed")
    return of_seed if isinstance(of_seed, list) and len(of_seed) > 1 else []


def _line(row, x):
    """What tells the line of a point from others: its label without what is on the axis."""
    label = row["label"]
    if x == "sids.levels":
        return label.partition(" ")[2]  # "3 × 64, stamp"
    if x in ("pruning.keep", "map.weight"):
        return re.sub(r"(, )?(keep|weight) [\d.]+$", "", label) or "pruned"
    return label
