"""What all explorers share: a state that follows the controls, and a view that draws it, in a
notebook and on a page without one.

An explorer is a pure function from its controls' values to a state, which is ready for JSON. A view
in JavaScript draws the state: that of the package's charts, or one of the explorer's own. `State`
holds the state for all views; when a control moves, one message carries what differs. A view that
starts late, a second one, and one after a reload of the page draw the state as it is.
"""

import functools
import gzip
import hashlib
import html
import json
import os
import pathlib

import anywidget
import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import traitlets
from IPython.display import display
from plotly.offline import get_plotlyjs

from sidlab.checks import as_histories, one_of
from sidlab.course.labels import Labels
from sidlab.course.probe import Probe, on_processor
from sidlab.figures.theme import TEMPLATES
from sidlab.files import write
from sidlab.models.t5 import SidT5

HERE = pathlib.Path(__file__).parent


class State(widgets.Widget):
    """A nested state for views, a leaf at a time: dicts and lists of dicts are branches, anything
    else is a leaf.

    This is a widget of ipywidgets itself, not an anywidget: anywidget gives a model two seconds to
    start, and where a busy page takes longer, the model hears no message any more. `heard`: called
    with what a view says, a dict.
    """

    def __init__(self, content: dict, heard):
        self._leaves = dict(_leaves(content))
        super().__init__()
        self.on_msg(lambda _, said, buffers: heard(said))

    def get_state(self, key=None, drop_defaults=False):
        """All leaves besides the widget's own traits: what a page asks for when it opens."""
        own = super().get_state(key, drop_defaults)
        return own | self._leaves if key is None else own

    def show(self, content: dict) -> None:
        """Take on `content`: one message with the leaves that differ, those that have gone as null;
        none where nothing differs.
        """
        leaves = dict(_leaves(content))
        changed = dict.fromkeys(self._leaves.keys() - leaves.keys())
        changed |= {
            path: value
            for path, value in leaves.items()
            if path not in self._leaves or self._leaves[path] != value
        }
        self._leaves = leaves
        if changed:
            self._send({"method": "update", "state": changed, "buffer_paths": []})


def _leaves(node, path=""):
    """(path, value) of every leaf: "/figure/data/#0/x". A typed array of plotly's, {"bdata": …}, is
    a leaf.
    """
    if isinstance(node, dict):
        steps = [(str(key).replace("/", "~1"), value) for key, value in node.items()]
    else:
        steps = [(f"#{place}", value) for place, value in enumerate(node)]
    for step, value in steps:
        within = isinstance(value, dict) and "bdata" not in value
        within |= isinstance(value, list) and all(
            isinstance(part, dict) and "bdata" not in part for part in value
        )
        if within and value:
            yield from _leaves(value, f"{path}/{step}")
        else:
            yield f"{path}/{step}", value


class _Library(widgets.Widget):
    """What the charts of all explorers share: plotly.min.js, packed, and the light and the dark
    template.
    """

    plotly = traitlets.Bytes().tag(sync=True)
    looks = traitlets.List().tag(sync=True)


@functools.cache
def _library():
    """One for a kernel, so that a page gets Plotly once."""
    return _Library(plotly=gzip.compress(get_plotlyjs().encode(), 6, mtime=0), looks=_looks())


def _looks():
    return [pio.templates[name].to_plotly_json() for name in TEMPLATES.values()]


class View(anywidget.AnyWidget):
    """Base class of what draws a `State` in a notebook. A subclass names its JavaScript file, which
    defines `function draw(el, state, env)`:

    * `el`: an empty element the first time, the same one afterwards.
    * `state`: the whole state; leaves that are null are missing.
    * `env`: {`dark`: whether the page is dark; `reduced`: whether the reader wants no motion;
      `act(content)`: calls `Explorer.acted(content)` in Python; `heading`; for charts `plotly`, a
      promise of Plotly, and `looks`, both templates}.
    """

    file = ""
    state = traitlets.Instance(State).tag(sync=True, **widgets.widget_serialization)
    library = traitlets.Instance(_Library, allow_none=True).tag(
        sync=True, **widgets.widget_serialization
    )
    heading = traitlets.Unicode().tag(sync=True)
    _css = """
    .sidlab-text { overflow-x: auto; overflow-wrap: break-word }
    .sidlab-text table { border-collapse: collapse }
    .sidlab-text :is(td, th) { max-width: 30rem; overflow-wrap: break-word }
    .sidlab-mute { opacity: 0.5; pointer-events: none }
    """

    def __init_subclass__(cls, **kwargs):
        if "file" in cls.__dict__:  # not in the classes that traitlets derives to add traits
            cls._esm = f"{cls.script()}\n{(HERE / 'explorer.js').read_text(encoding='utf-8')}"
        super().__init_subclass__(**kwargs)

    @classmethod
    def script(cls) -> str:
        """The source of `draw`."""
        return (HERE / cls.file).read_text(encoding="utf-8")


