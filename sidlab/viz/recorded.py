"""Explorers of recorded sweeps, as notebooks/record.py writes them: nothing is trained, controls
move among the settings that were run.
"""

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sidlab.figures.charts import COST, MEMORY, error_bars, span
from sidlab.figures.tables import folded, table
from sidlab.figures.theme import BLUE, GREY, VERMILLION, mark, template
from sidlab.viz.explorer import Explorer

RECALL = "recall@10"
DIGITS = 3  # of recalls, their intervals and their differences: more than the intervals know
BETTER = "clearly better"
WORSE = "clearly worse"
UNDECIDED = "undecided"


class Recorded(Explorer):
    """Base class: together the controls always name one recorded setting, whose seeds are pooled in
    a row.

    Args: `data`: a loaded file of notebooks/data; `controls`: {name: (setting, value at the start,
    description)}, `setting` being a key of `data["rows"]`. Numbers become sliders and words menus,
    over recorded values only. Where values were not recorded together, the later controls move to
    the nearest that were. `others`: {name: widget}, controls that choose no run.
    """

    form = "g"  # of the numbers on a slider

    def __init__(self, data: dict, controls: dict, **others):
        self.data = data
        self._settings = {name: setting for name, (setting, *_) in controls.items()}
        self.runs = [
            row
            for row in data["rows"]
            if all(row.get(setting) is not None for setting in self._settings.values())
        ]
        if not self.runs:
            raise ValueError(
                f"data must hold rows with {', '.join(self._settings.values())}, as"
                " notebooks/record.py writes them"
            )
        made = {}
        for name, (setting, value, description) in controls.items():
            values = sorted({row[setting] for row in self.runs})
            kind = widgets.Dropdown if isinstance(value, str) else widgets.SelectionSlider
            value = _nearest(values, value)
            made[name] = kind(
                options=[(_text(v, self.form), v) for v in values],
                value=value,
                description=description,
            )
        super().__init__(made | others)

    def run(self) -> dict:
        """The row that the controls name, once they have moved onto it."""
        runs = self.runs
        before = self._quiet
        self._quiet = True
        try:
            for name, setting in self._settings.items():
                value = _nearest([row[setting] for row in runs], self.value(name))
                self.controls[name].value = value
                runs = [row for row in runs if row[setting] == value]
        finally:
            self._quiet = before
        return runs[0]

    def _source(self):
        machine = self.data["hardware"]
        seeds = self.data["seeds"]
        over = (
            "test users and seeds"
            if seeds > 1
            else "test users: another seed would move the points, too"
        )
        busy = " Other jobs ran beside: the seconds are rough." if self.data["busy"] else ""
        return (
            f"<p>Recorded with <code>{self.data['command']}</code> on"
            f" {machine['gpu'] or machine['processor']}; {seeds} seed{'s' * (seeds > 1)}. The"
            f" intervals are over {over}.{busy}</p>"
        )


class DilutionExplorer(Recorded):
    """What levels and width of SIDs cost and bring, from a recorded sweep; a cursor chooses one
    run.

    Args: `data`: notebooks/data/granularity.json, loaded; `levels`, `width`: where the cursor
    starts; `cost`: what the bars show, a key of `COSTS`; `items`: the length of the history whose
    tokens are counted (planted test histories: 11 on average).
    """

    heading = "What do finer semantic IDs cost, and what do they bring?"
    exported = "levels"
    COSTS = {
        "mflops": "MFLOPs per training window (predicted)",
        COST: "seconds per 1,000 training windows (measured)",
    }
    _head = (
        "levels × codes",
        "recall@10",
        "95 % interval",
        *COSTS.values(),
        "updates",
        "tokens per item, with separator",
        "tokens per history",
        "items that share their codes",
        "perplexity by level",
    )

    def __init__(
        self, data: dict, *, levels: int = 1, width: int = 8, cost: str = "mflops", items: int = 11
    ):
        self.items = items
        menu = widgets.Dropdown(
            options=[(title, name) for name, title in self.COSTS.items()],
            value=cost,
            description="cost",
        )
        super().__init__(
            data,
            {
                "levels": ("sids.levels", levels, "levels (L)"),
                "width": ("sids.width", width, "codes per level (W)"),
            },
            cost=menu,
        )

    def draw(self):
        run = self.run()
        field = self.value("cost")
        best = max(self.runs, key=lambda row: row[RECALL])
        said = [_verdict(run, row) for row in self.runs if row is not run]
        text = (
            f"<p><b>{_size(run)} codes: recall@10 {_recall(run)} at {run[field]:.3g}"
            f" {self.COSTS[field]}.</b> On the same users and seeds it is {BETTER} than"
            f" {said.count(BETTER)} of the other {len(said)} settings, {WORSE} than"
            f" {said.count(WORSE)}; the rest is {UNDECIDED}.</p>"
            + table(
                ("", "chosen", "best recall recorded"),
                zip(self._head, self._cells(run), self._cells(best)),
            )
            + folded(
                f"All {len(self.runs)} settings as a table",
                table(self._head, map(self._cells, self.runs)),
            )
            + self._source()
        )
        return dilution_figure(self.runs, run, field, self.COSTS[field]), text

    def _cells(self, row):
        report = row["sids"]
        tokens = row["sids"]["levels"] + 1
        perplexity = [f"{level['perplexity']:.1f}" for level in report["per_level"]]
        if report["levels"] > row["sids.levels"]:  # the level that collisions="extend" adds
            perplexity[-1] = f"({perplexity[-1]}, added against collisions)"
        costs = [f"{row[field]:.3g}" for field in self.COSTS]
        return (
            _size(row),
            f"{row[RECALL]:.{DIGITS}f}",
            span(row, RECALL, DIGITS),
            *costs,
            f"{row['updates']:g}",
            tokens,
            tokens * self.items,
            f"{report['collision_rate']:.0%}",
            " · ".join(perplexity),
        )


