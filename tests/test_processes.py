"""Two processes train what one does: the same losses, and checkpoints that either goes on from."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from sidlab.models.qwen import SidQwen
from sidlab.models.t5 import SidT5
from sidlab.research.launch import launch

SETTINGS = {
    "accumulation": 2,
    "max_updates": 8,
    "eval_every": 4,
    "pruning.keep": 0.5,
    "map.steps": 2,
    "precision": "fp32",
    "muon": 0.01,
    "batch_tokens": 700,
}


def write(path, folder, **changes):
    path.write_text(
        json.dumps({"preset": "smoke", "output_dir": str(folder), "settings": SETTINGS} | changes)
    )
    return path


def run(config, processes, program=("-m", "sidlab.research.launch")):
    several = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *several, *program, "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Result of a run on one process and on two; neither leaves a group of processes behind, at
    whose threads its end may abort.
    """
    folder = tmp_path_factory.mktemp("processes")
    results = {}
    program = folder / "program.py"
    program.write_text(
        "import sys\nimport torch\nfrom sidlab.research.launch import"
        " launch\nlaunch(sys.argv[1:])\nassert not torch.distributed.is_initialized()\n"
    )
    for processes in (1, 2):
        code, output = run(
            write(folder / f"{processes}.json", folder / str(processes)), processes, [str(program)]
        )
        assert code == 0, output
        results[processes] = json.loads((folder / str(processes) / "result.json").read_text())
    return folder, results


def test_losses_recalls_and_counts_are_those_of_one_process(finished):
    _, results = finished
    one = results[1]
    two = results[2]
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("windows", "updates", "kept_token_fraction", "real_token_fraction"):
        assert one[name] == two[name], name
    for name in ("loss", "main_loss", "grad_norm", "learning_rate", "recall@10"):
        found = [[entry[name] for entry in result["log"] if name in entry] for result in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) >= 2, name
    assert one["test"]["recall@10"] == pytest.approx(two["test"]["recall@10"], abs=0.002)


