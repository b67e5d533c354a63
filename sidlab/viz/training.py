"""The training monitor: runs race beside the notebook, with their curves growing side by side.

Every run has a thread of its own, in which `train` is one call, and one thread trains at a time:
it has the turn for a few updates, then the next one has it. A run that is paused is a thread that
gets no turn. What PyTorch and the libraries keep for the whole process goes with the turn
(`Turns`), so a run gives bit for bit what `train` alone gives. But code that draws random numbers
in the notebook meanwhile draws them from the run whose turn it is.

The threads draw the picture too: ipykernel takes widget messages from any thread.
"""

import contextlib
import dataclasses
import os
import threading
import time

import ipywidgets as widgets
import numpy as np
from transformers import TrainerCallback

from sidlab.checks import one_of
from sidlab.config import TrainConfig
from sidlab.fast.precision import kept_random_state
from sidlab.figures.charts import learning_curves
from sidlab.figures.tables import table as html_table
from sidlab.figures.theme import MARKS
from sidlab.research.baselines import Popularity
from sidlab.training import TrainResult, result_so_far, train
from sidlab.training_plan import planned_updates, validation_cases
from sidlab.viz.explorer import Explorer, alert, chart_state, write_frames
from sidlab.viz.turns import Turns
from sidlab.windows import leave_one_out

PAUSE = 0.5  # seconds between two pictures
MUTE = "sidlab-mute"  # the class of a button that has nothing to do
ROOM = 1.1  # how far an axis reaches beyond what it must show
RULERS = {"popularity": "popularity", "bayes": "Bayes optimum"}
clock = time.monotonic


