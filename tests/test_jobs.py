"""Runs handed out: the same results from workers as here, workers that die, sweeps that end."""

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
from conftest import ROOT, instead_of_runs
from distributed import LocalCluster
from filelock import FileLock

from sidlab.config import TrainConfig
from sidlab.pruning import PruningConfig
from sidlab.research import jobs
from sidlab.research.runs import run_all, spec
from sidlab.research.summary import SECONDS

SHORT = {"max_updates": 2, "eval_every": 2, "precision": "fp32"}
BASE = spec("planted", TrainConfig.preset("smoke", targets="all", **SHORT))
# Two that start from the third
SPECS = {
    "after": spec("planted", TrainConfig.preset("smoke", continued=True, **SHORT), start="base"),
    "pruned": spec(
        "planted", {"recommend": 10, "pruning": PruningConfig().to_dict()}, start="base"
    ),
    "base": BASE,
}
WITHOUT_TORCH = "'torch' not in __import__('sys').modules"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs of one thread each, as bits depend on their number; from where `sidlab` is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The results of the runs one after the other."""
    return list(run_all(SPECS, tmp_path_factory.mktemp("here")))


def processes():
    """Two worker processes that inherit nothing from this one."""
    return concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def same(side_by_side, here):
    """Whether runs came out as one after the other, bit for bit; those alone have seconds."""
    for found, right in zip(side_by_side, here, strict=True):
        assert found["beside"] and not right["beside"]
        for name in ("ranks", "curve", "precision", "key"):
            assert found[name] == right[name]
        for name in found["row"].keys() - {*SECONDS, "peak_memory_mb"}:
            assert found["row"][name] == right["row"][name]
        assert right["row"]["evaluation_seconds"] > 0
        assert [found["row"][name] for name in SECONDS] == [None] * 3
    return True


def runs_below(pid):
    """The processes of runs that a worker has started."""
    return [
        process
        for process in psutil.Process(pid).children()
        if "sidlab.research.one_run" in process.cmdline()
    ]


class Killer(threading.Thread):
    """Kills the worker, among those that `workers` gives, whose run is the first to be at work."""

    def __init__(self, workers):
        super().__init__(daemon=True)
        self.workers = workers
        self.killed = None

    def run(self):
        while self.killed is None:
            time.sleep(0.1)
            for pid in self.workers():
                if self.killed is None and psutil.pid_exists(pid) and runs_below(pid):
                    psutil.Process(pid).kill()
                    self.killed = pid


def test_worker_processes_give_what_one_process_gives(tmp_path, here):
    with processes() as pool:
        assert same(run_all(SPECS, tmp_path, pool), here)
        assert pool.submit(eval, WITHOUT_TORCH).result()
    # What was asked for is no longer, and is found the next time
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} <= {
        *("", ".json", ".log", ".lock", ".alive", ".spec")
    }
    assert same(run_all(SPECS, tmp_path), here)


def test_a_dask_cluster_that_loses_a_worker_gives_what_one_process_gives(tmp_path, here):
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        executor = jobs.cluster(cluster.scheduler_address)
        client = executor._client
        pids = tuple(client.run(os.getpid).values())
        killer = Killer(lambda: pids)
        killer.start()
        assert same(run_all(SPECS, tmp_path, executor), here)
        assert killer.killed
        assert all(client.run(eval, WITHOUT_TORCH).values())
        executor.shutdown()
        client.close()
    assert jobs.cluster("") is None


def test_a_pool_that_broke_is_made_again(tmp_path, here, capsys):
    pools = []

    def make():
        pools.append(processes())
        return pools[-1]

    killer = Killer(lambda: tuple(pools[0]._processes or ()) if pools else ())
    killer.start()
    assert same(run_all({"base": BASE}, tmp_path, make), here[2:])
    assert killer.killed
    assert len(pools) == 2 and "submitted once more" in capsys.readouterr().out


class Mortal(concurrent.futures.Executor):
    """Does what is submitted at once, but for the runs that a worker dies of, so many times."""

    def __init__(self, times, error=RuntimeError):
        self.times = times
        self.error = error
        self.asked = []

    def submit(self, function, folder, name, ticket):
        future = concurrent.futures.Future()
        self.asked.append(name)
        if self.times.get(name, 0) > 0:
            self.times[name] -= 1
            future.set_exception(self.error("the worker is gone"))
        else:
            future.set_result(function(folder, name, ticket))
        return future


def done_at_once(monkeypatch, folder):
    """Runs that take no time."""

    def work(name, one):
        model = jobs.path_of(folder, name) / "model.safetensors"
        model.parent.mkdir(exist_ok=True)
        model.write_bytes(b"weights")
        return {"row": {}}

    instead_of_runs(monkeypatch, work)


def test_a_run_whose_worker_dies_is_submitted_once_more(tmp_path, monkeypatch):
    done_at_once(monkeypatch, tmp_path)
    executor = Mortal({"base": 1, "pruned": 1})
    assert len(list(run_all(SPECS, tmp_path, executor))) == 3
    assert executor.asked == ["base", "base", "after", "pruned", "pruned"]


def test_a_run_that_dies_twice_is_named_with_its_log(tmp_path, monkeypatch):
    done_at_once(monkeypatch, tmp_path)
    executor = Mortal({"base": 2})
    with pytest.raises(RuntimeError, match="base failed twice; its log is .*base.log.*is gone"):
        list(run_all(SPECS, tmp_path, executor))
    assert executor.asked == ["base", "base"]
    # Nothing is asked for any more
    assert not [path for path in (tmp_path / "runs").iterdir() if path.suffix != ".lock"]


def test_a_broken_pool_asks_for_a_function_and_is_not_made_for_ever(tmp_path, monkeypatch):
    done_at_once(monkeypatch, tmp_path)
    broken = concurrent.futures.BrokenExecutor
    with pytest.raises(RuntimeError, match="broke at base, whose log .* give a function that"):
        list(run_all(SPECS, tmp_path, Mortal({"base": 1}, broken)))
    with pytest.raises(RuntimeError, match="broke before any run began: the worker is gone"):
        list(run_all(SPECS, tmp_path, lambda: Mortal({"base": 9}, broken)))
    with pytest.raises(TypeError, match="must be a concurrent.futures.Executor, or a function"):
        list(run_all(SPECS, tmp_path, "tcp://10.0.0.1:8786"))


@pytest.mark.parametrize("width", [1, 3])
def test_no_worker_waits_for_the_run_that_another_starts_from(tmp_path, monkeypatch, width):
    done_at_once(monkeypatch, tmp_path)
    with concurrent.futures.ThreadPoolExecutor(width) as pool:
        assert len(list(run_all(SPECS, tmp_path, pool))) == 3


@pytest.mark.parametrize("executor", [None, "threads"])
def test_a_sweep_that_ends_stops_its_runs(tmp_path, monkeypatch, executor):
    pool = concurrent.futures.ThreadPoolExecutor(1) if executor else None
    running = []

    def interrupted(seconds):
        time.sleep(seconds)
        running.extend(runs_below(os.getpid()))
        if running:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "time", types.SimpleNamespace(sleep=interrupted))
    with pytest.raises(KeyboardInterrupt):
        list(run_all({"base": BASE, "other": BASE}, tmp_path, pool))
    assert len(running) == 1 and not psutil.wait_procs(running, timeout=60)[1]
    left = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_file())
    assert left == ["base.alive", "base.lock", "base.log", "base.spec"]
    if pool:
        pool.shutdown()


def test_a_run_ends_with_its_worker(tmp_path):
    path = jobs.path_of(tmp_path, "base")
    jobs.write_json(jobs.file_of(path, ".spec"), {"cwd": str(ROOT)})
    jobs.write_json(jobs.file_of(path, ".ticket"), {})
    code = (
        f"from sidlab.research import jobs; jobs.start_child({str(tmp_path)!r}, 'base', 'ticket')"
    )
    # Held, so that the run cannot end by itself
    with (
        FileLock(jobs.file_of(path, ".alive")),
        subprocess.Popen([sys.executable, "-c", code]) as worker,
    ):
        while not runs_below(worker.pid):
            time.sleep(0.1)
        runs = runs_below(worker.pid)
        worker.kill()
        assert not psutil.wait_procs(runs, timeout=60)[1]


def test_who_waits_for_another_workers_run_stops_when_nobody_asks(tmp_path):
    path = jobs.path_of(tmp_path, "base")
    ticket = jobs.file_of(path, ".ticket")
    jobs.write_json(ticket, {})
    with (
        FileLock(jobs.file_of(path, ".lock")),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        future = pool.submit(jobs.run_in_child, str(tmp_path), "base", "ticket")
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(1)
        ticket.unlink()
        with pytest.raises(RuntimeError, match="base is no longer asked for"):
            future.result(60)


def test_what_a_run_says_is_printed_once_with_its_name(tmp_path, monkeypatch, capsys):
    def start_child(folder, name, ticket):
        path = jobs.path_of(folder, name)
        log = jobs.file_of(path, ".log")
        log.write_text(f"{ticket}\n» first\nnot for the reader\n» sec", encoding="utf-8")
        time.sleep(5 * jobs.POLL)
        with log.open("a", encoding="utf-8") as file:
            file.write("ond\n» last\n")
        key = json.loads(jobs.file_of(path, ".spec").read_text())["key"]
        jobs.write_json(jobs.file_of(path, ".json"), {"key": key, "row": {}})

    # A log of an earlier time
    jobs.write_json(jobs.file_of(jobs.path_of(tmp_path, "base"), ".log"), "» old\n")
    monkeypatch.setattr(jobs, "start_child", start_child)
    list(run_all({"base": BASE}, tmp_path))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1/1] base")]
    assert said == [f"[1/1] base: {word}" for word in ("first", "second", "last")]


def test_the_module_of_the_workers_imports_nothing_large():
    code = (
        "import sys, sidlab.research.jobs; print({'torch', 'transformers', 'numpy', 'pandas',"
        " 'distributed'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
