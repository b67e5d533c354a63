"""Explorers as a reader meets them, in JupyterLab in a headless Chromium: in a slow browser, with a
busy kernel, after a reload, in a second view, in the dark, after a restart, without a kernel; and
exported pages, opened from disk without a network.

Everywhere sliders, picture and text of an explorer must say the same. What they must say is
computed here, by an explorer that is set as the controls on the page are.
"""

import base64
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import bs4
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from playwright.sync_api import sync_playwright
from test_viz_accessible import MADE
from test_viz_cost import MACHINE
from test_viz_training import TABLE, TINY, WORLD

from sidlab.config import TrainConfig
from sidlab.viz import TrainingMonitor
from sidlab.viz.training import MUTE

# What each explorer starts with, and by how many steps a reader moves its main control.
SETTINGS = {
    "PruningExplorer": ({"user": 40, "keep": 0.5}, -9),
    "AttentionExplorer": ({"user": 3}, 5),
    "SidExplorer": ({}, 2),
    "DilutionExplorer": ({}, -1),
    "MapExplorer": ({}, 1),
    "FrontierExplorer": ({}, 2),
    "PaddingExplorer": ({"keep": 0.3}, 12),
    "QuirkExplorer": ({"mode": "corrected"}, 2),
    "CostCalculator": ({"speed": MACHINE}, 7),
}
PAPER = ("rgb(255, 255, 255)", "rgb(20, 23, 26)")  # of a light and of a dark page, as theme.py says
RESTARTED = ("PruningExplorer", "FrontierExplorer")  # run again in a new kernel
KILOBYTES = 200  # at most, until the pruning explorer stands
# What the browser may complain about, and why nothing is wrong with that.
HARMLESS = (
    # A busy page takes longer than anywidget's two seconds. Then messages to a view are dropped: it
    # gets none, the state is not an anywidget.
    "[anywidget] Failed to initialize model",
    # What ipywidgets says where there is no kernel, or one that has not run the cell.
    "widget model not found",
    "Cannot read properties of null (reading 'kernel')",
)

READ = """explorer => {
  const list = values => Array.from(values ?? [], value =>
    ArrayBuffer.isView(value) || Array.isArray(value) ? list(value) : value);
  const texts = selector => [...explorer.querySelectorAll(selector)].map(e => e.textContent);
  const controls = {}, spoken = {};
  for (const row of explorer.querySelectorAll(".widget-inline-hbox")) {
    const name = row.querySelector(".widget-label")?.textContent;
    const slider = row.querySelector(".noUi-handle"), menu = row.querySelector("select");
    const pressed = row.querySelector("button.mod-active");
    if (slider) {
      controls[name] = row.querySelector(".widget-readout").textContent;
      spoken[name] = slider.getAttribute("aria-valuetext");
    }
    else if (menu) controls[name] = menu.selectedOptions[0]?.textContent;
    else if (pressed) controls[name] = pressed.textContent;
  }
  for (const name in controls) controls[name] = controls[name]?.replaceAll("\\u00a0", " ");
  for (const name in spoken) spoken[name] = spoken[name]?.replaceAll("\\u00a0", " ");
  const plot = explorer.querySelector(".js-plotly-plot");
  const paper = explorer.querySelector(".main-svg, [data-kept=true]");
  return {
    controls, spoken,
    text: texts(".sidlab-text, .sidlab-said").join(),
    alert: texts("[role=alert]").join(),
    title: texts(".gtitle").join(),
    paper: paper && getComputedStyle(paper).backgroundColor,
    traces: (plot?._fullData ?? []).map(trace => ({ type: trace.type, ...Object.fromEntries(
      ["x", "y", "z", "base", "text"].map(key => [key, list(trace[key])])) })),
    tokens: [...explorer.querySelectorAll("[data-token][data-kept]")]
      .map(e => [Number(e.dataset.token), e.dataset.kept === "true"]),
    items: [...explorer.querySelectorAll("[data-item][data-place]")]
      .sort((a, b) => a.dataset.place - b.dataset.place).map(e => Number(e.dataset.item)),
  };
}"""


def made(name):
    """An explorer as it stands in the notebook's cell."""
    return MADE[name](**SETTINGS[name][0]).add_class(name)


