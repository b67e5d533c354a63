"""Make the course's notebooks from their sources: python tools/build.py

`notebooks/source/NN_name.py` (percent format of jupytext, no front matter) becomes
`notebooks/NN_name.ipynb` for the student, in which the solutions are stubs, and
`notebooks/solutions/NN_name.ipynb`, in which they stand. The same sources always give the same
bytes. A source with an error is named with its cell, and its notebooks stay as they were; the
others are written.

How a source is written:

* Cells begin with `# %% [markdown]` or `# %%`, tagged ones with `# %% tags=["setup"]`. Errors count
  the cells of the source from 1.
* The first cell is markdown and begins with `# Title`; then **Goals**, **You need**, **Time**
  (minutes), **Machine**. Links to the previous and the next notebook and to the index are not
  written: they are added here, from the titles. Other links are relative to notebooks/, the folder
  in which the code runs.
* One code cell is tagged "parameters": what papermill may replace.
* Cells tagged "setup" hold the imports and data that exercises need; they take less than 3 s.
* An exercise is a markdown cell `### Exercise 1 · ★★☆ · 10 minutes` with the task and, in
  <details>, a hint, and then a code cell tagged "exercise" that defines a function. Its solution
  stands between the lines `### BEGIN SOLUTION` and `### END SOLUTION`, indented like the code; the
  student finds `raise NotImplementedError("your turn")` in their place. The next code cell is
  tagged "check" and calls `teach.check("name", function)`. What comes after must not need the
  student's function.
* A cell with `teach.predict` holds the truth, so JupyterLab shows it folded up, but for its first
  line: that is `teach.predict(`, and nothing but the call is in the cell. What gives the answer
  away comes as `then=`, not in the cells behind.
* At the end stand `## Summary`, one `teach.quiz` of five questions, whose cell is folded up, too,
  and `## Links` to papers and code.
* The last code cell is tagged "record" and passes a dict of numbers to `teach.record`: what run.py
  asserts on. It is folded up as well.
* No LaTeX, since pages render offline: formulas are unicode in code blocks. No `Output` widgets and
  no `interact`, which keep errors to themselves.

A source without a number is no lesson: of these rules only those on the title, the parameters,
LaTeX and widgets hold, and it has no solutions.
"""

import pathlib
import re
import sys

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from sidlab.files import write

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
LESSON = re.compile(r"\d\d_")
STUB = 'raise NotImplementedError("your turn")'
PREDICTION = re.compile(r"teach\.predict\(\n(?:(?:    .*)?\n)*\)")
FOLDED = re.compile(r"\bteach\.(predict|quiz|record)\(")
# What JupyterLab writes when it opens a notebook, so that it is not changed by that. The kernel
# that `make setup` and Binder configure gives this version, whichever Python it is (see
# ../binder/ipython_kernel_config.py).
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3",
    },
}
FOLDER = """import os
import pathlib

if pathlib.Path.cwd().name == "solutions":
    os.chdir("..")  # where the notebook without solutions runs: its files are found from there"""
BEGIN = "### BEGIN SOLUTION"
END = "### END SOLUTION"
SOLUTION = re.compile(
    rf"^([ \t]*){BEGIN}[ \t]*\n(.*?)^[ \t]*{END}[ \t]*$", re.MULTILINE | re.DOTALL
)
# Of markdown: blocks and `spans`
CODE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$|(`+)(?!`).*?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
LATEX = re.compile(r"\$\$|(?<!\\)\$[^$\n]+\$|\\\\[(\[]|\\begin\{")
HIDES_ERRORS = re.compile(
    r"\b(?:Output|interact|interactive|interact_manual|interactive_output)\s*\("
)
# To a file
LINK = re.compile(
    r"(\]\(\s*<?|\b(?:src|href)=[\"'])(?![<\s#/]|[a-z][a-z0-9+.-]*:)([^)>\"'\s]+)", re.IGNORECASE
)


