"""Where something was measured, and with which code."""

import ast
import functools
import hashlib
import os
import pathlib
import platform

import numpy as np
import torch
import transformers

import sidlab


def hardware() -> dict:
    """What this machine is: processor, cores this process may use, memory in GB, GPU or None."""
    info = pathlib.Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.exists():
        name = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if hasattr(os, "sysconf")
        else None
    )
    return {
        "processor": name,
        "cores": cores,
        "memory_gb": memory and round(memory, 1),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict:
    """Versions of this package and its code (a digest, as in the runs' keys), of Python and of what
    computes.
    """
    import sidlab

    return {
        "sidlab": sidlab.__version__,
        "code": code_digest()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


# Rooms that no run goes through: they come after training.
BESIDE = ("research", "course", "figures", "viz")


@functools.cache
def code_digest():
    """A digest of the parts of this package that a run goes through, comments, docstrings, layout
    and what errors say aside: rounding differs between versions, and a table of old and new runs
    would compare that too.
    """
    home = pathlib.Path(sidlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0].removesuffix(".py") not in BESIDE:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                    and ast.get_docstring(node) is not None
                ):
                    del node.body[0]
                if isinstance(node, ast.Raise):
                    node.exc = None
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()