def monitor():
    """One whose training takes longer than the tests do, and is stopped by them."""
    config = TrainConfig(**TINY | {"max_updates": 10**5, "epochs": 10**5, "patience": 10**5})
    return TrainingMonitor({"unpruned": config}, WORLD, TABLE).add_class("TrainingMonitor")


@functools.cache
def oracle(name):
    return made(name)


class Lab:
    """A JupyterLab at `address` that serves `folder`."""

    def __init__(self, folder, address):
        self.folder = folder
        self.address = address

    def ask(self, path, method="GET"):
        request = urllib.request.Request(f"{self.address}{path}?token=t", method=method)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read() or "null")

    def shut_down(self):
        """End all kernels."""
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", "DELETE")


@pytest.fixture(scope="module")
def browser():
    # The system's; without one Playwright's own, or its message how to install that.
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab that serves a notebook with every explorer, a cell each."""
    folder = tmp_path_factory.mktemp("lab")
    cells = ["from test_browser import made, monitor"]
    cells += [f"made({name!r})" for name in SETTINGS] + ["monitor()"]
    book = nbformat.v4.new_notebook(
        cells=list(map(nbformat.v4.new_code_cell, cells)),
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(book, folder / "all.ipynb")

    # A configuration of its own: not the tabs and the theme that are open elsewhere, and no news.
    config = folder / "config"
    (config / "labconfig").mkdir(parents=True)
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "labconfig" / "page_config.json").write_text(json.dumps(no_news))
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
    ]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(config), "PYTHONPATH": os.pathsep.join(paths)}
    lab = Lab(folder, f"http://127.0.0.1:{port}")
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                lab.ask("/api")
                break
            time.sleep(0.5)
        yield lab
        lab.shut_down()
    finally:
        server.terminate()
        server.wait(30)


def watched(context):
    """A page; `wrong` gets what goes wrong on it: console errors, exceptions, failed requests;
    `received` are the bytes from the kernel."""
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.wrong = []
    page.received = 0
    page.on("console", lambda said: said.type == "error" and page.wrong.append(said.text))
    page.on("pageerror", lambda error: page.wrong.append(error.stack or str(error)))
    page.on("requestfailed", lambda request: page.wrong.append(request.url))

    def count(message):
        page.received += len(message.encode() if isinstance(message, str) else message)

    page.on("websocket", lambda socket: socket.on("framereceived", count))
    return page


def command(page, name, **args):
    page.evaluate("([name, args]) => { jupyterapp.commands.execute(name, args) }", [name, args])


def idle(page):
    """Wait until the notebook is there and its kernel has nothing to do."""
    page.wait_for_function(
        """() => {
      globalThis.panel ??= globalThis.jupyterapp?.shell.currentWidget;
      return globalThis.panel?.sessionContext?.session?.kernel?.status === "idle";
    }""",
        timeout=300_000,
    )


def run(page, *numbers):
    """Run cells, and wait until they have run."""
    for number in numbers:
        page.evaluate("number => { panel.content.activeCellIndex = number }", number)
        page.evaluate("jupyterapp.commands.execute('notebook:run-cell')")
    idle(page)


def shown(page, name, where=".jp-Notebook"):
    """The explorer on the page, scrolled to."""
    explorer = page.locator(f"{where} .{name}")
    explorer.scroll_into_view_if_needed()
    return explorer


def pictures(page, name):
    """What there is to be seen below the explorer's cell: "live" or "saved" each."""
    outputs = page.locator(f".jp-Notebook .jp-CodeCell >> nth={[*SETTINGS].index(name) + 1}")
    outputs.scroll_into_view_if_needed()
    return outputs.locator(".jp-OutputArea-child").evaluate_all("""outputs => outputs
      .filter(output => [...output.querySelectorAll("svg, canvas, img, [data-kept]")]
        .some(picture => picture.getBoundingClientRect().width * picture.getClientRects().length))
      .map(output => output.querySelector(".sidlab-explorer") ? "live" : "saved")""")


def spelled(control, text):
    """The value of a control that shows `text`."""
    if hasattr(control, "_options_full"):
        return dict(control._options_full)[text]
    return {said: value for value, said in places(control)}[text]


