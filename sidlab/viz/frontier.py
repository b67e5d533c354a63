"""The frontier: recall against cost of every scorer and kept share that was run."""

import collections

import numpy as np
import plotly.graph_objects as go

from sidlab.figures.charts import COST, MEMORY, error_bars
from sidlab.figures.tables import table
from sidlab.figures.theme import GREY, mark, template
from sidlab.viz.recorded import (
    DIGITS,
    Recorded,
    difference_text,
    quality_text,
    recall_text,
    verdict,
)


class FrontierExplorer(Recorded):
    """Quality against cost at every kept share that was recorded, a mark for each scorer; the kept
    share is the cursor.

    Args: `data` as in `Recorded`; `keep`: the kept share at the start (the nearest recorded one);
    `cost`: what the horizontal axis shows, a key of `COSTS`.
    """

    study = "strategies"
    heading = "What does keeping fewer tokens save, and what does it lose?"
    exported = "keep"
    form = ".0%"
    COSTS = {
        COST: "seconds per 1,000 training windows (measured)",
        "mflops": "MFLOPs per training window (predicted)",
        MEMORY: "peak memory while training, MB (measured)",
    }
    _head = ("scorer", "kept", "recall@10", "95 % interval", "minus unpruned", "", *COSTS.values())

    def __init__(self, data=None, *, keep=1 / 3, cost=COST):
        super().__init__(data, {"keep": ("pruning.keep", keep, "kept share of the tokens")}, cost)

    @staticmethod
    def shown(rows):
        """The scorers of which several shares were run."""
        runs = [row for row in rows[1:] if row["pruning.reduce"] == "select"]
        shares = collections.Counter(row["pruning.scorer"] for row in runs)
        return [row for row in runs if shares[row["pruning.scorer"]] > 1]

    def draw(self):
        keep = self.value("keep")
        base = self.base
        field = self.value("cost")
        chosen = [row for row in self.runs if row["pruning.keep"] == keep]
        says = []
        for row in chosen:
            ratio = row[field] / base[field]
            says.append(
                f"<li><b>{row['pruning.scorer']}</b>: {difference_text(row)} in recall@10,"
                f" {verdict(row)}. Cost {abs(ratio - 1):.0%}"
                f" {'lower' if ratio < 1 else 'higher'}.</li>"
            )
        text = (
            f"<p><b>{keep:.0%} of the tokens kept</b> after the pruner, against nothing pruned"
            f" with recall@10 {recall_text(base)}, on the same users and seeds. Cost:"
            f" {self.COSTS[field]}.</p><ul>{''.join(says)}</ul>"
            + table(self._head, map(self._cells, [base, *chosen]))
            + self._end(self._head, [self._cells(row) for row in [base, *self.runs]])
        )
        return frontier_figure(self.runs, base, keep, field, self.COSTS[field]), text

    def _cells(self, row):
        base = self.base
        costs = [f"{row[field]:.3g} (× {row[field] / base[field]:.2f})" for field in self.COSTS]
        if row is base:
            return ("unpruned", "100%", *quality_text(row), "", "", *costs)
        share = f"{row['pruning.keep']:.0%}"
        against = (difference_text(row), verdict(row))
        return (row["pruning.scorer"], share, *quality_text(row), *against, *costs)


def frontier_figure(
    runs: list[dict], unpruned: dict, keep: float, field: str, title: str
) -> go.Figure:
    """recall@10 minus that of `unpruned`, on the same users and seeds, against the cost `field`,
    called `title`: a line for each scorer through its `runs` (rows of the study), those at
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
                y=[row["difference"] for row in rows],
                name=scorer,
                legendgroup=scorer,
                showlegend=chosen,
                mode="markers" if chosen else "lines+markers",
                error_y=error_bars(rows, "difference") if chosen else None,
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
    ends = [0, *(end for row in runs for end in row["difference_interval"])]
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
