"""Runs handed out to workers: threads, processes, a Dask cluster, SLURM.

What a worker is given is `run_in_child` and three strings. It starts the run in a process of its
own and waits, so it imports neither torch nor transformers, and this module doesn't. Everything
else goes through the folder, which all machines must share, with file locks that hold across them:

* `runs/NAME.TICKET`: what is asked for. A sweep that ends removes it, and the run stops.
* `runs/NAME.lock`: held by the worker that does the run, `NAME.alive` by its child process.
* `runs/NAME.spec`: what the run in `runs/NAME` was begun with; `NAME.log`, `NAME.json`: what came.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import uuid
from typing import Any

from filelock import FileLock, Timeout

from sidlab.files import read_json, write_json

POLL = 0.2  # seconds between two looks at what runs
MARK = "» "  # a line of the log that is passed on


def path_of(folder, name: str) -> pathlib.Path:
    """The folder of a run: checkpoints, then the model."""
    name = re.sub(r"[^\w.=@+-]+", "-", name)
    if len(name) > 180:  # a file's name has 255 at most, with what is put behind
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return pathlib.Path(folder) / "runs" / name


def file_of(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """A file beside a run's folder."""
    # With_suffix would cut the name at its last dot, as in keep=0.5-seed0
    return path.with_name(path.name + suffix)


def result_of(path: pathlib.Path, spec: dict) -> dict | None:
    """The result beside `path`, or None if it isn't what `spec` asks for: its "key", and, with
    "weights", the model that other runs start from.
    """
    file = file_of(path, ".json")
    if not file.exists() or spec.get("weights") and not (path / "model.safetensors").exists():
        return None
    result = json.loads(file.read_text())
    return result if result["key"] == spec["key"] else None


def run_in_child(folder: str, name: str, ticket: str) -> str:
    """Do a run that is asked for in a process of its own; returns its result, as JSON.

    Where another worker is at the same run, its result is waited for. Raises RuntimeError with the
    end of the output if the run fails, and if it is no longer asked for.
    """
    path = path_of(folder, name)
    asked = file_of(path, f".{ticket}")
    with _held(file_of(path, ".lock"), asked):
        spec = read_json(asked)
        result = result_of(path, spec)
        if result is None:
            # A child whose worker was killed ends by itself, if not at once
            with _held(file_of(path, ".alive"), asked):
                stamp = file_of(path, ".spec")
                # A killed run of other data, settings or code
                if stamp.exists() and read_json(stamp)["key"] != spec["key"]:
                    shutil.rmtree(path, ignore_errors=True)
                write_json(stamp, spec)
            start_child(folder, name, ticket)
            result = json.loads(file_of(path, ".json").read_text())
    return json.dumps(result)


def start_child(folder: str, name: str, ticket: str) -> None:
    """Start the process of a run and wait for it. Its output goes to the run's log, whose first
    line is the ticket; it ends when its standard input does, so at the latest with this process.
    """
    path = path_of(folder, name)
    log = file_of(path, ".log")
    with open(log, "w", encoding="utf-8") as output:
        print(ticket, file=output, flush=True)
        with subprocess.Popen(
            [sys.executable, "-m", "sidlab.research.one_run", str(folder), name],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=read_json(file_of(path, ".spec"))["cwd"],
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        ) as process:
            try:
                while process.poll() is None:
                    _check(file_of(path, f".{ticket}"))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(POLL)
            finally:
                process.kill()
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[1:][-15:])
        raise RuntimeError(
            f"{name} failed (exit status {process.returncode}); its output is in {log} and ends"
            f" with\n{end}"
        )


def _check(asked):
    if not asked.exists():
        raise RuntimeError(f"{asked.stem} is no longer asked for: its sweep has ended")


@contextlib.contextmanager
def _held(file, asked):
    """Holds a lock; waits for it as long as the run is asked for."""
    lock = FileLock(file)
    while not lock.is_locked:
        _check(asked)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=POLL)
    try:
        yield
    finally:
        lock.release()


@dataclasses.dataclass
class _Job:
    label: str
    request: dict
    ticket: str = ""
    future: Any = None
    pool: Any = None
    failures: int = 0
    told: int = 0  # lines of the log; the first is the ticket, so 0: not begun