def places(control):
    """(value, what the control shows there) of every place of a slider or a menu."""
    if hasattr(control, "_options_full"):
        return [(value, text) for text, value in control._options_full]
    values = np.arange(control.min, control.max + control.step / 2, control.step).round(9)
    values = [control.base**v for v in values] if hasattr(control, "base") else values
    values = [type(control.value)(v) for v in values]
    return [(value, format(value, control.readout_format)) for value in values]


def state(name, controls):
    """What the explorer says when its controls show `controls`, {description: text}."""
    explorer = oracle(name)
    explorer.set(
        **{
            key: spelled(control, controls[control.description])
            for key, control in explorer.controls.items()
            if control.description in controls
        }
    )
    return explorer.state()


def nested(values):
    """The lists that an array of a figure stands for."""
    if not isinstance(values, dict):
        return values
    array = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    shape = str(values.get("shape", array.size)).split(",")
    return array.reshape([int(side) for side in shape]).tolist()


def same(seen, wanted):
    """Whether two nested lists of numbers (None for what is missing) or of texts are the same."""
    try:
        seen = np.array(seen, float)
        wanted = np.array(wanted, float)
    except (TypeError, ValueError):
        return list(map(str, seen)) == list(map(str, wanted))
    return seen.shape == wanted.shape and np.allclose(seen, wanted, atol=1e-9, equal_nan=True)


def differences(seen, state):
    """What on a page is not as `state` says."""
    out = [f"an alert: {seen['alert']}"] if seen["alert"] else []
    if seen["spoken"].items() - seen["controls"].items():
        out.append(f"said to assistive technology: {seen['spoken']}")
    text = bs4.BeautifulSoup(state["text"], "html.parser").get_text()
    if seen["text"].split() != text.split():
        out.append(f"text {seen['text'][:150]!r}, not {text[:150]!r}")
    if "figure" not in state:
        if {*map(tuple, seen["tokens"])} != {*enumerate(map(bool, state["tokens"]["kept"]))}:
            out.append(f"tokens {seen['tokens']}")
        if seen["items"] != state["list"]["after"]:
            out.append(f"items {seen['items']}, not {state['list']['after']}")
        return out

    title = bs4.BeautifulSoup(
        state["figure"]["layout"].get("title", {}).get("text", ""), "html.parser"
    ).get_text()
    if seen["title"] != title:
        out.append(f"title {seen['title']!r}, not {title!r}")
    traces = state["figure"]["data"]
    types = [trace["type"] for trace in seen["traces"]]
    if types != [trace.get("type", "scatter") for trace in traces]:
        return [*out, f"traces {types}"]
    out += [
        f"{key} of trace {number}"
        for number, (drawn, trace) in enumerate(zip(seen["traces"], traces))
        for key in drawn.keys() & trace.keys() - {"type"}
        if not isinstance(trace[key], str) and not same(drawn[key], nested(trace[key]))
    ]
    return out


def until(holds, what, seconds=90):
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.3)


def assert_agree(explorer, name, **wanted):
    """Controls, picture and text say the same as soon as all is drawn; controls named in `wanted`
    show that."""
    wrong = None
    end = time.monotonic() + 60
    while wrong != []:
        seen = explorer.evaluate(READ)
        if None in seen["controls"].values() or len(seen["controls"]) < len(wanted):
            wrong = ["a control shows nothing"]
        else:
            wrong = differences(seen, state(name, seen["controls"]))
            wrong += [
                f"{label} is not at {text}"
                for label, text in wanted.items()
                if seen["controls"][label] != text
            ]
        if wrong:
            assert time.monotonic() < end, f"at {seen['controls']}: {'; '.join(wrong)}"
            time.sleep(0.3)


def move(explorer, name, steps):
    """Move the main control by keyboard, as a reader does, the other way where it ends; returns
    {label: what it must show}."""
    model = oracle(name)
    control = model.controls[model.exported]
    label = control.description
    texts = [text for _, text in places(control)]
    place = texts.index(explorer.evaluate(READ)["controls"][label])
    steps = steps if 0 <= place + steps < len(texts) else -steps
    after = texts[place + steps]
    slider = explorer.get_by_role("slider", name=label)
    if slider.count():
        slider.focus()
        for _ in range(abs(steps)):
            explorer.page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
    else:
        explorer.get_by_label(label).select_option(after.replace(" ", "\u00a0"))
    return {label: after}


