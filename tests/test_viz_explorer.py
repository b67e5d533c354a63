"""What every explorer stands on: following by one message, errors that reach the reader, exported frames."""

import json
import re
import subprocess
import sys

import ipywidgets as widgets
import latency
import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from sidlab.viz import theme
from sidlab.viz.explorer import Explorer, _Figure, sync, write_frames


class Squares(Explorer):
    heading = "Squares </script> & more"
    exported = "n"

    def __init__(self, **kwargs):
        super().__init__({"n": widgets.IntSlider(value=3, min=1, max=9, description="how many"),
                          "kind": widgets.Dropdown(options=[("up", 1), ("down", -1)], description="kind"),
                          "slow": widgets.FloatSlider(value=0, min=0, max=1, step=0.01, description="slow one")}, slow=("slow",), **kwargs)
        self.drawn = 0

    def draw(self):
        if self.value("n") == 9:
            raise ValueError("nine is <too> many")
        self.drawn = getattr(self, "drawn", 0) + 1
        n = self.value("n")
        figure = make_subplots(1, 2)
        figure.add_scatter(x=np.arange(n), y=self.value("kind") * np.arange(n) ** 2, text=[f"p{i}" for i in range(n)], row=1, col=1)
        figure.add_heatmap(z=np.eye(n), row=1, col=2)
        if n % 2:
            figure.add_annotation(text="odd", x=0, y=0)
        return figure.update_layout(template=theme.template(), title_text=f"{n} squares"), f"<p>{n} squares</p>"


def plain(figure):
    """A figure's content, arrays as lists, without the ids that a widget adds."""
    content = json.loads(go.Figure(figure).to_json())
    for trace in content["data"]:
        trace.pop("uid", None)
    return content


def no_nones(node):
    return {k: no_nones(v) for k, v in node.items() if v is not None} if isinstance(node, dict) else node


def test_following_equals_drawing_anew():
    explorer = Squares()
    for n, kind in ((5, 1), (4, -1), (1, -1), (8, 1), (3, 1)):
        explorer.controls["n"].value, explorer.controls["kind"].value = n, kind
        fresh = Squares()
        fresh.set(n=n, kind=kind)
        wanted, _ = fresh.draw()
        assert no_nones(plain(explorer.figure)) == no_nones(plain(wanted))
        assert explorer.text.value == f"<p>{n} squares</p>"


def test_only_what_differs_is_sent(monkeypatch):
    explorer, sent = Squares(), []

    def send(self, restyle_data, relayout_data=None, **rest):
        sent.append((restyle_data, relayout_data))

    for name in ("_send_update_msg", "_send_restyle_msg"):
        monkeypatch.setattr(type(explorer.figure), name, send)
    explorer.controls["kind"].value = -1
    assert len(sent) == 1 and not sent[0][1]
    changed = sent[0][0]
    assert set(changed) == {"y"}, "the heatmap, the texts and the layout are the same"


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
    assert 'role="alert"' in explorer.alert.value and "nine is &lt;too&gt; many" in explorer.alert.value
    explorer.controls["n"].value = 2
    assert explorer.alert.value == "", "gone as soon as it works again"


def test_slow_controls_act_on_release_and_every_control_needs_a_label():
    explorer = Squares()
    assert not explorer.controls["slow"].continuous_update and explorer.controls["n"].continuous_update

    class Nameless(Squares):
        def __init__(self):
            Explorer.__init__(self, {"n": widgets.IntSlider(max=3)})

    with pytest.raises(ValueError, match="needs a description"):
        Nameless()


def test_other_traces_cannot_be_followed():
    widget = go.FigureWidget(go.Figure(go.Scatter(x=[1])))
    with pytest.raises(ValueError, match="same traces"):
        sync(widget, go.Figure(go.Bar(x=[1])))


def test_exported_page_holds_a_frame_a_value_and_needs_no_network(tmp_path):
    explorer = Squares()
    path = explorer.export(tmp_path / "deep" / "x.html", values=[1, 2, 5])
    page = path.read_text()
    frames = json.loads(re.search(r"const frames = (\[.*?\]), looks = ", page)[1])
    assert [frame["value"] for frame in frames] == ["1", "2", "5"]
    assert [frame["text"] for frame in frames] == [f"<p>{n} squares</p>" for n in (1, 2, 5)]
    assert [len(frame["data"][0]["text"]) for frame in frames] == [1, 2, 5]
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
            before, self._quiet = self._quiet, True
            self.controls["n"].value -= self.value("n") % 2
            self.controls["slow"].value = self.value("n") / 10
            self._quiet = before
            return super().draw()

    explorer = Snaps()
    explorer.set(n=4)
    frames = explorer.frames([2, 3, 6])
    assert [(value, text) for value, _, text in frames] == [(n, f"<p>{n} squares</p>") for n in ("2", "6")]
    assert explorer.value("n") == 4 and explorer.value("slow") == 0.4 and not explorer._quiet


def test_where_one_of_several_values_is_refused_the_figure_follows_the_others():
    explorer = Squares()
    with pytest.raises(Exception, match="value not found"):
        explorer.set(n=5, kind="sideways")
    assert explorer.value("n") == 5 and explorer.text.value == "<p>5 squares</p>"


def test_frames_of_a_slider_cover_its_range():
    explorer = Squares()
    explorer.exported = "slow"
    shown = [float(value) for value, *_ in explorer.frames()]
    assert len(shown) == 21 and min(shown) == 0 and max(shown) == 1 and sorted(shown) == shown


def test_a_text_cannot_end_the_script(tmp_path):
    page = write_frames(tmp_path / "x.html", "t", "l", [("a", go.Figure(), "</script><b>")]).read_text()
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


def test_theme(dark):
    assert Squares().figure.layout.template.layout.paper_bgcolor == "#14171A"
    with pytest.raises(ValueError, match="theme='pink' is unknown"):
        theme.use_theme("pink")


def test_latency_is_measured_in_a_process_of_its_own():
    command = [sys.executable, latency.__file__, "--only", "MapExplorer", "--moves", "2"]
    head, row = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    name, *numbers = row.split()
    assert name == "MapExplorer" and len(numbers) == 6 and all(float(number) > 0 for number in numbers) and "p95 (ms)" in head


def test_a_figure_reaches_the_browser_whole(monkeypatch):
    opened = []
    monkeypatch.setattr(go.FigureWidget, "open", lambda self: opened.append((len(self._widget_data), bool(self._widget_layout))))
    _Figure(go.Figure(go.Scatter(x=[1]), {"title": {"text": "one"}}))
    assert opened == [(1, True)]


def test_following_leaves_the_width_to_the_browser():
    widget = _Figure(go.Figure(go.Scatter(x=[1])))
    widget.layout.autosize = True  # as the browser reports it
    sync(widget, go.Figure(go.Scatter(x=[2])))
    assert widget.layout.autosize is True and list(widget.data[0].x) == [2]
