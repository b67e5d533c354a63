"""A board of one's own runs: a JSON file that a table and a figure show."""

import html
import json
import pathlib

import pandas as pd

from sidlab.checks import from_extra
from sidlab.figures.charts import shorten
from sidlab.figures.theme import BLUE, GREY, mark, template
from sidlab.files import write_json

with from_extra("course"):
    import plotly.graph_objects as go
    from IPython.display import HTML


class Board:
    """Entries kept in `path`, so that they outlive the kernel; in a notebook it shows itself as a
    table, best first.

    >>> board = Board("runs/capstone/board.json")  # doctest: +SKIP
    >>> measured = {"recall@10": 0.5, "low": 0.47, "high": 0.53}
    >>> board.add("mine", "demo, keep 1/6", measured)  # doctest: +SKIP
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)

    @property
    def rows(self) -> list[dict]:
        """All entries, oldest first: {"name", "contest", …numbers}."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def add(self, name: str, contest: str, numbers: dict) -> None:
        """Write down one run. `contest` says what may be compared (data, kept share, users); an
        entry of the same name in the same contest is replaced. `numbers`: JSON-ready; "recall@10",
        "low" and "high" of its interval, and whatever else; "anchor": true for a bound that is no
        competitor. Raises ValueError without a recall@10.
        """
        if "recall@10" not in numbers:
            raise ValueError(f"numbers must hold 'recall@10', got {sorted(numbers)}")
        rows = [row for row in self.rows if (row["name"], row["contest"]) != (name, contest)]
        write_json(self.path, [*rows, {"name": name, "contest": contest, **numbers}])

    def frame(self, contest: str | None = None) -> pd.DataFrame:
        """The entries (of one contest), best first within each contest."""
        rows = [row for row in self.rows if contest in (None, row["contest"])]
        frame = pd.DataFrame(rows, columns=None if rows else ["name", "contest", "recall@10"])
        return frame.sort_values(
            ["contest", "recall@10"], ascending=[True, False], kind="stable", ignore_index=True
        )

    def table(self, contest: str | None = None) -> HTML:
        """The entries as a reader wants them: three decimals, nothing where a number is missing,
        and in words which are bounds.
        """
        frame = self.frame(contest)
        if frame.empty:
            return HTML("<p>No entry yet.</p>")
        if "anchor" in frame:
            frame.insert(
                1, "", ["bound" if anchor is True else "" for anchor in frame.pop("anchor")]
            )
        if contest is not None:
            del frame["contest"]
        return HTML(frame.to_html(index=False, float_format="{:.3f}".format, na_rep=""))

    def figure(self, contest: str) -> go.Figure:
        """recall@10 of the entries of `contest` with their intervals, best on top; anchors are
        lines.
        """
        rows = sorted(
            (row for row in self.rows if row["contest"] == contest),
            key=lambda row: -row["recall@10"],
        )
        entries, anchors = (
            [row for row in rows if row.get("anchor", False) == which] for which in (False, True)
        )
        values = [row["recall@10"] for row in entries]
        figure = go.Figure(
            go.Scatter(
                x=values,
                y=[row["name"] for row in entries],
                mode="markers",
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
                marker={
                    "size": 11,
                    "color": BLUE,
                    "symbol": [mark(row["name"]).symbol for row in entries],
                },
                error_x={
                    "array": [row.get("high", x) - x for row, x in zip(entries, values)],
                    "color": GREY,
                    "arrayminus": [x - row.get("low", x) for row, x in zip(entries, values)],
                },
            )
        )
        # Names of neighbours on either side, or one covers the other
        for place, row in enumerate(anchors):
            figure.add_vline(
                row["recall@10"],
                line_dash="dot",
                line_color=GREY,
                annotation_yanchor="bottom",
                annotation_position=("top right", "top left")[place % 2],
                annotation_text=html.escape(f"{shorten(row['name'])} {row['recall@10']:.3f}"),
            )
        names = [row["name"] for row in entries]
        figure.update_xaxes(title_text="recall@10")
        figure.update_yaxes(
            autorange="reversed",
            type="category",
            tickvals=names,
            ticktext=[html.escape(shorten(name)) for name in names],
        )
        return figure.update_layout(
            template=template(), height=160 + 30 * len(entries), margin_t=60, showlegend=False
        )

    def _repr_html_(self):
        return self.table().data
