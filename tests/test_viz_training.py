"""The monitor shows what training logs, stops it when told, loses no error, and sends little."""

import dataclasses
import json
import re
import threading
import time

import pytest
import torch
from conftest import frames_of

from sidlab import viz
from sidlab.config import TrainConfig
from sidlab.data.planted import planted_catalogue
from sidlab.map_loss import MapConfig
from sidlab.pruning import PruningConfig
from sidlab.sids.table import SidTable
from sidlab.training import train
from sidlab.viz import theme, training
from sidlab.viz.theme import looks
from sidlab.viz.training import TrainingMonitor

WORLD = planted_catalogue(40, seed=1, shortest=5, longest=9)
TABLE = SidTable(WORLD.truth.tree, tuple((WORLD.truth.tree.max(axis=0) + 1).tolist()))
TINY = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "ffn_hidden_layers": 1, "num_layers": 3, "num_decoder_layers": 1,
        "dropout": 0.0, "batch_tokens": 400, "accumulation": 1, "max_items": 6, "max_updates": 6, "eval_every": 3,
        "eval_users": 20, "precision": "fp32"}
CONFIGS = {"unpruned": TrainConfig(**TINY), "stamp": TrainConfig(**TINY, pruning=PruningConfig(), map=MapConfig())}


class StopsAfter(TrainingMonitor):
    """Presses Stop once a run has made so many updates."""

    def __init__(self, updates, configs=CONFIGS, **kwargs):
        self.updates = updates
        super().__init__(configs, WORLD, TABLE, **kwargs)

    def show(self):
        if any(run.step == self.updates for run in self._runs.values()):
            self.stop_button.click()
        super().show()


@pytest.fixture(scope="module")
def finished():
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    monitor.start_button.click()
    assert monitor.running and monitor.start_button.disabled and not monitor.stop_button.disabled
    monitor.wait()
    return monitor


def test_monitored_training_is_training(finished):
    assert list(finished.results) == list(CONFIGS) and set(finished.states.values()) == {"done"}
    for name, config in CONFIGS.items():
        alone, watched = train(config, WORLD, TABLE, progress=False), finished.results[name]
        assert watched.metrics == alone.metrics and watched.timing["updates"] == 6 and watched.tokens == alone.tokens
        assert all(torch.equal(a, b) for a, b in zip(watched.model.state_dict().values(), alone.model.state_dict().values(), strict=True))


def test_monitored_runs_go_on_from_a_saved_model(finished, tmp_path):
    finished.results["unpruned"].model.save_pretrained(tmp_path)
    more = {name: dataclasses.replace(config, learning_rate=1e-4) for name, config in CONFIGS.items()}
    monitor = TrainingMonitor(more, WORLD, TABLE, start_from=tmp_path)
    for name, watched in monitor.wait().items():
        alone = train(more[name], WORLD, TABLE, start_from=tmp_path, progress=False)
        fresh = train(more[name], WORLD, TABLE, progress=False)
        assert watched.log[0]["main_loss"] == alone.log[0]["main_loss"] < fresh.log[0]["main_loss"]
        assert all(torch.equal(a, b) for a, b in zip(watched.model.state_dict().values(), alone.model.state_dict().values(), strict=True))


def test_figure_and_text_hold_what_was_logged(finished):
    for name, result in finished.results.items():
        recall, loss = (trace for trace in finished.figure.data if trace.name == name)
        evaluations = {e["step"]: e["recall@10"] for e in result.log if "recall@10" in e}
        assert dict(zip(recall.x, recall.y)) == evaluations and set(evaluations) == {3, 6}
        assert dict(zip(loss.x, loss.y)) == {e["step"]: e["main_loss"] for e in result.log if "loss" in e}
        row = next(row for row in re.findall("<tr>(.*?)</tr>", finished.text) if row.startswith(f"<td>{name}</td>"))
        _, state, update, _, last, best = re.findall("<td>(.*?)</td>", row)
        assert (state, update, best) == ("done", "6 of 6", f"{max(evaluations.values()):.4f}") and last == f"{loss.y[-1]:.3f}"
        assert f"<td>{evaluations[3]:.4f}</td>" in finished.text
    assert finished.start_button.disabled and finished.stop_button.disabled and finished.alert == ""


