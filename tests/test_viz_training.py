"""The monitor's runs race and still train as alone; it shows what they log, pauses them when told,
loses no error, and sends little.
"""

import dataclasses
import random
import re
import time

import numpy as np
import pytest
import torch
from conftest import connect, frames_of
from transformers import TrainerCallback
from transformers.utils import logging

from sidlab import viz
from sidlab.config import TrainConfig
from sidlab.data.planted import planted_catalogue
from sidlab.figures import theme
from sidlab.figures.theme import looks
from sidlab.map_loss import MapConfig
from sidlab.pruning import PruningConfig
from sidlab.sids.table import SidTable
from sidlab.training import train
from sidlab.training_plan import validation_cases
from sidlab.viz import training
from sidlab.viz.training import MUTE, TrainingMonitor
from sidlab.windows import leave_one_out

WORLD = planted_catalogue(40, seed=1, shortest=5, longest=9)
TABLE = SidTable(WORLD.truth.tree, tuple((WORLD.truth.tree.max(axis=0) + 1).tolist()))
TINY = {
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 16,
    "ffn_hidden_layers": 1,
    "num_layers": 3,
    "num_decoder_layers": 1,
    "dropout": 0.1,
    "batch_tokens": 400,
    "accumulation": 1,
    "max_items": 6,
    "max_updates": 6,
    "eval_every": 3,
    "eval_users": 20,
    "precision": "fp32",
}
CONFIGS = {
    "unpruned": TrainConfig(**TINY),
    "stamp": TrainConfig(**TINY, pruning=PruningConfig(), map=MapConfig()),
}


class Told(TrainingMonitor):
    """Notes how far the runs are whenever it may draw, and calls `then(self)` once, when
    `when(steps)` holds.
    """

    def __init__(
        self, when=lambda steps: False, then=TrainingMonitor.stop, configs=CONFIGS, **kwargs
    ):
        self.when = when
        self.then = then
        self.steps = []
        super().__init__(configs, WORLD, TABLE, **kwargs)

    def follow(self):
        self.steps.append({name: run.step for name, run in self._runs.items()})
        if self.when(self.steps[-1]):
            self.when = lambda steps: False
            self.then(self)
        super().follow()


def same_weights(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(
            one.model.state_dict().values(), other.model.state_dict().values(), strict=True
        )
    )


def losses(result):
    return [(entry["step"], entry["loss"]) for entry in result.log if "loss" in entry]


def mute(button):
    return MUTE in button._dom_classes


@pytest.fixture(scope="module")
def finished():
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    monitor.start_button.click()
    assert monitor.running and mute(monitor.start_button) and not mute(monitor.stop_button)
    monitor.wait()
    return monitor


# Runs that differ in whatever a process has once: random numbers, precision, and how many batches
# make an update.
UNLIKE = {
    "one": TrainConfig(**TINY | {"max_updates": 10, "eval_every": 5}),
    "random": TrainConfig(
        **TINY | {"seed": 3, "precision": "bf16"},
        pruning=PruningConfig(scorer="random"),
        map=MapConfig(),
    ),
    "three": TrainConfig(**TINY | {"accumulation": 3, "eval_every": 4, "max_updates": 8}),
}


def test_raced_training_is_training_alone():
    monitor = Told(configs=UNLIKE)
    assert [run.planned for run in monitor._runs.values()] == [10, 6, 8], "known before training"
    results = monitor.wait()
    assert (
        list(results) == list(UNLIKE)
        and set(monitor.states.values()) == {"done"}
        and not monitor.running
    )
    for name, config in UNLIKE.items():
        alone = train(config, WORLD, TABLE, progress=False)
        raced = results[name]
        assert (
            losses(raced) == losses(alone)
            and raced.metrics == alone.metrics
            and raced.tokens == alone.tokens
        )
        assert raced.precision == alone.precision == config.precision and same_weights(raced, alone)
        assert raced.timing["updates"] == alone.timing["updates"] and not raced.model.training
    # Each logs its loss at every update, so that is a turn, and nobody is ever further ahead.
    together = [sorted(steps.values()) for steps in monitor.steps if max(steps.values()) <= 6]
    assert len(together) >= 18 and all(steps[-1] - steps[0] <= 1 for steps in together)


