"""Shared by all tests: where the real data stand, if they do, and how Triton's kernels run."""

import json
import os
import pathlib
import re
import sys

import hypothesis
import pytest
import torch

from sidlab.research import jobs

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
# Last: the tools import one another, and nothing else may find them first
sys.path.append(str(ROOT / "tools"))
import latency

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data not found at {SHARED}")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # here, before a test imports anything that imports triton
# Other work on the machine is no failure
hypothesis.settings.register_profile("sidlab", deadline=None)
hypothesis.settings.load_profile("sidlab")


def pytest_report_header():
    data = "found at" if SHARED.is_dir() else "NOT found, tests on it are skipped; looked at"
    return [
        f"sidlab: real data {data} {SHARED}",
        f"sidlab: GPU kernels are {'compiled' if CUDA else 'interpreted on the CPU'}",
    ]


def instead_of_runs(monkeypatch, work) -> None:
    """`work(name, spec)` in place of a run's process; it returns what the result holds besides the
    key.
    """

    def start_child(folder, name, ticket):
        path = jobs.path_of(folder, name)
        one = json.loads(jobs.file_of(path, ".spec").read_text())
        result = work(name, one)
        jobs.write_json(jobs.file_of(path, ".json"), {"key": one["key"], **result})

    monkeypatch.setattr(jobs, "start_child", start_child)


@pytest.fixture
def dark(monkeypatch):
    """Figures are dark."""
    from sidlab.figures import theme

    monkeypatch.setattr(theme.pio.templates, "default", theme.pio.templates.default)
    theme.use_theme("dark")


def connect(explorer) -> list:
    """Let an explorer talk to nobody; returns the list of the sizes in bytes of what it says."""
    sent = []
    latency.connect(explorer, sent)
    return sent


def frames_of(page: str) -> list[dict]:
    """The frames of an exported page: {"value": what the slider shows, "state": what is drawn}."""
    return json.loads(
        re.search(r"const frames = (\[.*?\]), env = ", page, re.DOTALL)[1].replace("<\\/", "</")
    )