def test_start_after_the_end_does_nothing(finished):
    before = finished.results
    finished.start()
    assert not finished.running and finished.wait() == before


def test_stop_before_an_evaluation_leaves_nothing_and_start_trains_anew():
    monitor = StopsAfter(1)
    assert monitor.wait() == {}
    assert monitor.states == {"unpruned": "stopped", "stamp": "waiting"} and monitor.stop_button.disabled
    assert monitor._runs["unpruned"].step == 2 and "2 of 6" in monitor.text  # ended with the update in progress
    monitor.updates = None
    assert not monitor.start_button.disabled
    monitor.start()
    assert set(monitor.wait()) == set(CONFIGS)
    assert all(len(trace.x) and list(trace.x) == sorted(set(trace.x)) for trace in monitor.figure.data)  # no points of the first try


def test_stop_after_an_evaluation_keeps_the_best_checkpoint():
    monitor = StopsAfter(4)
    results = monitor.wait()
    assert monitor.states == {"unpruned": "stopped", "stamp": "waiting"} and list(results) == ["unpruned"]
    # The same updates of the same schedule: at its only evaluation, update 3, the whole run stood where this one did.
    whole = train(CONFIGS["unpruned"], WORLD, TABLE, progress=False)
    assert results["unpruned"].timing["updates"] == 5
    assert results["unpruned"].metrics["recall@10"] == next(e["recall@10"] for e in whole.log if e["step"] == 3 and "recall@10" in e)
    assert not results["unpruned"].model.training
    monitor.updates = None
    monitor.start()
    assert {name: r.timing["updates"] for name, r in monitor.wait().items()} == {"unpruned": 6, "stamp": 6}


def test_done_runs_are_kept_when_a_later_one_is_stopped_and_started():
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    show = monitor.show
    monitor.show = lambda: monitor.stop() if monitor.states["stamp"] == "training" else show()
    first = monitor.wait()
    assert monitor.states == {"unpruned": "done", "stamp": "stopped"} and list(first) == ["unpruned"]
    monitor.show = show
    monitor.start()
    assert monitor.wait()["unpruned"] is first["unpruned"] and monitor.states["stamp"] == "done"


def test_an_error_reaches_the_reader_and_whoever_waits():
    bad = {"unpruned": CONFIGS["unpruned"], "<narrow>": TrainConfig(**TINY | {"batch_tokens": 4})}
    monitor = TrainingMonitor(bad, WORLD, TABLE)
    with pytest.raises(ValueError, match="batch_tokens=4 is less"):
        monitor.wait()
    assert 'role="alert"' in monitor.alert and "batch_tokens=4" in monitor.alert
    assert monitor.states == {"unpruned": "done", "<narrow>": "failed"} and list(monitor.results) == ["unpruned"]
    assert not monitor.start_button.disabled and monitor.stop_button.disabled
    assert "&lt;narrow&gt;" in monitor.text and "<narrow>" not in monitor.text
    with pytest.raises(ValueError, match="batch_tokens=4"):
        monitor.wait()


def test_a_monitor_that_is_started_stops_the_one_before(monkeypatch):
    inside, most = [], []

    def counted(config, *args, **kwargs):
        inside.append(config)
        most.append(len(inside))
        try:
            return train(config, *args, **kwargs)
        finally:
            inside.remove(config)

    monkeypatch.setattr(training, "train", counted)
    long = {name: dataclasses.replace(CONFIGS["unpruned"], max_updates=100_000) for name in ("one", "another")}
    first, second = TrainingMonitor(long, WORLD, TABLE), TrainingMonitor(CONFIGS, WORLD, TABLE)
    first.start()
    while not inside:
        time.sleep(0.01)
    assert list(second.wait()) == list(CONFIGS) and set(second.states.values()) == {"done"}
    assert not first.running and first.states == {"one": "stopped", "another": "waiting"} and not first.start_button.disabled
    assert max(most) == 1


def test_an_interrupt_stops_training():
    monitor = StopsAfter(None)
    monitor.start()
    thread, join = monitor._thread, monitor._thread.join
    calls = []

    def interrupted():
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt
        join()

    thread.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        monitor.wait()
    assert not monitor.running and "stopped" in monitor.states.values()