def dilution_figure(runs: list[dict], chosen: dict, field: str, title: str) -> go.Figure:
    """recall@10 with its interval, above the cost `field`, called `title`: a panel for each number
    of levels, the widths side by side. `chosen`, one of `runs` (rows of granularity.json), is
    ringed, and its bar is filled in another colour.
    """
    levels, widths = (
        sorted({row[setting] for row in runs}) for setting in ("sids.levels", "sids.width")
    )
    figure = make_subplots(
        2,
        len(levels),
        shared_yaxes=True,
        row_heights=[0.62, 0.38],
        horizontal_spacing=0.02,
        vertical_spacing=0.14,
        subplot_titles=[f"{_text(level)} level{'s' * (level > 1)}" for level in levels],
    )
    for column, level in enumerate(levels, start=1):
        of_level = sorted(
            (row for row in runs if row["sids.levels"] == level), key=lambda row: row["sids.width"]
        )
        places = [widths.index(row["sids.width"]) for row in of_level]
        names = [_size(row) for row in of_level]
        common = {"showlegend": False, "customdata": names, "col": column}
        figure.add_scatter(
            x=places,
            y=[row[RECALL] for row in of_level],
            error_y=error_bars(of_level, RECALL),
            mode="lines+markers",
            marker_size=9,
            marker_color=BLUE,
            line_color=BLUE,
            line_width=1,
            line_dash="dot",
            hovertemplate=f"%{{customdata}}: %{{y:.{DIGITS}f}}<extra></extra>",
            row=1,
            **common,
        )
        here = [row is chosen for row in of_level]
        figure.add_bar(
            x=places,
            y=[row[field] for row in of_level],
            marker_color=[VERMILLION if it else GREY for it in here],
            marker_line_width=[3 * it for it in here],
            marker_line_color=VERMILLION,
            width=0.6,
            marker_pattern_shape=["/" if it else "" for it in here],
            hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
            row=2,
            **common,
        )
        ring = [(place, row[RECALL]) for place, row in zip(places, of_level) if row is chosen]
        figure.add_scatter(
            x=[place for place, _ in ring],
            y=[recall for _, recall in ring],
            mode="markers",
            hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 18, "color": VERMILLION, "line": {"width": 3}},
            showlegend=False,
            row=1,
            col=column,
        )
    ends = [end for row in runs for end in row[f"{RECALL}_interval"]]
    figure.update_xaxes(
        tickvals=list(range(len(widths))),
        ticktext=[_text(width) for width in widths],
        showgrid=False,
        zeroline=False,
        range=[-0.6, len(widths) - 0.4],
        tickangle=0,
    )
    figure.update_yaxes(range=[min(ends) - 0.01, max(ends) + 0.01], row=1)
    figure.update_yaxes(range=[0, 1.06 * max(row[field] for row in runs)], nticks=4, row=2)
    # What the axes show stands above them: beside, a long name would not fit.
    above = {
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 13},
    }
    for text, y in (
        ("<b>recall@10</b>, 95 % intervals", 1.08),
        (f"<b>{title}</b>", figure.layout[f"yaxis{len(levels) + 1}"].domain[1]),
    ):
        figure.add_annotation(above | {"text": text, "y": y})
    figure.add_annotation(
        above
        | {
            "text": "codes per level (W)",
            "x": 0.5,
            "xanchor": "center",
            "y": 0,
            "yanchor": "top",
            "yshift": -22,
        }
    )
    return figure.update_layout(template=template(), height=500, margin_t=70, margin_b=50)


