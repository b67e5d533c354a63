"""An explorer as a page that needs no kernel: its states, one for each value of a control."""

import json
import pathlib

from sidlab.files import write
from sidlab.research.templates import render
from sidlab.viz.view import ChartView, View, looks


def write_frames(
    path, title: str, label: str, frames, first: int = 0, kind: type[View] = ChartView
) -> pathlib.Path:
    """Write `frames`, (value as text, state) each, as one HTML page with a slider and a view of
    `kind`.

    It needs no network, and is light or dark as the reader's system is.
    """
    charts = issubclass(kind, ChartView)
    page = render(
        "explorer.html.j2",
        title=title,
        label=label,
        last=len(frames) - 1,
        first=first,
        plotly=charts,
        script=kind.script(),
        frames=_script([{"value": value, "state": state} for value, state in frames]),
        env=_script({"heading": title} | ({"looks": looks()} if charts else {})),
    )
    return write(path, page)


def _script(value):
    return json.dumps(value).replace("</", "<\\/")  # or a text could end the script
