"""Render the course as a static site that opens from disk, without a network:

python tools/site.py [--settings tiny|quick] [--output build/site]

Runs the notebooks (run.py), with explorers that export themselves instead of going live, and writes
every notebook as a page: the student's with outputs, the others (solutions, study.ipynb,
reproduce.ipynb) as they are. The index is notebooks/README.md; docs/*.md are pages, too. Other
files that pages link to are copied to linked/. Pages are light or dark as the reader's system is.
Plotly stands beside them once, for all.
"""

import argparse
import functools
import html
import itertools
import json
import os
import pathlib
import shutil
import sys

import build
import nbformat
import plotly.io as pio
import run
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from plotly.offline import get_plotlyjs

from sidlab.figures import theme
from sidlab.files import write

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
# Files that a browser shows; others get the ending .txt
AS_IT_IS = {".html", ".svg", ".png", ".json"}

# JupyterLab's page without what it would load from elsewhere: require.js, MathJax, mermaid.
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}
<style>
:root { color-scheme: light dark }
body.jp-Notebook { max-width: 1200px; margin: 0 auto; padding: 1rem; \
background: var(--jp-layout-color0) }
.jp-InputPrompt, .jp-OutputPrompt { display: none }
iframe { border: 1px solid var(--jp-border-color1) }
@media (prefers-color-scheme: dark) { {{ resources.dark }} }
</style>
<script src="{{ resources.up }}plotly.min.js"></script>
<script src="{{ resources.up }}figures.js"></script>
{% endblock %}
"""

SCRIPT = """const looks = %s, dark = matchMedia("(prefers-color-scheme: dark)"), shown = [];
const look = () => looks[dark.matches ? 1 : 0];
function show(id, figure) {
  shown.push(id);
  Plotly.newPlot(id, {...figure, layout: {...figure.layout, template: look()}, \
config: {responsive: true, displayModeBar: false}});
}
dark.addEventListener("change", () => shown.forEach(id => Plotly.relayout(id, {template: look()})));
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="quick", choices=sorted(run.load_settings()))
    parser.add_argument("--output", default="build/site", type=pathlib.Path)
    args = parser.parse_args()
    executed = args.output.with_name(f"{args.output.name}-run").resolve()
    shutil.rmtree(executed, ignore_errors=True)
    results = run.run(
        sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")),
        run.load_settings()[args.settings],
        executed,
        environment={"SIDLAB_SITE": str(executed / "explorers")},
        keep_widgets=True,
    )
    if any(result["problems"] for result in results):
        sys.exit("the site is not rendered: a notebook failed")
    print(f"open {render(NOTEBOOKS, executed, args.output)}")


def render(notebooks, executed, output) -> pathlib.Path:
    """Render the folder `notebooks` as pages in `output`, with outputs from the notebooks in
    `executed`; returns the index page.

    ValueError if a page links to what is no file, or `output` holds something else than a site.
    """
    notebooks, executed, output = (
        pathlib.Path(folder).resolve() for folder in (notebooks, executed, output)
    )
    if output.exists() and any(output.iterdir()) and not (output / "figures.js").exists():
        raise ValueError(
            f"output={str(output)!r} holds something else than a site, which would be lost; give an"
            " empty or a new folder"
        )
    shutil.rmtree(output, ignore_errors=True)
    root = notebooks.parent
    index = notebooks / "README.md"
    ours = [*notebooks.glob("*.ipynb"), *notebooks.glob("solutions/*.ipynb")]
    pages = {path: path.relative_to(notebooks).with_suffix(".html") for path in ours}
    pages |= {path: path.relative_to(root).with_suffix(".html") for path in root.glob("docs/*.md")}
    pages[index] = pathlib.PurePath("index.html")
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"site.html.j2": TEMPLATE})], template_file="site.html.j2"
    )
    dark = next(
        path
        for folder in exporter.template_paths
        if (path := pathlib.Path(folder) / "static" / "theme-dark.css").exists()
    )
    for path, page in pages.items():
        if path.suffix == ".md":
            notebook = new_notebook(cells=[new_markdown_cell(path.read_text(encoding="utf-8"))])
        else:
            ran = executed / path.relative_to(notebooks)
            notebook = nbformat.read(ran if ran.exists() else path, as_version=4)
        change = functools.partial(link, path=path, pages=pages, root=root, output=output)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = build.relink(cell.source, change)
        without_kernel(notebook)
        up = "../" * (len(page.parts) - 1)
        notebook.metadata["title"] = title(notebook) or path.stem
        body, _ = exporter.from_notebook_node(
            notebook, {"dark": dark.read_text(encoding="utf-8"), "up": up}
        )
        write(output / page, body)
    write(output / "plotly.min.js", get_plotlyjs())
    write(
        output / "figures.js",
        SCRIPT
        % json.dumps([pio.templates[name].to_plotly_json() for name in theme.TEMPLATES.values()]),
    )
    inline = f"<script>{get_plotlyjs()}</script>"
    beside = '<script src="../plotly.min.js"></script>'
    for explorer in (executed / "explorers").glob("*.html"):
        write(
            output / "explorers" / explorer.name,
            explorer.read_text(encoding="utf-8").replace(inline, beside),
        )
    return output / pages[index]