class MapExplorer(Recorded):
    """Recorded learning curves with MAP (our reading of it) beside those without.

    Args: `data`: notebooks/data/map.json, loaded; `unit`, `steps`, `weight`: which run is shown at
    first.
    """

    heading = "What does it bring to predict further ahead?"
    exported = "weight"

    def __init__(self, data: dict, *, unit: str = "item", steps: int = 2, weight: float = 0.3):
        self.baseline = next((row for row in data["rows"] if row.get("map.unit") is None), None)
        if self.baseline is None:
            raise ValueError(
                "data must hold a run without MAP to compare with, as notebooks/record.py writes it"
            )
        super().__init__(
            data,
            {
                "unit": ("map.unit", unit, "unit of a step"),
                "steps": ("map.steps", steps, "steps ahead (S)"),
                "weight": ("map.weight", weight, "weight of the auxiliary loss"),
            },
        )

    def draw(self):
        run = self.run()
        base = self.baseline
        pair = (base, run)
        rows = [
            (
                f"{metric}, test users",
                *(_recall(row, metric) for row in pair),
                (
                    _difference(run, base)
                    if metric == RECALL
                    else f"{run[metric] - base[metric]:+.{DIGITS}f}"
                ),
            )
            for metric in (RECALL, "recall@5", "ndcg@10")
        ]
        losses = [row["curve"]["loss"][-1] for row in pair]
        rows.append(
            (
                "loss of the next item, last",
                *(f"{loss:.3f}" for loss in losses),
                f"{losses[1] - losses[0]:+.3f}",
            )
        )
        rows.append(
            (
                "seconds per 1,000 windows",
                *(f"{row[COST]:.2f}" for row in pair),
                f"× {run[COST] / base[COST]:.2f}",
            )
        )
        curves = [
            (title, step, f"{a:.3f}", f"{b:.3f}")
            for title, at, what in (
                ("validation recall@10", "eval_step", RECALL),
                ("loss of the next item", "step", "loss"),
            )
            for step, a, b in zip(base["curve"][at], base["curve"][what], run["curve"][what])
        ]
        head = ("setting", "recall@10", "95 % interval", "minus no MAP", "seconds per 1,000")
        every = [
            (
                _map_name(row),
                f"{row[RECALL]:.{DIGITS}f}",
                span(row, RECALL, DIGITS),
                _difference(row, base),
                f"{row[COST]:.2f}",
            )
            for row in [base, *self.runs]
        ]
        text = (
            f"<p><b>{_map_name(run)}: recall@10 {_recall(run)}, without MAP {_recall(base)}.</b> On"
            f" the same users and seeds: {_verdict(run, base)}.</p>"
            + table(("", "no MAP", "chosen", "difference"), rows)
            + folded("Both curves as a table", table(("", "update", "no MAP", "chosen"), curves))
            + folded(f"All {len(every)} settings as a table", table(head, every))
            + self._source()
        )
        return map_figure(self.runs, base, run), text


