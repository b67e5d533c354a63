"""The house: every module has a room, and a room imports only itself and the rooms before it."""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sidlab"
# In order. A room is a folder or a file; those of one line may not import each other in a circle.
ROOMS = (
    "checks files",
    "sids",
    "data",
    "saliency",
    "pruning",
    "map_loss",
    "fast",
    "models",
    "windows batches strategy config metrics decoding",
    "model_building training_plan checkpoints trainer",
    "training",
    "figures",
    "research",
    "course",
    "viz",
)
ORDER = {room: place for place, rooms in enumerate(ROOMS) for room in rooms.split()}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name):
    """Modules of this package that a module names in its imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative path"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {module for module in found if module in MODULES and module != "sidlab"}


def room(name):
    return name.split(".")[1]


# `sidlab/__init__.py` and `sidlab/viz/__init__.py` name others in tables, to be imported on first
# use.
WALKED = sorted(MODULES.keys() - {"sidlab"})


def test_every_module_has_a_room():
    assert {room(name) for name in WALKED} == ORDER.keys()


@pytest.mark.parametrize("name", WALKED)
def test_a_room_imports_only_rooms_before_it(name):
    later = [other for other in imports(name) if ORDER[room(other)] > ORDER[room(name)]]
    assert not later, f"{name} imports {', '.join(later)}, which stand in later rooms"


def test_nothing_is_imported_in_a_circle():
    graph = {name: imports(name) for name in WALKED}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", WALKED)
def test_no_module_takes_what_another_keeps_to_itself(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sidlab"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{name} imports {private} from {node.module}"


def test_importing_the_package_loads_nothing_large():
    code = (
        "import sys, sidlab; print({'torch', 'transformers', 'faiss', 'plotly'} &"
        " sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