@pytest.fixture(scope="module")
def slow(browser, lab):
    """The notebook, opened and run in a browser that is six times slower. `page.first`: bytes until
    the first explorer, that of pruning, stood."""
    page = watched(browser.new_context(viewport={"width": 1280, "height": 720}))
    page.cdp = page.context.new_cdp_session(page)
    page.cdp.send("Emulation.setCPUThrottlingRate", {"rate": 6})
    page.goto(f"{lab.address}/lab/tree/all.ipynb?token=t")
    idle(page)
    run(page, 0)
    before = page.received
    run(page, 1)
    shown(page, "PruningExplorer").locator("[data-token]").first.wait_for()
    page.first = page.received - before
    run(page, *range(2, len(SETTINGS) + 2))
    return page


def test_the_pruning_explorer_costs_little_until_it_stands(slow):
    assert 0 < slow.first < 1000 * KILOBYTES


@pytest.mark.parametrize("name", SETTINGS)
def test_in_a_slow_browser(slow, name):
    explorer = shown(slow, name)
    assert_agree(explorer, name)
    assert_agree(explorer, name, **move(explorer, name, SETTINGS[name][1]))


def curve(page):
    """How many evaluations the training monitor shows."""
    return sum(len(trace["x"]) for trace in shown(page, "TrainingMonitor").evaluate(READ)["traces"])


@pytest.fixture(scope="module")
def reloaded(slow):
    """The same page, no longer slowed down, saved and loaded anew while a model trains."""
    slow.cdp.send("Emulation.setCPUThrottlingRate", {"rate": 1})
    shown(slow, "TrainingMonitor").get_by_role("button", name="Start").click()
    until(lambda: curve(slow), "a training curve")
    slow.evaluate("jupyterapp.commands.execute('docmanager:save')")
    slow.reload()
    idle(slow)
    return slow


def test_the_training_monitor_after_a_reload(reloaded):
    until(lambda: curve(reloaded), "the curves of a training that runs")
    points = curve(reloaded)
    until(lambda: curve(reloaded) > points, "more of the curves")
    explorer = shown(reloaded, "TrainingMonitor")
    start, stop = (explorer.get_by_role("button", name=name) for name in ("Resume", "Stop"))
    stop.click()
    until(lambda: "paused" in explorer.inner_text(), "the end of training")
    mute = [MUTE in button.get_attribute("class") for button in (start, stop)]
    assert mute == [False, True]


@pytest.mark.parametrize("name", SETTINGS)
def test_after_a_reload(reloaded, name):
    explorer = shown(reloaded, name)
    assert_agree(explorer, name)
    assert_agree(explorer, name, **move(explorer, name, -SETTINGS[name][1]))
    assert pictures(reloaded, name) == ["live"]


def test_a_dragged_slider(reloaded):
    explorer = shown(reloaded, "PruningExplorer")
    slider = explorer.get_by_role("slider", name="kept share")
    before = slider.get_attribute("aria-valuetext")
    box = slider.bounding_box()
    x = box["x"] + box["width"] / 2
    y = box["y"] + box["height"] / 2
    reloaded.mouse.move(x, y)
    reloaded.mouse.down()
    reloaded.mouse.move(x + 60, y, steps=30)
    reloaded.mouse.up()
    until(lambda: slider.get_attribute("aria-valuetext") != before, "a slider that has moved")
    assert_agree(explorer, "PruningExplorer")


