"""What all explorers share: a state that follows the controls, and a view that draws it, in a
notebook and on a page without one.

An explorer is a pure function from its controls' values to a state, which is ready for JSON. A view
in JavaScript draws the state: that of the package's charts, or one of the explorer's own. `State`
holds the state for all views; when a control moves, one message carries what differs. A view that
starts late, a second one, and one after a reload of the page draw the state as it is.
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
from IPython.display import display

from sidlab.checks import as_histories, one_of
from sidlab.course.labels import Labels
from sidlab.course.probe import Probe, on_cpu
from sidlab.models.t5 import SidT5
from sidlab.viz.export import write_frames
from sidlab.viz.view import ChartView, State, looks


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
                "layout": self.content["figure"]["layout"] | {"template": looks()[0]},
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
        self.model, self._probe = on_cpu(self.model), functools.lru_cache(8)(self._probe)

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