class SourceError(ValueError):
    """A source does not keep to the rules above. The message names the file and the cell."""


def main():
    notebooks, errors = build(NOTEBOOKS / "source")
    for name, text in notebooks.items():
        write(NOTEBOOKS / name, text)
    print(f"{len(notebooks)} notebooks written")
    sys.exit("\n".join(map(str, errors)) if errors else 0)


def build(folder) -> tuple[dict[str, str], list[SourceError]]:
    """Make the notebooks of all sources in `folder`: ({path below notebooks/: text of the .ipynb},
    errors).
    """
    paths = sorted(pathlib.Path(folder).glob("*.py"))
    sources = {path.stem: read(path) for path in paths}
    titles = {stem: title(cells) or stem for stem, cells in sources.items() if LESSON.match(stem)}
    notebooks = {}
    errors = []
    for path in paths:
        cells = sources[path.stem]
        try:
            check(path.name, cells)
        except SourceError as error:
            errors.append(error)
            continue
        if not LESSON.match(path.stem):
            index = new_markdown_cell("[Index](README.md)")
            notebooks[f"{path.stem}.ipynb"] = notebook(path.stem, [index, *cells])
            continue
        top, bottom = navigation(path.stem, titles)
        back = new_markdown_cell(
            f"Solutions. [The notebook without them](../{path.stem}.ipynb) · [Index](../README.md)"
        )
        notebooks[f"{path.stem}.ipynb"] = notebook(
            path.stem, [top, *(without_solution(cell) for cell in cells), bottom]
        )
        notebooks[f"solutions/{path.stem}.ipynb"] = notebook(
            path.stem, [back, new_code_cell(FOLDER), *map(one_folder_down, cells), back]
        )
    return notebooks, errors


def read(path):
    """The cells of a source, as jupytext reads them."""
    return jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent").cells


def title(cells) -> str | None:
    """The first heading of the first cell, without its `#`."""
    found = cells and cells[0].cell_type == "markdown" and re.match(r"# +(.+)", cells[0].source)
    return found[1].strip() if found else None


def navigation(stem, titles):
    """The first and the last cell of a student's notebook: links to its neighbours in `titles`,
    {stem: title}, and to the index.
    """
    stems = list(titles)
    place = stems.index(stem)
    links = ["[Index](README.md)"]
    if place > 0:
        links.insert(0, f"[← {titles[stems[place - 1]]}]({stems[place - 1]}.ipynb)")
    if place + 1 < len(stems):
        links.append(f"[{titles[stems[place + 1]]} →]({stems[place + 1]}.ipynb)")
    top = " · ".join(links)
    return new_markdown_cell(top), new_markdown_cell(
        f"[Solutions](solutions/{stem}.ipynb)\n\n{top}"
    )


def notebook(stem, cells) -> str:
    """The text of an .ipynb. Of a cell's metadata only its tags stay; its id is the stem and its
    place.
    """
    out = new_notebook(metadata=METADATA)
    for place, cell in enumerate(cells):
        new = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        metadata = {"tags": tags(cell)} if tags(cell) else {}
        if cell.cell_type == "code" and FOLDED.search(cell.source):
            metadata["jupyter"] = {"source_hidden": True}
            if "record" in tags(cell):
                metadata["jupyter"]["outputs_hidden"] = True
        out.cells.append(new(cell.source, id=f"{stem}-{place:02}", metadata=metadata))
    nbformat.validate(out)
    return nbformat.writes(out) + "\n"


def tags(cell):
    return list(cell.metadata.get("tags", []))


def without_solution(cell):
    """The cell with its solutions replaced by stubs."""
    if "exercise" not in tags(cell):
        return cell
    return new_code_cell(
        SOLUTION.sub(lambda found: found[1] + STUB, cell.source), metadata=cell.metadata
    )


