"""As a reader does it: JupyterLab in a headless Chromium, the retention slider of 04_live_pruning dragged and moved by keyboard; and an
exported explorer opened from disk without a network."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import papermill
import pytest
from conftest import ROOT
from playwright.sync_api import sync_playwright

from sidlab.viz import PruningExplorer

TRACES = """plot => plot._fullData.map(t => ({type: t.type, x: Array.from(t.x || []), base: Array.from(t.base || []),
                                         z: Array.from(t.z || [], row => Array.from(row))}))"""


@pytest.fixture(scope="module")
def browser():
    # The system's; without one Playwright's own, or its message how to install that.
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves a copy of the notebook."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "04_live_pruning.ipynb", folder)
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
             "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}",
             "--LabApp.expose_app_in_browser=True"],
            stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"JUPYTER_CONFIG_DIR": str(folder / "config")})  # not the tabs and the theme that are open elsewhere
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api?token=t")
                break
            time.sleep(0.5)
        yield f"{address}/lab/tree/04_live_pruning.ipynb?token=t"
    finally:
        server.terminate()
        server.wait(30)


def watched(context):
    """A page, and the list of what went wrong on it: console errors, exceptions, failed requests."""
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    return page, wrong


def shown(explorer):
    """What the page shows: the kept and the pruned bars of the strip as sets of places, the heatmaps, the top-10."""
    traces = explorer.locator(".js-plotly-plot").evaluate(TRACES)
    bars = [{(x, round(base)) for x, base in zip(t["x"], t["base"])} for t in traces if t["type"] == "bar"]
    heatmaps = [np.array([[np.nan if v is None else v for v in row] for row in t["z"]], float) for t in traces if t["type"] == "heatmap"]
    return bars, heatmaps, explorer.inner_text()


def share(slider):
    """The kept share that the slider tells assistive technology, in whole percent as its steps are."""
    return int(slider.get_attribute("aria-valuetext").rstrip("%")) / 100


def computed(user, keep):
    """The same from the package, without a browser."""
    explorer = PruningExplorer(user=user, keep=keep)
    kept = explorer.pruned.kept.numpy().reshape(len(explorer.histories[user - 1]) - 1, -1)
    bars = [{tuple(place) for place in np.argwhere(which).tolist()} for which in (kept, ~kept)]
    behind = np.full((kept.size, kept.size), np.nan)
    at = np.flatnonzero(kept.ravel())
    behind[np.ix_(at, at)] = explorer.pruned.attention[0].mean(0).numpy()
    return bars, behind, explorer.titles(explorer.pruned.items.tolist())


def assert_shows(explorer, user, keep):
    bars, heatmaps, text = shown(explorer)
    wanted_bars, behind, titles = computed(user, keep)
    assert bars == wanted_bars
    np.testing.assert_allclose(heatmaps[1], behind, atol=1e-4)
    rows = re.findall(r"^\s*\d+\t(?:★ )?([^\t\n]+?)\t", text, re.MULTILINE)
    assert rows[:10] == titles, text


def test_the_retention_slider_in_jupyterlab(browser, lab):
    parameters = papermill.inspect_notebook(ROOT / "notebooks" / "04_live_pruning.ipynb")
    user, keep = (eval(parameters[name]["default"]) for name in ("user", "keep"))
    context = browser.new_context(viewport={"width": 1500, "height": 1400})
    page, wrong = watched(context)
    page.goto(lab)
    idle = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
    page.wait_for_function(idle, timeout=120_000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    explorer = page.locator(".sidlab-explorer").filter(has=page.locator(".js-plotly-plot")).first
    explorer.wait_for(timeout=120_000)
    page.wait_for_function(idle, timeout=300_000)
    slider = explorer.get_by_role("slider", name="kept share")  # found by the name that assistive technology reads
    slider.scroll_into_view_if_needed()
    assert_shows(explorer, user, keep)

    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y, steps=10)
    page.mouse.up()
    page.wait_for_timeout(1500)
    dragged = share(slider)
    assert dragged > keep + 0.1
    assert_shows(explorer, user, dragged)

    slider.focus()
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(2500)
    pressed = share(slider)
    assert pressed == pytest.approx(dragged - 0.25, abs=1e-6)
    assert_shows(explorer, user, pressed)
    assert not wrong
    context.close()


def test_an_exported_explorer_offline(browser, tmp_path):
    live = PruningExplorer()
    path = live.export(tmp_path / "pruning.html", values=[0.2, 0.5, 1.0])
    context = browser.new_context(viewport={"width": 1300, "height": 1400}, color_scheme="dark")
    context.set_offline(True)
    page, wrong = watched(context)
    page.goto(path.as_uri())
    slider = page.get_by_role("slider", name="kept share")
    slider.focus()
    page.keyboard.press("Home")
    main = page.locator("main")
    for keep in (0.2, 0.5, 1.0):
        assert_shows(main, 1, keep)
        assert page.locator("output").inner_text() == slider.get_attribute("aria-valuetext")
        page.keyboard.press("ArrowRight")
    background = page.locator(".js-plotly-plot").evaluate("plot => plot._fullLayout.paper_bgcolor")
    assert background.lower() in ("#14171a", "rgb(20, 23, 26)"), "dark, as the reader's system is"
    assert not wrong
    context.close()