def test_the_process_is_afterwards_as_it_was():
    def process():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
        )

    torch.manual_seed(5)
    before = process()
    pauses = []
    monitor = Told(lambda steps: steps["stamp"] == 4)
    monitor.wait()
    pauses.append(process())
    monitor.start()
    monitor.wait()
    assert pauses == [before] and process() == before and logging.is_progress_bar_enabled()


def test_raced_runs_go_on_from_a_saved_model(finished, tmp_path):
    finished.results["unpruned"].model.save_pretrained(tmp_path)
    more = {
        name: dataclasses.replace(config, learning_rate=1e-4) for name, config in CONFIGS.items()
    }
    monitor = TrainingMonitor(more, WORLD, TABLE, start_from=tmp_path)
    for name, raced in monitor.wait().items():
        alone = train(more[name], WORLD, TABLE, start_from=tmp_path, progress=False)
        fresh = train(more[name], WORLD, TABLE, progress=False)
        assert raced.log[0]["main_loss"] == alone.log[0]["main_loss"] < fresh.log[0]["main_loss"]
        assert same_weights(raced, alone)


def test_figure_and_text_hold_what_was_logged(finished):
    for name, result in finished.results.items():
        recall, loss = (trace for trace in finished.figure.data if trace.name == name)
        evaluations = {e["step"]: e["recall@10"] for e in result.log if "recall@10" in e}
        assert dict(zip(recall.x, recall.y)) == evaluations and set(evaluations) == {3, 6}
        assert dict(zip(loss.x, loss.y)) == {
            e["step"]: e["main_loss"] for e in result.log if "loss" in e
        }
        row = next(
            row
            for row in re.findall("<tr>(.*?)</tr>", finished.text)
            if row.startswith(f"<td>{name}</td>")
        )
        _, state, update, _, last, best = re.findall("<td>(.*?)</td>", row)
        assert (state, update, best) == (
            "done",
            "6 of 6",
            f"{max(evaluations.values()):.4f}",
        ) and last == f"{loss.y[-1]:.3f}"
        assert f"<td>{evaluations[3]:.4f}</td>" in finished.text
    assert mute(finished.start_button) and mute(finished.stop_button) and finished.alert == ""
    assert all(mute(button) for button in finished.run_buttons.values())


def axes(monitor):
    layout = monitor.figure.layout
    return [
        tuple(axis.range) for axis in (layout.xaxis, layout.xaxis2, layout.yaxis, layout.yaxis2)
    ]


def test_axes_stand_from_the_start_and_show_the_rulers():
    configs = {
        "short": CONFIGS["unpruned"],
        "by epochs": TrainConfig(**TINY | {"max_updates": None, "epochs": 2}),
    }
    monitor = TrainingMonitor(configs, WORLD, TABLE)
    before = axes(monitor)
    longest = max(
        train(config, WORLD, TABLE, progress=False).timing["updates"] for config in configs.values()
    )
    assert before[0] == before[1] == (0, 1.03 * longest) and longest > 6
    # By hand, on the users who are evaluated: the ten items that stand most often in the training
    # parts, and the truth.
    split = leave_one_out(WORLD.histories)
    histories, targets = validation_cases(split, CONFIGS["unpruned"])
    counts = np.bincount(np.concatenate(split.train), minlength=WORLD.n_items + 1)
    popular = sorted(range(1, WORLD.n_items + 1), key=lambda item: -counts[item])[:10]
    popularity = np.mean([target in popular for target in targets])
    bayes = WORLD.truth.bayes_recall(histories).mean()
    assert 0 < popularity < bayes < 1 and sorted(
        {shape.y0 for shape in monitor.figure.layout.shapes}
    ) == pytest.approx([popularity, bayes])
    assert {shape.yref for shape in monitor.figure.layout.shapes} == {"y"}, (
        "in the panel of recall alone"
    )
    labels = [note.text for note in monitor.figure.layout.annotations]
    assert f"popularity {popularity:.3f}" in labels and f"Bayes optimum {bayes:.3f}" in labels
    assert (
        f"{popularity:.4f}" in monitor.text
        and f"{bayes:.4f}" in monitor.text
        and "20 validation users" in monitor.text
    )
    assert before[2] == (0, pytest.approx(1.1 * bayes))
    monitor.wait()
    seen = [value for run in monitor._runs.values() for _, value in run.loss]
    assert axes(monitor)[:3] == before[:3] and axes(monitor)[3] == (
        0,
        pytest.approx(max(before[3][1], 1.1 * max(seen))),
    )
    assert 0.9 * before[3][1] < max(seen), "a model that has learned nothing is near the top"


