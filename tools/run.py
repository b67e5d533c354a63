"""Run the student's notebooks from top to bottom and judge them:

python tools/run.py [--only NN …] [--settings tiny|quick] [--output runs/notebooks]

`settings.json` gives each notebook its papermill "parameters", the "seconds" it may take and, in
"expect", bounds [low, high] of metrics. Every notebook runs in a process of its own, two at a time.
It passes if it ends in time, if none of its outputs and widgets shows an error, if it records
metrics (`teach.record`), all finite and within their bounds, and if every check finds its exercise
not done. The executed notebooks, their logs and `results.json` are in the output folder.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import papermill
import psutil

HERE = pathlib.Path(__file__).resolve().parent
NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
TRACEBACK = "Traceback (most recent call last)"
ALERT = re.compile(r"\brole\s*=\s*[\"']?alert\b")
WIDGETS = "application/vnd.jupyter.widget-state+json"
ROW = "{:28} {:>8} {:>8} {:>6}  {}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NN",
        help="notebooks whose names begin so; default: all",
    )
    parser.add_argument("--settings", default="tiny", choices=sorted(load_settings()))
    parser.add_argument("--output", default="runs/notebooks", type=pathlib.Path)
    args = parser.parse_args()
    paths = [
        path
        for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
        if path.name.startswith(tuple(args.only))
    ]
    if not paths:
        sys.exit(f"--only {' '.join(args.only)}: no notebook's name begins so")
    results = run(paths, load_settings()[args.settings], args.output)
    sys.exit(any(result["problems"] for result in results))


def load_settings() -> dict:
    return json.loads((HERE / "settings.json").read_text(encoding="utf-8"))


def run(paths, settings, output, environment=None, keep_widgets=False) -> list[dict]:
    """Run and judge the notebooks `paths` under `settings`, {stem: {"parameters", "seconds",
    "expect"}}, and print a table.

    Returns a dict each, also in `output`/results.json: notebook, seconds, peak_mb (of the kernel
    and its children), cells, metrics, problems (a list of texts; empty: it passed). `environment`:
    further variables of the kernels; `keep_widgets`: leave the widgets' state, megabytes, in the
    executed notebooks. ValueError if the settings do not fit the notebooks.
    """
    check_settings(paths, settings)
    output = pathlib.Path(output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    results = []
    print(ROW.format("notebook", "seconds", "peak MB", "cells", "verdict"), flush=True)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(
                _run_one, path, settings[path.stem], output, environment or {}, keep_widgets
            )
            for path in paths
        ]
        for result in (job.result() for job in jobs):
            results.append(result)
            seconds = f"{result['seconds']:.0f}"
            peak = f"{result['peak_mb']:.0f}"
            verdict = "FAILED" if result["problems"] else "passed"
            print(ROW.format(result["notebook"], seconds, peak, result["cells"], verdict))
            print(
                *(f"    {problem}\n" for problem in result["problems"]), sep="", end="", flush=True
            )
    (output / "results.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    failed = sum(bool(result["problems"]) for result in results)
    print(
        f"{len(results) - failed} of {len(results)} passed; executed notebooks and logs: {output}"
    )
    return results


def check_settings(paths, settings):
    """ValueError if a notebook has no settings, or if they hold a parameter that it does not have:
    papermill would ignore that one.
    """
    for path in paths:
        if path.stem not in settings:
            raise ValueError(
                f"settings.json: no entry for {path.stem}; it has {', '.join(settings)}"
            )
        known = papermill.inspect_notebook(path)
        if unknown := settings[path.stem]["parameters"].keys() - known.keys():
            raise ValueError(
                f"settings.json: {path.stem} has no parameter {', '.join(sorted(unknown))}; "
                f"it has {', '.join(known) or 'none'}"
            )


def _run_one(path, setting, output, environment, keep_widgets):
    executed = output / path.name
    record = output / f"{path.stem}.record.json"
    for file in (executed, record):
        file.unlink(missing_ok=True)
    # Two notebooks share the cores; with more threads they would wait for one another.
    variables = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    variables |= {
        "SIDLAB_UNATTENDED": "1",
        "SIDLAB_RECORD": str(record),
        "PLOTLY_RENDERER": "plotly_mimetype",
        **environment,
    }
    command = [
        sys.executable,
        "-m",
        "papermill",
        path,
        executed,
        "--kernel",
        "python3",
        "--cwd",
        NOTEBOOKS,
        "--no-progress-bar",
        "--parameters_yaml",
        json.dumps(setting["parameters"]),
    ]
    with open(output / f"{path.stem}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        seconds, peak, in_time = _watch(process, setting["seconds"])
    problems = [] if in_time else [f"not done after {setting['seconds']} s"]
    notebook = nbformat.read(executed if in_time and executed.exists() else path, as_version=4)
    problems += errors_shown(notebook)
    if not problems and process.returncode:
        problems = [f"papermill ended with {process.returncode}; see {log.name}"]
    recorded = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if not problems:
        problems = judge(
            recorded,
            setting.get("expect", {}),
            sum("check" in cell.metadata.get("tags", []) for cell in notebook.cells),
        )
    if not keep_widgets and notebook.metadata.pop("widgets", None):
        nbformat.write(notebook, executed)
    return {
        "notebook": path.stem,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak, 1),
        "cells": len(notebook.cells),
        "metrics": recorded.get("metrics", {}),
        "problems": problems,
    }


def _watch(process, limit):
    """Wait for `process`; end it and its children after `limit` seconds: (seconds, peak MB of all
    below it together, whether it ended).
    """
    start = time.monotonic()
    peak = 0.0
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            below = parent.children(recursive=True)
            peak = max(peak, sum(map(_megabytes, below)))
            if time.monotonic() - start > limit:
                for one in [parent, *below]:
                    one.kill()
                process.wait()
                return time.monotonic() - start, peak, False
        except psutil.NoSuchProcess:
            continue  # it ended while being looked at
        time.sleep(0.1)
    return time.monotonic() - start, peak, True


def _megabytes(process):
    """The most that a process has held so far where the system tells (Linux), else what it holds
    now.
    """
    status = pathlib.Path(f"/proc/{process.pid}/status")
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:  # another system, or the process is gone
        found = None
    return int(found[1]) / 1024 if found else process.memory_info().rss / 2**20


def errors_shown(notebook) -> list[str]:
    """Every error that an executed notebook shows, in outputs or inside of widgets (of which the
    state has to be in its metadata).
    """
    problems = []
    for cell in notebook.cells:
        problems += [
            f"cell {cell.id}: {problem}"
            for output in cell.get("outputs", [])
            for problem in _errors_of_output(output)
        ]
    for model in notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {}).values():
        name = model["model_name"]
        state = model["state"]
        problems += [
            f"inside an Output widget: {problem}"
            for output in state.get("outputs", [])
            for problem in _errors_of_output(output)
        ]
        shown = [value for key, value in state.items() if key != "_esm"]  # which is a view's source
        problems += [
            f"a widget ({name}): {problem}" for value in shown for problem in _errors_of_text(value)
        ]
    return problems


def _errors_of_output(output):
    if output["output_type"] == "error":
        return [f"{output['ename']}: {output['evalue']}"]
    data = {"text": output["text"]} if output["output_type"] == "stream" else dict(output["data"])
    if len(data) > 1:
        data.pop("text/plain", None)  # the same again, as repr writes it
    return [problem for text in data.values() for problem in _errors_of_text(text)]


def _errors_of_text(text):
    if not isinstance(text, str):
        return []
    if TRACEBACK in text:
        return [f"shows a traceback: {text.strip().splitlines()[-1]}"]
    if found := ALERT.search(text):
        alert = text[found.start() :].partition(">")[2]
        return [f"shows an alert: {re.sub('<[^>]*>', '', alert)[:200]}"]
    return []


def judge(recorded: dict, expect: dict, checks: int) -> list[str]:
    """What is wrong with a record, {"metrics": {...}, "checks": [{"name", "passed", "verdict"}]}:
    nothing recorded, a number that is not finite, a metric outside of `expect`, {name: [low,
    high]}, fewer checks than `checks`, a check that a stub does not fail.
    """
    metrics = recorded.get("metrics", {})
    problems = [] if metrics else ["nothing was recorded"]
    problems += [
        f"metric {name} is {value}" for name, value in _numbers(metrics) if not math.isfinite(value)
    ]
    for name, (low, high) in expect.items():
        value = metrics.get(name)
        if not isinstance(value, int | float) or not low <= value <= high:
            problems.append(f"metric {name} is {value}; it has to be from {low} to {high}")
    made = recorded.get("checks", [])
    if len(made) < checks:
        problems.append(f"{len(made)} checks recorded of {checks} cells tagged 'check'")
    problems += [
        f"check {check['name']} of a stub says {check['verdict']!r}, not 'not started'"
        for check in made
        if check["passed"] or check["verdict"] != "not started"
    ]
    return problems


def _numbers(node, name=""):
    """(dotted name, number) of everything below `node`."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _numbers(child, f"{name}.{key}" if name else str(key))
    elif isinstance(node, int | float):
        yield name, node


if __name__ == "__main__":
    main()
