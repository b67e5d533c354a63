"""The set-up agrees with itself: one set of pins, one torch index, one Python; Binder, make, lazy
import.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import papermill
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sidlab.research.compare import DEFAULT_METHODS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
}
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
MAKEFILE = (ROOT / "Makefile").read_text()
POSTBUILD = ROOT / "binder" / "postBuild"


def applies(requirement, extras=()):
    """Whether the marker of `requirement` holds in this Python, with any of `extras` asked for."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
    )


def constraints():
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    return [Requirement(line) for line in lines if line]


PINS = {canonicalize_name(pin.name): pin for pin in constraints() if applies(pin)}


def pip_lines(environment):
    """The entries of an environment.yml: (conda packages, lines for pip)."""
    entries = yaml.safe_load((ROOT / environment).read_text())["dependencies"]
    nested = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], [
        line for lines in nested for line in lines
    ]


def run(*command):
    # MAKEFLAGS of a make that runs these tests would otherwise reach a make started here
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    }
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def make(*arguments):
    return run("make", "-n", *arguments)


# --- pins -----------------------------------------------------------------------------------------


def test_every_constraint_is_one_exact_public_version():
    for pin in constraints():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, (
            f"{pin} is not one exact version"
        )
        assert Version(specifier.version).local is None, (
            f"{pin}: a local version excludes the other builds"
        )
    applying = [canonicalize_name(pin.name) for pin in constraints() if applies(pin)]
    assert len(applying) == len(set(applying)), "a package has two pins that apply at once"
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-"))], (
        "torch pins those, per build"
    )


def test_versions_are_named_in_constraints_only():
    for requirement in [*DEPENDENCIES, *(line for lines in EXTRAS.values() for line in lines)]:
        assert {specifier.operator for specifier in requirement.specifier} <= {">="}, (
            f"{requirement}: a lower bound only"
        )
    for file in ("Makefile", "environment.yml", "binder/environment.yml", "binder/postBuild"):
        assert "==" not in (ROOT / file).read_text(), (
            f"{file} names a version; constraints.txt is the place"
        )


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_every_declared_dependency_is_pinned_within_its_bounds(group):
    for requirement in DEPENDENCIES if group == "dependencies" else EXTRAS[group]:
        if applies(requirement):
            assert canonicalize_name(requirement.name) in PINS, (
                f"{requirement.name} ({group}) has no pin"
            )
            pinned = next(iter(PINS[canonicalize_name(requirement.name)].specifier)).version
            assert requirement.specifier.contains(pinned), (
                f"{requirement} ({group}) excludes the pin {pinned}"
            )


def test_installed_closure_is_pinned_and_installed_at_the_pins():
    """Walk what sidlab and its extras need, by the metadata of what is installed: each has a pin
    and is at its pin.
    """
    todo = [*DEPENDENCIES, *(line for lines in EXTRAS.values() for line in lines)]
    seen = set()
    missing = set()
    differing = []
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if name not in PINS:
            missing.add(name)
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for instance a dev tool, where only the package was installed
        if (
            Version(found.version).public
            != Version(next(iter(PINS[name].specifier)).version).public
        ):
            differing.append(f"{name} {found.version}, not {PINS[name].specifier}")
        needs = [Requirement(line) for line in found.requires or ()]
        todo += [need for need in needs if applies(need, requirement.extras)]
    missing = {name for name in missing if not name.startswith(("nvidia-", "cuda-"))}
    assert not missing, f"needed, but not pinned in constraints.txt: {sorted(missing)}"
    assert not differing, f"installed otherwise than pinned (run make setup): {differing}"
    assert len(seen) > 100, "the walk ended early"


# What a room's modules may import besides the dependencies. Elsewhere an extra's package stands
# within `with from_extra(...)`.
ROOM_EXTRAS = {"figures": ["course"], "viz": ["course"], "research": ["course", "research"]}
# Taken where somebody has it, and never asked for (see `data.text`).
UNDECLARED = {"sentence_transformers"}
PROVIDERS = metadata.packages_distributions()