def test_moved_while_the_kernel_is_busy(reloaded, lab):
    wait = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.1)"
    reloaded.evaluate(
        """code => {
      globalThis.waits = true;
      const future = panel.sessionContext.session.kernel.requestExecute({ code });
      future.done.finally(() => { globalThis.waits = false });
    }""",
        wait,
    )
    moved = {}
    try:
        for name, (_, steps) in SETTINGS.items():
            moved[name] = move(shown(reloaded, name), name, steps)
        assert reloaded.evaluate("waits"), "the kernel was free"
    finally:
        (lab.folder / "go").touch()
    for name, wanted in moved.items():
        assert_agree(shown(reloaded, name), name, **wanted)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_view(reloaded, name):
    number = [*SETTINGS].index(name) + 1
    reloaded.evaluate("number => { panel.content.activeCellIndex = number }", number)
    command(reloaded, "notebook:create-output-view")
    assert_agree(shown(reloaded, name, ".jp-LinkedOutputView"), name)
    for where, steps in ((".jp-LinkedOutputView", -1), (".jp-Notebook", 1)):
        wanted = move(shown(reloaded, name, where), name, steps * (SETTINGS[name][1] > 0 or -1))
        for view in (".jp-Notebook", ".jp-LinkedOutputView"):
            assert_agree(shown(reloaded, name, view), name, **wanted)
    reloaded.evaluate("""() => {
      for (const tab of [...jupyterapp.shell.widgets("main")]) if (tab !== panel) tab.close();
      jupyterapp.shell.activateById(panel.id);
    }""")


def look(page, name):
    return shown(page, name).evaluate(READ)["paper"]


def test_as_dark_as_the_page(reloaded):
    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        command(reloaded, "apputils:change-theme", theme=theme)
        for name in SETTINGS:
            until(
                lambda name=name, dark=dark: look(reloaded, name) == PAPER[dark],
                f"{name} in {theme}",
            )


def complaints(page):
    """What went wrong on a page since this was asked last, but for what is harmless."""
    found = {said for said in page.wrong if not any(words in said for words in HARMLESS)}
    page.wrong.clear()
    return "\n".join(found)


def test_nothing_went_wrong_until_now(reloaded):
    assert complaints(reloaded) == ""


def test_after_a_restart_of_the_kernel(reloaded):
    reloaded.evaluate("panel.sessionContext.session.kernel.restart()")
    idle(reloaded)
    assert pictures(reloaded, "FrontierExplorer") == ["live"]
    run(reloaded, 0, *([*SETTINGS].index(name) + 1 for name in RESTARTED))
    for name in RESTARTED:
        explorer = shown(reloaded, name)
        assert_agree(explorer, name)
        assert_agree(explorer, name, **move(explorer, name, SETTINGS[name][1]))


@pytest.mark.parametrize("kernel", [False, True], ids=["no kernel", "new kernel"])
def test_a_saved_notebook(reloaded, browser, lab, kernel):
    reloaded.evaluate("jupyterapp.commands.execute('docmanager:save')")
    lab.shut_down()
    page = watched(browser.new_context(viewport={"width": 1280, "height": 720}))
    page.goto(f"{lab.address}/lab/workspaces/{kernel}?token=t")
    page.wait_for_function("globalThis.jupyterapp?.restored")
    page.evaluate(
        """async kernel => {
      await jupyterapp.restored;
      globalThis.panel = await jupyterapp.commands.execute("docmanager:open", {
        path: "all.ipynb", kernelPreference: { shouldStart: kernel, canStart: kernel } });
      await panel.context.ready;
    }""",
        kernel,
    )
    if kernel:
        idle(page)
    for name in SETTINGS:
        until(lambda name=name: pictures(page, name) == ["saved"], f"the picture of {name}")
    assert bool(lab.ask("/api/sessions")) == kernel
    assert complaints(page) == ""


EXPORTED = {"PruningExplorer": [0.2, 0.5, 1.0], "FrontierExplorer": None}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_page_offline(browser, tmp_path, name):
    model = oracle(name)
    control = model.controls[model.exported]
    path = model.export(tmp_path / "page.html", values=EXPORTED[name])
    context = browser.new_context(viewport={"width": 1300, "height": 900}, color_scheme="dark")
    context.set_offline(True)
    page = watched(context)
    page.goto(path.as_uri())
    slider = page.get_by_role("slider", name=control.description)
    slider.focus()
    page.keyboard.press("Home")
    main = page.locator("main")
    output = page.locator("output")
    for value, text in places(control):
        if EXPORTED[name] and value not in EXPORTED[name]:
            continue
        wanted = state(name, {control.description: text})
        until(lambda wanted=wanted: not differences(main.evaluate(READ), wanted), f"{name}: {text}")
        assert output.inner_text() == slider.get_attribute("aria-valuetext") == text
        page.keyboard.press("ArrowRight")
    assert main.evaluate(READ)["paper"] == PAPER[1]  # dark, as the reader's system is
    assert complaints(page) == ""
    context.close()
