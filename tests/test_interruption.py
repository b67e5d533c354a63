"""Whatever ends a reproduction from outside, nothing of it goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT


def wait_for(condition, seconds=120):
    """The first true value of `condition()`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"nothing came within {seconds} s")


@pytest.mark.parametrize(
    "who, how",
    [
        ("papermill", signal.SIGTERM),
        ("papermill", signal.SIGINT),
        ("papermill", signal.SIGKILL),
        ("kernel", signal.SIGKILL),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_reproduction_that_is_ended_leaves_nothing_running(tmp_path, who, how):
    parameters = {"methods": "unpadded", "seeds": 1, "output_dir": tmp_path / "out"}
    given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    command = ["-m", "papermill", "notebooks/reproduce.ipynb", str(tmp_path / "out.ipynb"), *given]
    papermill = psutil.Popen(
        [sys.executable, *command, "-k", "python3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Where tests run in the background, a shell has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def training():
        """The process of the run, once it trains."""
        assert papermill.poll() is None, "papermill ended by itself"
        log = tmp_path / "out" / "runs" / "base-seed0.log"
        began = log.exists() and "update" in log.read_text()
        return began and next(
            one
            for one in papermill.children(recursive=True)
            if "sidlab.research" in str(one.cmdline())
        )

    found = [papermill]
    try:
        child = wait_for(training)
        kernel = child.parent()
        assert "ipykernel" in str(kernel.cmdline())
        found += [kernel, child]
        {"papermill": papermill, "kernel": kernel}[who].send_signal(how)
        _, alive = psutil.wait_procs(found, timeout=60)
        assert not alive
    finally:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
