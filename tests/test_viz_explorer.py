"""What every explorer stands on: a state that follows by one message, errors that reach the reader,
exported frames.
"""

import json
import re
import subprocess
import sys

import ipywidgets as widgets
import latency
import numpy as np
import plotly.graph_objects as go
import pytest
from conftest import frames_of
from hypothesis import given
from hypothesis import strategies as st
from plotly.subplots import make_subplots

from sidlab.figures import theme
from sidlab.viz.explorer import Explorer, chart_state
from sidlab.viz.export import write_frames
from sidlab.viz.view import State


class Squares(Explorer):
    heading = "Squares </script> & more"
    exported = "n"

    def __init__(self, **kwargs):
        super().__init__(
            {
                "n": widgets.IntSlider(value=3, min=1, max=9, description="how many"),
                "kind": widgets.Dropdown(options=[("up", 1), ("down", -1)], description="kind"),
                "slow": widgets.FloatSlider(
                    value=0, min=0, max=1, step=0.01, description="slow one"
                ),
            },
            slow=("slow",),
            **kwargs,
        )
        self.drawn = 0

    def draw(self):
        if self.value("n") == 9:
            raise ValueError("nine is <too> many")
        self.drawn = getattr(self, "drawn", 0) + 1
        n = self.value("n")
        figure = make_subplots(1, 2)
        figure.add_scatter(
            x=np.arange(n),
            y=self.value("kind") * np.arange(n) ** 2,
            text=[f"p{i}" for i in range(n)],
            row=1,
            col=1,
        )
        figure.add_heatmap(z=np.eye(n), row=1, col=2)
        if n % 2:
            figure.add_annotation(text="odd", x=0, y=0)
        return (
            figure.update_layout(template=theme.template(), title_text=f"{n} squares"),
            f"<p>{n} squares</p>",
        )


class Listener:
    """Stands in for a page: applies every message to what the state was when it opened, as the
    model in a browser does.
    """

    comm_id = kernel = "none"

    def __init__(self, state):
        self.attributes = state.get_state()
        self.messages = []
        state.comm = self

    def send(self, data=None, metadata=None, buffers=None):
        self.messages.append(json.loads(json.dumps(data["state"], allow_nan=False)))
        self.attributes |= self.messages[-1]

    def on_msg(self, *args):
        """Nothing ever arrives."""

    on_close = close = on_msg

    def nested(self):
        """What `nested` in explorer.js makes of them, put together in another way."""

        def branch(leaves):
            if "" in leaves:
                return leaves[""]
            steps = {}
            for path, value in leaves.items():
                step, slash, rest = path[1:].partition("/")
                steps.setdefault(step, {})[slash + rest] = value
            if steps and all(step.startswith("#") for step in steps):
                return [
                    branch(steps[step]) for step in sorted(steps, key=lambda step: int(step[1:]))
                ]
            return {step.replace("~1", "/"): branch(inner) for step, inner in steps.items()}

        return branch(
            {
                path: value
                for path, value in self.attributes.items()
                if path[0] == "/" and value is not None
            }
        )


def no_nones(node):
    if isinstance(node, dict):
        return {k: no_nones(v) for k, v in node.items() if v is not None}
    branches = isinstance(node, list) and all(isinstance(part, dict) for part in node)
    return [no_nones(part) for part in node] if branches else node


LEAF = st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.none(), max_size=3)
KEY = st.text("ab/.~ ", min_size=1, max_size=3).filter(lambda key: "~1" not in key)
STATES = st.dictionaries(
    KEY,
    st.recursive(
        LEAF,
        lambda inner: (
            st.dictionaries(KEY, inner, min_size=1, max_size=3)
            | st.lists(st.dictionaries(KEY, inner, min_size=1, max_size=2), min_size=1, max_size=3)
        ),
        max_leaves=8,
    )
    | st.none(),
    max_size=4,
)


@given(st.lists(STATES, min_size=2, max_size=5))
def test_a_page_holds_the_present_state_whatever_came_before(states):
    """One that was there from the start, and one that opens at the end, as after a reload."""
    state = State(states[0], print)
    page = Listener(state)
    for content in states[1:]:
        before = len(page.messages)
        state.show(content)
        assert len(page.messages) - before <= 1
    assert page.nested() == no_nones(states[-1]) == Listener(state).nested()
    count = len(page.messages)
    state.show(states[-1])
    assert len(page.messages) == count


def test_following_equals_drawing_anew():
    explorer = Squares()
    page = Listener(explorer.view.state)
    for n, kind in ((5, 1), (4, -1), (1, -1), (8, 1), (3, 1)):
        explorer.controls["n"].value = n
        explorer.controls["kind"].value = kind
        fresh = Squares()
        fresh.set(n=n, kind=kind)
        assert (
            page.nested() == no_nones(explorer.content) == no_nones({"alert": "", **fresh.content})
        ), "whatever was there before"
        assert page.nested()["text"] == f"<p>{n} squares</p>"


def test_only_what_differs_is_sent():
    explorer = Squares()
    page = Listener(explorer.view.state)
    explorer.controls["kind"].value = -1
    (message,) = page.messages
    assert set(message) == {
        "/figure/data/#0/y",
        "/alert",
    }, "the heatmap, the texts and the layout are the same"
    explorer.controls["kind"].value = 1
    assert set(page.messages[-1]) == {"/figure/data/#0/y"}


def test_a_view_is_told_where_what_it_said_fails():
    class Clicked(Squares):
        def acted(self, content):
            raise ValueError(f"<{content['x']}>")

    explorer = Clicked()
    with pytest.raises(ValueError, match="<3>"):
        explorer._heard({"x": 3})
    assert explorer.alert == '<p role="alert"><b>ValueError:</b> &lt;3&gt;</p>'