def title(notebook):
    """The first heading that begins a cell."""
    return next(filter(None, (build.title([cell]) for cell in notebook.cells)), None)


def link(target, path, pages, root, output):
    """`target`, a relative link of the file `path`, as it is in the site: to a page, or to a copy
    in linked/ of what is no page.
    """
    name, hash_sign, anchor = target.partition("#")
    to = pathlib.Path(os.path.normpath(path.parent / name))
    if to in pages:
        there = pages[to]
    elif to.is_file():
        # Not "files", which nbconvert takes away
        there = pathlib.PurePath("linked") / to.relative_to(root)
        if to.suffix not in AS_IT_IS:
            there = there.with_name(f"{there.name}.txt")
        (output / there).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(to, output / there)
    else:
        raise ValueError(f"{path.relative_to(root)} links to {target!r}, which is no file")
    return (
        pathlib.PurePath(os.path.relpath(there, pages[path].parent)).as_posix() + hash_sign + anchor
    )


def without_kernel(notebook):
    """Put HTML in place of what needs a kernel or JupyterLab to be seen: plotly figures and
    widgets.
    """
    models = notebook.metadata.pop("widgets", {}).get(run.WIDGETS, {}).get("state", {})
    number = itertools.count(1)
    for output in itertools.chain(*(cell.get("outputs", []) for cell in notebook.cells)):
        data = output.get("data", {})
        if PLOTLY in data or WIDGET in data:
            note = (
                "<p><i>Live in JupyterLab; here as it was left.</i></p>" if WIDGET in data else ""
            )
            output.data = new_output(
                "display_data", {"text/html": output_html(data, models, number) + note}
            ).data


def output_html(data, models, number):
    """An output of a cell or of an Output widget, {MIME type: content}, as HTML. `number` counts
    the figures.
    """
    if PLOTLY in data:
        return figure_html(data[PLOTLY], f"figure-{next(number)}")
    if WIDGET in data:
        return widget_html(data[WIDGET]["model_id"], models, number)
    return data["text/html"] if "text/html" in data else markdown2html(data["text/markdown"])


def figure_html(figure, name):
    """A plotly figure, {"data", "layout"}, as an element named `name`, drawn by figures.js."""
    label = (figure["layout"].get("title") or {}).get("text") or "Figure"
    content = {key: figure[key] for key in ("data", "layout") if key in figure}
    content["layout"] = {
        key: value for key, value in content["layout"].items() if key != "template"
    }
    script = json.dumps(content).replace("</", "<\\/")  # or a text could end the script
    return (
        f'<div id="{name}" role="img"'
        f' aria-label="{html.escape(label)}"></div>\n<script>show("{name}", {script});</script>'
    )


def widget_html(name, models, number):
    """A widget as text: containers by their children, choices as lists, outputs as those of cells,
    other controls by label and value.
    """
    model = models.get(name.removeprefix("IPY_MODEL_"), {"model_name": "", "state": {}})
    kind = model["model_name"]
    state = model["state"]
    label = html.escape(state.get("description") or "")
    value = state.get("value")
    if "children" in state:
        return (
            "<div>"
            + "".join(widget_html(child, models, number) for child in state["children"])
            + "</div>"
        )
    if kind == "HTMLModel":
        return f"<div>{value}</div>"
    if kind == "OutputModel":
        return "".join(
            f"<div>{output_html(output['data'], models, number)}</div>"
            for output in state["outputs"]
        )
    if "_options_labels" in state:
        chosen = state["index"] if isinstance(state["index"], list) else [state["index"]]
        options = "".join(
            f"<li>{html.escape(option)}{' (chosen)' if place in chosen else ''}</li>"
            for place, option in enumerate(state["_options_labels"])
        )
        return f"<p>{label}</p><ul>{options}</ul>"
    if kind == "ButtonModel":
        return f"<p><button disabled>{label}</button></p>"
    if value is None:
        return ""
    shown = " to ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"<p>{label} {html.escape(shown)}</p>"


if __name__ == "__main__":
    main()
