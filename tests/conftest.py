"""Shared by all tests: where the real data stand, if they do, and how Triton's kernels run."""

import json
import os
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data not found at {SHARED}")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # here, before a test imports anything that imports triton


def pytest_report_header():
    data = "found at" if SHARED.is_dir() else "NOT found, tests on it are skipped; looked at"
    return [f"sidlab: real data {data} {SHARED}", f"sidlab: GPU kernels are {'compiled' if CUDA else 'interpreted on the CPU'}"]


class FakeComm:
    """Stands in for the connection to a browser: `sent` gets the size in bytes of each message. NaN is no JSON and would be refused."""

    comm_id = kernel = "fake"

    def __init__(self, sent: list):
        self.sent = sent

    def send(self, data=None, metadata=None, buffers=None):
        self.sent.append(len(json.dumps(data, allow_nan=False)) + sum(memoryview(buffer).nbytes for buffer in buffers or ()))

    def on_msg(self, *args):
        """Nothing ever arrives."""

    on_close = close = on_msg


def connect(explorer) -> list:
    """Let an explorer talk to a `FakeComm`; returns the list of sizes."""
    sent = []
    for widget in (explorer.figure, explorer.text, explorer.alert, *explorer.controls.values()):
        widget.comm = FakeComm(sent)
    return sent
