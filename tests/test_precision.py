"""The choice of precision: the answer from passes of known length, and nothing else changes."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, instead_of_runs
from hypothesis import given
from hypothesis import strategies as st

from sidlab import training_plan
from sidlab.config import TrainConfig
from sidlab.data.planted import planted_catalogue
from sidlab.fast import precision
from sidlab.map_loss import MapConfig
from sidlab.pruning import PruningConfig
from sidlab.research import runs as sweeps
from sidlab.research import timing
from sidlab.research.cost import cost
from sidlab.sids.table import SidTable
from sidlab.training import train
from sidlab.training_plan import batches_of, measured_precision
from sidlab.windows import Windows, leave_one_out

WORLD = planted_catalogue(60, seed=1, shortest=5, longest=9)
TABLE = SidTable(WORLD.truth.tree, tuple((WORLD.truth.tree.max(axis=0) + 1).tolist()))
WINDOWS = Windows(leave_one_out(WORLD.histories).train, 6)
TINY = {
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 16,
    "ffn_hidden_layers": 1,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "dropout": 0.1,
    "batch_tokens": 400,
    "accumulation": 2,
    "max_items": 6,
    "max_updates": 6,
    "eval_every": 2,
    "eval_users": 20,
}


def config(**changes):
    return TrainConfig(**TINY | changes)


def run(output_dir=None, **changes):
    return train(config(**changes), WORLD, TABLE, output_dir=output_dir, progress=False)


@pytest.fixture(autouse=True)
def cpu_with_bf16(monkeypatch):
    """A CPU on which both precisions are worth a try, and nothing measured on it yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(training_plan, "_measured", {})


@pytest.fixture
def answers(monkeypatch):
    """Passes are run as they would be, but the answer is the next of this list."""
    given_answers = []

    def prescribed(passes, device):
        for dtype in (None, torch.bfloat16):
            passes(dtype)
        return given_answers.pop(0)

    monkeypatch.setattr(training_plan, "faster_precision", prescribed)
    return given_answers


class Passes:
    """Passes that take the given seconds, those of the call's number where that is a list."""

    def __init__(self, fp32, bf16):
        self.seconds = {None: fp32, torch.bfloat16: bf16}
        self.now = 0.0
        self.calls = []

    def __call__(self, dtype):
        taken = self.seconds[dtype]
        self.now += taken[self.calls.count(dtype)] if isinstance(taken, list) else taken
        self.calls.append(dtype)

    def answer(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "clock", lambda: self.now)
            return precision.faster_precision(self)


# --- The answer


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_bf16_is_taken_where_fp32_takes_a_tenth_longer(fp32, bf16):
    if abs(fp32 / bf16 - 1.1) > 1e-6:
        assert Passes(fp32, bf16).answer() == ("bf16" if fp32 > 1.1 * bf16 else "fp32")


def test_neither_the_first_pass_nor_a_disturbed_one_decides():
    # Medians without the first: 0.2 and 0.1
    assert Passes([0.2, 0.2, 0.2, 0.2, 0.2, 0.2], [9, 0.1, 0.1, 5, 0.1, 5]).answer() == "bf16"
    assert Passes([9, 0.1, 5, 0.1, 0.1, 5], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]).answer() == "fp32"


@pytest.mark.parametrize("seconds, rounds", [(0.1, 6), (0.75, 5), (100.0, 2)])
def test_slow_passes_are_few_and_as_many_in_either_precision(seconds, rounds):
    passes = Passes(seconds, seconds)
    passes.answer()
    assert passes.calls.count(None) == passes.calls.count(torch.bfloat16) == rounds
    # They take turns, and so does who begins.
    assert passes.calls[:4] in (
        [None, torch.bfloat16, torch.bfloat16, None],
        [torch.bfloat16, None, None, torch.bfloat16],
    )


def test_what_is_known_is_not_measured(monkeypatch):
    never = lambda dtype: pytest.fail("measured")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.faster_precision(never, "cpu") == "fp32"
    for supported, answer in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        assert precision.faster_precision(never, "cuda") == answer


def test_the_random_state_stays_as_it_was():
    def passes(dtype):
        random.random(), np.random.rand(), torch.rand(1)

    drawn = []
    for measure in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if measure:
            precision.faster_precision(passes)
            measured_precision(config(), TABLE, WINDOWS)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