def relink(text: str, change) -> str:
    """Markdown with `change(target)` in place of the target of every relative link and image
    outside of code.
    """

    def changed(prose):
        return LINK.sub(lambda link: link[1] + change(link[2]), prose)

    pieces = []
    at = 0
    for code in CODE.finditer(text):
        pieces += [changed(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*pieces, changed(text[at:])])


def one_folder_down(cell):
    """A markdown cell with its links to files as they are from solutions/; a code cell as it is."""
    if cell.cell_type == "code":
        return cell
    return new_markdown_cell(
        relink(cell.source, lambda target: f"../{target}"), metadata=cell.metadata
    )


def solutions(cell) -> list[list[str]]:
    """The lines of each solution of a cell, without indentation, empty lines and comments.
    ValueError where the markers do not pair up.
    """
    rest = SOLUTION.sub(lambda found: found[2], cell.source)
    for marker in (BEGIN, END):
        if marker in rest:
            raise ValueError(f"{marker!r} without its partner")
    return [_statements(found[2].splitlines()) for found in SOLUTION.finditer(cell.source)]


def check(name, cells) -> None:
    """SourceError if the cells of the source `name` do not keep to the rules at the top of this
    file.
    """

    def error(place, what):
        raise SourceError(f"{name}, cell {place + 1}: {what}")

    if not title(cells):
        error(0, "the first cell has to be markdown and to begin with '# Title'")
    code = [place for place, cell in enumerate(cells) if cell.cell_type == "code"]
    tagged = [place for place in code if "parameters" in tags(cells[place])]
    if len(tagged) != 1:
        error(
            tagged[1] if tagged else 0,
            f"{len(tagged)} cells are tagged 'parameters'; it has to be one",
        )
    for place, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            if found := LATEX.search(CODE.sub("", cell.source)):
                error(
                    place,
                    f"LaTeX ({found[0]!r}) does not render offline; write formulas as unicode in a"
                    " code block",
                )
            if BEGIN in cell.source or END in cell.source:
                error(place, "a marker of solutions in a markdown cell")
        elif found := HIDES_ERRORS.search(cell.source):
            error(place, f"{found[0]!r} keeps errors to itself; use .observe and HTML widgets")
        elif "teach.predict(" in cell.source and not PREDICTION.fullmatch(cell.source):
            error(
                place,
                "a prediction has to be a cell of its own, and its first line, which is seen when"
                " it is folded, 'teach.predict('",
            )
    if not LESSON.match(name):
        return
    if not code or "record" not in tags(cells[code[-1]]) or "record(" not in cells[code[-1]].source:
        error(
            code[-1] if code else 0,
            "the last code cell has to be tagged 'record' and to call teach.record",
        )
    for place, after in zip(code, [*code[1:], None]):
        _check_exercise(cells, place, after, error)


def _check_exercise(cells, place, after, error):
    cell = cells[place]
    try:
        found = solutions(cell)
    except ValueError as unpaired:
        error(place, unpaired)
    if "exercise" not in tags(cell):
        if found or BEGIN in cell.source or END in cell.source:
            error(place, "a solution in a cell that is not tagged 'exercise'")
        return
    if not found:
        error(place, f"an exercise without the lines {BEGIN!r} and {END!r}")
    if re.search(rf"^{BEGIN}", cell.source, re.MULTILINE):
        error(place, "a solution outside of a function: its stub would stop the notebook")
    if (
        after is None
        or "check" not in tags(cells[after])
        or "teach.check(" not in cells[after].source
    ):
        error(place, "the next code cell has to be tagged 'check' and to call teach.check")
    for other, text in enumerate(without_solution(cell).source for cell in cells):
        lines = _statements(text.splitlines())
        for solution in found:
            if not solution:
                error(place, "an empty solution")
            if any(lines[at : at + len(solution)] == solution for at in range(len(lines))):
                error(other, f"the solution of cell {place + 1} leaks: {solution[0]!r}")


def _statements(lines):
    stripped = (line.partition("  #")[0].strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


if __name__ == "__main__":
    main()
