"""The comparison behind reproduce.ipynb: names, child processes, resuming, the notebook under
papermill.
"""

import copy
import dataclasses
import json
import os

import nbformat
import numpy as np
import papermill
import pytest
import scipy.stats
from conftest import ROOT, instead_of_runs

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.metrics import FEW_SEEDS, paired_test
from sidlab.model_building import build_model, weights_digest
from sidlab.models.t5 import SidT5
from sidlab.pruning import PruningConfig
from sidlab.research import compare as comparison
from sidlab.research import jobs, machine, sid_tables
from sidlab.research import runs as sweeps
from sidlab.research.figures import cost_bars, quality_cost
from sidlab.research.one_run import kept_informative
from sidlab.research.page import write_page
from sidlab.research.summary import COSTS, SECONDS, metrics_of
from sidlab.sids.table import SidTable
from sidlab.training import evaluate
from sidlab.windows import leave_one_out

METHODS = ["unpadded", "rastp@1/2", "stamp", "rastp-reference", "pool", "sasrec"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke comparison from scratch, run once."""
    folder = tmp_path_factory.mktemp("comparison")
    os.chdir(ROOT)  # the children import sidlab from here where it is not installed
    return folder, comparison.compare(
        "planted", "smoke", METHODS, 1, str(folder), protocol="scratch"
    )


def page_of(results, tmp_path):
    """The page of `results`, as its readers get it."""
    write_page(results, tmp_path / "index.html")
    return (tmp_path / "index.html").read_text()


def test_rows_have_every_field_and_costs_are_measured(finished):
    _, results = finished
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == [*METHODS, "popularity", "neighbours", "bayes"]
    for method in METHODS[:-1]:
        row = rows[method]
        assert row["train_seconds"] > 0 and row["updates"] == 20
        # Of four small batches an update a fifth is padding
        assert (row["real_token_fraction"] > 0.75) == (method != "rastp-reference")
        assert row["seconds_per_1k_windows"] == pytest.approx(
            1000 * row["train_seconds"] / row["windows"]
        )
        assert row["recall@10_interval"][0] <= row["recall@10"] <= row["recall@10_interval"][1]
    assert (
        rows["unpadded"]["kept_token_fraction"] == 1
        and rows["unpadded"]["kept_informative"] is None
    )
    assert (
        0.5 <= rows["rastp@1/2"]["kept_token_fraction"] < 0.6
        and 1 / 3 <= rows["stamp"]["kept_token_fraction"] < 0.45
    )
    assert (
        rows["rastp-reference"]["kept_token_fraction"] > 0.6
        and rows["pool"]["kept_informative"] is None
    )
    assert rows["sasrec"]["train_seconds"] > 0 and rows["sasrec"]["seconds_per_1k_windows"] is None
    assert rows["popularity"]["train_seconds"] is None
    assert rows["bayes"]["recall@10"] > rows["unpadded"]["recall@10"]


def test_methods_see_the_same_windows_in_as_many_updates(finished):
    _, results = finished
    trained = [row for row in results["rows"] if row["updates"] is not None]
    assert len(trained) == 5
    assert len({(row["windows"], row["updates"]) for row in trained}) == 1


def test_predictions_stand_beside_measurements(finished):
    _, results = finished
    frame = comparison.predicted_and_measured(results)
    silent = copy.deepcopy(results)
    for row in silent["summary"]:
        row["peak_memory_mb"] = row["peak_memory_mb"] and 0.0  # as on a system that does not tell
    assert comparison.predicted_and_measured(silent)["measured memory ×"].isna().all()
    assert list(frame.index) == METHODS[:-1]
    assert (frame.loc["unpadded"].iloc[1:] == 1).all() and (frame > 0).all().all()
    flops = frame["predicted FLOPs ×"]
    assert flops["stamp"] < flops["rastp@1/2"] < 1 < flops["rastp-reference"]
    assert flops["pool"] < flops["stamp"]  # nothing is scored


def test_files_are_complete(finished, tmp_path):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "rastp@1/2" in page_of(results, tmp_path)
    assert (folder / "runs" / "stamp-seed0" / "model.safetensors").exists()
    assert not list((folder / "runs").glob("*/checkpoint-*"))


def test_what_is_there_is_not_done_again_and_what_is_missing_is(finished, capsys):
    folder, results = finished
    one = folder / "runs" / "stamp-seed0.json"
    one.unlink()
    kept = (folder / "runs" / "unpadded-seed0.json").stat().st_mtime_ns
    again = comparison.compare("planted", "smoke", METHODS, 1, str(folder), protocol="scratch")
    assert "unpadded-seed0: already in" in capsys.readouterr().out
    assert one.exists() and (folder / "runs" / "unpadded-seed0.json").stat().st_mtime_ns == kept
    recalls = [[row["recall@10"] for row in r["rows"]] for r in (results, again)]
    assert recalls[0] == recalls[1]  # a run repeats exactly


def stored(folder):
    return {
        name: json.loads(jobs.file_of(jobs.path_of(folder, f"{name}-seed0"), ".json").read_text())
        for name in METHODS
    }


def test_an_own_scorer_is_a_method():
    assert comparison.method_config("my_scorer:oldest@1/2", "smoke", 3).pruning == PruningConfig(
        scorer="my_scorer:oldest", keep=0.5
    )
    with pytest.raises(
        ValueError, match="method 'rasp' is unknown; .* or a custom scorer as module:function"
    ):
        comparison.method_config("rasp", "smoke", 0)


def test_other_jobs_are_told_on_the_page(finished, monkeypatch, tmp_path):
    folder, _ = finished
    runs = [run | {"busy": True} for run in stored(folder).values()]
    monkeypatch.setattr(comparison, "run_all", lambda specs, folder, executor: runs * 2)
    results = comparison.compare("planted", "smoke", METHODS, 2, str(folder), protocol="scratch")
    assert results["busy"].startswith("Other jobs ran") and results["busy"] in page_of(
        results, tmp_path
    )


def test_seconds_of_two_devices_do_not_compare(finished, monkeypatch):
    folder, _ = finished
    runs = stored(folder)
    runs["stamp"] |= {"device": "NVIDIA H100"}
    monkeypatch.setattr(
        comparison,
        "run_all",
        lambda specs, folder, executor: [run | {"busy": False} for run in runs.values()],
    )
    told = comparison.compare("planted", "smoke", METHODS, 1, str(folder), protocol="scratch")[
        "busy"
    ]
    assert (
        told.startswith("The runs were made on NVIDIA H100 and a CPU (threads: ")
        and "do not compare" in told
    )


def test_methods_that_were_run_side_by_side_have_no_seconds_beside_those_that_have(
    finished, monkeypatch, tmp_path
):
    folder, _ = finished
    runs = stored(folder)
    for method in ("stamp", "pool"):
        row = runs[method]["row"] | dict.fromkeys(SECONDS)
        runs[method] |= {"beside": True, "busy": True, "row": row}
    # Two seeds of which one has seconds say nothing of the method's
    later = [*runs.values(), *(run | {"busy": False} for run in stored(folder).values())]
    monkeypatch.setattr(comparison, "run_all", lambda specs, folder, executor: later)
    results = comparison.compare("planted", "smoke", METHODS, 2, str(folder), protocol="scratch")
    summary = {row["method"]: row for row in results["summary"]}
    assert summary["stamp"]["seconds_per_1k_windows"] is summary["pool"]["train_seconds"] is None
    assert summary["rastp@1/2"]["seconds_per_1k_windows"] > 0
    assert summary["stamp"]["peak_memory_mb"] > 0
    assert "Runs were done side by side: those carry no seconds." in page_of(results, tmp_path)
    ratios = comparison.predicted_and_measured(results)["measured seconds ×"]
    assert ratios.isna().tolist() == [method in ("stamp", "pool") for method in ratios.index]
    cost_bars(results)
    quality_cost(results)
    # Nobody has any
    for run in later:
        run["row"] = run["row"] | dict.fromkeys(SECONDS)
    results = comparison.compare("planted", "smoke", METHODS, 2, str(folder), protocol="scratch")
    assert comparison.predicted_and_measured(results)["measured seconds ×"].isna().all()
    assert ">nan<" not in page_of(results, tmp_path)


def test_a_failing_run_says_so_with_its_output(tmp_path):
    (tmp_path / "runs").mkdir()
    sweeps.write_json(
        tmp_path / "runs" / "unpadded-seed0.spec",
        {
            "dataset": "nowhere",
            "sids": {},
            "config": {},
            "key": "",
            "code": machine.code_digest(),
            "cwd": str(ROOT),
        },
    )
    (tmp_path / "runs" / "unpadded-seed0.ticket").touch()
    with pytest.raises(RuntimeError, match="(?s)unpadded-seed0 failed.*no catalogue 'nowhere'"):
        jobs.start_child(tmp_path, "unpadded-seed0", "ticket")


def test_kept_informative_of_the_oracle_is_as_good_as_its_budget():
    """Keeping everything has recall 1 and the base rate as precision."""
    catalogue = load_catalogue("planted", n_users=40)
    table = SidTable(
        catalogue.truth.tree, width=tuple(int(w) for w in catalogue.truth.tree.max(0) + 1)
    )
    histories, _ = leave_one_out(catalogue.histories).cases("test")
    config = TrainConfig.preset("smoke", pruning=PruningConfig(keep=1.0, scorer="oracle"))
    everything = kept_informative(build_model(config, table).eval(), catalogue.truth, histories)
    informative = catalogue.truth.informative(histories).sum()
    tokens = sum(len(h) for h in histories) * 4
    assert everything == {"precision": pytest.approx(informative / tokens), "recall": 1.0}
    config = dataclasses.replace(config, pruning=PruningConfig(keep=1 / 3, scorer="oracle"))
    third = kept_informative(build_model(config, table).eval(), catalogue.truth, histories)
    config = dataclasses.replace(config, pruning=PruningConfig(keep=1 / 3, scorer="random"))
    chance = kept_informative(build_model(config, table).eval(), catalogue.truth, histories)
    assert third["precision"] > 0.95 and abs(chance["precision"] - informative / tokens) < 0.08


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(methods="unpadded rasp"),
            "method 'rasp' is unknown; use some of padded unpadded recent",
        ),
        (dict(methods="map@1/2"), "only a pruning method takes a kept share"),
        (dict(methods="rastp@2"), "must lie in"),
        *(
            (dict(methods=f"rastp@{keep}"), "takes a kept share, written as in rastp@1/2")
            for keep in ("", "1/0", "much", "1/2/3")
        ),
        (
            dict(preset="fast"),
            "preset='fast' is unknown; use one of 'smoke', 'quick', 'long', 'gpu', 'paper'",
        ),
        (dict(dataset="beauty"), "no catalogue 'beauty'"),
        (dict(methods="rastp unpadded rastp"), "names rastp twice"),
        (dict(seeds=0), "seeds must be at least 1, got 0"),
        (
            dict(methods="base unpadded"),
            "names base, a row that protocol='continue' adds by itself",
        ),
        (dict(protocol="both"), "protocol='both' is unknown; use one of 'continue', 'scratch'"),
        (dict(preset="paper", protocol="continue"), "preset='paper' trains from scratch"),
        (dict(methods=""), "give at least one method"),
        (dict(sids="nowhere.txt.gz"), "sids='.*nowhere.txt.gz' is no file; give a published table"),
    ],
)
def test_bad_arguments_stop_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        comparison.compare(
            **dict(dataset="planted", preset="smoke", output_dir=str(tmp_path / "out")) | arguments
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [1, 3, FEW_SEEDS])
def test_differences_are_paired_and_seeds_are_told_one_by_one(seeds, tmp_path):
    catalogue = load_catalogue("planted")
    users = len(catalogue.histories)
    rng = np.random.default_rng(0)
    names = ["unpadded", "rastp", "sasrec"]
    runs = []
    for name in names:
        for seed in range(seeds):
            ranks = (rng.random(users) < 0.3 + rng.normal(0, 0.03)).astype(int)
            row = metrics_of(ranks) | dict.fromkeys(COSTS, 1.0) | {"kept_informative": None}
            told = {"curve": None, "busy": False, "device": "a CPU", "precision": "fp32"}
            runs.append({"method": name, "seed": seed, "ranks": ranks, "row": row, **told})
    # The same methods and seeds as asked for, seeds outside
    asked = comparison.Comparison("planted", "smoke", names, seeds, protocol="scratch")
    found = asked.results(sorted(runs, key=lambda run: run["seed"]), tmp_path)
    rows = {row["method"]: row for row in found["summary"]}
    hits = {
        name: np.array([run["ranks"] for run in runs if run["method"] == name], float)
        for name in names
    }
    hits["popularity"] = (comparison._baselines(catalogue)["popularity"] > 0).astype(float)
    for name in ("rastp", "sasrec", "popularity"):
        row = rows[name]
        of_seed = hits[name].mean(-1) - hits["unpadded"].mean(1)
        assert row["against"] == "unpadded" and row["difference"] == pytest.approx(of_seed.mean())
        assert row["difference_by_seed"] == pytest.approx(of_seed.tolist())
        # Users are drawn, seeds are not: the interval is that of each user's mean.
        of_user = np.atleast_2d(hits[name] - hits["unpadded"]).mean(axis=0)
        assert row["difference_interval"] == list(paired_test(of_user, 0 * of_user).interval)
        if seeds < FEW_SEEDS:
            assert row["difference_seed_interval"] is None
            continue
        theirs = np.broadcast_to(hits[name].mean(-1), seeds)
        expected = scipy.stats.ttest_rel(theirs, hits["unpadded"].mean(1)).confidence_interval()
        assert row["difference_seed_interval"] == pytest.approx(list(expected))
    assert rows["unpadded"]["difference"] is None and rows["unpadded"]["against"] is None
    page = page_of(found, tmp_path)
    told = ", ".join(f"{value:+.4f}" for value in rows["rastp"]["difference_by_seed"])
    assert (f"seeds {told}" in page) == (seeds == 3)
    assert ("seeds [" in page) == (seeds == FEW_SEEDS)


def test_seconds_intervals_and_tests_agree_with_the_ranks(finished):
    folder, results = finished
    ranks = np.array(json.loads((folder / "runs" / "stamp-seed0.json").read_text())["ranks"])
    base = np.array(json.loads((folder / "runs" / "unpadded-seed0.json").read_text())["ranks"])
    entry = next(s for s in results["summary"] if s["method"] == "stamp")
    hit = lambda r: ((r > 0) & (r <= 10)).mean()
    assert entry["recall@10"] == pytest.approx(hit(ranks))
    assert entry["difference"] == pytest.approx(hit(ranks) - hit(base))


def test_a_published_sid_table_is_what_every_method_speaks(tmp_path):
    catalogue = load_catalogue("planted")
    lines = []
    # Digits of the item's number: as good as any for this
    for item in range(1, catalogue.n_items + 1):
        lines.append(f"{item} {item // 64} {item // 8 % 8} {item % 8}\n")
    (tmp_path / "sids.txt").write_text("".join(lines))
    results = comparison.compare(
        "planted", "smoke", "unpadded", 1, str(tmp_path / "out"), str(tmp_path / "sids.txt")
    )
    assert (
        results["sids"]["collision_rate"] == 0
        and f"SIDS={tmp_path / 'sids.txt'}" in results["command"]
    )
    table = SidT5.from_pretrained(tmp_path / "out" / "runs" / "unpadded-seed0").table
    assert table.codes.tolist() == [
        [item // 64, item // 8 % 8, item % 8] for item in range(1, catalogue.n_items + 1)
    ]


# --- Going on from one model

CONTINUED = ["unpadded", "rastp@1/2", "pool", "map"]


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A smoke comparison of methods that continue one model, run once."""
    folder = tmp_path_factory.mktemp("continued")
    os.chdir(ROOT)
    return folder, comparison.compare("planted", "smoke", CONTINUED, 1, str(folder))


def test_methods_go_on_from_one_base_and_the_base_itself_is_shown(continued, tmp_path):
    folder, results = continued
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == [
        "base",
        *CONTINUED,
        "base-rastp@1/2",
        "base-pool",
        "popularity",
        "neighbours",
        "bayes",
    ]
    assert (
        results["protocol"] == "continue"
        and "base" not in results["command"]
        and "PROTOCOL" not in results["command"]
    )
    trained = [rows[name] for name in CONTINUED]
    assert len({(row["windows"], row["updates"]) for row in trained}) == 1
    assert rows["base"]["seconds_per_1k_windows"] > 0 and rows["base-pool"]["train_seconds"] is None
    digest = weights_digest(folder / "runs" / "base-seed0")
    for name in CONTINUED:
        spec = json.loads(jobs.file_of(jobs.path_of(folder, f"{name}-seed0"), ".spec").read_text())
        assert (
            spec["start"] == "base-seed0"
            and spec["config"]["targets"] == 1
            and spec["config"]["encoder_mask"] == "items"
        )
    assert digest != weights_digest(jobs.path_of(folder, "unpadded-seed0"))
    summary = {row["method"]: row for row in results["summary"]}
    assert summary["base-pool"]["against"] == "base" and summary["map"]["against"] == "unpadded"
    assert all(summary[name]["predicted_flops"] > 0 for name in ("base", *CONTINUED))
    page = page_of(results, tmp_path)
    assert "base-rastp@1/2" in page and "against base" in page


def test_the_base_pruned_when_recommending_is_that_model_pruned(continued):
    folder, _ = continued
    model = SidT5.from_pretrained(folder / "runs" / "base-seed0")
    model.set_pruning(PruningConfig(scorer="rastp", keep=0.5))
    histories, targets = leave_one_out(load_catalogue("planted").histories).cases("test")
    stored = json.loads(
        (folder / "runs" / f"{jobs.path_of(folder, 'base-rastp@1/2-seed0').name}.json").read_text()
    )
    assert evaluate(model, histories, targets).tolist() == stored["ranks"]


def test_another_base_means_other_runs(continued):
    folder, _ = continued
    path = jobs.path_of(folder, "unpadded-seed0")
    spec = json.loads(jobs.file_of(path, ".spec").read_text())
    catalogue = load_catalogue("planted")
    table, _ = sid_tables.sid_table(catalogue, folder, {})
    digest = weights_digest(folder / "runs" / "base-seed0")
    assert (
        sweeps._key(spec, catalogue, table, digest)
        == spec["key"]
        != sweeps._key(spec, catalogue, table, "0" * 12)
    )


def test_a_start_must_be_one_of_the_runs(tmp_path):
    config = TrainConfig.preset("smoke", continued=True)
    for start in ("nowhere", "b"):
        specs = {
            "a": sweeps.spec("planted", config, start=start),
            "b": sweeps.spec("planted", config, start="a"),
        }
        with pytest.raises(
            ValueError, match=f"start='{start}' of the run 'a' must name one of these runs"
        ):
            list(sweeps.run_all(specs, tmp_path))


def test_a_start_has_the_same_data_and_sids_and_is_asked_for(tmp_path):
    config = TrainConfig.preset("smoke", continued=True)
    other = sweeps.spec("planted", config, {"levels": 2}, start="a")
    with pytest.raises(ValueError, match="must have the dataset and the sids of its start='a'"):
        list(sweeps.run_all({"a": sweeps.spec("planted", config), "b": other}, tmp_path))
    with pytest.raises(ValueError, match="needs a start"):
        list(
            sweeps.run_all(
                {
                    "a": sweeps.spec(
                        "planted", {"recommend": 10, "pruning": PruningConfig().to_dict()}
                    )
                },
                tmp_path,
            )
        )


def test_a_base_without_its_weights_is_trained_again(tmp_path, monkeypatch):
    done = []

    def work(name, spec):
        path = jobs.path_of(tmp_path, name)
        path.mkdir(exist_ok=True)
        (path / "model.safetensors").write_bytes(b"the same every time")
        done.append(name)
        return {}

    instead_of_runs(monkeypatch, work)
    config = TrainConfig.preset("smoke", precision="fp32")
    specs = {"b": sweeps.spec("planted", config, start="a"), "a": sweeps.spec("planted", config)}
    first = list(sweeps.run_all(specs, tmp_path))
    assert done == ["a", "b"] and len(first) == 2
    (tmp_path / "runs" / "a" / "model.safetensors").unlink()
    assert list(sweeps.run_all(specs, tmp_path)) == first and done == ["a", "b", "a"]


NOTEBOOK = ROOT / "notebooks" / "reproduce.ipynb"


def test_the_notebook_has_the_parameters_and_stops_at_an_unknown_one(tmp_path):
    assert set(papermill.inspect_notebook(str(NOTEBOOK))) == set(comparison.PARAMETERS)
    with pytest.raises(
        papermill.PapermillExecutionError, match="unknown parameter seed; use dataset, preset"
    ):
        papermill.execute_notebook(
            str(NOTEBOOK),
            str(tmp_path / "out.ipynb"),
            parameters={"seed": 1},
            cwd=str(ROOT),
            kernel_name="python3",
            progress_bar=False,
        )


def test_the_notebook_shows_what_is_there(finished, tmp_path):
    """The runs are done already, so this is about its tables and figures."""
    folder, results = finished
    papermill.execute_notebook(
        str(NOTEBOOK),
        str(tmp_path / "out.ipynb"),
        parameters={
            "preset": "smoke",
            "methods": " ".join(METHODS),
            "seeds": 1,
            "output_dir": str(folder),
            "protocol": "scratch",
        },
        cwd=str(ROOT),
        kernel_name="python3",
        progress_bar=False,
    )
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    shown = " ".join(
        str(output.get("data", {}).get("text/html", ""))
        for cell in cells
        for output in cell.get("outputs", ())
    )
    for row in results["summary"]:
        if row["difference"] is not None:
            low, high = row["difference_interval"]
            assert f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" in shown, row["method"]


def test_notebooks_are_committed_clean():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert (
            notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
        ), path
        for cell in notebook.cells:
            assert cell.id and not cell.get("outputs") and cell.get("execution_count") is None, (
                path,
                cell.id,
            )
