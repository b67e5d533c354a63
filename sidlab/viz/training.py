"""The training monitor: several runs, one after the other, in a thread beside the notebook, with their curves growing live.

The thread draws too: ipykernel takes widget messages from any thread, and plotly's figure has one writer at a time. Training itself
draws from PyTorch's global random state, so code that does the same meanwhile changes the numbers of the run.
"""

import dataclasses
import os
import threading
import time

import ipywidgets as widgets
from transformers import TrainerCallback

from sidlab.config import TrainConfig
from sidlab.training import TrainResult, train
from sidlab.viz.explorer import Explorer, alert, chart_state, write_frames
from sidlab.viz.figures import learning_curves
from sidlab.viz.pruning import table as html_table

PAUSE = 0.5  # seconds between two pictures
clock = time.monotonic


class TrainingMonitor(Explorer):
    """Train `configs`, {name: `TrainConfig`}, one after the other on `catalogue` with the SIDs of `table`, and watch.

    "Start" (or `start()`) trains what is not done yet; "Stop" (or `stop()`) ends training after the update in progress. A stopped run
    that has been evaluated keeps its best checkpoint so far, another one leaves nothing; "Start" trains both anew. `wait()` starts if
    need be, blocks until training ends and returns `results`. One monitor trains at a time: to start another (of the same cell, run
    again, say) stops the one before. Where a run fails, the reader sees why and `wait()` raises it. `start_from`: the folder of a saved
    model that every run goes on from (`train`); the folder must still be there when training starts.
    Attributes: `results` {name: `TrainResult`} so far, `states` {name: "waiting", "training", "done", "stopped" or "failed"}.
    """

    heading = "Training runs side by side"
    _starting, _last = threading.Lock(), None  # of all monitors: the one started last

    def __init__(self, configs: dict[str, TrainConfig], catalogue, table, *, start_from=None):
        if not configs:
            raise ValueError("configs must hold at least one run {name: TrainConfig}")
        self.catalogue, self.table, self.start_from = catalogue, table, start_from
        self._runs = {name: _Run(name, config) for name, config in configs.items()}
        self._thread, self._error, self._drawn, self._points = None, None, -PAUSE, None
        self._stopping = threading.Event()
        super().__init__({})
        self.start_button = widgets.Button(description="Start", icon="play", tooltip="train what is not done yet")
        self.stop_button = widgets.Button(description="Stop", icon="stop", tooltip="end training after this update", disabled=True)
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.children = [widgets.HBox([self.start_button, self.stop_button]), *self.children[1:]]

    @property
    def results(self) -> dict[str, TrainResult]:
        return {name: run.result for name, run in self._runs.items() if run.result is not None}

    @property
    def states(self) -> dict[str, str]:
        return {name: run.state for name, run in self._runs.items()}

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Train in the background what is not done; returns at once. Does nothing while training runs."""
        with TrainingMonitor._starting:  # JupyterLab may handle a click in one thread while `wait` starts in another
            todo = [run for run in self._runs.values() if run.state != "done"]
            if self.running or not todo:
                return
            self._stopping.clear()
            self._error = None
            for run in todo:
                run.clear()
            self.start_button.disabled, self.stop_button.disabled = True, False
            self.refresh()
            before, TrainingMonitor._last = TrainingMonitor._last, self
            if before is not None and before.running:
                before.stop()
            thread = threading.Thread(target=self._work, args=(todo, before and before._thread), name="sidlab training", daemon=True)
            thread.start()
            self._thread = thread  # now that `wait` can join it

    def stop(self) -> None:
        """End training after the update in progress; returns at once."""
        self._stopping.set()
        self.stop_button.disabled = True

    def wait(self) -> dict[str, TrainResult]:
        """Block until training ends (started here if it never was) and return `results`. An interrupt stops training. Raises what a run
        raised."""
        if self._thread is None:
            self.start()
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.stop()
            self._thread.join()
            raise
        if self._error is not None:
            raise self._error
        return self.results

    def _work(self, todo, before):
        """The thread: once that of another monitor has ended, every run, and whatever happens the buttons as they should be."""
        try:
            if before is not None:
                before.join()
            for run in todo:
                if self._stopping.is_set():
                    break
                self._train(run)
            self.refresh()
        except Exception as error:  # noqa: BLE001 `wait` raises it; as nobody may wait, the reader sees it here
            self._error = error
            self.show(text=self._text(), alert=alert(error))
        finally:
            self.start_button.disabled = all(run.state == "done" for run in self._runs.values())
            self.stop_button.disabled = True

    def _train(self, run):
        run.state, run.begin = "training", clock()
        try:
            run.result = train(run.config, self.catalogue, self.table, start_from=self.start_from, progress=False,
                               callbacks=[_Watch(self, run)])
            run.state = "stopped" if self._stopping.is_set() and run.step < run.updates else "done"
        except _Stopped:
            run.state = "stopped"
        except Exception:
            run.state = "failed"
            raise

    def follow(self) -> None:
        """Bring text and, where a curve has grown, figure up to date, but at most every `PAUSE` seconds: it is time lost for training."""
        if clock() - self._drawn < PAUSE:
            return
        points = [(len(run.loss), len(run.recall)) for run in self._runs.values()]
        if points != self._points:
            self.refresh()
        else:
            self.show(text=self._text())
        self._drawn, self._points = clock(), points

    def draw(self):
        return self._figure(), self._text()

    def _figure(self, until=float("inf")):
        """The curves up to one update; all runs have theirs, if empty."""
        curves = []
        for run in self._runs.values():
            loss, recall = ([pair for pair in points if pair[0] <= until] for points in (run.loss, run.recall))
            curves.append({"method": run.name, "seed": run.config.seed, "step": [s for s, _ in loss], "loss": [v for _, v in loss],
                           "eval_step": [s for s, _ in recall], "recall@10": [v for _, v in recall]})
        last = max(run.updates for run in self._runs.values())
        figure = learning_curves({"curves": curves}).update_xaxes(range=[0, 1.03 * last] if last else None)
        return figure.update_layout(height=420, uirevision="same", margin_b=90)

    def _text(self, until=float("inf")):
        rows, places = [], sorted({step for run in self._runs.values() for step, _ in run.recall if step <= until})
        for run in self._runs.values():
            loss, recall = ([v for step, v in points if step <= until] for points in (run.loss, run.recall))
            rows.append((run.name, run.state, f"{min(run.step, until)} of {run.updates}" if run.updates else "–", f"{run.seconds:.0f}",
                         f"{loss[-1]:.3f}" if loss else "–", f"{max(recall):.4f}" if recall else "–"))
        out = html_table(("run", "state", "update", "seconds", "training loss", "best validation recall@10"), rows)
        if places:
            by_run = [dict(run.recall) for run in self._runs.values()]
            rows = [(step, *(f"{of_run[step]:.4f}" if step in of_run else "–" for of_run in by_run)) for step in places]
            out += "<p>Validation recall@10 after so many updates:</p>" + html_table(("update", *self._runs), rows)
        return out

    def frames(self, values=None):
        """The curves as they grew: a frame for each of `values`, numbers of updates (default: each evaluation, thinned to 21)."""
        if values is None:
            steps = sorted({step for run in self._runs.values() for step, _ in run.recall}) or [0]
            values = steps[::-1][:: -(-len(steps) // 21)][::-1]
        return [(str(value), chart_state(self._figure(value), self._text(value))) for value in values]

    def export(self, path, values=None):
        """Write one HTML file with the final curves and a slider back to how they grew (see `frames`)."""
        frames = self.frames(values)
        return write_frames(path, self.heading, "up to update", frames, first=len(frames) - 1)

    def _repr_mimebundle_(self, **kwargs):
        if os.environ.get("SIDLAB_SITE"):
            self.wait()  # a page shows the finished curves
        return super()._repr_mimebundle_(**kwargs)


@dataclasses.dataclass
class _Run:
    """One run as the monitor sees it: `loss` and `recall` are lists of (update, value)."""

    name: str
    config: TrainConfig

    def __post_init__(self):
        self.clear()

    def clear(self):
        self.state, self.result, self.step, self.updates, self.begin, self.seconds = "waiting", None, 0, 0, 0.0, 0.0
        self.loss, self.recall = [], []


class _Watch(TrainerCallback):
    """Carries a run's numbers to the monitor and the reader's stop to the Trainer."""

    def __init__(self, monitor, run):
        self.monitor, self.run = monitor, run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.updates = state.max_steps

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.run.loss.append((state.global_step, logs["main_loss"]))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.run.recall.append((state.global_step, metrics["eval_recall@10"]))
        self.run.seconds = clock() - self.run.begin
        self.monitor.follow()

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step, self.run.seconds = state.global_step, clock() - self.run.begin
        if self.monitor._stopping.is_set():
            if not self.run.recall:
                raise _Stopped  # without an evaluation there is no checkpoint that `train` could return
            control.should_training_stop = True
        self.monitor.follow()


class _Stopped(Exception):
    """Stopped before the first evaluation."""
