"""An explorer as a page that needs no kernel: its states, one for each value of a control."""

import html
import json
import pathlib

from plotly.offline import get_plotlyjs

from sidlab.files import write
from sidlab.viz.view import ChartView, View, looks

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
        "env": _script({"heading": title} | ({"looks": looks()} if charts else {})),
    }
    return write(path, page)


def _script(value):
    return json.dumps(value).replace("</", "<\\/")  # or a text could end the script
