"""Explorers of the studies' summaries, as `make study` writes them. Nothing is trained: controls
move among the settings that were run.
"""

import importlib.resources
import json

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sidlab.figures.charts import COST, error_bars, span
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

    Args: `data`: a summary of the study `study`, as `sidlab.research.studies.save` writes it; None:
    the one that comes with the package, of the planted shop. `controls`: {name: (setting, value at
    the start, description)}, `setting` being a key of its rows. Numbers become sliders and words
    menus, over recorded values only. Where values were not recorded together, the later controls
    move to the nearest that were. `cost`: which of `COSTS` a menu shows at first. Raises ValueError
    for another study, or one of which too few settings were run.
    """

    COSTS = {}  # {name in a row: in words}
    study = ""
    form = "g"  # of the numbers on a slider

    def __init__(self, data: dict | None, controls: dict, cost: str | None = None):
        if data is None:
            file = importlib.resources.files("sidlab.course") / "data" / f"{self.study}.json"
            data = json.loads(file.read_text(encoding="utf-8"))
        self.data = data
        self.base, *_ = data["rows"]
        self._settings = {name: setting for name, (setting, *_) in controls.items()}
        self.runs = self.shown(data["rows"]) if data.get("study") == self.study else []
        if not self.runs:
            raise ValueError(
                f"data must be a summary of the study {self.study!r}, as `make study"
                f" STUDY={self.study}` writes it; got one of {data.get('study')!r} with"
                f" {len(data['rows'])} settings"
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
        if self.COSTS:
            options = [(title, name) for name, title in self.COSTS.items()]
            made["cost"] = widgets.Dropdown(options=options, value=cost, description="cost")
        super().__init__(made)

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

    @staticmethod
    def shown(rows: list[dict]) -> list[dict]:
        """Those of a study's rows that the controls choose among: all but the first, which they are
        compared with.
        """
        return rows[1:]

    def _end(self, head, rows):
        """All settings as a table, and where they come from."""
        return folded(f"All {len(rows)} settings as a table", table(head, rows)) + self._source()

    def _source(self):
        hardware = self.data["hardware"]
        machine = hardware["gpu"] or hardware["processor"]
        command = f"<code>{self.data['command']}</code>"
        seeds = self.data["seeds"]
        over = (
            "test users and seeds"
            if seeds > 1
            else "test users: another seed would move the points, too"
        )
        busy = any(row["busy"] for row in self.data["rows"])
        made = f"Recorded with {command} on {machine}"
        if self.data.get("older_models"):
            made = (
                f"<b>Older models</b>, trained by an earlier version of this kit on {machine};"
                f" {command} trains them anew"
            )
        return (
            f"<p>{made}; {seeds} seed{'s' * (seeds > 1)}. The intervals are over {over}."
            f"{' Other jobs ran beside: the seconds are rough.' * busy}</p>"
        )


class DilutionExplorer(Recorded):
    """What levels and width of SIDs cost and bring; a cursor chooses one run.

    Args: `data` as in `Recorded`; `levels`, `width`: where the cursor starts; `cost`: what the bars
    show, a key of `COSTS`; `items`: the length of the history whose tokens are counted (planted
    test histories: 11 on average).
    """

    study = "granularity"
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

    def __init__(self, data=None, *, levels=1, width=8, cost="mflops", items=11):
        self.items = items
        controls = {
            "levels": ("sids.levels", levels, "levels (L)"),
            "width": ("sids.width", width, "codes per level (W)"),
        }
        super().__init__(data, controls, cost)

    @staticmethod
    def shown(rows):
        """All without STAMP."""
        return [row for row in rows if row.get("map.steps") is None]

    def draw(self):
        run = self.run()
        field = self.value("cost")
        best = max(self.runs, key=lambda row: row[RECALL])
        pairs = self.data["versus"]
        said = [verdict(pair) for pair in pairs if pair["label"] == run["label"]]
        # The finer one's difference to this one says the opposite of this one
        other_way = {BETTER: WORSE, WORSE: BETTER, UNDECIDED: UNDECIDED}
        said += [other_way[verdict(pair)] for pair in pairs if pair["against"] == run["label"]]
        text = (
            f"<p><b>{run['label']} codes: recall@10 {recall_text(run)} at {run[field]:.3g}"
            f" {self.COSTS[field]}.</b> On the same users and seeds it is {BETTER} than"
            f" {said.count(BETTER)} of the {len(said)} settings that are coarser or finer, {WORSE}"
            f" than {said.count(WORSE)}; the rest is {UNDECIDED}.</p>"
            + table(
                ("", "chosen", "best recall recorded"),
                zip(self._head, self._cells(run), self._cells(best)),
            )
            + self._end(self._head, [self._cells(row) for row in self.runs])
        )
        return dilution_figure(self.runs, run, field, self.COSTS[field]), text

    def _cells(self, row):
        report = row["sids"]
        tokens = len(report["widths"]) + 1
        perplexity = [f"{of_level:.1f}" for of_level in report["perplexity"]]
        if len(perplexity) > row["sids.levels"]:  # the level that collisions="extend" adds
            perplexity[-1] = f"({perplexity[-1]}, added against collisions)"
        costs = [f"{row[field]:.3g}" for field in self.COSTS]
        return (
            row["label"],
            *quality_text(row),
            *costs,
            f"{row['updates']:g}",
            tokens,
            tokens * self.items,
            f"{report['collision_rate']:.0%}",
            " · ".join(perplexity),
        )


def dilution_figure(runs: list[dict], chosen: dict, field: str, title: str) -> go.Figure:
    """recall@10 with its interval, above the cost `field`, called `title`: a panel for each number
    of levels, the widths side by side. `chosen`, one of `runs` (rows of the study), is
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
        names = [row["label"] for row in of_level]
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
        _ring(figure, ring, row=1, col=column)
    ends = [end for row in runs for end in row[f"{RECALL}_interval"]]
    figure.update_xaxes(**_named([_text(width) for width in widths]))
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

    Args: `data` as in `Recorded`; `unit`, `steps`, `weight`: which run is shown at first.
    """

    study = "map"
    heading = "What does it bring to predict further ahead?"
    exported = "weight"

    def __init__(self, data=None, *, unit="item", steps=2, weight=0.3):
        controls = {
            "unit": ("map.unit", unit, "unit of a step"),
            "steps": ("map.steps", steps, "steps ahead (S)"),
            "weight": ("map.weight", weight, "weight of the auxiliary loss"),
        }
        super().__init__(data, controls)

    def draw(self):
        run = self.run()
        base = self.base
        pair = (base, run)
        last, now = (row["curve"]["loss"][-1] for row in pair)
        seconds = [f"{row[COST]:.2f}" for row in pair]
        rows = [(f"{RECALL}, test users", *map(recall_text, pair), difference_text(run))]
        for metric in ("recall@5", "ndcg@10"):
            change = f"{run[metric] - base[metric]:+.{DIGITS}f}"
            rows.append((f"{metric}, test users", *(recall_text(r, metric) for r in pair), change))
        rows += [
            ("loss of the next item, last", f"{last:.3f}", f"{now:.3f}", f"{now - last:+.3f}"),
            ("seconds per 1,000 windows", *seconds, f"× {run[COST] / base[COST]:.2f}"),
        ]
        curves = [
            (title, step, f"{a:.3f}", f"{b:.3f}")
            for title, at, what in (
                ("validation recall@10", "updates", "mean"),
                ("loss of the next item", "loss_updates", "loss"),
            )
            for step, a, b in zip(base["curve"][at], base["curve"][what], run["curve"][what])
        ]
        head = ("setting", "recall@10", "95 % interval", "minus no MAP", "seconds per 1,000")
        every = [
            (row["label"], *quality_text(row), difference_text(row), f"{row[COST]:.2f}")
            for row in [base, *self.runs]
        ]
        text = (
            f"<p><b>{run['label']}: recall@10 {recall_text(run)}, without MAP"
            f" {recall_text(base)}.</b> On the same users and seeds: {verdict(run)}.</p>"
            + table(("", "no MAP", "chosen", "difference"), rows)
            + folded("Both curves as a table", table(("", "update", "no MAP", "chosen"), curves))
            + self._end(head, every)
        )
        return map_figure(self.runs, base, run), text


def map_figure(runs: list[dict], baseline: dict, chosen: dict) -> go.Figure:
    """Learning curves of `chosen` and `baseline` above the difference that each of `runs` (rows of
    the study) makes in test recall@10.
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
    for column, (at, what) in enumerate((("updates", "mean"), ("loss_updates", "loss")), start=1):
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
    names = [row["label"] for row in runs]
    figure.add_scatter(
        x=list(range(len(runs))),
        y=[row["difference"] for row in runs],
        error_y=error_bars(runs, "difference"),
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
    _ring(figure, [(runs.index(chosen), chosen["difference"])], row=2, col=1)
    figure.add_hline(0, line_color=GREY, line_dash="dot", layer="below", row=2, col=1)
    figure.update_yaxes(tickformat="+.2f", zeroline=False, row=2, col=1)
    ticks = _named([name.replace(", weight", "<br>×") for name in names])
    figure.update_xaxes(tickfont_size=11, row=2, col=1, **ticks)
    return figure.update_layout(
        template=template(),
        height=640,
        margin_t=70,
        legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"},
    )


def _ring(figure, points, **place):
    """A mark around the chosen one of a panel, [(x, y)], or around nothing."""
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="markers",
        marker={"symbol": "circle-open", "size": 18, "color": VERMILLION, "line": {"width": 3}},
        hoverinfo="skip",
        showlegend=False,
        **place,
    )


def _named(names):
    """An axis of settings side by side, with room for a mark at each edge."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "tickangle": 0,
        "showgrid": False,
        "zeroline": False,
        "range": [-0.6, len(names) - 0.4],
    }


def quality_text(row):
    return f"{row[RECALL]:.{DIGITS}f}", span(row, RECALL, DIGITS)


def recall_text(row, metric=RECALL):
    return f"{row[metric]:.{DIGITS}f} {span(row, metric, DIGITS)}"


def _text(value, form="g"):
    return value if isinstance(value, str) else format(value, form)


def _nearest(options, value):
    return min(
        options,
        key=lambda option: option != value if isinstance(value, str) else abs(option - value),
    )


def verdict(row):
    """Of its difference."""
    low, high = row["difference_interval"]
    return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED


def difference_text(row):
    if row["difference"] is None:
        return "–"
    low, high = row["difference_interval"]
    return f"{row['difference']:+.{DIGITS}f} [{low:+.{DIGITS}f}, {high:+.{DIGITS}f}]"