def map_figure(runs: list[dict], baseline: dict, chosen: dict) -> go.Figure:
    """Learning curves of `chosen` and `baseline` above the difference that each of `runs` (rows of
    map.json) makes in test recall@10.
    """
    figure = make_subplots(
        2,
        2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        vertical_spacing=0.2,
        horizontal_spacing=0.1,
        subplot_titles=(
            "validation recall@10",
            "loss of the next item alone",
            "test recall@10 minus that without MAP, same users and seeds",
        ),
    )
    for column, (at, what) in enumerate((("eval_step", RECALL), ("step", "loss")), start=1):
        for row, name, look in (
            (baseline, "no MAP", mark("unpadded")),
            (chosen, "chosen", mark("map")),
        ):
            figure.add_scatter(
                x=row["curve"][at],
                y=row["curve"][what],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                marker_symbol=look.symbol,
                marker_size=8,
                line_color=look.color,
                line_dash=look.dash,
                hovertemplate=f"{name}, update %{{x}}: %{{y:.{DIGITS}f}}<extra></extra>",
                row=1,
                col=column,
            )
        values = [value for row in [baseline, *runs] for value in row["curve"][what]]
        room = 0.06 * np.ptp(values)
        figure.update_xaxes(title_text="updates", title_standoff=4, row=1, col=column)
        figure.update_yaxes(range=[min(values) - room, max(values) + room], row=1, col=column)
    ordered = sorted(runs, key=lambda row: (row["map.unit"], row["map.steps"], row["map.weight"]))
    names = [_map_name(row) for row in ordered]
    gains = _gains(ordered, baseline)
    figure.add_scatter(
        x=list(range(len(ordered))),
        y=[one["gain"] for one in gains],
        error_y=error_bars(gains, "gain"),
        mode="markers",
        showlegend=False,
        marker_symbol=mark("map").symbol,
        marker_color=mark("map").color,
        marker_size=9,
        customdata=names,
        hovertemplate=f"%{{customdata}}: %{{y:+.{DIGITS}f}}<extra></extra>",
        row=2,
        col=1,
    )
    place = ordered.index(chosen)
    figure.add_scatter(
        x=[place],
        y=[gains[place]["gain"]],
        mode="markers",
        marker_symbol="circle-open",
        marker_size=22,
        marker_color=VERMILLION,
        marker_line_width=3,
        showlegend=False,
        hoverinfo="skip",
        row=2,
        col=1,
    )
    figure.add_hline(0, line_color=GREY, line_dash="dot", layer="below", row=2, col=1)
    figure.update_yaxes(tickformat="+.2f", zeroline=False, row=2, col=1)
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=[name.replace(", weight", "<br>×") for name in names],
        tickangle=0,
        tickfont_size=11,
        showgrid=False,
        zeroline=False,
        range=[-0.6, len(names) - 0.4],
        row=2,
        col=1,
    )
    return figure.update_layout(
        template=template(),
        height=640,
        margin_t=70,
        legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"},
    )


class FrontierExplorer(Recorded):
    """Quality against cost at every kept share that was recorded, a mark for each scorer; the kept
    share is the cursor.

    Args: `data`: notebooks/data/frontier.json, loaded; `keep`: the kept share at the start (the
    nearest recorded one); `cost`: what the horizontal axis shows, a key of `COSTS`.
    """

    heading = "What does keeping fewer tokens save, and what does it lose?"
    exported = "keep"
    form = ".0%"
    COSTS = {
        COST: "seconds per 1,000 training windows (measured)",
        "mflops": "MFLOPs per training window (predicted)",
        MEMORY: "peak memory while training, MB (measured)",
    }
    _head = ("scorer", "kept", "recall@10", "95 % interval", "minus unpruned", "", *COSTS.values())

    def __init__(self, data: dict, *, keep: float = 1 / 3, cost: str = COST):
        kinds = [(row.get("pruning.scorer"), row.get("pruning.keep")) for row in data["rows"]]
        if kinds.count((None, None)) != 1 or len(set(kinds)) < len(kinds):
            raise ValueError(
                "data must hold one row without pruning and one for each scorer and kept share, as"
                f" notebooks/record.py writes them; got {len(kinds)} rows, {len(set(kinds))} of"
                " them different"
            )
        self.unpruned = data["rows"][kinds.index((None, None))]
        super().__init__(
            data,
            {"keep": ("pruning.keep", keep, "kept share of the tokens")},
            cost=widgets.Dropdown(
                options=[(title, name) for name, title in self.COSTS.items()],
                value=cost,
                description="cost",
            ),
        )

    def draw(self):
        keep = self.value("keep")
        base = self.unpruned
        field = self.value("cost")
        chosen = [row for row in self.runs if row["pruning.keep"] == keep]
        says = []
        for row in chosen:
            ratio = row[field] / base[field]
            says.append(
                f"<li><b>{row['pruning.scorer']}</b>: {_difference(row, base)} in recall@10,"
                f" {_verdict(row, base)}. Cost {abs(ratio - 1):.0%}"
                f" {'lower' if ratio < 1 else 'higher'}.</li>"
            )
        text = (
            f"<p><b>{keep:.0%} of the tokens kept</b> behind the pruner, against nothing pruned"
            f" with recall@10 {_recall(base)}, on the same users and seeds. Cost:"
            f" {self.COSTS[field]}.</p><ul>{''.join(says)}</ul>"
            + table(self._head, map(self._cells, [base, *chosen]))
            + folded(
                f"All {len(self.runs) + 1} settings as a table",
                table(self._head, map(self._cells, [base, *self.runs])),
            )
            + self._source()
        )
        return frontier_figure(self.runs, base, keep, field, self.COSTS[field]), text

    def _cells(self, row):
        base = self.unpruned
        quality = (f"{row[RECALL]:.{DIGITS}f}", span(row, RECALL, DIGITS))
        costs = [f"{row[field]:.3g} (× {row[field] / base[field]:.2f})" for field in self.COSTS]
        if row is base:
            return ("unpruned", "100%", *quality, "", "", *costs)
        return (
            row["pruning.scorer"],
            f"{row['pruning.keep']:.0%}",
            *quality,
            _difference(row, base),
            _verdict(row, base),
            *costs,
        )


