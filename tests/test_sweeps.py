"""Sweeps: names of settings, child processes, resuming, what is refused before training."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, instead_of_runs

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.files import write
from sidlab.research import jobs, machine, sid_tables
from sidlab.research import runs as sweeps
from sidlab.research.one_run import Progress
from sidlab.sids.fusion import collaborative_embeddings, fuse_embeddings
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.windows import leave_one_out

GRID = [
    {},
    {"pruning.keep": 0.5, "pruning.after_layer": 1},
    {"map.steps": 1, "sids.levels": 2, "sids.width": 16},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    os.chdir(ROOT)  # the children import sidlab from here where it is not installed
    return folder, sweeps.sweep(GRID, folder, preset="smoke", seeds=1)


def test_no_slots_are_kept_that_no_history_can_fill():
    def sizes(longest, **changes):
        catalogue = types.SimpleNamespace(histories=[np.ones(3), np.ones(longest)])
        found = sweeps.clip_max_items(TrainConfig.preset("paper", **changes), catalogue)
        return found.max_items, found.padded_items

    assert sizes(40) == sizes(30) == (29, 30)
    assert sizes(12) == (11, 12)
    assert sizes(12, max_items=20) == (11, None)


def test_a_row_a_run_with_its_settings(finished):
    folder, frame = finished
    assert len(frame) == 3 and frame["seed"].tolist() == [0, 0, 0]
    assert frame["pruning.keep"].fillna(1).tolist() == [1, 0.5, 1]
    assert frame["kept_token_fraction"][0] == 1 and 0.5 <= frame["kept_token_fraction"][1] < 0.6
    assert (frame["updates"] == 20).all() and frame["windows"].nunique() == 1
    on_disk = pd.read_csv(folder / "rows.csv")
    np.testing.assert_allclose(on_disk["recall@10"], frame["recall@10"])
    for file, recall in zip(frame["file"], frame["recall@10"]):
        ranks = np.array(json.loads(pathlib.Path(file).read_text())["ranks"])
        assert ((ranks > 0) & (ranks <= 10)).mean() == pytest.approx(recall)


def test_a_record_says_what_it_takes_to_repeat_the_run(finished):
    _, frame = finished
    record = json.loads(pathlib.Path(frame["file"][1]).read_text())
    assert record["spec"]["config"]["pruning"]["keep"] == 0.5
    assert record["spec"]["dataset"] == "planted" and record["spec"]["sids"] == {}
    assert record["versions"]["code"] == machine.code_digest()[:12]
    assert record["hardware"]["threads"] >= 1
    again = sweeps.spec(record["spec"]["dataset"], TrainConfig.from_dict(record["spec"]["config"]))
    assert again["config"] == record["spec"]["config"]


def test_the_sids_are_those_of_the_setting(finished):
    folder, _ = finished
    two = SidTable.load(
        folder / "runs" / "planted-smoke-map.steps=1-sids.levels=2-sids.width=16-seed0"
    )
    assert two.base_levels == 2 and two.widths[:2] == (16, 16)
    _, report = sid_tables.sid_table(load_catalogue("planted"), folder, {"levels": 2, "width": 16})
    assert (
        report["per_level"][1]["reconstruction_error"] < 0.5
        and len(list(folder.glob("sids/*/"))) == 2
    )


def test_a_finished_sweep_trains_nothing_and_a_longer_one_only_what_is_new(finished, monkeypatch):
    folder, frame = finished
    instead_of_runs(monkeypatch, lambda *_: pytest.fail("a run was repeated"))
    again = sweeps.sweep(GRID, folder, preset="smoke", seeds=1)
    pd.testing.assert_frame_equal(again, frame)
    asked = []
    result = json.loads(pathlib.Path(frame["file"][0]).read_text())
    instead_of_runs(monkeypatch, lambda name, _: asked.append(name) or {"row": result["row"]})
    longer = sweeps.sweep(
        {"pruning.keep": [0.5, 0.7], "pruning.after_layer": [1]}, folder, preset="smoke", seeds=1
    )
    assert (
        asked == ["planted-smoke-pruning.keep=0.7-pruning.after_layer=1-seed0"] and len(longer) == 2
    )


def test_other_data_or_settings_make_a_run_anew(finished):
    folder, _ = finished
    catalogue = load_catalogue("planted")
    table, _ = sid_tables.sid_table(catalogue, folder)
    one = sweeps._in_one_precision(
        sweeps.spec("planted", TrainConfig.preset("smoke")), catalogue, table, folder
    )
    path = jobs.path_of(folder, "planted-smoke-seed0")
    assert jobs.result_of(path, {"key": sweeps._key(one, catalogue, table)}) is not None
    for other in (
        (sweeps.spec("planted", TrainConfig.preset("smoke", d_ff=32)), catalogue, table),
        (one, load_catalogue("planted", seed=1), table),
        (one, catalogue, SidTable(table.codes[:, ::-1], width=table.widths[::-1])),
    ):
        assert jobs.result_of(path, {"key": sweeps._key(*other)}) is None


def test_a_gpu_does_not_take_what_a_processor_did(finished, monkeypatch):
    catalogue = load_catalogue("planted")
    what = (
        sweeps.spec("planted", TrainConfig.preset("smoke")),
        catalogue,
        sid_tables.sid_table(catalogue, finished[0])[0],
    )
    on_cpu = sweeps._key(*what)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sweeps._key(*what) != on_cpu


def test_other_libraries_and_other_pretrained_weights_make_a_run_anew(
    finished, monkeypatch, tmp_path
):
    catalogue = load_catalogue("planted")
    table, _ = sid_tables.sid_table(catalogue, finished[0])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    one = sweeps.spec("planted", TrainConfig.preset("smoke", arch="qwen", checkpoint=str(tmp_path)))
    keys = [sweeps._key(one, catalogue, table)]
    weights.write_bytes(b"another")
    keys.append(sweeps._key(one, catalogue, table))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.append(sweeps._key(one, catalogue, table))
    assert len(set(keys)) == 3


def test_a_catalogue_whose_embeddings_tell_nothing_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    catalogue = load_catalogue("planted", n_users=20)
    alike = dataclasses.replace(
        catalogue, truth=None, embeddings=np.repeat(np.eye(1, 48), catalogue.n_items, axis=0)
    )
    monkeypatch.setattr(sweeps, "load_catalogue", lambda dataset: alike)
    instead_of_runs(monkeypatch, lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="only 1 of the 160 rows is distinct"):
        sweeps.sweep([{}], tmp_path, preset="smoke", seeds=1)


def test_shared_sids_are_measured_by_expectation_and_stored_with_their_sharers(tmp_path):
    settings = {"sids.levels": 2, "sids.width": 4, "sids.collisions": "share"}
    (row,) = sweeps.sweep([settings], tmp_path, preset="smoke", seeds=1).to_dict("records")
    stored = json.loads(pathlib.Path(row["file"]).read_text())
    first = np.array(stored["ranks"])
    sharers = np.array(stored["sharers"])
    assert sharers.max() > 1
    inside = np.where(first > 0, np.clip(10 - (first - 1), 0, sharers), 0) / sharers
    assert row["recall@10"] == pytest.approx(inside.mean())


OLDEST = "def oldest(signals):\n    return -signals.positions\n"


def test_an_own_scorer_takes_part_by_name_and_is_done_again_when_its_module_changes(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "my_scorer.py").write_text(OLDEST)
    monkeypatch.chdir(tmp_path)  # a module beside the notebook, for this process and the run's
    monkeypatch.syspath_prepend(tmp_path)
    grid = [{"pruning.scorer": name} for name in ("my_scorer:oldest", "recent")]
    frame = sweeps.sweep(grid, "out", preset="smoke", seeds=1)
    oldest, recent = (json.loads(pathlib.Path(file).read_text())["ranks"] for file in frame["file"])
    assert oldest != recent
    capsys.readouterr()
    for text, again in ((OLDEST, False), (OLDEST.replace("-", ""), True)):
        (tmp_path / "my_scorer.py").write_text(text)
        monkeypatch.delitem(sys.modules, "my_scorer")
        changed = sweeps.sweep(grid, "out", preset="smoke", seeds=1)
        assert ("is done again" in capsys.readouterr().out) == again
    assert json.loads(pathlib.Path(changed["file"][0]).read_text())["ranks"] == recent, (
        "now it is the newest that it keeps"
    )

    def edited(name, spec):
        (tmp_path / "my_scorer.py").write_text(OLDEST)
        return {"row": {}, "ranks": []}

    instead_of_runs(monkeypatch, edited)
    with pytest.raises(
        RuntimeError, match="the scorer's module has changed since this sweep began"
    ):
        sweeps.sweep({"pruning.scorer": ["my_scorer:oldest"]}, "other", preset="smoke", seeds=2)


@pytest.mark.parametrize("code", ["the same", "other"])
def test_a_killed_run_goes_on_where_the_code_is_the_same_alone(tmp_path, monkeypatch, code):
    left = tmp_path / "runs" / "planted-smoke-seed0" / "checkpoint-10"
    found = []

    def work(name, spec):
        found.append(left.exists())
        left.mkdir(parents=True, exist_ok=True)
        raise RuntimeError("killed")

    instead_of_runs(monkeypatch, work)
    for version in ("the same", code):
        monkeypatch.setattr(sweeps, "code_digest", lambda version=version: version)
        with pytest.raises(RuntimeError, match="killed"):
            sweeps.sweep([{}], tmp_path, preset="smoke", seeds=1)
    assert found == [False, code == "the same"]


def test_a_run_is_busy_if_any_of_its_evaluations_was(monkeypatch):
    progress = Progress()
    state = types.SimpleNamespace(log_history=[], global_step=1, max_steps=3)
    for load, busy in ((0.0, False), (9.0, True), (0.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0), raising=False)
        progress.on_evaluate(None, state, None, {"eval_recall@10": 0.5})
        assert progress.busy == busy


def test_threads_that_write_one_file_leave_it_whole(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write(tmp_path / "one", str(n) * 100), [1, 2] * 200))
    assert (tmp_path / "one").read_text() in ("1" * 100, "2" * 100) and len(
        list(tmp_path.iterdir())
    ) == 1


def test_values_with_a_dot_and_seeds_keep_files_of_their_own(tmp_path, monkeypatch):
    trained = []

    def work(name, spec):
        trained.append(name)
        return {"row": {"recall@10": len(trained)}}

    instead_of_runs(monkeypatch, work)
    for _ in range(2):
        frame = sweeps.sweep({"pruning.keep": [0.5, 0.7]}, tmp_path, preset="smoke", seeds=2)
        assert frame["recall@10"].tolist() == [1, 2, 3, 4] and frame["file"].nunique() == 4
        assert all(pathlib.Path(file).is_file() for file in frame["file"])
    assert len(trained) == 4  # the second time nothing was


def test_two_sweeps_at_once_in_one_folder_share_the_work(tmp_path, monkeypatch):
    trained = []

    def work(name, spec):
        trained.append(name)
        time.sleep(0.2)
        return {"row": {"recall@10": 0.5}}

    instead_of_runs(monkeypatch, work)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        frames = list(
            pool.map(
                lambda keep: sweeps.sweep(
                    {"pruning.keep": [0.5, keep]}, tmp_path, preset="smoke", seeds=1
                ),
                (0.2, 0.7),
            )
        )
    assert [len(frame) for frame in frames] == [2, 2]
    assert sorted(trained) == [
        f"planted-smoke-pruning.keep={keep}-seed0" for keep in (0.2, 0.5, 0.7)
    ]


def test_sids_of_behaviour_are_of_training_histories_alone(tmp_path):
    catalogue = load_catalogue("planted", n_users=300)
    table, _ = sid_tables.sid_table(catalogue, tmp_path, sid_tables.sids_of("behaviour"))
    sources = {
        "items": catalogue.embeddings,
        "behaviour": collaborative_embeddings(
            leave_one_out(catalogue.histories).train, catalogue.n_items
        ),
    }
    fused = fuse_embeddings(sources)
    encoder = ResidualKMeans(levels=3, width=20, seed=0).fit(fused)
    assert (table.codes[:, :3] == encoder.encode(fused)).all()
    # Other validation and test items change nothing.
    others = [np.concatenate([history[:-2], history[:2]]) for history in catalogue.histories]
    other = dataclasses.replace(catalogue, histories=others, truth=None)
    again, _ = sid_tables.sid_table(other, tmp_path, {"behaviour": 1.0, "width": 20})
    assert (again.codes == table.codes).all()
    plain, _ = sid_tables.sid_table(catalogue, tmp_path, {"behaviour": 0.0, "width": 20})
    assert (plain.codes[:, :3] != table.codes[:, :3]).any()
    assert sid_tables.sids_of("") == {}
    for sids, message in (
        ({"behaviour": -1.0}, "must be a weight, finite and at least 0, got -1.0"),
        ({"behaviour": "much"}, "got 'much'"),
        ({"behaviour": 1.0, "file": __file__}, "needs no encoder and no embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            sid_tables.check_sids(sids)


def test_published_sids_from_a_file(tmp_path):
    catalogue = load_catalogue("planted")
    lines = [
        f"{item} {(item - 1) // 16} {(item - 1) % 16}\n" for item in range(1, catalogue.n_items + 1)
    ]
    (tmp_path / "sids.txt").write_text("".join(lines))
    sids = {"file": str(tmp_path / "sids.txt"), "width": 16}
    for _ in range(2):  # made, then read
        table, report = sid_tables.sid_table(catalogue, tmp_path, sids)
        assert table.codes[17].tolist() == [1, 1] and report["unique_sids"] == catalogue.n_items
    (tmp_path / "sids.txt").write_text(
        "".join(
            reversed([f"{161 - int(line.split()[0])} {line.split(' ', 1)[1]}" for line in lines])
        )
    )
    assert sid_tables.sid_table(catalogue, tmp_path, sids)[0].codes[17].tolist() == [
        8,
        14,
    ], "the file has changed, so has the table"


def test_a_sid_file_of_another_catalogue_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    instead_of_runs(monkeypatch, lambda *_: pytest.fail("trained"))
    catalogue = load_catalogue("planted")
    path = tmp_path / "sids.txt"
    # Codes are 0..255, whatever the items
    path.write_text("".join(f"{item} {item % 200} 199\n" for item in range(1, catalogue.n_items)))
    with pytest.raises(
        ValueError,
        match=(
            rf"sids.txt has {catalogue.n_items - 1} items, the catalogue 'planted'"
            rf" {catalogue.n_items}"
        ),
    ):
        sweeps.sweep([{"sids.file": str(path)}], tmp_path / "out", preset="smoke", seeds=1)
    path.with_suffix(".gz").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"sids.gz is damaged or cut off"):
        SidTable.from_file(path.with_suffix(".gz"))


def test_runs_of_another_version_of_the_code_are_done_again(tmp_path, monkeypatch):
    settings = [{"max_updates": 2, "eval_every": 2}]
    with (
        monkeypatch.context() as changed,
        pytest.raises(RuntimeError, match="has changed since this sweep began"),
    ):
        changed.setattr(sweeps, "code_digest", lambda: "another")  # the child finds the present one
        sweeps.sweep(settings, tmp_path, preset="smoke", seeds=1)
    sweeps.sweep(settings, tmp_path, preset="smoke", seeds=1)
    instead_of_runs(monkeypatch, lambda *_: pytest.fail("trained"))
    sweeps.sweep(settings, tmp_path, preset="smoke", seeds=1)
    monkeypatch.setattr(sweeps, "code_digest", lambda: "another")
    with pytest.raises(pytest.fail.Exception, match="trained"):
        sweeps.sweep(settings, tmp_path, preset="smoke", seeds=1)


def test_a_sweep_takes_arrays_and_any_number_of_settings(tmp_path, monkeypatch):
    asked = []
    instead_of_runs(
        monkeypatch, lambda name, _: asked.append(jobs.path_of(tmp_path, name)) or {"row": {}}
    )
    frame = sweeps.sweep(
        {"sids.levels": np.arange(1, 3), "learning_rate": [1e-3, 1.00001e-3]},
        tmp_path,
        preset="smoke",
        seeds=1,
    )
    assert frame["sids.levels"].tolist() == [1, 1, 2, 2] and len(set(asked)) == 4
    fields = {
        f.name: f.default
        for f in dataclasses.fields(TrainConfig)
        if isinstance(f.default, int | float)
    } | {"weight_decay": 0.01}
    names = [dict(fields, warmup=warmup) for warmup in (0.01, 0.02)]
    for name in names:
        name.pop("seed")
    sweeps.sweep(names, tmp_path, preset="smoke", seeds=1)
    assert len(set(asked)) == 6 and all(len(path.name) < 200 for path in asked)


def test_settings_may_continue_a_model_of_their_sids():
    grid = [
        {"arch": "qwen", "sids.levels": levels, "pruning.keep": keep}
        for levels in (2, 3)
        for keep in (0.3, 0.5)
    ]
    specs, rows = sweeps.grid_specs(grid, preset="quick", seeds=2, continued=True)
    assert len(rows) == 8 and len(specs) == 8 + 4  # a base for each SIDs and seed
    names = list(specs)
    for name, row in rows.items():
        spec = specs[name]
        base = specs[spec["start"]]
        assert names.index(spec["start"]) < names.index(name) and "start" not in base
        assert spec["sids"] == base["sids"] == {"levels": row["sids.levels"]}
        assert base["config"]["targets"] == "all" and spec["config"]["targets"] == 1
        assert spec["config"]["layout"] == "stream" and spec["config"]["seed"] == row["seed"]
        rate = spec["config"]["learning_rate"] / base["config"]["learning_rate"]
        assert base["config"]["seed"] == row["seed"] and rate < 0.2
    alone, _ = sweeps.grid_specs(grid, preset="quick", seeds=2)
    assert alone.keys() == rows.keys() and not any("start" in spec for spec in alone.values())


def test_results_of_another_preset_in_the_same_folder_are_not_overwritten(tmp_path, monkeypatch):
    instead_of_runs(monkeypatch, lambda *_: {"row": {}})
    files = [
        sweeps.sweep([{}], tmp_path, preset=preset, seeds=1)["file"][0]
        for preset in ("smoke", "quick")
    ]
    assert files[0] != files[1]


def test_what_is_only_said_makes_no_other_version_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(machine.sidlab, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for text in (
        'def f():\n    """One."""\n    return 1',
        'def f():\n    """Other."""\n    return 1  # one',
        "def f():\n    return 2",
    ):
        (tmp_path / "part.py").write_text(text)
        digests.append(machine.code_digest.__wrapped__())
    assert digests[0] == digests[1] != digests[2]
    told = "def f(x):\n    if x:\n        raise ValueError('{}')\n    return 1"
    for text in (told.format("no"), told.format("x must be 0"), told.replace("if x", "if not x")):
        (tmp_path / "part.py").write_text(text)
        digests.append(machine.code_digest.__wrapped__())
    assert digests[3] == digests[4] != digests[5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(grid={"pruning.kept": [0.5]}), r"\['pruning.kept'\] are unknown; use .*pruning.keep"),
        (
            dict(grid={"sids.depth": [2]}),
            "sids={'depth': 2} must hold some of encoder, levels, width, collisions, file",
        ),
        (dict(grid={"pruning.keep": [0.5, 2]}), "must lie in"),
        (dict(grid={"seed": []}), "at least one setting"),
        (dict(grid=[{"dropout": 0.1}, {"dropout": 0.1}]), "dropout=0.1-seed0 twice"),
        (dict(grid=[{}], seeds=0), "seeds must be at least 1, got 0"),
        (dict(grid=[{}], seeds=1.9), "seeds must be an integer, got 1.9"),
        (dict(grid=[{}], dataset="nowhere"), "no catalogue 'nowhere'"),
        (dict(grid=[{}], preset="fast"), "preset='fast' is unknown"),
        (
            dict(grid={"pruning.scorer": ["nowhere:score"]}),
            "scorer='nowhere:score': No module named 'nowhere'; the module's file must",
        ),
        (
            dict(grid={"pruning.scorer": ["json:score"]}),
            "module 'json' has no attribute 'score' .*restart the kernel",
        ),
        (
            dict(grid={"pruning.scorer": ["math:pi"]}),
            "scorer='math:pi' must be a function from Signals",
        ),
        (dict(grid={"pruning.scorer": ["own:score"]}), "a module needs another name than own"),
        (dict(grid={"pruning.scorer": ["__main__:exit"]}), "finds functions in files alone"),
        (
            dict(grid={"pruning.keep": 0.3}),
            r"a grid holds lists of values, .* got 0.3 for pruning.keep",
        ),
        (dict(grid=[{"seed": 1}]), r"settings \['seed'\] are unknown"),
        (
            dict(grid=[{"sids.file": "sids.txt", "sids.levels": 2}]),
            "a published file has its own levels",
        ),
        (
            dict(grid={"sids.file": ["nowhere.txt"]}),
            "sids='nowhere.txt' is no file; give a published table",
        ),
        (
            dict(grid=[{"pruning": None, "pruning.keep": 0.5}]),
            "settings hold both 'pruning' and one of its parts",
        ),
        (
            dict(grid=[{"sids.encoder": "vq"}]),
            "sids.encoder='vq' is unknown; use one of 'residual-kmeans'",
        ),
    ],
)
def test_bad_sweeps_stop_before_anything_is_trained(arguments, message, tmp_path, monkeypatch):
    instead_of_runs(monkeypatch, lambda *_: pytest.fail("trained"))
    with pytest.raises((ValueError, TypeError), match=message):
        sweeps.sweep(**dict(folder=tmp_path / "out", preset="smoke") | arguments)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_model_that_prunes_in_training_only_has_kept_nothing_to_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    frame = sweeps.sweep(
        [{"pruning.keep": 0.5, "pruning.at_inference": False}], tmp_path, preset="smoke", seeds=1
    )
    assert 0.5 <= frame["kept_token_fraction"][0] < 0.6 and frame["kept_informative"][0] is None
