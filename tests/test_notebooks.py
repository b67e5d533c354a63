"""The course: notebooks are what their sources give, exercises can be done, and what builds, runs
and renders them sees mistakes.
"""

import ast
import builtins
import importlib.util
import json
import re
from types import SimpleNamespace

import ipykernel.ipkernel
import ipykernel.kernelspec
import ipywidgets
import nbformat
import plotly.graph_objects as go
import pytest
import torch
from bs4 import BeautifulSoup
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = ROOT / "notebooks"
import build
import run

# `site` alone is Python's own
spec = importlib.util.spec_from_file_location("tools_site", ROOT / "tools" / "site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

COURSE = [
    "00_start_here",
    "01_semantic_ids",
    "02_semantic_dilution",
    "03_which_tokens_matter",
    "04_live_pruning",
    "05_denser_supervision",
    "06_training_runs",
    "07_padding_is_not_pruning",
    "08_cost_and_scale",
    "09_your_own_data",
    "10_capstone",
    "11_beyond",
]
SOURCES = sorted((NOTEBOOKS / "source").glob("[0-9][0-9]_*.py"))
COMMITTED = sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("solutions/*.ipynb")])
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize(
    "path", COMMITTED, ids=lambda path: str(path.relative_to(NOTEBOOKS))
)

SAMPLE = '''# %% [markdown]
# # 0. Sample
# See [the code](../sidlab/pruning.py), [here](#part) and [the paper]\
(https://arxiv.org/abs/2511.16943); `[no](link.md)`, 5 $.

# %% tags=["parameters"]
share = 0.5  # kept

# %% tags=["setup"]
import math

from sidlab.course import checks, teach

# %% tags=["exercise"]
def kept(n, keep):
    """How many of `n` tokens stay."""
    if n == 0:
        return 0
    ### BEGIN SOLUTION
    exact = keep * n

    return max(1, math.ceil(exact - 1e-6))
    ### END SOLUTION

# %% [markdown]
# It checks itself.

# %% tags=["check"]
teach.check("kept_count", kept)

# %%
block = bytearray(b"1" * 150_000_000)

# %% tags=["record"]
record = {"share": share, "sizes": {"block": len(block)}}
teach.record(record)
'''


def write_source(folder, name, text=SAMPLE):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)


def cells(text):
    return nbformat.reads(text, as_version=4).cells