# --- What is measured


@pytest.fixture
def timed(monkeypatch):
    """The models that are timed and, for every pass, its batch and whether it was in bf16."""
    models = []
    inputs = []
    build = training_plan.build_model

    def built(one, table):
        model = build(one, table)
        forward = type(build(one, table)).forward
        models.append(model)

        def seen(**batch):
            inputs.append((batch, torch.is_autocast_enabled("cpu")))
            return forward(model, **batch)

        model.forward = seen
        return model

    monkeypatch.setattr(training_plan, "build_model", built)
    return models, inputs


@pytest.mark.parametrize("arch", ["t5", "qwen"])
@pytest.mark.parametrize("windows", ["prefixes", "contiguous"])
def test_a_typical_batch_of_an_unpruned_model_is_timed(timed, monkeypatch, arch, windows):
    monkeypatch.setattr(training_plan, "TIMED_SLOTS", 100)
    never = PruningConfig(scorer=lambda signals: pytest.fail("scored"), after_layer=1)
    one = config(arch=arch, windows=windows, pruning=never, map=MapConfig(), padding="fixed")
    own = Windows(leave_one_out(WORLD.histories).train, 6, windows)
    measured_precision(one, TABLE, own)
    (model,), inputs = timed
    assert {in_bf16 for _, in_bf16 in inputs} == {True, False}
    batches = [own.lengths[indices].max() for indices in batches_of(one, TABLE, own)]
    (shape,) = {tuple(batch["input_ids"].shape) for batch, _ in inputs}
    # A window of the median batch has so many slots, four tokens an item.
    assert shape[1] == 4 * sorted(batches)[len(batches) // 2]
    assert shape[0] * shape[1] <= 100 < (shape[0] + 1) * shape[1]
    assert model.training and all(p.grad is not None for p in model.parameters())


def test_methods_that_are_compared_get_one_answer_and_other_sizes_their_own(answers):
    answers += ["bf16", "fp32", "fp32"]
    for changes in (
        {},
        {"pruning": PruningConfig(after_layer=1)},
        {"map": MapConfig()},
        {"padding": "fixed"},
        {"muon": 0.01},
    ):
        assert measured_precision(config(**changes), TABLE, WINDOWS) == "bf16"
    assert measured_precision(config(d_ff=32), TABLE, WINDOWS) == "fp32"
    assert measured_precision(config(batch_tokens=100), TABLE, WINDOWS) == "fp32" and answers == []


# --- Training


@pytest.mark.parametrize("answer", ["fp32", "bf16"])
def test_auto_trains_as_if_nothing_had_been_measured(answers, answer):
    # The random scorer draws from the same state as dropout.
    changes = {"pruning": PruningConfig(scorer="random", after_layer=1), "map": MapConfig()}
    answers.append(answer)
    auto = run(**changes)
    asked = run(precision=answer, **changes)
    assert answers == [] and auto.precision == asked.precision == answer
    assert auto.log == asked.log and auto.metrics == asked.metrics
    for one, other in zip(auto.model.parameters(), asked.model.parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


@pytest.mark.parametrize("answer, other", [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_resumed_run_keeps_its_precision(tmp_path, answers, monkeypatch, answer, other):
    whole = run(precision=answer)
    answers.append(answer)
    folder = tmp_path / "run"
    run(folder)
    for file in (folder / "checkpoint-6").iterdir():
        file.unlink()  # as if it had been killed before
    assert json.loads((folder / "run.json").read_text())["precision"] == answer
    answers += [other] * 2
    monkeypatch.setattr(training_plan, "_measured", {})
    resumed = run(folder)
    assert resumed.precision == answer and resumed.log == whole.log and len(answers) == 2
    assert run(folder, precision=answer).log == whole.log  # the same run, by name
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run(folder, precision=other)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run(folder, seed=1)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json can't be read"):
        run(folder)


# --- Sweeps


@pytest.fixture
def trained(monkeypatch):
    """Names and precisions of the runs that are done; nothing is trained."""
    done = {}

    def work(name, one):
        done[name] = one["config"]["precision"]
        return {"row": {"recall@10": 0.5}, "precision": done[name], "curve": None, "ranks": []}

    instead_of_runs(monkeypatch, work)
    return done


GRID = [
    {},
    {"pruning.keep": 0.5},
    {"map.steps": 1},
    {"padding": "fixed"},
    {"d_ff": 32},
    {"precision": "fp32"},
]


def test_a_sweep_measures_once_for_each_size_and_its_runs_are_found_again(
    tmp_path, answers, trained, monkeypatch
):
    answers += ["bf16", "fp32"]
    sweeps.sweep(GRID, tmp_path, preset="smoke", seeds=2)
    assert answers == [] and len(trained) == 12
    for name, found in trained.items():
        assert found == ("fp32" if "d_ff" in name or "precision" in name else "bf16"), name
    # Another process would measure otherwise by now, and does not ask.
    monkeypatch.setattr(training_plan, "_measured", {})
    trained.clear()
    sweeps.sweep([*GRID, {"pruning.keep": 0.7}], tmp_path, preset="smoke", seeds=2)
    assert set(trained.values()) == {"bf16"} and len(trained) == 2
    # Whoever wants it measured anew deletes the file; then a comparison in one precision is made
    # again.
    (tmp_path / "precision.json").unlink()
    answers += ["fp32", "fp32"]
    trained.clear()
    sweeps.sweep(GRID, tmp_path, preset="smoke", seeds=1)
    assert list(trained.values()) == ["fp32"] * 4 and not any("d_ff" in name for name in trained)


def test_a_cpu_without_bf16_does_not_go_on_in_it(tmp_path, answers, trained, monkeypatch):
    answers.append("bf16")
    sweeps.sweep([{}], tmp_path, preset="smoke", seeds=1)
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    sweeps.sweep([{}], tmp_path / "other", preset="smoke", seeds=1)
    sweeps.sweep([{}], tmp_path, preset="smoke", seeds=1)
    assert (
        list(trained.values()) == ["fp32"] and not (tmp_path / "other" / "precision.json").exists()
    )


def test_a_run_says_in_which_precision_it_was(tmp_path, answers, monkeypatch):
    monkeypatch.chdir(ROOT)  # the child imports sidlab from here where it is not installed
    answers.append("bf16")
    frame = sweeps.sweep([{"max_updates": 2, "eval_every": 2}], tmp_path, preset="smoke", seeds=1)
    with open(frame["file"][0]) as file:
        assert json.load(file)["precision"] == "bf16"


# --- Those who ask about a precision


def test_the_cost_of_auto_is_that_of_fp32_on_a_cpu_and_of_what_a_gpu_takes(monkeypatch):
    auto, fp32, bf16 = (
        cost(config(precision=p), TABLE.widths, WINDOWS).activation_bytes
        for p in ("auto", "fp32", "bf16")
    )
    assert auto == fp32 > bf16
    assert cost(config(), TABLE.widths, WINDOWS, bf16=True).activation_bytes == bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, same in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        one, other = (
            cost(config(precision=p), TABLE.widths, WINDOWS, fused=False) for p in ("auto", same)
        )
        assert one.activation_bytes == other.activation_bytes


def test_the_cost_model_needs_no_training():
    code = "import sys, sidlab.research.cost; sys.exit('sidlab.training' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode
        == 0
    )


def test_the_benchmark_takes_turns_in_one_precision_for_each_size(monkeypatch):
    found = []

    def prescribed(passes, device):
        passes(None), passes(torch.bfloat16)
        found.append(device)
        return "bf16" if len(found) == 1 else "fp32"

    monkeypatch.setattr(timing, "faster_precision", prescribed)
    configs = {
        "auto": config(),
        "pruned": config(pruning=PruningConfig(after_layer=1)),
        "wider": config(d_ff=32),
        "fp32": config(precision="fp32"),
    }
    variants = {name: timing.Variant(one) for name, one in configs.items()}
    settled = timing.in_faster_precision(variants, 2, "cpu", (8, 8))
    assert {name: v.config.precision for name, v in settled.items()} == {
        "auto": "bf16",
        "pruned": "bf16",
        "wider": "fp32",
        "fp32": "fp32",
    }
    assert found == ["cpu", "cpu"] and settled["pruned"].config.pruning == configs["pruned"].pruning