def test_set_draws_once_and_knows_its_controls():
    explorer = Squares()
    explorer.drawn = 0
    explorer.set(n=5, kind=-1)
    assert explorer.drawn == 1 and explorer.value("kind") == -1
    with pytest.raises(ValueError, match=r"no control \['m'\]; it has n, kind, slow"):
        explorer.set(m=1)


def test_errors_reach_the_reader_and_are_raised():
    explorer = Squares()
    with pytest.raises(ValueError, match="too"):
        explorer.controls["n"].value = 9
    assert 'role="alert"' in explorer.alert and "nine is &lt;too&gt; many" in explorer.alert
    explorer.controls["n"].value = 2
    assert explorer.alert == "", "gone as soon as it works again"


def test_slow_controls_act_on_release_and_every_control_needs_a_label():
    explorer = Squares()
    assert (
        not explorer.controls["slow"].continuous_update and explorer.controls["n"].continuous_update
    )

    class Nameless(Squares):
        def __init__(self):
            Explorer.__init__(self, {"n": widgets.IntSlider(max=3)})

    with pytest.raises(ValueError, match="needs a description"):
        Nameless()


def test_exported_page_holds_a_frame_a_value_and_needs_no_network(tmp_path):
    explorer = Squares()
    path = explorer.export(tmp_path / "deep" / "x.html", values=[1, 2, 5])
    page = path.read_text()
    frames = frames_of(page)
    assert [frame["value"] for frame in frames] == ["1", "2", "5"]
    assert [frame["state"]["text"] for frame in frames] == [
        f"<p>{n} squares</p>" for n in (1, 2, 5)
    ]
    assert [len(frame["state"]["figure"]["data"][0]["text"]) for frame in frames] == [1, 2, 5]
    assert explorer.value("n") == 3, "the live one stays as it was"
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="http', page)
    assert "Squares &lt;/script&gt; &amp; more" in page
    with pytest.raises(ValueError, match="values must hold at least one value of 'n'"):
        explorer.export(tmp_path / "y.html", [])
    assert not list(tmp_path.glob("**/.*")), "nothing half-written is left"


def test_a_frame_shows_what_its_label_says_and_leaves_all_controls_as_they_were():
    class Snaps(Squares):
        """There are even numbers alone, and drawing one moves another control."""

        def draw(self):
            before = self._quiet
            self._quiet = True
            self.controls["n"].value -= self.value("n") % 2
            self.controls["slow"].value = self.value("n") / 10
            self._quiet = before
            return super().draw()

    explorer = Snaps()
    explorer.set(n=4)
    frames = explorer.frames([2, 3, 6])
    assert [(value, state["text"]) for value, state in frames] == [
        (n, f"<p>{n} squares</p>") for n in ("2", "6")
    ]
    assert explorer.value("n") == 4 and explorer.value("slow") == 0.4 and not explorer._quiet


def test_where_one_of_several_values_is_refused_the_figure_follows_the_others():
    explorer = Squares()
    with pytest.raises(Exception, match="value not found"):
        explorer.set(n=5, kind="sideways")
    assert explorer.value("n") == 5 and explorer.text == "<p>5 squares</p>"


def test_frames_of_a_slider_cover_its_range():
    explorer = Squares()
    explorer.exported = "slow"
    shown = [float(value) for value, _ in explorer.frames()]
    assert len(shown) == 21 and min(shown) == 0 and max(shown) == 1 and sorted(shown) == shown


def test_a_text_cannot_end_the_script(tmp_path):
    page = write_frames(
        tmp_path / "x.html", "t", "l", [("a", chart_state(go.Figure(), "</script><b>"))]
    ).read_text()
    assert page.count("</script>") == 2  # plotly.js and ours


def test_site_shows_the_exported_page(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDLAB_SITE", str(tmp_path / "explorers"))
    explorer = Squares()
    explorer.exported = "kind"
    bundle = explorer._repr_mimebundle_()
    source = re.search(r'src="explorers/(Squares-\w+\.html)"', bundle["text/html"])[1]
    assert (tmp_path / "explorers" / source).exists() and set(bundle) == {"text/html", "text/plain"}
    monkeypatch.delenv("SIDLAB_SITE")
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


def test_the_theme_has_a_name():
    with pytest.raises(ValueError, match="theme='pink' is unknown"):
        theme.use_theme("pink")


def test_latency_is_measured_in_a_process_of_its_own():
    command = [sys.executable, latency.__file__, "--only", "MapExplorer", "--moves", "2"]
    head, row = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    name, *numbers = row.split()
    assert (
        name == "MapExplorer"
        and len(numbers) == 6
        and all(float(number) > 0 for number in numbers)
        and "p95 (ms)" in head
    )


def test_a_notebook_without_a_kernel_has_a_picture(capsys, monkeypatch):
    shown = []
    renewed = []

    class Handle:
        def update(self, bundle, raw):
            renewed.append(bundle)

    def display(bundle, raw, display_id=False):
        shown.append(bundle)
        return Handle() if display_id else None

    monkeypatch.setattr("sidlab.viz.explorer.display", display)
    explorer = Squares()
    explorer.renew_picture()
    assert not renewed, "there is none before it is shown"
    explorer._ipython_display_()
    widget, picture = shown
    assert "application/vnd.jupyter.widget-view+json" in widget
    figure = picture["application/vnd.plotly.v1+json"]
    assert (
        len(figure["data"]) == 2
        and figure["layout"]["template"]["layout"]["paper_bgcolor"] == "#FFFFFF"
    )
    explorer.controls["n"].value = 5
    explorer.renew_picture()
    assert renewed[0]["application/vnd.plotly.v1+json"]["layout"]["title"]["text"] == "5 squares"