class ChartView(View):
    """Draws {"figure": a Plotly figure without its template, "text": HTML that says the same,
    "alert": HTML or ""}.
    """

    file = "charts.js"

    def __init__(self, **kwargs):
        super().__init__(library=_library(), **kwargs)


class Explorer(widgets.VBox):
    """Base class. A subclass makes its controls, calls `super().__init__`, and writes `draw`; one
    with a `View` of its own names it in `kind` and writes `state` and `picture` instead.

    Args: `controls`: {name: widget with a `value` and a `description`}; `slow`: names of those
    whose change takes longer than a blink: they act on release and say that they work. Views are
    light or dark as their page is. Attributes: `controls`; `view`, a `View`, whose `state` all
    views draw; `content`, the present state; of charts `figure`, as last drawn, and `text` and
    `alert` (HTML).
    """

    heading = ""  # the title of an exported page
    exported = ""  # the control that an exported page has
    kind = ChartView

    def __init__(self, controls: dict, *, slow=()):
        super().__init__()
        self.controls = controls
        self._quiet = False
        self._picture = None
        for name, control in controls.items():
            if not control.description:
                raise ValueError(
                    f"controls[{name!r}] needs a description: it is the label that assistive"
                    " technology reads"
                )
            control.style.description_width = "initial"
            if name in slow and hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(functools.partial(self._changed, slow=name in slow), "value")
        self.content = self.state()
        self.view = self.kind(state=State(self.content, self._heard), heading=self.heading)
        row = widgets.Box(
            list(controls.values()),
            layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 16px"),
        )
        self.children = [row, self.view, Labels()]
        self.add_class("sidlab-explorer")

    def draw(self) -> tuple[go.Figure, str]:
        """Of charts: the figure and the text (HTML) for the controls' values."""
        raise NotImplementedError

    def state(self) -> dict:
        """What the view draws for the controls' values, ready for JSON."""
        self.figure, text = self.draw()
        return chart_state(self.figure, text)

    def acted(self, content: dict) -> None:
        """What a view says. Charts: {"trace": number, "x": …, "y": …} of the clicked point."""

    def _heard(self, content):
        try:
            self.acted(content)
        except Exception as error:
            self.show(alert=alert(error))
            raise

    @property
    def text(self) -> str:
        return self.content["text"]

    @property
    def alert(self) -> str:
        return self.content.get("alert", "")

    def value(self, name: str):
        return self.controls[name].value

    def set(self, **values) -> None:
        """Set several controls and draw once."""
        if unknown := values.keys() - self.controls.keys():
            raise ValueError(
                f"{type(self).__name__} has no control {sorted(unknown)}; it has"
                f" {', '.join(self.controls)}"
            )
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
            content = self.state()
        except Exception as error:
            self.show(alert=alert(error))
            raise
        self.show(**{"alert": "", **content})

    def show(self, **parts) -> None:
        """Change parts of the state for all views."""
        self.content = self.content | parts
        self.view.state.show(self.content)

    def _changed(self, change, slow):
        if self._quiet:
            return
        if slow:
            self.show(alert='<p role="status">working …</p>')
        self.refresh()

    def frames(self, values=None) -> list[tuple[str, dict]]:
        """(value as text, state) for each of `values` of the control `exported` (default: all its
        options, or the present value and 21 steps).
        """
        one_of("exported", self.exported, self.controls)
        widget = self.controls[self.exported]
        if values is None:
            values = (
                [v for _, v in widget._options_full]
                if hasattr(widget, "_options_full")
                else _steps(widget)
            )
        if not len(values):
            raise ValueError(
                f"values must hold at least one value of {self.exported!r}, got {values!r}"
            )
        before = {name: control.value for name, control in self.controls.items()}
        self._quiet = True
        out = {}
        try:
            for value in values:
                widget.value = value
                drawn = self.state()  # which moves the control to what there is
                out.setdefault(_shown(widget), drawn)
        finally:
            for name, value in before.items():
                self.controls[name].value = value
            self._quiet = False
        self.state()  # what drawing leaves behind is that of the control's own value again
        return [*out.items()]

    def export(self, path, values=None) -> pathlib.Path:
        """Write one HTML file that holds the view and a state for each value of one control (see
        `frames`): it works without a kernel and without a network. It opens at the control's
        present value if that is one of them.
        """
        frames = self.frames(values)
        widget = self.controls[self.exported]
        first = next((i for i, (value, _) in enumerate(frames) if value == _shown(widget)), 0)
        return write_frames(
            path, self.heading or type(self).__name__, widget.description, frames, first, self.kind
        )

    def picture(self) -> dict:
        """What stands for the explorer where a saved notebook is opened without a kernel, by MIME
        type.
        """
        return {
            "application/vnd.plotly.v1+json": {
                "data": self.content["figure"]["data"],
                "layout": self.content["figure"]["layout"] | {"template": _looks()[0]},
                "config": {"displayModeBar": False, "responsive": True},
            }
        }

    def _ipython_display_(self):
        """The widget, and below it the picture, which the live view hides."""
        display(self._repr_mimebundle_(), raw=True)
        if not os.environ.get("SIDLAB_SITE"):
            self._picture = display(self.picture(), raw=True, display_id=True)

    def renew_picture(self) -> None:
        """Let the picture show what the views show. It costs what a picture costs, so no move does
        it.
        """
        if self._picture is not None:
            self._picture.update(self.picture(), raw=True)

    def _repr_mimebundle_(self, **kwargs):
        """While a static site is rendered ($SIDLAB_SITE names its folder of explorers), the
        exported page stands in for the live widget.
        """
        site = os.environ.get("SIDLAB_SITE")
        if not site:
            return super()._repr_mimebundle_(**kwargs)
        page = self.export(pathlib.Path(site) / "explorer.html")
        name = f"{type(self).__name__}-{hashlib.sha256(page.read_bytes()).hexdigest()[:10]}.html"
        os.replace(page, page.with_name(name))
        height = int(self.content.get("figure", {}).get("layout", {}).get("height", 450)) + 420
        source = f"{pathlib.Path(site).name}/{name}"
        title = html.escape(self.heading)
        frame = (
            f'<iframe src="{source}" title="{title}" width="100%" height="{height}"></iframe>'
            "<p><small>Here only its slider moves; the rest needs JupyterLab.</small></p>"
        )
        return {"text/html": frame, "text/plain": f"{type(self).__name__}: {name}"}