class Queue:
    """The runs of a sweep that are at work; a context that stops them when it is left.

    `executor`: None (one run at a time, here), a `concurrent.futures.Executor`, or a function that
    makes one. Only `submit(function, *strings)` is asked of it, and `done()`, `result()` and
    `cancel()` of what that returns, so submitit's will do. A run that fails in an executor, or
    whose worker dies, is submitted once more. A pool that is broken is replaced by what the
    function makes; without one, that is an error.
    """

    def __init__(self, folder, executor=None):
        self.folder = str(pathlib.Path(folder).absolute())
        self.running: dict[str, _Job] = {}
        self.tries = 1 if executor is None else 2
        if executor is None:
            executor = functools.partial(concurrent.futures.ThreadPoolExecutor, 1)
        self.make = executor if callable(executor) else None
        self.pool = executor if self.make is None else executor()
        if not hasattr(self.pool, "submit"):
            raise TypeError(
                "executor must be a concurrent.futures.Executor, or a function that makes one, got"
                f" {self.pool!r}"
            )

    @property
    def full(self) -> bool:
        """Whether the next run must wait: without an executor they go one after the other."""
        return self.tries == 1 and bool(self.running)

    def submit(self, name: str, request: dict, label: str) -> None:
        """Ask for a run; `label` stands before each line that it prints."""
        self.running[name] = _Job(label, request)
        self._submit(name)

    def next(self) -> tuple[str, dict]:
        """Wait for any run to be done: its name and result. Prints what the runs say meanwhile."""
        while True:
            for name, job in list(self.running.items()):
                done = job.future.done()
                # Asked before, so that its last line is told
                self._tell(name, job)
                if not done:
                    continue
                try:
                    result = json.loads(job.future.result())
                except Exception as error:  # noqa: BLE001 - whatever it died of
                    self._again(name, error)
                else:
                    self._asked(name).unlink(missing_ok=True)
                    del self.running[name]
                    return name, result
            time.sleep(POLL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name in self.running:
            self._asked(name).unlink(missing_ok=True)
        for job in self.running.values():
            # One that is out of reach is no reason to leave the others
            with contextlib.suppress(Exception):
                job.future.cancel()
        self._end_pool()

    def _end_pool(self):
        if self.make is not None and hasattr(self.pool, "shutdown"):
            self.pool.shutdown()

    def _asked(self, name):
        return file_of(path_of(self.folder, name), f".{self.running[name].ticket}")

    def _log(self, name):
        return file_of(path_of(self.folder, name), ".log")

    def _submit(self, name):
        job = self.running[name]
        if job.ticket:
            self._asked(name).unlink(missing_ok=True)
        # A new one each time: what is submitted twice with the same arguments Dask does once
        job.ticket = uuid.uuid4().hex[:12]
        job.told = 0
        write_json(self._asked(name), job.request)
        try:
            job.future = self.pool.submit(run_in_child, self.folder, name, job.ticket)
        except concurrent.futures.BrokenExecutor as error:
            self._renew(name, error)
            job.future = self.pool.submit(run_in_child, self.folder, name, job.ticket)
        job.pool = self.pool

    def _again(self, name, error):
        job = self.running[name]
        broken = isinstance(error, concurrent.futures.BrokenExecutor)
        # What still waited when another run broke the pool has not failed
        job.failures += 1 if job.told or not broken else 0
        if job.failures == self.tries:
            if self.tries == 1:
                raise error
            raise RuntimeError(
                f"{name} failed twice; its log is {self._log(name)}. The second time: {error}"
            ) from error
        if broken and job.pool is self.pool:
            self._renew(name, error)
        print(f"{job.label}: {str(error).splitlines()[0]}; submitted once more", flush=True)
        self._submit(name)

    def _renew(self, name, error):
        """Another pool in place of a broken one."""
        if self.make is None:
            raise RuntimeError(
                f"the executor broke at {name}, whose log is {self._log(name)}: {error}. For it to"
                " be submitted once more, give a function that makes an executor, such as lambda:"
                " ProcessPoolExecutor(2)"
            ) from error
        for other, job in self.running.items():
            self._tell(other, job)
        if not any(job.told for job in self.running.values() if job.pool is self.pool):
            raise RuntimeError(f"the executor broke before any run began: {error}") from error
        self._end_pool()
        self.pool = self.make()

    def _tell(self, name, job):
        """Print the new lines of a run's log that are meant for it."""
        log = self._log(name)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = text.split("\n")[:-1]  # whole ones
        if lines[:1] != [job.ticket]:  # not begun; the log is that of an earlier time
            return
        for line in lines[job.told :]:
            if line.startswith(MARK):
                print(f"{job.label}: {line.removeprefix(MARK)}", flush=True)
        job.told = len(lines)


def cluster(address: str) -> concurrent.futures.Executor | None:
    """The executor of the Dask cluster whose scheduler has this address, such as
    tcp://10.0.0.1:8786; None for "", so that runs go one after the other, here.
    """
    if not address:
        return None
    # Here, since a worker imports this module, and nothing large with it.
    from sidlab.checks import from_extra

    with from_extra("cluster"):
        from distributed import Client

    return Client(address).get_executor()
