"""Widgets that show a state: what is sent to the page, and how it is drawn there."""

import functools
import gzip
import pathlib

import anywidget
import ipywidgets as widgets
import plotly.io as pio
import traitlets
from plotly.offline import get_plotlyjs

from sidlab.figures.theme import TEMPLATES

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
    return _Library(plotly=gzip.compress(get_plotlyjs().encode(), 6, mtime=0), looks=looks())


def looks():
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