def links(notebook):
    """Targets of the relative links of a notebook."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            build.relink(cell.source, lambda target: found.append(target) or target)
    return found


# --- the committed course -------------------------------------------------------------------------


def test_the_course_is_complete():
    assert [path.stem for path in SOURCES] == COURSE


def test_committed_notebooks_are_what_their_sources_give():
    made, errors = build.build(NOTEBOOKS / "source")
    assert not errors, "\n".join(map(str, errors))
    committed = {
        str(path.relative_to(NOTEBOOKS)): path.read_text(encoding="utf-8")
        for path in COMMITTED
        if path.name != "reproduce.ipynb"
    }
    assert committed.keys() == made.keys(), "run: python tools/build.py"
    assert not [name for name in made if committed[name] != made[name]], (
        "run: python tools/build.py"
    )


@each_notebook
def test_notebook_is_valid_and_holds_no_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert (
        notebook["metadata"]["kernelspec"]["name"] == "python3"
        and "widgets" not in notebook["metadata"]
    )
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]
        holds_answers = cell["cell_type"] == "code" and re.search(
            r"teach\.(predict|quiz|record)\(", "".join(cell["source"])
        )
        folds = {"source_hidden": True} if holds_answers else {}
        if "record" in cell["metadata"].get("tags", []):
            folds["outputs_hidden"] = True
        assert cell["metadata"].get("jupyter", {}) == folds, cell["id"]


@each_notebook
def test_opening_a_notebook_does_not_change_it(path):
    """JupyterLab writes what the kernel and its kernelspec say of themselves into the metadata;
    where that is what stands there already, the notebook stays as it was saved. The kernel of this
    course is told to name version 3 of Python, whichever it is.
    """
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    config = (ROOT / "binder" / "ipython_kernel_config.py").read_text(encoding="utf-8")
    language = dict(ipykernel.ipkernel.IPythonKernel.language_info)
    shell = SimpleNamespace(kernel=SimpleNamespace(language_info={}))
    c = SimpleNamespace(IPKernelApp=SimpleNamespace())
    exec(config, {"c": c})  # noqa: S102 - what IPython does with it
    for line in c.IPKernelApp.exec_lines:
        exec(line, {"get_ipython": lambda: shell})  # noqa: S102
    assert set(shell.kernel.language_info) == {"version"}
    assert metadata["language_info"] == language | shell.kernel.language_info
    spec = ipykernel.kernelspec.get_kernel_dict()
    assert metadata["kernelspec"] == {
        "name": "python3",
        "display_name": spec["display_name"],
        "language": spec["language"],
    }
    installed = [(ROOT / file).read_text() for file in ("Makefile", "binder/postBuild")]
    assert all(
        "binder/ipython_kernel_config.py" in text and "apputils-extension:announcements" in text
        for text in installed
    )


@each_notebook
def test_links_of_notebook_lead_to_files(path):
    targets = links(nbformat.read(path, as_version=4))
    missing = [
        target for target in targets if not (path.parent / target.partition("#")[0]).is_file()
    ]
    assert not missing, f"{path.name} links to {missing}"


@pytest.mark.parametrize(
    "path",
    [NOTEBOOKS / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_of_a_page_lead_to_files(path):
    page = new_notebook(cells=[new_markdown_cell(path.read_text(encoding="utf-8"))])
    missing = [
        target for target in links(page) if not (path.parent / target.partition("#")[0]).is_file()
    ]
    assert not missing, f"{path.name} links to {missing}; the site needs files, not folders"


@each_source
def test_source_has_the_parts_of_a_lesson(path):
    lesson = build.read(path)
    prose = [cell.source for cell in lesson if cell.cell_type == "markdown"]
    code = [ast.parse(cell.source) for cell in lesson if cell.cell_type == "code"]
    for part in ("Goals", "You need", "Time", "Machine"):
        assert f"**{part}" in prose[0], f"the header names no {part}"
    assert re.search(r"\d+ minutes", prose[0]), "the header names no minutes"
    calls = [node for tree in code for node in ast.walk(tree) if isinstance(node, ast.Call)]
    quizzes = [len(call.args) for call in calls if ast.unparse(call.func).split(".")[-1] == "quiz"]
    assert quizzes == [5], f"quizzes with {quizzes} questions, not one with five"
    headings = re.findall(r"^#+ (.*)", "\n".join(prose), re.MULTILINE)
    assert {"Summary", "Links"} <= set(headings)
    exercises = sum("exercise" in build.tags(cell) for cell in lesson)
    # Difficulty, minutes
    tasks = re.split(
        r"^#+ Exercise \d+ · [★☆]{3} · \d+ minutes$", "\n".join(prose), flags=re.MULTILINE
    )[1:]
    assert len(tasks) == exercises > 0, (
        f"{exercises} cells tagged 'exercise', {len(tasks)} headings of exercises"
    )
    assert all("<details>" in task and "Hint" in task for task in tasks), (
        "an exercise without a hint"
    )
    links = next(text for text in reversed(prose) if text.startswith("## Links"))
    assert "](https://arxiv.org/" in links and "](../sidlab/" in links, (
        "no link to a paper, or none to code"
    )


def call_of(cell):
    """The call that is all of a cell with teach.predict, else None."""
    found = (
        cell.cell_type == "code"
        and cell.source.startswith("teach.predict(")
        and ast.parse(cell.source).body[0].value
    )
    return found or None


def names(*nodes):
    """The names that values are made from: not the indices into them, and not what runs in a
    comprehension.
    """
    found = set()
    running = set()
    for node in filter(None, nodes):
        if isinstance(node, ast.Name):
            found.add(node.id)
        children = (
            [node.value] if isinstance(node, ast.Subscript) else list(ast.iter_child_nodes(node))
        )
        running |= {
            name
            for child in children
            if isinstance(child, ast.comprehension)
            for name in names(child.target)
        }
        found |= names(*children)
    return found - running


def given_away(lesson):
    """What stands open beside a question: (place of the prediction, what), over all of them. Either
    a truth that is written down in the markdown cell after it; or a name that the next code cell
    shows, and from which the truth, or what is shown with it, is made and the question is not. Of
    what the truth is made is looked up one assignment back.
    """
    made_of = {}
    general = set(dir(builtins))
    found = []
    for place, cell in enumerate(lesson):
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Assign):
                for name in names(*node.targets):
                    made_of[name] = made_of.get(name, set()) | names(node.value)
            elif isinstance(node, ast.FunctionDef | ast.Import | ast.ImportFrom):
                general |= (
                    {node.name}
                    if isinstance(node, ast.FunctionDef)
                    else {(a.asname or a.name).split(".")[0] for a in node.names}
                )
        if (call := call_of(cell)) is None:
            continue
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        question, truth = call.args
        open_to_all = names(
            question, *(options.get(name) for name in ("choices", "range", "default", "unit"))
        )
        hidden = names(truth, options.get("explain"), options.get("then"))
        hidden = (
            (hidden | set().union(*(made_of.get(name, set()) for name in names(truth))))
            - open_to_all
            - general
        )
        behind = lesson[place + 1 :]
        prose = behind[0].source if behind and behind[0].cell_type == "markdown" else ""
        if isinstance(truth, ast.Constant) and re.search(
            rf"(?<![\w/]){re.escape(str(truth.value))}(?!\w)", prose
        ):
            found.append((place, truth.value))
        after = next((cell for cell in behind if cell.cell_type == "code"), None)
        if after is not None and call_of(after) is None:
            tree = ast.parse(after.source)
            shown = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            ]
            shown += [tree.body[-1]] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
            found += [(place, name) for name in sorted(hidden & names(*shown))]
    return found


@each_source
def test_nothing_beside_a_question_gives_its_answer_away(path):
    assert given_away(build.read(path)) == []


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        ("# %%\ntable", ["table"]),
        ("# %%\nprint(best)", ["best"]),
        ("# %%\nx = table\ntable.round(2)", ["table"]),
        ("# %% [markdown]\n# So it is b, of course.", ["b"]),
        ("# %% [markdown]\n# So it is bad.", []),
        ("# %%\nother", []),
        ("# %%\nx = table", []),
        ("# %%\nkeep", []),
    ],
)
def test_an_answer_beside_a_question_is_found(tmp_path, behind, found):
    truth = "'b'" if "markdown" in behind else "best"
    write_source(
        tmp_path,
        "00_a",
        "# %%\nkeep = 3\ntable = f(keep)\nbest = g(table)\n\n# %%\nteach.predict(\n"
        f"    f'Of {{keep}}?', {truth}, choices=['a', 'b'],\n)\n\n{behind}\n",
    )
    assert [what for _, what in given_away(build.read(tmp_path / "00_a.py"))] == found


@each_source
def test_checks_have_the_names_of_the_functions(path):
    """The verdict names what the student has written."""
    lesson = build.read(path)
    pairs = []
    for cell in lesson:
        if "exercise" in build.tags(cell):
            function = [
                node.name
                for node in ast.parse(cell.source).body
                if isinstance(node, ast.FunctionDef)
            ]
        elif "check" in build.tags(cell):
            pairs.append((function, re.findall(r'teach\.check\("(.*?)"', cell.source)))
    assert pairs and all(function == checked for function, checked in pairs), pairs


@each_source
def test_stubs_are_not_started_and_solutions_pass(path, monkeypatch, request):
    from sidlab.course import checks, teach

    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setenv("SIDLAB_UNATTENDED", "1")
    monkeypatch.setattr(checks, "CHECKS", dict(checks.CHECKS))  # notebooks add their own
    # A notebook may turn gradients off for its whole kernel
    request.addfinalizer(lambda: torch.set_grad_enabled(True))
    namespace = {"__name__": "__main__"}
    done = 0
    for place, cell in enumerate(build.read(path)):

        def execute(source, name=f"{path.name}, cell {place + 1}"):
            exec(compile(source, name, "exec"), namespace)  # noqa: S102 - that is the test

        if {"parameters", "setup"} & set(build.tags(cell)):
            execute(cell.source)
        elif "exercise" in build.tags(cell):
            exercise = cell
        elif "check" in build.tags(cell):
            for version, passes in ((build.without_solution(exercise), False), (exercise, True)):
                teach.reset()
                execute(version.source)
                execute(cell.source)
                assert teach.checks(), f"cell {place + 1} checks nothing"
                for check in teach.checks():
                    assert check["passed"] == passes and (
                        passes or check["verdict"] == "not started"
                    ), (passes, check)
            done += 1
    assert done, "no exercise"


@pytest.mark.parametrize("name", ["tiny", "quick"])
def test_settings_fit_the_notebooks(name):
    settings = run.load_settings()[name]
    assert settings.keys() == set(COURSE)
    run.check_settings(
        [path for path in COMMITTED if path.parent == NOTEBOOKS and path.stem in COURSE], settings
    )
    for stem, setting in settings.items():
        assert setting.keys() == {"parameters", "seconds", "expect"} and setting["seconds"] > 0, (
            stem
        )
        assert setting["expect"], f"{stem}: nothing is expected of its metrics"


# --- build.py -------------------------------------------------------------------------------------


def test_build_makes_stub_solution_and_navigation(tmp_path):
    titles = {"00_first": "0. First", "01_second": "1. Second", "02_third": "2. Third"}
    for name, title in titles.items():
        write_source(tmp_path, name, SAMPLE.replace("0. Sample", title))
    made, errors = build.build(tmp_path)
    assert not errors and made == build.build(tmp_path)[0]
    assert sorted(made) == sorted(
        f"{folder}{name}.ipynb" for folder in ("", "solutions/") for name in titles
    )
    student = cells(made["01_second.ipynb"])
    solution = cells(made["solutions/01_second.ipynb"])
    (stub,) = [cell.source for cell in student if cell.metadata.get("tags") == ["exercise"]]
    assert (
        stub
        == 'def kept(n, keep):\n    """How many of `n` tokens stay."""\n    if n == 0:\n       '
        ' return 0\n    raise NotImplementedError("your turn")'
    )
    assert (
        "exact = keep * n" in made["solutions/01_second.ipynb"]
        and "SOLUTION" not in made["01_second.ipynb"]
    )
    navigation = "[← 0. First](00_first.ipynb) · [Index](README.md) · [2. Third →](02_third.ipynb)"
    assert (
        student[0].source == navigation
        and student[-1].source == f"[Solutions](solutions/01_second.ipynb)\n\n{navigation}"
    )
    assert (
        cells(made["00_first.ipynb"])[0].source
        == "[Index](README.md) · [1. Second →](01_second.ipynb)"
    )
    assert (
        cells(made["02_third.ipynb"])[0].source
        == "[← 1. Second](01_second.ipynb) · [Index](README.md)"
    )
    assert (
        "(../01_second.ipynb)" in solution[0].source
        and 'os.chdir("..")' in solution[1].source
        and len(solution) == len(student) + 1
    )
    # The other links lead where they led
    assert solution[2].source == student[1].source.replace("(../sidlab", "(../../sidlab")


def test_a_source_without_a_number_is_no_lesson(tmp_path):
    text = '# %% [markdown]\n# # A tool\n\n# %% tags=["parameters"]\nshare = 1\n'
    write_source(tmp_path, "tool", text)
    write_source(tmp_path, "00_first")
    made, errors = build.build(tmp_path)
    assert not errors
    assert sorted(made) == ["00_first.ipynb", "solutions/00_first.ipynb", "tool.ipynb"]
    assert [cell.source for cell in cells(made["tool.ipynb"])] == [
        "[Index](README.md)",
        "# A tool",
        "share = 1",
    ]
    assert "tool.ipynb" not in made["00_first.ipynb"]
    write_source(tmp_path, "tool", text.replace("share", "widgets.Output()\nshare"))
    (error,) = build.build(tmp_path)[1]
    assert "tool.py, cell 2: 'Output(' keeps errors to itself" in str(error)


def test_build_writes_what_it_can_and_names_the_rest(tmp_path, monkeypatch):
    write_source(tmp_path / "source", "00_good")
    write_source(tmp_path / "source", "01_bad", SAMPLE.replace("    ### END SOLUTION\n", ""))
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    with pytest.raises(SystemExit, match=r"01_bad\.py, cell 4: .*BEGIN"):
        build.main()
    written = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    assert written == {"00_good.ipynb", "solutions/00_good.ipynb"}
    (tmp_path / "source" / "01_bad.py").unlink()
    with pytest.raises(SystemExit) as done:
        build.main()
    assert done.value.code == 0
    assert (tmp_path / "00_good.ipynb").read_text(encoding="utf-8") == build.build(
        tmp_path / "source"
    )[0]["00_good.ipynb"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("# # 0. Sample", "# Sample", "cell 1: the first cell .* '# Title'"),
        (
            "# %%\nblock",
            '# %% tags=["parameters"]\nblock',
            "cell 7: 2 cells are tagged 'parameters'",
        ),
        (' tags=["parameters"]', "", "cell 1: 0 cells are tagged 'parameters'"),
        ("    ### END SOLUTION\n", "", "cell 4: '### BEGIN SOLUTION' without its partner"),
        ("    ### BEGIN SOLUTION\n", "", "cell 4: '### END SOLUTION' without its partner"),
        (
            "    exact = ",
            "    ### BEGIN SOLUTION\n    exact = ",
            "cell 4: '### BEGIN SOLUTION' without its partner",
        ),
        (
            (
                "    ### BEGIN SOLUTION\n    exact = keep * n\n\n    return max(1, math.ceil(exact"
                " - 1e-6))\n    ### END SOLUTION"
            ),
            "    return 1",
            "cell 4: an exercise without",
        ),
        (
            "    exact = keep * n\n\n    return max(1, math.ceil(exact - 1e-6))\n",
            "    # to be written\n",
            "cell 4: an empty solution",
        ),
        (' tags=["exercise"]', "", "cell 4: a solution in a cell that is not tagged 'exercise'"),
        (' tags=["check"]', "", "cell 4: the next code cell has to be tagged 'check'"),
        ("teach.check(", "print(", "cell 4: the next code cell has to be tagged 'check'"),
        ("    ### BEGIN", "### BEGIN", "cell 4: a solution outside of a function"),
        ("# It checks", "# $$ x^2 $$ It checks", r"cell 5: LaTeX \('\$\$'\)"),
        ("# It checks", "# With $n_b$ it checks", r"cell 5: LaTeX \('\$n_b\$'\)"),
        (
            "# It checks",
            "# ### BEGIN SOLUTION\n# It checks",
            "cell 5: a marker of solutions in a markdown cell",
        ),
        (
            "block = ",
            (
                "exact = share * 3\nexact = keep * n  # as above\n\nreturn max(1, math.ceil(exact -"
                " 1e-6))\nblock = "
            ),
            "cell 7: the solution of cell 4 leaks",
        ),
        (
            "block = ",
            "out = widgets.Output()\nblock = ",
            r"cell 7: 'Output\(' keeps errors to itself",
        ),
        (
            "block = ",
            "widgets.interact(kept)\nblock = ",
            r"cell 7: 'interact\(' keeps errors to itself",
        ),
        (
            "block = ",
            "teach.predict('?', 1, choices=[1, 2])\nblock = ",
            "cell 7: a prediction has to be a cell of its own",
        ),
        (
            'block = bytearray(b"1" * 150_000_000)',
            "teach.predict('Which?', 1, choices=[1, 2])",
            "cell 7: a prediction .* first line",
        ),
        (' tags=["record"]', "", "cell 8: the last code cell has to be tagged 'record'"),
        (
            "teach.record(record)",
            "print(record)",
            "cell 8: the last code cell has to be tagged 'record'",
        ),
    ],
)
def test_build_refuses_a_source(tmp_path, old, new, message):
    assert old in SAMPLE
    write_source(tmp_path, "05_sample", SAMPLE.replace(old, new, 1))
    made, errors = build.build(tmp_path)
    assert not made and len(errors) == 1
    assert re.match(rf"05_sample\.py, {message}", str(errors[0])), errors[0]


def test_code_in_markdown_is_neither_latex_nor_link(tmp_path):
    text = SAMPLE.replace(
        "# It checks itself.",
        "# ```sh\n# echo $$ $a$ [x](y.md)\n# ```\n# `$$` and `$x$`, 5 \\$ and 6 \\$",
    )
    write_source(tmp_path, "00_sample", text)
    made, errors = build.build(tmp_path)
    assert not errors and "[x](y.md)" in made["solutions/00_sample.ipynb"]


# --- run.py ---------------------------------------------------------------------------------------


def test_run_judges_what_happens_in_the_kernel(tmp_path):
    """Three notebooks run for real: one is good, one hides an error, one does not end."""
    write_source(tmp_path / "source", "00_good")
    made, _ = build.build(tmp_path / "source")
    hidden = (
        "import ipywidgets\n\n@ipywidgets.interact(x=(0, 3))\ndef show(x):\n    raise"
        " ValueError('planted')"
    )
    texts = {"00_good": made["00_good.ipynb"]}
    for name, code in (("01_hidden", hidden), ("02_endless", "while True: pass")):
        notebook = nbformat.reads(made["00_good.ipynb"], as_version=4)
        notebook.cells.insert(-3, new_code_cell(code))
        texts[name] = nbformat.writes(notebook)
    for name, text in texts.items():
        (tmp_path / f"{name}.ipynb").write_text(text)
    settings = {
        name: {"parameters": {"share": 0.25}, "seconds": 300, "expect": {"share": [0.2, 0.3]}}
        for name in texts
    }
    settings["02_endless"]["seconds"] = 3
    results = run.run([tmp_path / f"{name}.ipynb" for name in texts], settings, tmp_path / "out")
    good, hidden, endless = results
    assert good["problems"] == [] and good["metrics"] == {
        "share": 0.25,
        "sizes": {"block": 150_000_000},
    }
    # 150 million bytes; with a cell of parameters
    assert good["peak_mb"] > 143 and good["seconds"] > 0 and good["cells"] == 11
    assert hidden["problems"] == ["inside an Output widget: ValueError: planted"]
    assert endless["problems"] == ["not done after 3 s"] and endless["seconds"] < 60
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (
        "widgets" not in nbformat.read(tmp_path / "out" / "01_hidden.ipynb", as_version=4).metadata
    )


@pytest.mark.parametrize(
    "output, problem",
    [
        (
            new_output("error", ename="KeyError", evalue="'a'", traceback=[]),
            "cell c: KeyError: 'a'",
        ),
        (
            new_output(
                "stream", text="Traceback (most recent call last):\n  File\nOSError: gone\n"
            ),
            "cell c: shows a traceback: OSError: gone",
        ),
        (
            new_output("display_data", {"text/html": "<p class='a' role='alert'><b>bad</b></p>"}),
            "cell c: shows an alert: bad",
        ),
        (
            new_output(
                "display_data", {"text/html": '<p role="status">fine</p>', "text/plain": ""}
            ),
            None,
        ),
    ],
)
def test_errors_shown_in_outputs(output, problem):
    notebook = new_notebook(cells=[new_code_cell("", id="c", outputs=[output])])
    assert run.errors_shown(notebook) == ([problem] if problem else [])


def test_errors_shown_by_widgets():
    def shown(widget):
        models = {"m": {"model_name": type(widget).__name__, "state": widget.get_state()}}
        return run.errors_shown(
            new_notebook(metadata={"widgets": {run.WIDGETS: {"state": models}}})
        )

    assert shown(ipywidgets.HTML('<p role="alert">Bad</p>')) == [
        "a widget (HTML): shows an alert: Bad"
    ]
    assert shown(ipywidgets.HTML("<p>Good</p>")) == []
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    assert shown(ipywidgets.Output(outputs=[error])) == ["inside an Output widget: ValueError: no"]


STUB = {"name": "gather", "passed": False, "verdict": "not started"}


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"metrics": {"a": 1.5, "name": "x"}, "checks": [STUB]}, None),
        ({"metrics": {"a": 1}, "checks": [STUB, STUB]}, None),
        ({}, "nothing was recorded"),
        (
            {"metrics": {"a": 1, "b": {"c": [0.0, float("nan")]}}, "checks": [STUB]},
            "metric b.c.1 is nan",
        ),
        ({"metrics": {"a": 3}, "checks": [STUB]}, "metric a is 3; it has to be from 1 to 2"),
        ({"metrics": {"b": 1}, "checks": [STUB]}, "metric a is None; it has to be from 1 to 2"),
        ({"metrics": {"a": 1}, "checks": []}, "0 checks recorded of 1 cells tagged 'check'"),
        (
            {"metrics": {"a": 1}, "checks": [STUB | {"passed": True, "verdict": "exact"}]},
            "check gather of a stub says 'exact'",
        ),
        (
            {"metrics": {"a": 1}, "checks": [STUB | {"verdict": "wrong shape"}]},
            "check gather of a stub says 'wrong shape'",
        ),
    ],
)
def test_judge(record, problem):
    problems = run.judge(record, {"a": [1, 2]}, checks=1)
    assert problems[0].startswith(problem) if problem else not problems, problems


def test_settings_that_do_not_fit_are_refused(tmp_path):
    write_source(tmp_path, "00_sample")
    path = tmp_path / "00_sample.ipynb"
    path.write_text(build.build(tmp_path)[0]["00_sample.ipynb"])
    run.check_settings([path], {"00_sample": {"parameters": {"share": 1}}})
    with pytest.raises(ValueError, match="no entry for 00_sample; it has 01_other"):
        run.check_settings([path], {"01_other": {"parameters": {}}})
    with pytest.raises(ValueError, match="00_sample has no parameter shore; it has share"):
        run.check_settings([path], {"00_sample": {"parameters": {"shore": 1}}})


# --- site.py --------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A course of one notebook below tmp_path/notebooks, executed in tmp_path/run with a figure, a
    widget and an explorer.
    """
    notebooks = tmp_path / "notebooks"
    executed = tmp_path / "run"
    (notebooks / "solutions").mkdir(parents=True)
    (notebooks / "README.md").write_text("# The course\n\n[0. Sample](00_sample.ipynb)\n")
    (executed / "explorers").mkdir(parents=True)
    (tmp_path / "sidlab").mkdir()
    (tmp_path / "sidlab" / "pruning.py").write_text("# <code>")
    write_source(notebooks / "source", "00_sample")
    made = build.build(notebooks / "source")[0]
    for name, text in made.items():
        (notebooks / name).write_text(text)
    notebook = nbformat.reads(made["00_sample.ipynb"], as_version=4)
    figure = go.Figure(go.Scatter(y=[1, 2]), layout={"title": {"text": "Loss </script>"}})
    question = ipywidgets.VBox(
        [
            ipywidgets.HTML("<b>Which?</b>"),
            ipywidgets.RadioButtons(options=["<one>", "two"], description="Answer", index=1),
            ipywidgets.IntSlider(4, description="Tokens"),
            ipywidgets.Button(description="Check"),
        ]
    )
    more = ipywidgets.Output(
        outputs=[
            new_output("display_data", data)
            for data in (
                {"text/plain": "", "text/markdown": "It is *two*."},
                {"text/html": "<table><td>3</td></table>"},
                {site.PLOTLY: json.loads(figure.to_json())},
            )
        ]
    )
    question.children = [*question.children, more]
    models = {
        widget.model_id: {
            "model_name": widget._model_name,
            "state": ipywidgets.Widget._trait_to_json(widget.get_state(), widget),
        }
        for widget in (question, *question.children)
    }
    for model in models.values():
        model["state"]["children"] = [f"IPY_MODEL_{child.model_id}" for child in question.children]
        if model["model_name"] != "VBoxModel":
            del model["state"]["children"]
    view = {site.WIDGET: {"model_id": question.model_id}, "text/plain": "VBox()"}
    frame = '<iframe src="explorers/E-1.html" title="An explorer"></iframe>'
    outputs = [{site.PLOTLY: json.loads(figure.to_json())}, view, {"text/html": frame}]
    notebook.cells[-2].outputs = [new_output("display_data", data) for data in outputs]
    notebook.metadata["widgets"] = {
        run.WIDGETS: {"state": json.loads(json.dumps(models, default=str))}
    }
    nbformat.write(notebook, executed / "00_sample.ipynb")
    (executed / "explorers" / "E-1.html").write_text(f"<script>{site.get_plotlyjs()}</script>ok")
    return notebooks, executed, tmp_path / "site"