def frontier_figure(
    runs: list[dict], unpruned: dict, keep: float, field: str, title: str
) -> go.Figure:
    """recall@10 minus that of `unpruned`, on the same users and seeds, against the cost `field`,
    called `title`: a line for each scorer through its `runs` (rows of frontier.json), those at
    `keep` large and with their intervals.
    """
    figure = go.Figure()
    for scorer in dict.fromkeys(row["pruning.scorer"] for row in runs):
        of_scorer = sorted(
            (row for row in runs if row["pruning.scorer"] == scorer),
            key=lambda row: row["pruning.keep"],
        )
        look = mark(scorer)
        shown = [row for row in of_scorer if row["pruning.keep"] == keep]
        for rows, chosen in ((of_scorer, False), (shown, True)):
            figure.add_scatter(
                x=[row[field] for row in rows],
                y=[one["gain"] for one in _gains(rows, unpruned)],
                name=scorer,
                legendgroup=scorer,
                showlegend=chosen,
                mode="markers" if chosen else "lines+markers",
                error_y=error_bars(_gains(rows, unpruned), "gain") if chosen else None,
                line={"color": look.color, "dash": look.dash, "width": 1.2},
                opacity=1 if chosen else 0.6,
                marker={"symbol": look.symbol, "color": look.color, "size": 17 if chosen else 7},
                marker_line={"width": 2 * chosen, "color": GREY},
                customdata=[f"{row['pruning.keep']:.0%}" for row in rows],
                hovertemplate=(
                    f"{scorer}, %{{customdata}} kept: %{{y:+.{DIGITS}f}} at"
                    " %{x:.3g}<extra></extra>"
                ),
            )
    look = mark("unpadded")
    figure.add_scatter(
        x=[unpruned[field]],
        y=[0],
        mode="markers",
        name="unpruned",
        hovertemplate="unpruned, at %{x:.3g}<extra></extra>",
        marker={"symbol": look.symbol, "color": look.color, "size": 13},
    )
    figure.add_hline(0, line_color=GREY, line_dash="dot", layer="below")
    costs = [row[field] for row in [unpruned, *runs]]
    ends = [0, *(end for one in _gains(runs, unpruned) for end in one["gain_interval"])]
    room = 0.06 * np.ptp(costs) or 0.1 * costs[0]
    figure.update_xaxes(range=[min(costs) - room, max(costs) + room], title_text=title)
    figure.update_yaxes(
        range=[min(ends) - 0.01, max(ends) + 0.01],
        tickformat="+.2f",
        zeroline=False,
        title_text="test recall@10 minus unpruned",
    )
    return figure.update_layout(
        template=template(),
        height=460,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )


def _size(row):
    return f"{_text(row['sids.levels'])} × {_text(row['sids.width'])}"


def _recall(row, metric=RECALL):
    return f"{row[metric]:.{DIGITS}f} {span(row, metric, DIGITS)}"


def _map_name(row):
    if row.get("map.unit") is None:
        return "no MAP"
    return (
        f"{row['map.steps']:g} {row['map.unit']}{'s' * (row['map.steps'] > 1)}, weight"
        f" {row['map.weight']:g}"
    )


def _text(value, form="g"):
    return value if isinstance(value, str) else format(value, form)


def _nearest(options, value):
    return min(
        options,
        key=lambda option: option != value if isinstance(value, str) else abs(option - value),
    )


def _verdict(row, other):
    """On the same users and seeds."""
    _, low, high = row["against"][other["number"]]
    return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED


def _gains(rows, base):
    """Their differences of recall to `base`: {"gain", "gain_interval"} each."""
    return [
        {"gain": mean, "gain_interval": ends}
        for mean, *ends in (row["against"][base["number"]] for row in rows)
    ]


def _difference(row, other):
    test = row["against"][other["number"]]
    return test and f"{test[0]:+.{DIGITS}f} [{test[1]:+.{DIGITS}f}, {test[2]:+.{DIGITS}f}]" or "–"
