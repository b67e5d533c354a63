"""The examples in docstrings are run."""

import doctest
import importlib

import pytest
from conftest import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "sidlab").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    # What an example takes for granted: torch and the package.
    names = vars(module) | {name: importlib.import_module(name) for name in ("torch", "sidlab")}
    found = doctest.testmod(module, extraglobs=names)
    assert not found.failed, f"python -m doctest -v {module.__file__}"


def test_some_examples_are_run_and_a_wrong_one_is_found():
    assert len(MODULES) > 5
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