def test_axes_give_way_to_what_lies_outside():
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    monitor._runs["stamp"].recall.append((3, 0.9))
    monitor._runs["stamp"].loss.append((1, 7.0))
    monitor.refresh()
    assert axes(monitor)[2:] == [(0, pytest.approx(0.99)), (0, pytest.approx(7.7))]


def test_without_a_truth_popularity_is_the_only_ruler():
    world = dataclasses.replace(WORLD, truth=None)
    monitor = TrainingMonitor(CONFIGS, world, TABLE)
    assert list(monitor.rulers) == ["popularity"] and "Bayes" not in monitor.text
    assert len(monitor.figure.layout.shapes) == 1


def test_start_after_the_end_does_nothing(finished):
    before = finished.results
    finished.start()
    assert not finished.running and finished.wait() == before


def test_a_run_is_stopped_while_the_others_go_on_and_resumes_where_it_was():
    configs = CONFIGS | {"unpruned": TrainConfig(**TINY | {"average_last": 0.8})}
    monitor = Told(
        lambda steps: steps["unpruned"] == 4,
        lambda monitor: monitor.run_buttons["unpruned"].click(),
        configs,
    )
    assert {name: button.description for name, button in monitor.run_buttons.items()} == {
        n: f"Start {n}" for n in CONFIGS
    }
    results = monitor.wait()
    assert monitor.states == {"unpruned": "paused", "stamp": "done"} and not monitor.running
    assert monitor.steps[-1] == {"unpruned": 4, "stamp": 6} and "<td>4 of 6</td>" in monitor.text
    button = monitor.run_buttons["unpruned"]
    assert (
        button.description == "Resume unpruned"
        and not mute(button)
        and mute(monitor.run_buttons["stamp"])
    )
    assert (
        monitor.start_button.description == "Resume all"
        and not mute(monitor.start_button)
        and mute(monitor.stop_button)
    )

    # It stands where it was evaluated, as one that ends there.
    class Ends(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    ended = train(configs["unpruned"], WORLD, TABLE, progress=False, callbacks=[Ends()])
    so_far = results["unpruned"]
    assert (
        so_far.timing["updates"] == ended.timing["updates"] == 3 and so_far.tokens == ended.tokens
    )
    assert (
        so_far.metrics == ended.metrics
        and losses(so_far) == losses(ended)
        and len(losses(ended)) == 3
    )
    assert same_weights(so_far, ended) and not so_far.model.training
    whole = train(configs["unpruned"], WORLD, TABLE, progress=False)
    button.click()
    assert monitor.running and button.description == "Stop unpruned"
    after = monitor.wait()
    assert after["stamp"] is results["stamp"] and after["unpruned"].timing["updates"] == 6
    assert losses(after["unpruned"]) == losses(whole) and same_weights(after["unpruned"], whole)
    made = [steps["unpruned"] for steps in monitor.steps]
    assert made == sorted(made), "it never began anew"


def test_all_are_stopped_and_resumed(finished):
    monitor = Told(
        lambda steps: steps["unpruned"] == 2, lambda monitor: monitor.stop_button.click()
    )
    assert monitor.wait() == {}, "nothing is evaluated yet"
    assert monitor.states == {"unpruned": "paused", "stamp": "paused"} and mute(monitor.stop_button)
    assert monitor.steps[-1] == {"unpruned": 2, "stamp": 1}, "the update in progress was the last"
    assert monitor.wait() == {} and not monitor.running, "to wait is not to resume"
    monitor.start_button.click()
    for name, result in monitor.wait().items():
        assert same_weights(result, finished.results[name])


def test_a_stop_before_the_first_turn_leaves_a_run_waiting():
    monitor = Told(lambda steps: steps["unpruned"] == 1)
    monitor.start("unpruned")
    monitor.wait()
    assert monitor.states == {"unpruned": "paused", "stamp": "waiting"}
    monitor.start("stamp")
    monitor.stop("stamp")
    assert monitor.wait() == {} and monitor.states["stamp"] in ("waiting", "paused")
    monitor.start()
    assert set(monitor.wait()) == set(CONFIGS)
    with pytest.raises(ValueError, match="names"):
        monitor.start("rastp")


def test_a_stop_that_is_taken_back_at_once_changes_nothing(finished):
    def hesitates(monitor):
        for _ in range(3):
            monitor.stop()
            monitor.start()

    monitor = Told(lambda steps: steps["stamp"] == 3, hesitates)
    for name, result in monitor.wait().items():
        assert same_weights(result, finished.results[name])


def test_an_error_reaches_the_reader_and_whoever_waits_and_the_others_go_on():
    bad = {"<narrow>": TrainConfig(**TINY | {"batch_tokens": 4}), "unpruned": CONFIGS["unpruned"]}
    monitor = TrainingMonitor(bad, WORLD, TABLE)
    with pytest.raises(ValueError, match="batch_tokens=4 is less"):
        monitor.wait()
    assert 'role="alert"' in monitor.alert and "batch_tokens=4" in monitor.alert
    assert monitor.states == {"<narrow>": "failed", "unpruned": "done"} and list(
        monitor.results
    ) == ["unpruned"]
    assert not mute(monitor.start_button) and mute(monitor.stop_button)
    assert "&lt;narrow&gt;" in monitor.text and "<narrow>" not in monitor.text
    with pytest.raises(ValueError, match="batch_tokens=4"):
        monitor.wait()


def test_what_fails_on_its_way_fails_alone_and_starts_anew(monkeypatch, finished):
    monitor = Told(lambda steps: steps["stamp"] == 2, lambda monitor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        monitor.wait()
    assert (
        monitor.states == {"unpruned": "done", "stamp": "failed"}
        and "ZeroDivisionError" in monitor.alert
    )
    monitor.start()
    assert same_weights(monitor.wait()["stamp"], finished.results["stamp"]) and monitor.alert == ""


def test_a_monitor_that_is_started_pauses_the_one_before():
    long = {
        name: dataclasses.replace(CONFIGS["unpruned"], max_updates=100_000, eval_every=1000)
        for name in ("one", "another")
    }
    first = Told(configs=long)
    second = Told()
    first.start()
    while not first.steps:
        time.sleep(0.01)
    second.start()
    second.steps.append(dict(first.steps[-1]))
    assert list(second.wait()) == list(CONFIGS) and set(second.states.values()) == {"done"}
    assert (
        not first.running
        and set(first.states.values()) <= {"paused", "waiting"}
        and not mute(first.start_button)
    )
    stood = first.steps[-1]
    met = second.steps[0]
    assert all(stood[name] <= met[name] + 1 for name in long), (
        "from then on it made the update in progress at most"
    )
    second.start()
    assert not first.running, "a monitor that has nothing to do disturbs nobody"
    first.start("one")
    while first.steps[-1]["one"] < stood["one"] + 3:
        time.sleep(0.01)
    first.stop()
    assert first.wait() == {} and first.steps[-1]["another"] == stood["another"]


def test_an_interrupt_pauses_all(monkeypatch):
    monitor = TrainingMonitor(
        {"unpruned": dataclasses.replace(CONFIGS["unpruned"], max_updates=100_000)}, WORLD, TABLE
    )
    wait = training._turns.changed.wait
    calls = []

    def interrupted(timeout=None):
        if timeout == 1:  # of `TrainingMonitor.wait`, not of a run
            calls.append(timeout)
            if len(calls) == 1:
                raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(training._turns.changed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monitor.wait()
    assert not monitor.running and monitor.states["unpruned"] in ("waiting", "paused")


def test_pictures_are_rare_and_small(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "clock", lambda: now[0])
    monitor = TrainingMonitor({"unpruned": TrainConfig(**TINY | {"max_updates": 12})}, WORLD, TABLE)
    sent = connect(monitor)
    follow = monitor.follow

    def ticking():  # an update every 0.2 s
        now[0] += 0.2
        follow()

    monitor.follow = ticking
    monitor.wait()
    # 12 updates and 4 evaluations take 3.2 s, which is room for at most 6 pictures, and one at the
    # start and at the end. Buttons are small.
    pictures = [size for size in sent if size > 400]
    assert 4 <= len(pictures) <= 8 and max(sent) < 20_000


def test_only_what_differs_is_sent_and_not_too_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "clock", lambda: now[0])
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    sent = connect(monitor)
    run = monitor._runs["unpruned"]
    for run.step, now[0], grows in (
        (1, 1.0, True),
        (2, 2.0, False),
        (3, 2.4, True),
        (4, 3.0, False),
        (5, 3.2, False),
    ):
        if grows:
            run.loss.append((run.step, 2.0))
        monitor.follow()
        # Less than half a second after a picture
        assert (f"<td>{run.step} of 6</td>" in monitor.text) == (run.step not in (3, 5))
    assert len(sent) == 3 and list(monitor.figure.data[1].x) == [1, 3]


def test_what_a_page_asks_for_after_a_reload_is_the_present(finished):
    held = finished.view.state.get_state()
    assert any(value == finished.text for value in held.values() if isinstance(value, str))
    assert [value for path, value in held.items() if path.endswith("/data/#0/y")] == [
        list(finished.figure.data[0].y)
    ]
    assert all(
        MUTE in button.get_state()["_dom_classes"]
        for button in (finished.start_button, finished.stop_button)
    )


def test_export_replays_the_curves(finished, tmp_path):
    page = finished.export(tmp_path / "curves.html").read_text()
    frames = frames_of(page)
    # The last one first
    assert [frame["value"] for frame in frames] == ["3", "6"] and 'value="1"' in page
    before, after = (frame["state"]["figure"]["data"] for frame in frames)
    assert [len(trace["x"]) for trace in before if "markers" in trace["mode"]] == [1, 1]
    assert [list(trace["x"]) for trace in after if "markers" in trace["mode"]] == [[3, 6], [3, 6]]
    assert (
        "<script src" not in page
        and "6 of 6" in frames[1]["state"]["text"]
        and "3 of 6" in frames[0]["state"]["text"]
    )


def test_a_site_shows_finished_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDLAB_SITE", str(tmp_path))
    monitor = TrainingMonitor({"unpruned": CONFIGS["unpruned"]}, WORLD, TABLE)
    bundle = monitor._repr_mimebundle_()
    assert (
        monitor.states == {"unpruned": "done"}
        and "<iframe" in bundle["text/html"]
        and len(list(tmp_path.glob("*.html"))) == 1
    )


def test_every_run_has_a_look_of_its_own():
    names = ["unpruned", "rastp", "mine", "unpadded", "other"]
    found = looks(names)
    assert len({look.symbol for look in found}) == len({look.dash for look in found}) == len(names)
    assert found[1] == theme.mark("rastp") and found[3] == theme.mark("unpadded")
    figure = TrainingMonitor(dict.fromkeys(names[:3], CONFIGS["unpruned"]), WORLD, TABLE).figure
    assert [(t.line.dash, t.marker.symbol) for t in figure.data[::2]] == [
        (look.dash, look.symbol) for look in looks(names[:3])
    ]


def test_controls_theme_and_refusal(dark):
    monitor = viz.TrainingMonitor(CONFIGS, WORLD, TABLE)
    assert monitor.figure.layout.template.layout.paper_bgcolor == "#14171A"
    assert [b.description for b in monitor.children[0].children] == [
        "Start all",
        "Stop all",
        "Start unpruned",
        "Start stamp",
    ]
    assert "waiting" in monitor.text and monitor.results == {} and not monitor.running
    with pytest.raises(ValueError, match="at least one run"):
        TrainingMonitor({}, WORLD, TABLE)