def test_site_needs_no_network_and_all_links_lead_somewhere(folders):
    index = site.render(*folders)
    pages = sorted(folders[2].rglob("*.html"))
    assert index in pages and len(pages) == 4  # index, notebook, solutions, explorer
    for path in pages:
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for tag in page.find_all(["script", "link", "img", "iframe"]):
            target = tag.get("src") or tag.get("href")
            assert target is None or (path.parent / target).is_file(), (
                f"{path.name}: {tag.name} {target}"
            )
        styles = " ".join(tag.text for tag in page.find_all("style"))
        assert not re.search(r"@import|url\(\s*[\"']?(?!data:)", styles)
        assert not re.search(
            r"\bimport\b.*https?:|cdn", " ".join(tag.text for tag in page.find_all("script"))
        )
        for tag in page.find_all("a", href=re.compile(r"^(?!https?:|#)")):
            assert (path.parent / tag["href"].partition("#")[0]).is_file(), (
                f"{path.name}: {tag['href']}"
            )
    assert (folders[2] / "linked/sidlab/pruning.py.txt").read_text() == "# <code>"
    assert (
        folders[2] / "explorers/E-1.html"
    ).read_text() == '<script src="../plotly.min.js"></script>ok'


def test_site_shows_figures_and_widgets_to_everybody(folders):
    site.render(*folders)
    page = BeautifulSoup((folders[2] / "00_sample.html").read_text(encoding="utf-8"), "html.parser")
    assert (
        page.html["lang"] == "en"
        and page.title.text == "0. Sample"
        and len(page.find_all("h1")) == 1
        and page.main
    )
    assert page.find("em", string="two") and page.main.find("table").text == "3"
    more = page.find("div", id="figure-2")
    assert more["aria-label"] == "Loss </script>" and more.find_next("script").text.startswith(
        'show("figure-2", {'
    )
    figure = page.find("div", id="figure-1")
    assert figure["role"] == "img" and figure["aria-label"] == "Loss </script>"
    call = re.fullmatch(r'show\("figure-1", (.*)\);', figure.find_next("script").text)
    drawn = json.loads(call[1])
    assert drawn["data"][0]["y"] == [1, 2] and "template" not in drawn["layout"]
    assert page.find("iframe")["title"] == "An explorer"
    assert [item.text for item in page.find_all("li")] == ["<one>", "two (chosen)"]
    text = " ".join(page.main.get_text(" ").split())
    assert (
        "Which? Answer" in text
        and "Tokens 4" in text
        and page.find("button", disabled=True).text == "Check"
    )
    assert "prefers-color-scheme: dark" in str(page.head) and "VBox()" not in text


