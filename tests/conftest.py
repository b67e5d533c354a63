"""Shared by all tests: where the real data stand, if they do."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data not found at {SHARED}")


def pytest_report_header():
    return f"sidlab: real data {'found at' if SHARED.is_dir() else 'NOT found, tests on it are skipped; looked at'} {SHARED}"