class TrainingMonitor(Explorer):
    """Train `configs`, {name: `TrainConfig`}, side by side on `catalogue` with the SIDs of `table`.

    The runs take turns of a few updates, those between two values of the training loss. "Start
    all" (or `start()`) trains all that are not done; "Stop all" (or `stop()`) pauses them after the
    update in progress, and each run has a button of its own. A paused run goes on where it was.
    `wait()` starts if need be, blocks until all are done or paused and returns `results`, where a
    paused run that has been evaluated stands with its best checkpoint so far.

    A run that fails lets the others go on: the reader sees why, `wait()` raises it in the end, and
    its button trains it anew. One monitor trains at a time: to start another (of the same cell, run
    again, say) pauses the one before. `start_from`: the folder of a saved model that every run goes
    on from (`train`); it must still be there when training starts.

    Recall is drawn with two rulers, on the users of the evaluation: the most popular items for
    everybody and, where the catalogue knows its truth, the best possible.

    Attributes: `results` {name: `TrainResult`} so far, whose `peak_memory` is that of the process,
    so of all runs; `states` {name: "waiting", "training", "paused", "done" or "failed"}; `running`.
    """

    heading = "Training runs side by side"
    _last = None  # of all monitors: the one started last

    def __init__(self, configs: dict[str, TrainConfig], catalogue, table, *, start_from=None):
        if not configs:
            raise ValueError("configs must hold at least one run {name: TrainConfig}")
        self.catalogue = catalogue
        self.table = table
        self.start_from = start_from
        self._runs = {name: _Run(name, config) for name, config in configs.items()}
        self._begun = False
        self._drawing = threading.RLock()
        self._drawn = -PAUSE
        self._measure()
        super().__init__({})
        self.start_button = widgets.Button(icon="play", tooltip="train what is not done yet")
        self.stop_button = widgets.Button(icon="stop", tooltip="pause after this update")
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.run_buttons = {}
        for name in configs:
            self.run_buttons[name] = button = widgets.Button(layout=widgets.Layout(width="auto"))
            button.on_click(lambda _, name=name: self._toggle(name))
        buttons = [self.start_button, self.stop_button]
        if len(configs) > 1:
            buttons += self.run_buttons.values()
        row = widgets.Box(buttons, layout=widgets.Layout(flex_flow="row wrap", grid_gap="4px"))
        self.children = [row, *self.children[1:]]
        self._tell()

    def _measure(self):
        """What the axes need to know before training: numbers of updates, and rulers."""
        split = leave_one_out(self.catalogue.histories)
        for run in self._runs.values():
            # What is wrong with a configuration its run tells.
            with contextlib.suppress(ValueError):
                run.planned = planned_updates(run.config, self.table, split)
        # Where runs are evaluated on different users, the most.
        cases = [validation_cases(split, run.config) for run in self._runs.values()]
        histories, targets = max(cases, key=lambda case: len(case[1]))
        # The same ten items for everybody, so for one without a history.
        popularity = Popularity().fit(split.train, self.catalogue.n_items)
        popular = popularity.recommend([np.empty(0, np.int64)])[0]
        self.rulers = {"popularity": float(np.isin(targets, popular).mean())}
        if self.catalogue.truth is not None:
            self.rulers["bayes"] = float(self.catalogue.truth.bayes_recall(histories).mean())
        self._users = len(targets)
        # The loss of one who knows nothing.
        self._guess = float(np.log(self.table.widths).mean())

    @property
    def results(self) -> dict[str, TrainResult]:
        return {name: run.result for name, run in self._runs.items() if run.result is not None}

    @property
    def states(self) -> dict[str, str]:
        return {name: run.state for name, run in self._runs.items()}

    @property
    def running(self) -> bool:
        """Whether a run trains, has still to come to its turn, or has not yet come to its pause."""
        with _turns.changed:
            return any(run.wanted or _turns.has(run) for run in self._runs.values())

    def start(self, *names: str) -> None:
        """Train the named runs (default: all) in the background, a paused one from where it is;
        returns at once."""
        with _turns.changed:
            runs = [run for run in self._named(names) if run.state != "done" and not run.wanted]
            if not runs:
                return
            self._begun = True
            before = TrainingMonitor._last
            TrainingMonitor._last = self
            if before is not None and before is not self:
                before._want(before._runs.values(), False)
            fresh = [run for run in runs if run.thread is None]
            for run in fresh:
                run.clear()
                run.thread = threading.Thread(target=self._work, args=(run,), daemon=True)
            self._want(runs, True)
        self._tell()
        if before is not None and before is not self:
            before._tell()
        for run in fresh:
            run.thread.start()

    def stop(self, *names: str) -> None:
        """Pause the named runs (default: all) after the update in progress; returns at once."""
        self._want(self._named(names), False)
        self._tell()

    def wait(self) -> dict[str, TrainResult]:
        """Block until every run is done, paused or failed, and return `results`; starts all if none
        ever was. An interrupt pauses all. Raises what a run raised."""
        if not self._begun:
            self.start()
        try:
            self._settle()
        except KeyboardInterrupt:
            self.stop()
            self._settle()
            raise
        for run in self._runs.values():
            if run.error is not None:
                raise run.error
        return self.results

    def _settle(self):
        with _turns.changed:
            while self.running:
                _turns.changed.wait(1)  # with a limit: else some systems let no interrupt through

    def _named(self, names):
        for name in names:
            one_of("names", name, self._runs)
        return [self._runs[name] for name in names or self._runs]

    def _want(self, runs, wanted):
        with _turns.changed:
            for run in runs:
                run.wanted = wanted
                if wanted:
                    _turns.queue_up(run)

    def _toggle(self, name):
        (self.stop if self._runs[name].wanted else self.start)(name)  # of one that is done: nothing

    def _work(self, run):
        """A thread: one run from its first turn to its end."""
        _turns.take(run)
        try:
            self._hold(run)
            run.state = "training"
            run.since = clock()
            run.result = train(
                run.config,
                self.catalogue,
                self.table,
                start_from=self.start_from,
                progress=False,
                callbacks=[_Watch(self, run)],
            )
            run.state = "done"
        except Exception as error:  # noqa: BLE001 `wait` raises it, and the reader sees it
            run.state = "failed"
            run.error = error
        finally:
            with _turns.changed:
                run.wanted = False
                run.thread = None
            try:
                self._tell()
            finally:
                _turns.give(run)

    def pass_on(self, run, so_far):
        """Called by a run before an update: let the others have their turns, and come back when it
        is to go on. `so_far`: a function that returns its `TrainResult` so far."""
        run.spent += clock() - run.since
        if run.wanted:
            _turns.give(run, again=True)
            _turns.take(run)
        self._hold(run, so_far)
        run.state = "training"
        run.result = None
        run.since = clock()

    def _hold(self, run, so_far=None):
        """Return at once or, if the run is to pause, when it is to go on."""
        while not run.wanted:
            run.state = "paused" if run.step else "waiting"
            if run.recall and run.result is None:
                run.result = so_far()
            self._tell()
            _turns.give(run)
            _turns.take(run)

    def _tell(self):
        """Buttons and picture as they should be."""
        with self._drawing:
            runs = self._runs.values()
            left = [run for run in runs if run.state != "done"]
            every = " all" if len(runs) > 1 else ""
            resumes = any(run.state == "paused" for run in left)
            self.start_button.description = ("Resume" if resumes else "Start") + every
            self.stop_button.description = "Stop" + every
            _mute(self.start_button, all(run.wanted for run in left))
            _mute(self.stop_button, not any(run.wanted for run in runs))
            for run, button in zip(runs, self.run_buttons.values()):
                button.description, button.icon = run.says()
                _mute(button, run.state == "done")
            self.refresh()
            if not any(run.wanted for run in runs):
                self.renew_picture()
            self._drawn = clock()

    def follow(self) -> None:
        """Bring the picture up to date, but at most every `PAUSE` seconds: it is time lost for
        training."""
        if clock() - self._drawn >= PAUSE:
            with self._drawing:
                self.refresh()
                self._drawn = clock()

    def state(self):
        errors = [alert(run.error) for run in self._runs.values() if run.error is not None]
        return super().state() | {"alert": "".join(errors)}

    def draw(self):
        return self._figure(), self._text()

    def _figure(self, until=float("inf")):
        """The curves up to one update; all runs have theirs, if empty. The axes are those of the
        whole training from the start, and give way only to what lies outside."""
        runs = self._runs.values()
        curves = []
        for run in runs:
            loss, recall = run.until(until)
            # One without a point yet has its name in the legend all the same.
            recall = recall or [(None, None)]
            curves.append(
                {
                    "method": run.name,
                    "seed": run.config.seed,
                    "step": [step for step, _ in loss],
                    "loss": [value for _, value in loss],
                    "eval_step": [step for step, _ in recall],
                    "recall@10": [value for _, value in recall],
                }
            )
        figure = learning_curves({"curves": curves})
        for name, value in self.rulers.items():
            look = MARKS[name]
            figure.add_hline(
                value,
                line_color=look.color,
                line_dash=look.dash,
                line_width=1.5,
                annotation_text=f"{RULERS[name]} {value:.3f}",
                annotation_position="top left",
                row=1,
                col=1,
            )
        best = max([*self.rulers.values(), *(value for run in runs for _, value in run.recall)])
        worst = max([self._guess, *(value for run in runs for _, value in run.loss)])
        last = max(1, *(run.planned for run in runs))
        figure.update_yaxes(range=[0, ROOM * best or 1], col=1)
        figure.update_yaxes(range=[0, ROOM * worst], col=2)
        figure.update_xaxes(range=[0, 1.03 * last])
        return figure.update_layout(height=420, uirevision="same", margin_b=90)

    def _text(self, until=float("inf")):
        rows = []
        curves = {}
        for run in self._runs.values():
            loss, recall = run.until(until)
            curves[run.name] = dict(recall)
            update = f"{min(run.step, until)} of {run.planned}" if run.planned else "–"
            last = f"{loss[-1][1]:.3f}" if loss else "–"
            best = f"{max(curves[run.name].values()):.4f}" if recall else "–"
            rows.append((run.name, run.state, update, f"{run.seconds:.0f}", last, best))
        head = ("run", "state", "update", "seconds", "training loss", "best validation recall@10")
        out = html_table(head, rows) + f"<p>On these {self._users} validation users: "
        out += ", ".join(f"{RULERS[name]} {value:.4f}" for name, value in self.rulers.items())
        out += ".</p>"
        if places := sorted({step for curve in curves.values() for step in curve}):
            rows = [
                (
                    step,
                    *(f"{curve[step]:.4f}" if step in curve else "–" for curve in curves.values()),
                )
                for step in places
            ]
            out += "<p>Validation recall@10 after so many updates:</p>"
            out += html_table(("update", *curves), rows)
        return out

    def frames(self, values=None):
        """The curves as they grew: a frame for each of `values`, numbers of updates (default: each
        evaluation, thinned to 21)."""
        if values is None:
            steps = sorted({step for run in self._runs.values() for step, _ in run.recall}) or [0]
            values = steps[::-1][:: -(-len(steps) // 21)][::-1]
        states = (chart_state(self._figure(value), self._text(value)) for value in values)
        return list(zip(map(str, values), states))

    def export(self, path, values=None):
        """Write one HTML file with the final curves and a slider back to how they grew (see
        `frames`)."""
        frames = self.frames(values)
        return write_frames(path, self.heading, "up to update", frames, first=len(frames) - 1)

    def _repr_mimebundle_(self, **kwargs):
        if os.environ.get("SIDLAB_SITE"):
            self.wait()  # a page shows the finished curves
        return super()._repr_mimebundle_(**kwargs)


def _mute(button, mute):
    """Pale and deaf to the mouse, but not disabled: a disabled button loses the focus, and with it
    the notebook's keys."""
    (button.add_class if mute else button.remove_class)(MUTE)


class _Run:
    """One run as the monitor sees it: `loss` and `recall` are lists of (update, value), `wanted`
    says whether it is to train, `planned` is its number of updates if nothing stops it early."""

    def __init__(self, name, config):
        self.name = name
        self.config = config
        self.thread = None
        self.wanted = False
        self.planned = 0
        self.clear()

    def clear(self):
        self.state = "waiting"
        self.result = None
        self.error = None
        self.kept = None
        self.step = 0
        self.spent = 0.0
        self.since = 0.0
        self.seconds = 0.0
        self.loss = []
        self.recall = []

    def until(self, update):
        """Loss and recall up to an update."""
        return [
            [point for point in curve if point[0] <= update] for curve in (self.loss, self.recall)
        ]

    def says(self):
        """Text and icon of its button."""
        if self.state == "done":
            return f"{self.name} is done", "check"
        if self.wanted:
            return f"Stop {self.name}", "stop"
        return f"{'Resume' if self.state == 'paused' else 'Start'} {self.name}", "play"


_turns = Turns()


class _Watch(TrainerCallback):
    """Carries a run's numbers to the monitor, and passes the turn on."""

    def __init__(self, monitor, run):
        self.monitor = monitor
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.planned = state.max_steps

    def on_step_begin(self, args, state, control, model, **kwargs):
        """The only place to pass the turn on: all that belongs to the last update, its evaluation
        too, is done.

        After so many updates as lie between two losses, so that curves grow side by side; or at
        once, if one who waits for the turn only needs it to pause."""
        due = state.global_step % args.logging_steps == 0
        if not due and self.run.wanted and all(run.wanted for run in list(_turns.queue)):
            return
        self.meter.pause()
        self.monitor.pass_on(self.run, lambda: self._so_far(args, model))
        self.meter.resume()

    def _so_far(self, args, model):
        config = dataclasses.replace(self.run.config, precision="bf16" if args.bf16 else "fp32")
        with kept_random_state():
            result = result_so_far(args.output_dir, config)
        result.model.to(model.device)
        return result

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.run.loss.append((state.global_step, logs["main_loss"]))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.run.recall.append((state.global_step, metrics["eval_recall@10"]))
        self._show()

    def on_step_end(self, args, state, control, **kwargs):
        self.run.step = state.global_step
        self._show()

    def _show(self):
        self.run.seconds = self.run.spent + clock() - self.run.since
        self.monitor.follow()
