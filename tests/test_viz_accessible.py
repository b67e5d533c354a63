"""What all explorers owe every reader: labels, keyboard, a text that says the same, both themes,
colours that stay apart.
"""

import itertools
import re

import ipywidgets as widgets
import numpy as np
import pytest

from sidlab import SidTable, TrainConfig, load_catalogue, viz
from sidlab.course.labels import Labels
from sidlab.figures import theme
from sidlab.viz.view import ChartView

# Widgets that ipywidgets draws as native, focusable inputs or, sliders, as handles that take the
# arrow keys.
KEYBOARD = (
    widgets.IntSlider,
    widgets.FloatSlider,
    widgets.SelectionSlider,
    widgets.FloatLogSlider,
    widgets.Dropdown,
    widgets.ToggleButtons,
    widgets.RadioButtons,
    widgets.Checkbox,
    widgets.Button,
    widgets.BoundedFloatText,
)


def monitor(**kwargs):
    catalogue = load_catalogue("planted", n_users=20)
    table = SidTable(
        np.array(np.unravel_index(np.arange(catalogue.n_items), (8, 8, 4))).T, (8, 8, 4)
    )
    return viz.TrainingMonitor(
        {"unpruned": TrainConfig.preset("smoke")}, catalogue, table, **kwargs
    )


MADE = {
    "PruningExplorer": viz.PruningExplorer,
    "AttentionExplorer": viz.AttentionExplorer,
    "SidExplorer": viz.SidExplorer,
    "DilutionExplorer": viz.DilutionExplorer,
    "MapExplorer": viz.MapExplorer,
    "FrontierExplorer": viz.FrontierExplorer,
    "TrainingMonitor": monitor,
    "CostCalculator": viz.CostCalculator,
    "PaddingExplorer": viz.PaddingExplorer,
    "QuirkExplorer": viz.QuirkExplorer,
}


def test_no_explorer_is_missing():
    assert MADE.keys() == set(viz.__all__) - {"Explorer", "use_theme"}


def inputs(widget):
    """All that a reader can operate below `widget`; figures and plain texts are none."""
    for child in getattr(widget, "children", ()):
        yield from inputs(child)
    if isinstance(widget, (widgets.ValueWidget, widgets.Button)) and not isinstance(
        widget, (widgets.HTML, widgets.Label)
    ):
        yield widget


@pytest.mark.parametrize("name", MADE)
def test_controls_have_labels_and_work_by_keyboard_and_the_figure_has_a_text(name):
    explorer = MADE[name]()
    found = list(inputs(explorer))
    assert found and {id(control) for control in explorer.controls.values()} <= {
        id(control) for control in found
    }
    for control in found:
        assert isinstance(control, KEYBOARD), (
            f"{name}: {type(control).__name__} is not known to work by keyboard"
        )
        assert re.search(r"\w", control.description), (
            f"{name}: a {type(control).__name__} without a label"
        )
    assert explorer.heading and explorer.view.heading == explorer.heading
    assert any(isinstance(child, Labels) for child in explorer.children)
    words = re.sub(r"<[^>]*>", " ", explorer.text).split()
    assert len(words) > 15 or name == "TrainingMonitor", "before a run there is little to tell"
    assert re.search(r"\d", explorer.text)


@pytest.mark.parametrize("name", MADE)
def test_a_state_leaves_light_and_dark_to_the_view(name):
    explorer = MADE[name]()
    layout = explorer.content.get("figure", {}).get("layout", {})
    assert not {"template", "paper_bgcolor", "plot_bgcolor"} & layout.keys()
    if not isinstance(explorer.view, ChartView):
        return  # a view of its own brings its colours
    light, dark = (look["layout"]["paper_bgcolor"] for look in explorer.view.library.looks)
    assert (light, dark) == ("#FFFFFF", "#14171A")


@pytest.mark.parametrize("name", MADE)
def test_every_menu_shows_what_is_chosen(name):
    menus = [control for control in inputs(MADE[name]()) if hasattr(control, "_options_full")]
    blank = [
        control.description
        for control in menus
        if control.index is None or not control._options_labels[control.index]
    ]
    assert not blank, "a value of None leaves a menu blank"


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
# deficiency" (2009), severity 1, linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(color, vision):
    """CIE L*a*b* (D65) of a hex colour as somebody with this vision sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(
        np.array(vision) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4),
        0,
        1,
    )
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / [0.9505, 1, 1.089]
    )
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_keep_their_distance(vision):
    palette = [
        theme.ORANGE,
        theme.SKY,
        theme.GREEN,
        theme.YELLOW,
        theme.BLUE,
        theme.VERMILLION,
        theme.PURPLE,
        theme.GREY,
    ]
    seen = [lab(color, VISION[vision]) for color in palette]
    # 2.3 is a just noticeable difference; marks and dashes tell methods apart besides.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 4 * 2.3