def test_site_index_is_the_readme(folders):
    notebooks, _, output = folders
    page = BeautifulSoup(site.render(*folders).read_text(encoding="utf-8"), "html.parser")
    assert (
        page.title.text == "The course"
        and page.find("a", string="0. Sample")["href"] == "00_sample.html"
    )
    (notebooks / "README.md").write_text(
        "# Syllabus\n\n[Start](00_sample.ipynb#Part) and [a primer](../docs/primer.md).\n"
    )
    (notebooks.parent / "docs").mkdir()
    (notebooks.parent / "docs" / "primer.md").write_text(
        "# Primer\n\n[Back](../notebooks/README.md)\n"
    )
    page = BeautifulSoup(site.render(*folders).read_text(encoding="utf-8"), "html.parser")
    assert (
        page.title.text == "Syllabus"
        and page.find("a", string="Start")["href"] == "00_sample.html#Part"
    )
    assert page.find("a", string="a primer")["href"] == "docs/primer.html"
    assert 'href="../index.html"' in (output / "docs" / "primer.html").read_text(encoding="utf-8")


def test_site_takes_no_folder_that_holds_something_else(folders):
    folders[2].mkdir()
    (folders[2] / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds something else than a site"):
        site.render(*folders)
    assert (folders[2] / "thesis.txt").read_text() == "years"


def test_site_refuses_a_link_to_nothing(folders):
    notebook = new_notebook(cells=[new_markdown_cell("# A\n[b](../missing.py)")])
    nbformat.write(notebook, folders[0] / "01_a.ipynb")
    with pytest.raises(
        ValueError, match=r"notebooks/01_a\.ipynb links to '\.\./missing\.py', which is no file"
    ):
        site.render(*folders)
