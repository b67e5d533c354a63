"""What all explorers share: a figure that follows its controls, in a notebook and as a file that needs no notebook.

An explorer is drawn by a pure function from values to a plotly Figure and a text that says the same. When a control moves, the
new figure is compared with the one on the screen and only what differs is sent: one message for the figure, one for the text.
"""

import functools
import hashlib
import html
import json
import os
import pathlib

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from sidlab.checks import as_histories, one_of
from sidlab.files import write
from sidlab.models.t5 import SidT5
from sidlab.probe import Probe, on_processor
from sidlab.viz.labels import Labels
from sidlab.viz.theme import TEMPLATES


class Explorer(widgets.VBox):
    """Base class. A subclass makes its controls, calls `super().__init__`, and writes `draw`.

    Args: `controls`: {name: widget with a `value` and a `description`}; `slow`: names of those whose change takes longer than a
    blink: they act on release and say that they work. It is light or dark as `use_theme` says.
    Attributes: `controls`, `figure` (a FigureWidget), `text` and `alert` (HTML widgets).
    """

    heading = ""  # the title of an exported page
    exported = ""  # the control that an exported page has

    def __init__(self, controls: dict, *, slow=()):
        super().__init__()
        self.controls, self._quiet = controls, False
        self.alert, self.text = widgets.HTML(), widgets.HTML()
        for name, control in controls.items():
            if not control.description:
                raise ValueError(f"controls[{name!r}] needs a description: it is the label that assistive technology reads")
            control.style.description_width = "initial"
            if name in slow and hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(functools.partial(self._changed, slow=name in slow), "value")
        figure, text = self.draw()
        self.figure, self.text.value = _Figure(figure), text
        self.figure._config = {"responsive": True, "displayModeBar": False}
        row = widgets.Box(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 16px"))
        self.children = [row, self.alert, self.figure, self.text, Labels(heading=self.heading)]
        self.add_class("sidlab-explorer")

    def draw(self) -> tuple[go.Figure, str]:
        """The figure and the text (HTML) for the controls' values. Always the same number of traces, so that they can be updated."""
        raise NotImplementedError

    def value(self, name: str):
        return self.controls[name].value

    def set(self, **values) -> None:
        """Set several controls and draw once."""
        if unknown := values.keys() - self.controls.keys():
            raise ValueError(f"{type(self).__name__} has no control {sorted(unknown)}; it has {', '.join(self.controls)}")
        self._quiet = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._quiet = False
            self.refresh()  # where a value is refused, those before it have moved

    def refresh(self) -> None:
        """Draw again. What is raised on the way is shown to the reader, and raised."""
        try:
            figure, text = self.draw()
            sync(self.figure, figure)
        except Exception as error:
            self.alert.value = f'<p role="alert"><b>{type(error).__name__}:</b> {html.escape(str(error))}</p>'
            raise
        self.text.value, self.alert.value = text, ""

    def _changed(self, change, slow):
        if self._quiet:
            return
        if slow:
            self.alert.value = '<p role="status">working …</p>'
        self.refresh()

    def frames(self, values=None) -> list[tuple[str, go.Figure, str]]:
        """(value as text, figure, text) for each of `values` of the control `exported` (default: all its options, or the present value and
        21 steps)."""
        one_of("exported", self.exported, self.controls)
        widget = self.controls[self.exported]
        if values is None:
            values = [v for _, v in widget._options_full] if hasattr(widget, "_options_full") else _steps(widget)
        if not len(values):
            raise ValueError(f"values must hold at least one value of {self.exported!r}, got {values!r}")
        before, self._quiet, out = {name: control.value for name, control in self.controls.items()}, True, {}
        try:
            for value in values:
                widget.value = value
                drawn = self.draw()  # which moves the control to what there is
                out.setdefault(_shown(widget), drawn)
        finally:
            for name, value in before.items():
                self.controls[name].value = value
            self._quiet = False
        self.draw()  # what a draw leaves behind is that of the control's own value again
        return [(value, *drawn) for value, drawn in out.items()]

    def export(self, path, values=None) -> pathlib.Path:
        """Write one HTML file that holds plotly.js and a frame for each value of one control (see `frames`): it works without a kernel and
        without a network. It opens at the control's present value if that is one of them."""
        frames, widget = self.frames(values), self.controls[self.exported]
        first = next((i for i, (value, _, _) in enumerate(frames) if value == _shown(widget)), 0)
        return write_frames(path, self.heading or type(self).__name__, widget.description, frames, first)

    def _repr_mimebundle_(self, **kwargs):
        """While a static site is rendered ($SIDLAB_SITE names its folder of explorers), the exported page stands in for the live widget."""
        site = os.environ.get("SIDLAB_SITE")
        if not site:
            return super()._repr_mimebundle_(**kwargs)
        page = self.export(pathlib.Path(site) / "explorer.html")
        name = f"{type(self).__name__}-{hashlib.sha256(page.read_bytes()).hexdigest()[:10]}.html"
        os.replace(page, page.with_name(name))
        height = int(self.figure.layout.height or 450) + 420
        source, title = f"{pathlib.Path(site).name}/{name}", html.escape(self.heading)
        frame = (f'<iframe src="{source}" title="{title}" width="100%" height="{height}"></iframe>'
                 f"<p><small>Here only its slider moves; the rest needs JupyterLab.</small></p>")
        return {"text/html": frame, "text/plain": f"{type(self).__name__}: {name}"}


def demo_or(model, catalogue):
    """`model` and `catalogue`, or those of the bundled demo where neither is given."""
    if (model is None) != (catalogue is None):
        raise ValueError("give model and catalogue, or neither for the bundled demo")
    if model is None:
        from sidlab.demo import load

        return (demo := load()).model, demo.catalogue
    return model, catalogue


class HistoryExplorer(Explorer):
    """Base class of explorers of one history, whose last item is the one to be found; a subclass calls `take` first. Histories of a single
    item are left out."""

    def take(self, model, catalogue, histories):
        self.model, self.catalogue = demo_or(model, catalogue)
        n_items = getattr(getattr(self.model, "table", None), "n_items", None)
        if not isinstance(self.model, SidT5) or n_items != self.catalogue.n_items:
            raise ValueError(f"this explorer looks into a SidT5 with a table of the catalogue's {self.catalogue.n_items} items, got a "
                             f"{type(self.model).__name__} with {n_items}")
        given = self.catalogue.histories if histories is None else histories
        self.histories = [history for history in given if len(history) > 1][: 50 if histories is None else None]
        if not self.histories:
            raise ValueError("no history has two items: one to be read and one to be found")
        for history in as_histories(self.histories):
            if history.min() < 1 or history.max() > self.catalogue.n_items:
                raise ValueError(f"a history must hold item ids in 1..{self.catalogue.n_items}, got {history.tolist()}")
        self.model, self._probe = on_processor(self.model), functools.lru_cache(8)(self._probe)

    def _probe(self, user):
        return Probe(self.model, self.histories[user - 1][:-1], self.catalogue.truth)

    def titles(self, items) -> list[str]:
        return [self.catalogue.items.title[i - 1] or f"item {i}" for i in items]


def moved(before: int | None, place: int) -> str:
    """How many places up or down an item went to `place`, from the place `before` (None: it was in no list)."""
    up = before and before - place
    return "new" if before is None else "=" if up == 0 else f"▲ {up}" if up > 0 else f"▼ {-up}"


def within(name, value, low, high):
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {value}")


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


class _Figure(go.FigureWidget):
    """Opens once and whole: a view that the browser draws before traces and layout are there stays empty. Sends an update in two messages,
    not four: the edit ids travel within the update as well."""

    def __init__(self, figure):
        self._whole = False
        super().__init__(figure)
        self._whole = True
        self.open()

    def open(self):
        if self._whole:
            super().open()

    def send_state(self, key=None):
        if key not in ("_last_layout_edit_id", "_last_trace_edit_id"):
            super().send_state(key)


def sync(widget: go.FigureWidget, figure: go.Figure) -> None:
    """Make `widget` look like `figure`, by one message with what differs. Both have the same number of traces of the same types."""
    if [trace.type for trace in widget.data] != [trace.type for trace in figure.data]:
        raise ValueError("a figure can only be followed with the same traces, got types "
                         f"{[trace.type for trace in figure.data]} after {[trace.type for trace in widget.data]}")
    with widget.batch_update():
        for part, wanted in [*zip(widget.data, figure.data), (widget.layout, figure.layout)]:
            before, after = dict(_leaves(part.to_plotly_json())), dict(_leaves(wanted.to_plotly_json()))
            for path in before.keys() - after.keys() - {"uid", "autosize"}:  # these are the browser's; without autosize no width follows
                part[path] = None
            for path, value in after.items():
                if path not in before or not _same(before[path], value):
                    part[path] = wanted[path]


def _leaves(node, path=""):
    """(dotted path, value) of everything below `node`; an array is one value ({"bdata": …}), and templates stay as they are."""
    for key, value in node.items():
        if isinstance(value, dict) and "bdata" not in value:
            yield from _leaves(value, f"{path}{key}.") if key != "template" else ()
        else:
            yield path + key, value


def _same(a, b):
    arrays = isinstance(a, np.ndarray) or isinstance(b, np.ndarray)  # of objects: others are {"bdata": …} here
    return np.array_equal(a, b) if arrays else a == b


def _shown(widget):
    """The value of a control as a reader sees it."""
    if hasattr(widget, "_options_full"):
        return widget.label
    return format(widget.value, getattr(widget, "readout_format", "")) if isinstance(widget.value, float) else str(widget.value)


def _steps(widget):
    grid = np.unique(np.round(np.linspace(widget.min, widget.max, 21) / widget.step).astype(int)) * widget.step
    grid = [value for value in grid.clip(widget.min, widget.max) if not np.isclose(value, widget.value)]
    return sorted([widget.value, *map(type(widget.value), grid)])


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; margin: 1rem; color: #222; background: #fff }
label { font-weight: 600 }
input[type=range] { width: min(30rem, 60%%); vertical-align: middle }
#text { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #8886 }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #14171a } }
</style>
<script>%(plotly)s</script>
</head>
<body>
<main>
<h1>%(title)s</h1>
<p><label for="control">%(label)s</label>
<input id="control" type="range" min="0" max="%(last)d" step="1" value="%(first)d"> <output id="value" for="control"></output></p>
<div id="figure" role="img" aria-label="%(title)s. The text below says the same."></div>
<div id="text" role="status"></div>
</main>
<script>
const frames = %(frames)s, looks = %(looks)s;
const control = document.getElementById("control"), dark = matchMedia("(prefers-color-scheme: dark)");
function show() {
  const frame = frames[control.value];
  Plotly.react("figure", frame.data, {...frame.layout, template: looks[dark.matches ? 1 : 0]}, {responsive: true, displayModeBar: false});
  document.getElementById("text").innerHTML = frame.text;
  document.getElementById("value").textContent = frame.value;
  control.setAttribute("aria-valuetext", frame.value);
}
control.addEventListener("input", show);
dark.addEventListener("change", show);
show();
</script>
</body>
</html>
"""


def write_frames(path, title: str, label: str, frames, first: int = 0) -> pathlib.Path:
    """Write `frames`, (value as text, figure, text as HTML) each, as one HTML page with a slider. It needs no network; the figures are
    light or dark as the reader's system is."""
    out = []
    for value, figure, text in frames:
        content = json.loads(pio.to_json(figure, validate=False))
        content["layout"].pop("template", None)
        out.append({"value": value, "text": text, **content})
    looks = [pio.templates[name].to_plotly_json() for name in TEMPLATES.values()]
    page = PAGE % {"title": html.escape(title), "label": html.escape(label), "plotly": get_plotlyjs(), "last": len(out) - 1, "first": first,
                   "frames": _script(out), "looks": _script(looks)}
    return write(path, page)


def _script(value):
    return json.dumps(value).replace("</", "<\\/")  # or a text could end the script