def chart_state(figure: go.Figure, text: str) -> dict:
    """The state of a `ChartView`."""
    content = figure.to_dict()
    content["layout"].pop("template", None)
    return {"figure": json.loads(pio.json.to_json_plotly(content)), "text": text}


def alert(error: Exception) -> str:
    """How a reader sees an error, as HTML."""
    return f'<p role="alert"><b>{type(error).__name__}:</b> {html.escape(str(error))}</p>'


def demo_or(model, catalogue):
    """`model` and `catalogue`, or those of the bundled demo where neither is given."""
    if (model is None) != (catalogue is None):
        raise ValueError("give model and catalogue, or neither for the bundled demo")
    if model is None:
        from sidlab.course.demo import load

        return (demo := load()).model, demo.catalogue
    return model, catalogue


class HistoryExplorer(Explorer):
    """Base class of explorers of one history, whose last item is the one to be found; a subclass
    calls `take` first. Histories of a single item are left out.
    """

    def take(self, model, catalogue, histories):
        self.model, self.catalogue = demo_or(model, catalogue)
        n_items = getattr(getattr(self.model, "table", None), "n_items", None)
        if not isinstance(self.model, SidT5) or n_items != self.catalogue.n_items:
            raise ValueError(
                "this explorer looks into a SidT5 with a table of the catalogue's"
                f" {self.catalogue.n_items} items, got a {type(self.model).__name__} with {n_items}"
            )
        given = self.catalogue.histories if histories is None else histories
        self.histories = [history for history in given if len(history) > 1][
            : 50 if histories is None else None
        ]
        if not self.histories:
            raise ValueError("no history has two items: one to be read and one to be found")
        for history in as_histories(self.histories):
            if history.min() < 1 or history.max() > self.catalogue.n_items:
                raise ValueError(
                    f"a history must hold item ids in 1..{self.catalogue.n_items}, got"
                    f" {history.tolist()}"
                )
        self.model, self._probe = on_processor(self.model), functools.lru_cache(8)(self._probe)

    def _probe(self, user):
        return Probe(self.model, self.histories[user - 1][:-1], self.catalogue.truth)

    def titles(self, items) -> list[str]:
        return [self.catalogue.items.title[i - 1] or f"item {i}" for i in items]