class FakeComm:
    """Counts the messages that a front end would get."""

    comm_id = "fake"

    def __init__(self):
        self.sent = []

    def send(self, data=None, metadata=None, buffers=None):
        size = len(json.dumps(data, default=str)) + sum(memoryview(b).nbytes for b in buffers or ())
        self.sent.append((threading.current_thread().name, size))

    def close(self, *args, **kwargs):
        pass

    on_msg = on_close = close


def test_pictures_are_rare_small_and_drawn_by_the_thread(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "clock", lambda: now[0])
    monitor = TrainingMonitor({"unpruned": TrainConfig(**TINY | {"max_updates": 12})}, WORLD, TABLE)
    figure, text = monitor.figure.comm, monitor.text.comm = FakeComm(), FakeComm()
    show = monitor.show

    def ticking():  # an update every 0.2 s
        now[0] += 0.2
        show()

    monitor.show = ticking
    monitor.wait()
    # 12 updates and 4 evaluations take 3.2 s, which is room for at most 6 pictures, and one at the start and at the end.
    for comm, messages in ((figure, 2), (text, 1)):
        assert 4 * messages <= len(comm.sent) <= 8 * messages and max(size for _, size in comm.sent) < 20_000
        assert {thread for thread, _ in comm.sent[1:]} == {"sidlab training"}


def test_only_text_is_sent_while_no_curve_grows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "clock", lambda: now[0])
    monitor = TrainingMonitor(CONFIGS, WORLD, TABLE)
    figure, text = monitor.figure.comm, monitor.text.comm = FakeComm(), FakeComm()
    run = monitor._runs["unpruned"]
    run.updates = 9
    for run.step, now[0], grows in ((1, 1.0, True), (2, 2.0, False), (3, 2.4, True), (4, 3.0, False), (5, 4.0, False)):
        if grows:
            run.loss.append((run.step, 2.0))
        monitor.show()
        assert (f"<td>{run.step} of 9</td>" in monitor.text) == (run.step != 3)  # 0.4 s after a picture
    assert (len(text.sent), list(monitor.figure.data[1].x)) == (4, [1, 3])
    assert len(figure.sent) == 4  # two pictures, at 1 and, with the point of 2.4, at 3 s


def test_export_replays_the_curves(finished, tmp_path):
    page = finished.export(tmp_path / "curves.html").read_text()
    frames = frames_of(page)
    assert [frame["value"] for frame in frames] == ["3", "6"] and 'value="1"' in page  # the last one first
    before, after = (frame["state"]["figure"]["data"] for frame in frames)
    assert [len(trace["x"]) for trace in before if "markers" in trace["mode"]] == [1, 1]
    assert [list(trace["x"]) for trace in after if "markers" in trace["mode"]] == [[3, 6], [3, 6]]
    assert "<script src" not in page and "6 of 6" in frames[1]["state"]["text"] and "3 of 6" in frames[0]["state"]["text"]


def test_a_site_shows_finished_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDLAB_SITE", str(tmp_path))
    monitor = TrainingMonitor({"unpruned": CONFIGS["unpruned"]}, WORLD, TABLE)
    bundle = monitor._repr_mimebundle_()
    assert monitor.states == {"unpruned": "done"} and "<iframe" in bundle["text/html"] and len(list(tmp_path.glob("*.html"))) == 1


def test_every_run_has_a_look_of_its_own():
    names = ["unpruned", "rastp", "mine", "unpadded", "other"]
    found = looks(names)
    assert len({look.symbol for look in found}) == len({look.dash for look in found}) == len(names)
    assert found[1] == theme.mark("rastp") and found[3] == theme.mark("unpadded")
    figure = TrainingMonitor(dict.fromkeys(names[:3], CONFIGS["unpruned"]), WORLD, TABLE).figure
    assert [(t.line.dash, t.marker.symbol) for t in figure.data[::2]] == [(look.dash, look.symbol) for look in looks(names[:3])]


def test_controls_theme_and_refusal(dark):
    monitor = viz.TrainingMonitor(CONFIGS, WORLD, TABLE)
    assert monitor.figure.layout.template.layout.paper_bgcolor == "#14171A"
    assert [b.description for b in monitor.children[0].children] == ["Start", "Stop"]
    assert "waiting" in monitor.text and monitor.results == {} and not monitor.running
    with pytest.raises(ValueError, match="at least one run"):
        TrainingMonitor({}, WORLD, TABLE)