def names_of(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def foreign_imports(path):
    """(top-level module, extra) of each import of a package that is not ours, within functions too;
    the extra is that of the `with from_extra(...)` around it, "gpu" where Triton may be missing.
    """

    def walk(node, extra):
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            if ast.unparse(call.func) == "from_extra":
                extra = ast.literal_eval(call.args[0])
        elif isinstance(node, ast.Try) and "ImportError" in ast.unparse(node.handlers):
            extra = "gpu"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for top in {name.partition(".")[0] for name in names} - OURS:
            yield top, extra
        for child in ast.iter_child_nodes(node):
            yield from walk(child, extra)

    lines = path.read_text(encoding="utf-8").splitlines()
    # Notebook sources hold the shell's commands
    yield from walk(ast.parse("\n".join(line for line in lines if line[:1] not in "%!")), None)


OURS = {"sidlab", *sys.stdlib_module_names} | {
    path.stem
    for folder in ("tests", "tools", "notebooks/source", "results", "docs")
    for path in (ROOT / folder).glob("*.py")
}


def undeclared(path, allowed):
    """Imports of `path` that neither the dependencies nor the extras `allowed` bring."""
    missing = set()
    for top, extra in foreign_imports(path):
        extras = {*allowed, extra} - {None}
        declared = names_of([*DEPENDENCIES, *(line for name in extras for line in EXTRAS[name])])
        if top not in UNDECLARED and not declared & {
            canonicalize_name(name) for name in PROVIDERS.get(top, [top])
        }:
            missing.add(f"{path.relative_to(ROOT)}: {top}")
    return missing


def test_every_import_of_a_room_has_a_declared_home():
    missing = set()
    for path in (ROOT / "sidlab").rglob("*.py"):
        room = path.relative_to(ROOT / "sidlab").parts[0].removesuffix(".py")
        missing |= undeclared(path, ROOM_EXTRAS.get(room, []))
    assert not missing, f"imported there, but brought by nothing that is installed: {missing}"


def test_every_import_of_tests_notebooks_and_tools_is_declared():
    folders = ("tests", "tools", "notebooks/source", "results", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    missing = set().union(*(undeclared(path, EXTRAS) for path in paths))
    assert len(paths) > 60 and not missing, f"imported, but declared nowhere: {missing}"


def test_the_walk_finds_an_import_in_the_wrong_room(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "core.py"
    path.write_text("import torch\n\ndef f():\n    import plotly, vector_quantize_pytorch.x\n")
    assert undeclared(path, []) == {"core.py: plotly", "core.py: vector_quantize_pytorch"}
    assert undeclared(path, ["course"]) == {"core.py: vector_quantize_pytorch"}
    path.write_text('with from_extra("research"):\n    import filelock\nimport plotly\n')
    assert undeclared(path, []) == {"core.py: plotly"}


def closure(requirements):
    """Names of all packages that `requirements` bring, by the metadata of what is installed."""
    todo = list(requirements)
    found = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found or not applies(requirement):
            continue
        found.add(key)
        try:
            needs = metadata.requires(requirement.name) or ()
        except metadata.PackageNotFoundError:
            continue
        todo += [need for need in map(Requirement, needs) if applies(need, requirement.extras)]
    return {name for name, _ in found}


# Run before what is tested: nothing that only an extra brings can be found.
ABSENT = """
import sys
from importlib.machinery import PathFinder

absent = {absent!r}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name.partition(".")[0] in absent else super().find_spec(name, *more)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def without_extras(code):
    """What `code` prints in a Python that has the dependencies and no extra."""
    core = closure(DEPENDENCIES)
    absent = {
        top
        for top, providers in PROVIDERS.items()
        if not core & {canonicalize_name(name) for name in providers} and top != "sidlab"
    }
    wanted = {"plotly", "ipywidgets", "anywidget", "IPython", "vector_quantize_pytorch"}
    assert wanted <= absent and not {"torch", "transformers", "pandas"} & absent
    return in_a_new_python(ABSENT.format(absent=absent) + code)


def test_the_core_trains_and_recommends_without_any_extra():
    code = """
import sidlab
catalogue = sidlab.load_catalogue("planted", n_users=100)
encoder = sidlab.ResidualKMeans(levels=2, width=8).fit(catalogue.embeddings)
table = sidlab.SidTable(encoder.encode(catalogue.embeddings), 8)
pruning = sidlab.PruningConfig(after_layer=1, keep=0.5)
for arch in ("t5", "qwen"):
    config = sidlab.TrainConfig.preset(
        "smoke", arch=arch, max_updates=2, eval_every=2, pruning=pruning, map=sidlab.MapConfig()
    )
    model = sidlab.train(config, catalogue, table, progress=False).model
    items, scores = sidlab.recommend(model, catalogue.histories[:3], k=5)
    print(type(model).__name__, *items.shape)
print(*sidlab.demo.load().model.table.widths)
"""
    printed = without_extras(code)
    assert printed[-9:-3] == ["SidT5", "3", "5", "SidQwen", "3", "5"], printed


def test_a_missing_extra_is_named_with_its_command():
    needs = {
        "import sidlab.viz": "course",
        "sidlab.viz": "course",
        "import sidlab.viz.pruning": "course",
        "from sidlab.viz import use_theme": "course",
        "sidlab.teach": "course",
        "from sidlab.course import board": "course",
        "from sidlab.figures import theme": "course",
        "from sidlab.research import study_figures": "course",
        "sidlab.RQVAE(1, 2).fit(embeddings)": "research",
        "from sidlab.research import jobs; jobs.cluster('tcp://nowhere:1')": "cluster",
    }
    printed = without_extras(f"""
import numpy as np
import sidlab
embeddings = np.random.default_rng(0).normal(size=(9, 4))
for code in {list(needs)!r}:
    try:
        exec(code)
        print("nothing")
    except ModuleNotFoundError as error:
        print(str(error).split('pip install "sidlab')[1:])
""")
    assert dict(zip(needs, map(ast.literal_eval, printed))) == {
        code: [f'[{extra}]"'] for code, extra in needs.items()
    }


# --- one torch index, one Python ------------------------------------------------------------------


def test_one_torch_index_everywhere():
    default = re.search(r"^TORCH_INDEX = \$\(or \$\(LAST_INDEX\),(\S+)\)$", MAKEFILE, re.MULTILINE)[
        1
    ]
    assert default == "https://download.pytorch.org/whl/cpu"
    assert f"--extra-index-url {default}" in pip_lines("environment.yml")[1]
    assert re.findall(r"^TORCH_INDEX=(\S+)$", POSTBUILD.read_text(), re.MULTILINE) == [default]


def test_constraints_bind_every_install():
    assert "-c constraints.txt" in pip_lines("environment.yml")[1]
    for text in (MAKEFILE, POSTBUILD.read_text()):
        installs = re.findall(r"pip install .*", text)
        assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs), (
            installs
        )


def test_every_setup_installs_the_extras_that_the_notebooks_need():
    assert "-e .[course,research]" in pip_lines("environment.yml")[1]
    assert "-e '.[course,research]' " in POSTBUILD.read_text()
    assert "-e '.[course,research,dev]'" in MAKEFILE
    assert "'.[course,research]'" in (ROOT / "README.md").read_text()


def test_python_versions_agree():
    least = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])[1]
    for file in ("environment.yml", "binder/environment.yml"):
        assert f"python={least}" in pip_lines(file)[0], f"{file}: not Python {least}"
    assert f"sys.version_info < ({least.replace('.', ', ')})" in MAKEFILE
    assert pip_lines("binder/environment.yml")[1] == [], "packages are installed by postBuild"


# --- Binder ---------------------------------------------------------------------------------------


def test_postbuild_stops_at_the_first_error():
    assert os.access(POSTBUILD, os.X_OK), "binder/postBuild is not executable"
    lines = POSTBUILD.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert run("bash", "-n", POSTBUILD).returncode == 0
    for line in (line for line in lines if line.startswith("pip install")):
        assert "--no-cache-dir" in line
        unpinned = [
            word
            for word in line.partition("constraints.txt ")[2].split()
            if word not in ("-e", "'.[course,research]'", *PINS)
        ]
        assert not unpinned, f"postBuild installs {unpinned}, not pinned in constraints.txt"


def test_repo2docker_accepts_the_folder_and_takes_binder():
    repo2docker = Path(sys.executable).with_name("jupyter-repo2docker")
    done = run(repo2docker, "--no-build", "--debug", ".")
    assert done.returncode == 0, done.stderr[-2000:]
    dockerfile = done.stdout
    assert (
        '--file "binder/environment.yml"' in dockerfile and "RUN ./binder/postBuild" in dockerfile
    ), dockerfile
    # The packages need the sources, so they may be installed only after these are copied.
    assert dockerfile.index("COPY --chown=0:0 src/ ") < dockerfile.index("RUN ./binder/postBuild")


# --- make -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["reproduce", "setup", "test"])
def test_make_rejects_an_unknown_variable(target):
    done = make(target, "METHOD=rastp")
    assert done.returncode != 0 and "METHOD." in done.stderr and "METHODS" in done.stderr, (
        done.stderr
    )


def test_make_reproduce_passes_its_variables_on():
    default = make("reproduce")
    assert default.returncode == 0, default.stderr
    for part in (
        '-r dataset "planted"',
        '-p seeds "3"',
        '-r output_dir "runs/planted-quick"',
        "-k python3 --cwd .",
    ):
        assert part in default.stdout, part
    assert f'-r methods "{DEFAULT_METHODS}"' in default.stdout
    assert '-r cluster ""' in default.stdout
    assert '-r cluster "tcp://h:1"' in make("reproduce", "CLUSTER=tcp://h:1").stdout
    chosen = make(
        "reproduce", "DATASET=/data/my set/", "PRESET=smoke", "METHODS=unpadded rastp", "SEEDS=1"
    ).stdout
    for part in (
        '-r dataset "/data/my set/"',
        '-r methods "unpadded rastp"',
        '-p seeds "1"',
        '"runs/my set-smoke"',
    ):
        assert part in chosen, part


def test_make_study_passes_its_variables_on():
    alone = make("study", "STUDY=map").stdout
    for part in (
        '-r study "map"',
        '-r dataset "planted" -r preset "quick" -p seeds "3"',
        '-r output_dir ""',
        '-p only "0"',
        "-k python3 --cwd .",
    ):
        assert part in alone, part
    assert "keep" not in alone
    told = make("study", "STUDY=map", "OUTPUT_DIR=out", "ONLY=2", "SIDS=my table", "KEEP=1").stdout
    for part in ('-r output_dir "out"', '-p only "2"', '-r sids "my table"', "-p keep True"):
        assert part in told, part
    given = set(re.findall(r"-[rp] (\w+) ", told))
    assert given <= papermill.inspect_notebook(ROOT / "notebooks" / "study.ipynb").keys()


def test_make_clean_spares_runs_and_sources():
    done = make("clean")
    assert ".venv" in done.stdout and "setup" not in done.stdout
    assert "runs" not in done.stdout and "pip" not in done.stdout


# --- the wheel ----------------------------------------------------------------------------------


def test_the_wheel_holds_what_notebooks_read(tmp_path):
    """A notebook opened alone, with the installed package, has the demo model, what the explorers
    show, and the views.
    """
    source = tmp_path / "source"  # setuptools leaves its build folder there
    names = ("pyproject.toml", "README.md", "LICENSE")
    shutil.copytree(ROOT / "sidlab", source / "sidlab")
    for name in names:
        shutil.copy(ROOT / name, source / name)
    code = f"import setuptools.build_meta as s; s.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if name.startswith("sidlab/")}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sidlab").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {f"sidlab/course/data/{name}.json" for name in ("granularity", "map")} < held


# --- import ---------------------------------------------------------------------------------------


def in_a_new_python(code):
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_import_loads_no_more_than_torch_and_opens_no_connection():
    heavy = {
        "transformers",
        "accelerate",
        "pandas",
        "sklearn",
        "scipy",
        "faiss",
        "plotly",
        "matplotlib",
        "IPython",
    }
    code = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError("import sidlab opens a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import {}
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    loaded = set(in_a_new_python(code.format("sidlab")))
    assert "sidlab" in loaded
    assert not heavy & loaded, f"import sidlab loads {sorted(heavy & loaded)}"
    ours = loaded - set(in_a_new_python(code.format("torch"))) - set(sys.stdlib_module_names)
    assert ours <= {"sidlab"}, f"import sidlab loads {sorted(ours)}, which torch does not"


@pytest.mark.parametrize(
    "code",
    [
        "import sidlab.viz",
        "import sidlab; sidlab.train; sidlab.SidQwen; sidlab.RQVAE; sidlab.OPQ; sidlab.sweep",
        # Drawn, another state after a move, recall with a rule of one's own
        """
from sidlab.viz import PruningExplorer
explorer = PruningExplorer()
explorer.set(keep=0.2, scorer="norm")
explorer.acted({"rule": {"levels": [0], "newest": 2}})
explorer.picture()
assert explorer.content["rule"]["rows"] and explorer.content["tokens"]
""",
    ],
    ids=["viz", "public names", "pruning explorer"],
)
def test_what_is_slow_to_import_waits_for_its_use(code):
    slow = {
        "transformers.trainer",
        "faiss",
        "sklearn",
        "scipy.stats",
        "scipy.cluster",
        "vector_quantize_pytorch",
        "tensorboard",
        "papermill",
        "nbconvert",
        "jupyterlab",
    }
    loaded = slow & set(in_a_new_python(f"import sys\n{code}\nprint(*sys.modules)"))
    assert not loaded, f"loads {sorted(loaded)}"


def test_every_public_name_resolves():
    code = (
        "import sidlab; print(*[name for name in sidlab.__all__ if getattr(sidlab, name) is not"
        " None])"
    )
    resolved = in_a_new_python(code)
    listed = in_a_new_python("import sidlab; print(*sidlab.__all__)")
    assert len(listed) > 0 and len(listed) == len(set(listed)) and resolved == listed
    assert set(listed) <= set(in_a_new_python("import sidlab; print(*dir(sidlab))"))


def test_make_paper_hands_on_what_it_is_given():
    alone = make("paper", "DATASETS=planted").stdout
    told = make(
        "paper",
        "DATASETS=planted",
        "ARCH=t5 qwen",
        "METHODS=unpadded rastp",
        "SIDS=table.txt",
        "PRESET=smoke",
        "SEEDS=1",
        "OUTPUT_DIR=out",
        "CLUSTER=tcp://h:1",
    ).stdout
    assert (
        "sidlab.research.claims planted --preset paper --seeds 3 --arch t5 --output runs/paper"
        in alone
        and "--methods" not in alone
    )
    assert "planted --preset smoke --seeds 1 --arch t5 qwen --output out" in told
    assert '--cluster "tcp://h:1"' in told and "--cluster" not in alone
    assert '--methods "unpadded rastp"' in told and '--sids "table.txt"' in told