def moved(before: int | None, place: int) -> str:
    """How many places up or down an item went to `place`, from the place `before` (None: it was in
    no list).
    """
    up = before and before - place
    return "new" if before is None else "=" if up == 0 else f"▲ {up}" if up > 0 else f"▼ {-up}"


def within(name, value, low, high):
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {value}")


def _shown(widget):
    """The value of a control as a reader sees it."""
    if hasattr(widget, "_options_full"):
        # Its `label` is empty where it starts at its first option
        return widget._options_labels[widget.index]
    return (
        format(widget.value, getattr(widget, "readout_format", ""))
        if isinstance(widget.value, float)
        else str(widget.value)
    )


def _steps(widget):
    grid = (
        np.unique(np.round(np.linspace(widget.min, widget.max, 21) / widget.step).astype(int))
        * widget.step
    )
    grid = [
        value for value in grid.clip(widget.min, widget.max) if not np.isclose(value, widget.value)
    ]
    return sorted([widget.value, *map(type(widget.value), grid)])


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; \
margin: 1rem; color: #222; background: #fff }
label { font-weight: 600 }
input[type=range] { width: min(30rem, 60%%); vertical-align: middle }
.sidlab-text { overflow-x: auto; overflow-wrap: break-word }
table { border-collapse: collapse }
th, td { max-width: 30rem; overflow-wrap: break-word; padding: .15rem .6rem; text-align: left; \
border-bottom: 1px solid #8886 }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #14171a } }
</style>
%(library)s
</head>
<body>
<main>
<h1>%(title)s</h1>
<p><label for="control">%(label)s</label>
<input id="control" type="range" min="0" max="%(last)d" step="1" value="%(first)d"> \
<output id="value" for="control"></output></p>
<div id="view" class="sidlab-view"></div>
</main>
<script>
%(script)s
const frames = %(frames)s, env = %(env)s;
const control = document.getElementById("control"), \
dark = matchMedia("(prefers-color-scheme: dark)");
env.plotly = Promise.resolve(globalThis.Plotly);
env.reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
env.act = () => {};
function show() {
  const { value, state } = frames[control.value];
  draw(document.getElementById("view"), state, { ...env, dark: dark.matches });
  document.getElementById("value").textContent = value;
  control.setAttribute("aria-valuetext", value);
}
control.addEventListener("input", show);
dark.addEventListener("change", show);
show();
</script>
</body>
</html>
"""


def write_frames(
    path, title: str, label: str, frames, first: int = 0, kind: type[View] = ChartView
) -> pathlib.Path:
    """Write `frames`, (value as text, state) each, as one HTML page with a slider and a view of
    `kind`.

    It needs no network, and is light or dark as the reader's system is.
    """
    charts = issubclass(kind, ChartView)
    page = PAGE % {
        "title": html.escape(title),
        "label": html.escape(label),
        "last": len(frames) - 1,
        "first": first,
        "script": kind.script(),
        "library": f"<script>{get_plotlyjs()}</script>" if charts else "",
        "frames": _script([{"value": value, "state": state} for value, state in frames]),
        "env": _script({"heading": title} | ({"looks": _looks()} if charts else {})),
    }
    return write(path, page)


def _script(value):
    return json.dumps(value).replace("</", "<\\/")  # or a text could end the script