def test_a_decoder_only_model_guided_by_its_loss_is_the_same_in_two_processes(tmp_path):
    guided = {
        "arch": "qwen",
        "residual_dropout": 0.0,
        "strategy.kind": "loss-gap",
        "strategy.every": 2,
        "strategy.bound": 1.0,
    }
    settings = SETTINGS | guided
    logs = []
    for processes in (1, 2):
        code, output = run(
            write(tmp_path / f"{processes}.json", tmp_path / str(processes), settings=settings),
            processes,
        )
        assert code == 0, output
        logs.append(json.loads((tmp_path / str(processes) / "result.json").read_text()))
    one, two = logs
    assert (
        one["kept_token_fraction"] == two["kept_token_fraction"] < 1
        and one["windows"] == two["windows"]
    )
    losses = [[e["main_loss"] for e in result["log"] if "main_loss" in e] for result in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) >= 2


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_a_model_taught_every_item_is_the_same_in_two_processes(arch, tmp_path):
    settings = {
        "arch": arch,
        "targets": "all",
        "map.steps": 2,
        "residual_dropout": 0.0,
        "batch_tokens": 256,
        "accumulation": 2,
        "max_updates": 6,
        "eval_every": 3,
    }
    logs = []
    for processes in (1, 2):
        code, output = run(
            write(tmp_path / f"{processes}.json", tmp_path / str(processes), settings=settings),
            processes,
        )
        assert code == 0, output
        logs.append(json.loads((tmp_path / str(processes) / "result.json").read_text()))
    one, two = logs
    assert (
        one["windows"] == two["windows"]
        and one["kept_token_fraction"] == two["kept_token_fraction"] == 1
    )
    for name in ("loss", "main_loss"):
        losses = [[e[name] for e in result["log"] if name in e] for result in logs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) >= 2


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_checkpoint_of_one_goes_on_in_two_and_the_other_way_round(
    finished, tmp_path, before, after
):
    _, results = finished
    config = write(tmp_path / "run.json", tmp_path / "out")
    assert run(config, before)[0] == 0
    last = tmp_path / "out" / "run" / "checkpoint-8"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()  # as if it had been stopped after update 4
    code, output = run(config, after)
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["processes"] == after and found["windows"] == results[1]["windows"]
    losses = [
        [e["main_loss"] for e in result["log"] if "main_loss" in e]
        for result in (found, results[1])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


ALONE = """
import json, sys
import sidlab
from sidlab.research.runs import config_with
catalogue = sidlab.load_catalogue("planted", n_users=200)
tree = catalogue.truth.tree
table = sidlab.SidTable(tree, tuple(tree.max(axis=0) + 1), collisions="extend")
settings = {"accumulation": 2, "max_updates": 8, "eval_every": 4}
settings |= {"pruning.keep": 0.5, "strategy.start": 0.2, "strategy.every": 4}
result = sidlab.train(config_with("smoke", 0, settings), catalogue, table, progress=False)
from accelerate import PartialState
weights = float(sum(p.double().abs().sum() for p in result.model.parameters()))
with open(sys.argv[2] + str(PartialState().process_index), "w") as file:
    json.dump([weights, result.model.pruning.keep], file)
PartialState().destroy_process_group()
"""


def test_without_a_folder_all_processes_return_the_same_model(tmp_path):
    program = tmp_path / "alone.py"
    program.write_text(ALONE)
    code, output = run(tmp_path / "rank", 2, [str(program)])
    assert code == 0, output
    (weights, keep), other = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert [weights, keep] == other and 0.2 <= keep <= 0.5


MEASURED = """
import os, sys
from sidlab import training_plan, training
from sidlab.research.launch import launch

def measured(*args):
    assert os.environ["RANK"] == "0", "one process measures for all"
    return "bf16"

training_plan.measured_precision = measured
arguments = training._arguments

def told(config, *args, **kwargs):
    # In one piece, or the lines of two processes may mix.
    os.write(1, f"rank {os.environ['RANK']} trains in {config.precision}\\n".encode())
    return arguments(config, *args, **kwargs)

training._arguments = told
launch(sys.argv[1:])
"""


def test_all_processes_train_in_the_precision_that_one_of_them_measured(tmp_path):
    program = tmp_path / "measured.py"
    program.write_text(MEASURED)
    settings = SETTINGS | {"precision": "auto", "max_updates": 2, "eval_every": 2}
    code, output = run(
        write(tmp_path / "run.json", tmp_path / "out", settings=settings), 2, [str(program)]
    )
    assert code == 0, output
    assert all(f"rank {rank} trains in bf16" in output for rank in (0, 1))
    assert (
        json.loads((tmp_path / "out" / "result.json").read_text())["config"]["precision"] == "bf16"
    )
    assert json.loads((tmp_path / "out" / "run" / "run.json").read_text())["precision"] == "bf16"


def test_what_it_writes_loads(finished):
    folder, results = finished
    model = SidT5.from_pretrained(folder / "2")
    assert (
        model.table is not None
        and model.pruning.keep == results[2]["config"]["pruning"]["keep"] == 0.5
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sids": {"levls": 2}}, "sids={'levls': 2} must hold some of encoder, levels"),
        ({"sids": "file.txt"}, "sids='file.txt' must hold"),
        ({"settings": {"pruning": 0.5}}, "pruning must be a PruningConfig or None, got 0.5"),
        ({"settings": {"sids.levls": 2}}, "must hold some of encoder"),
    ],
)
def test_a_file_with_a_mistake_says_so_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        launch(["--config", str(write(tmp_path / "x.json", tmp_path / "out", **changes))])
    assert not (tmp_path / "out").exists()


def test_sids_in_the_settings_and_the_oracle(tmp_path):
    settings = {
        "sids.levels": 2,
        "sids.width": 16,
        "pruning.scorer": "oracle",
        "max_updates": 2,
        "eval_every": 2,
    }
    launch(["--config", str(write(tmp_path / "x.json", tmp_path / "out", settings=settings))])
    assert SidT5.from_pretrained(tmp_path / "out").table.widths[:2] == (16, 16)
    with pytest.raises(ValueError, match="holds a 'sid_t5' model; SidQwen loads 'sid_qwen'"):
        SidQwen.from_pretrained(tmp_path / "out")


def test_what_cannot_be_shared_or_is_unknown_says_so(tmp_path):
    code, output = run(
        write(tmp_path / "odd.json", tmp_path / "odd", settings=SETTINGS | {"accumulation": 3}), 2
    )
    assert (
        code != 0
        and "accumulation=3 batches an update can't be shared by 2 processes; use a multiple"
        in output
    )
    with pytest.raises(ValueError, match=r"\['epochs'\] are unknown; use dataset, output_dir"):
        launch(["--config", str(write(tmp_path / "x.json", tmp_path, epochs=3))])
    with pytest.raises(ValueError, match="output_dir is missing"):
        launch(["--config", str(write(tmp_path / "y.json", ""))])
