"""Training on a tiny planted world: repeatable, resumable, fair, and nothing left behind."""

import dataclasses
import gc
import json
import random
import tempfile
import types

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from sidlab import training
from sidlab.batches import StratifiedBatches
from sidlab.config import PRESETS, TrainConfig
from sidlab.data.planted import planted_catalogue
from sidlab.decoding import encode_histories, recommend, score_items
from sidlab.fast import meter as meter_module
from sidlab.fast.meter import Meter
from sidlab.map_loss import MapConfig
from sidlab.metrics import summary
from sidlab.model_building import build_model
from sidlab.pruning import PruningConfig, kept_count
from sidlab.sids.table import SidTable
from sidlab.strategy import AdaptPruning, Strategy
from sidlab.training import evaluate, train
from sidlab.training_plan import collator_of, validation_cases
from sidlab.windows import Collator, Windows, leave_one_out

WORLD = planted_catalogue(60, seed=1, shortest=5, longest=9)
TABLE = SidTable(WORLD.truth.tree, tuple((WORLD.truth.tree.max(axis=0) + 1).tolist()))
WINDOWS = Windows(leave_one_out(WORLD.histories).train, 6)
# An evaluation and a checkpoint every three updates, and epochs that end between them.
TINY = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 32,
    "ffn_hidden_layers": 1,
    "num_layers": 3,
    "num_decoder_layers": 1,
    "dropout": 0.1,
    "batch_tokens": 800,
    "accumulation": 2,
    "max_items": 6,
    "max_updates": 8,
    "eval_every": 3,
    "eval_users": 20,
    "precision": "fp32",
}
# The random scorer draws from the same state as dropout, so a resumed run must find that state
# again.
STAMP = {"pruning": PruningConfig(scorer="random", after_layer=1), "map": MapConfig()}


def config(**changes):
    return TrainConfig(**TINY | changes)


def run(output_dir=None, callbacks=None, **changes):
    return train(
        config(**changes), WORLD, TABLE, output_dir=output_dir, callbacks=callbacks, progress=False
    )


def assert_same(found, expected):
    """Two results of training: the same weights, log, metrics and counts."""
    for (name, one), other in zip(
        found.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert (
        found.log == expected.log
        and found.metrics == expected.metrics
        and found.tokens == expected.tokens
    )
    for count in ("windows", "updates"):
        assert found.timing[count] == expected.timing[count]


class Seen(TrainerCallback):
    """Counts how many updates were done before each one."""

    def __init__(self, updates):
        self.updates = updates

    def on_step_begin(self, args, state, control, **kwargs):
        self.updates.append(state.global_step)


class Stop(TrainerCallback):
    """Pulls the plug before an update."""

    def __init__(self, update):
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise KeyboardInterrupt


@pytest.fixture
def spy(monkeypatch):
    """What the collator was asked for and gave, in order."""
    calls = []
    plain = Collator.__call__

    def recorded(self, indices):
        calls.append((list(indices), plain(self, indices)))
        return calls[-1][1]

    monkeypatch.setattr(Collator, "__call__", recorded)
    return calls


@pytest.fixture(scope="module")
def uninterrupted():
    return run(**STAMP)


# --- Repeatable


def test_a_seed_gives_one_model_and_another_seed_another(uninterrupted):
    same = run(**STAMP)
    other = run(seed=1, **STAMP)
    assert_same(same, uninterrupted)
    assert [e.get("loss") for e in other.log] != [e.get("loss") for e in uninterrupted.log]
    histories, _ = leave_one_out(WORLD.histories).cases("test")
    found = [recommend(r.model, histories, k=5)[1] for r in (same, uninterrupted, other)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_all_methods_of_a_seed_start_from_the_same_weights():
    plain = build_model(config(), TABLE).state_dict()
    for changes in (
        STAMP,
        {"padding": "fixed"},
        {"map": MapConfig(steps=3)},
        {"pruning": PruningConfig(keep=0.5, unit="item")},
    ):
        torch.rand(7)  # whatever was drawn before
        weights = build_model(config(**changes), TABLE).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in plain.items())
    assert not torch.equal(build_model(config(seed=1), TABLE).shared.weight, plain["shared.weight"])


def test_each_epoch_sees_windows_at_most_once_in_its_own_order(spy):
    run(max_updates=None, epochs=3, seed=4)
    batches = StratifiedBatches(WINDOWS.lengths, 4, 800, seed=4, accumulation=2)
    expected = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        expected += list(batches)
    assert [indices for indices, _ in spy] == expected and len(set(map(tuple, expected))) > len(
        batches
    )


def test_it_learns():
    result = run(max_updates=40, learning_rate=1e-2, dropout=0.0, eval_every=20)
    losses = [e["loss"] for e in result.log if "loss" in e]
    assert losses[-1] < losses[0] - 0.5
    assert not result.model.training
    assert [e["step"] for e in result.log if "recall@5" in e] == [20, 40]
    cases = leave_one_out(WORLD.histories).cases("validation")
    chosen = np.sort(np.random.default_rng(0).choice(len(cases[1]), 20, replace=False))
    ranks = evaluate(result.model, [cases[0][i] for i in chosen], cases[1][chosen], beam=10)
    assert result.metrics == pytest.approx(summary(ranks))


@pytest.mark.parametrize("arch", ["t5", "qwen"])
def test_plain_attention_and_dropout_give_the_same_model_where_nothing_is_dropped(arch):
    changes = {
        "arch": arch,
        "dropout": 0.0,
        "pruning": PruningConfig(),
        "map": MapConfig(),
        "max_updates": 3,
    }
    ours = run(**changes)
    plain = run(**changes, stock_kernels=True)
    assert (
        plain.model.stack.config._attn_implementation == "eager"
        and ours.model.stack.config._attn_implementation == "sidlab"
    )
    kinds = {type(m).__module__ for m in plain.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert kinds <= {"torch.nn.modules.dropout"}
    assert [e["loss"] for e in plain.log if "loss" in e] == pytest.approx(
        [e["loss"] for e in ours.log if "loss" in e], rel=1e-3
    )
    assert plain.tokens == ours.tokens


def test_the_meter_holds_nothing_of_a_batch():
    """Small tensors that stay keep the allocator from giving back the large ones between them: a
    megabyte an update, in a long training.
    """
    meter = Meter()
    mask = torch.ones(3, 5, dtype=torch.long)

    def alive():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    meter.count(mask, mask[:, :2], mask[:, 0].sum())
    before = alive()
    for _ in range(50):
        meter.count(mask, mask[:, :2], mask[:, 0].sum())
    assert alive() <= before
    assert meter.tokens() == {"real_token_fraction": 1, "kept_token_fraction": 0.4}


def test_what_a_strategy_spends_on_its_probe_is_metered(monkeypatch):
    running = [False]
    probes = []
    pause = Meter.pause
    resume = Meter.resume
    monkeypatch.setattr(Meter, "pause", lambda self: running.__setitem__(0, False) or pause(self))
    monkeypatch.setattr(Meter, "resume", lambda self: running.__setitem__(0, True) or resume(self))
    monkeypatch.setattr(AdaptPruning, "within_bound", lambda self: probes.append(running[0]) or 0.5)
    run(
        strategy=Strategy("loss-gap", every=2),
        pruning=PruningConfig(keep=0.5),
        max_updates=6,
        eval_every=2,
    )
    assert probes == [True, True]  # at updates 2 and 4, right behind an evaluation


def test_a_model_trained_in_mixed_precision_comes_back_whole():
    model = run(precision="bf16", max_updates=3).model
    histories = WORLD.histories[:5]
    items, scores = recommend(model, histories, k=5, beam=TABLE.n_items)
    torch.testing.assert_close(
        score_items(model, histories).gather(1, items - 1), scores, rtol=0, atol=1e-5
    )


def test_one_process_trains_on_one_gpu(monkeypatch):
    """The library would split each batch over all GPUs that it sees."""

    def two(arguments):
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(training.TrainingArguments, "_setup_devices", property(two))
    arguments = training._arguments(config(), "nowhere", 8, 1, keep=False, progress=False)
    assert arguments.n_gpu == arguments.train_batch_size == 1


def test_whoever_resumes_on_another_machine_is_told(tmp_path, monkeypatch):
    run(tmp_path, max_updates=3)
    monkeypatch.setattr(meter_module, "device_name", lambda: "NVIDIA H100")
    with pytest.warns(
        UserWarning, match=r"made on a CPU \(threads: \d+\), and this is NVIDIA H100"
    ):
        run(tmp_path, max_updates=3)


def test_bf16_is_close_to_fp32():
    one, other = (run(max_updates=1, dropout=0.0, precision=p, **STAMP) for p in ("fp32", "bf16"))
    assert one.log[0]["loss"] == pytest.approx(other.log[0]["loss"], rel=0.02)
    assert one.log[0]["loss"] != other.log[0]["loss"]


# --- Fair


def one_by_one(options, indices):
    """A fresh model after the passes of the windows one by one, whose gradients are those of an
    update of them, and the update's losses.
    """
    settings = config(**options)
    model = build_model(settings, TABLE).train()
    collate = Collator(WINDOWS, TABLE, separators=True, max_items=6, map_config=settings.map)
    main = 0.0
    auxiliary = 0.0
    if settings.map is not None:
        weights = settings.map.decay ** np.arange(settings.map.steps)
        labels = collate(indices)["map_labels"]  # [B, S, L]
        counts = (labels != -100).sum((0, 2)).tolist()
        assert len(set(counts)) == len(counts) and 0 not in counts
    for index in indices:
        window = collate([index])
        labels = window.pop("map_labels", None)
        out = model(**window)
        (out.main_loss / len(indices)).backward()
        main += out.main_loss.item() / len(indices)
        for step in range(settings.map.steps if settings.map is not None else 0):
            if (labels[:, step] == -100).all():
                continue
            alone = torch.full_like(labels, -100)
            alone[:, step] = labels[:, step]
            share = (alone != -100).sum().item() / counts[step] * weights[step] / weights.sum()
            # The mean over the window's labels of this step
            loss = model(**window, map_labels=alone).map_loss * share
            (settings.map.weight * loss).backward()
            auxiliary += loss.item()
    return (
        model,
        main,
        main + (settings.map.weight * auxiliary if settings.map is not None else 0.0),
    )


@pytest.mark.parametrize("arch", ["t5", "qwen"])
@pytest.mark.parametrize(
    "map_config",
    [None, MapConfig(), MapConfig(unit="token", decay=0.5, weight=2.0)],
    ids=["plain", "item", "token"],
)
def test_an_update_is_the_mean_over_its_windows_one_by_one(spy, arch, map_config):
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            found.append(
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            )

    found = []
    options = {
        "arch": arch,
        "map": map_config,
        "dropout": 0.0,
        "accumulation": 3,
        "batch_tokens": 200,
        "max_updates": 1,
    }
    result = run(callbacks=[Gradients()], **options)
    parts = [indices for indices, _ in spy[:3]]
    assert (
        len(set(map(len, parts))) > 1 and len({WINDOWS.lengths[part].max() for part in parts}) == 3
    )
    spy.clear()
    model, main, loss = one_by_one(options, [index for part in parts for index in part])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert result.log[0]["main_loss"] == pytest.approx(main, rel=1e-5)
    assert result.log[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0] and ("map_head.projection" in found[0]) == (map_config is not None)
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("windows, accumulation", [("prefixes", 2), ("contiguous", 1)])
def test_logged_losses_are_means_over_all_targets_since_the_last_log(spy, windows, accumulation):
    options = {
        "windows": windows,
        "accumulation": accumulation,
        "learning_rate": 0.0,
        "dropout": 0.0,
    }
    # A log every two updates, and the weights stay
    result = run(max_updates=4, eval_every=10, **options)
    assert [e["step"] for e in result.log if "loss" in e] == [2, 4]
    model = build_model(config(**options), TABLE).train()
    updates = [spy[u : u + accumulation] for u in range(0, 4 * accumulation, accumulation)]
    sizes = [sum(len(indices) for indices, _ in update) for update in updates]
    assert (len(set(sizes)) > 1) == (windows == "contiguous")
    for number, entry in enumerate(e for e in result.log if "loss" in e):
        both = [batch for update in updates[2 * number : 2 * number + 2] for _, batch in update]
        assert len({len(batch["labels"]) for batch in both}) > 1
        mean = sum(model(**batch).main_loss.item() * len(batch["labels"]) for batch in both) / sum(
            len(batch["labels"]) for batch in both
        )
        assert entry["loss"] == pytest.approx(mean, rel=1e-5) and entry[
            "main_loss"
        ] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"pruning": PruningConfig(), "map": MapConfig()}])
def test_padding_changes_nothing_but_the_slots(spy, changes):
    plain = run(dropout=0.0, max_updates=5, **changes)
    batches = [indices for indices, _ in spy]
    spy.clear()
    padded = run(dropout=0.0, max_updates=5, padding="fixed", **changes)
    assert [indices for indices, _ in spy] == batches
    assert {batch["input_ids"].shape[1] for _, batch in spy} == {24}
    losses = [[e["loss"] for e in result.log if "loss" in e] for result in (padded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert padded.tokens["kept_token_fraction"] == plain.tokens["kept_token_fraction"]
    assert padded.tokens["real_token_fraction"] < plain.tokens["real_token_fraction"]


def test_tokens_and_windows_are_counted(spy):
    found = run(pruning=PruningConfig(keep=0.3))
    masks = [batch["attention_mask"] for _, batch in spy]
    real = sum(m.sum().item() for m in masks)
    kept = sum(kept_count(m.sum(1), 0.3).sum().item() for m in masks)
    assert found.tokens["real_token_fraction"] == pytest.approx(
        real / sum(m.numel() for m in masks)
    )
    assert found.tokens["kept_token_fraction"] == pytest.approx(kept / real)
    assert found.timing["windows"] == sum(map(len, masks)) and found.timing["updates"] == 8
    per_window = found.timing["seconds_per_1k_windows"] / 1000
    assert 0 < found.timing["train_seconds"] == pytest.approx(per_window * found.timing["windows"])
    assert run(max_updates=1).tokens["kept_token_fraction"] == 1.0


def test_validation_users_are_the_same_for_every_seed():
    split = leave_one_out(WORLD.histories)
    histories, targets = validation_cases(split, config(seed=0, eval_users=20))
    other, other_targets = validation_cases(split, config(seed=5, eval_users=20))
    assert len(targets) == 20 and targets.tolist() == other_targets.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(histories, other))
    assert len(validation_cases(split, config(eval_users=None))[1]) == 60


def test_the_meter_counts_training_only(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(meter_module, "clock", lambda: clock.now)
    meter = Meter()
    meter.resume()
    clock.now += 2
    meter.resume()  # already running
    meter.pause()
    clock.now += 100
    meter.resume()
    clock.now += 3
    meter.pause()
    clock.now += 50
    meter.pause()
    assert meter.seconds == 5
    meter.count(torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1], [1]]), torch.tensor(2))
    assert meter.tokens() == {"real_token_fraction": 0.5, "kept_token_fraction": 2 / 3}
    meter.save(tmp_path / "checkpoint-1")
    again = Meter()
    again.load(tmp_path / "checkpoint-1")
    assert (
        again.tokens() == meter.tokens()
        and again.timing(4) == meter.timing(4)
        and again.peak == meter.peak
    )
    assert again.timing(4) == {
        "train_seconds": 5,
        "seconds_per_1k_windows": 2500,
        "windows": 2,
        "updates": 4,
    }


# --- Resumable


# Before the first checkpoint, within an epoch, after two checkpoints
@pytest.mark.parametrize("update", [2, 5, 7])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, uninterrupted, update):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [Stop(update)], **STAMP)
    assert len(list(tmp_path.glob("checkpoint-*"))) == update // 3
    seen = []
    assert_same(run(tmp_path, [Seen(seen)], **STAMP), uninterrupted)
    assert seen == list(range(update // 3 * 3, 8))  # and did not begin again


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, uninterrupted, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [Stop(7)], **STAMP)
    newest = tmp_path / "checkpoint-6" / "trainer_state.json"
    newest.write_text(newest.read_text()[:100])
    seen = []
    assert_same(run(tmp_path, [Seen(seen)], **STAMP), uninterrupted)
    assert seen[0] == 3 and "checkpoint-6/trainer_state.json is damaged" in capsys.readouterr().err
    for state in tmp_path.glob("checkpoint-*/trainer_state.json"):
        state.unlink()  # killed while the weights were written
    seen.clear()
    assert_same(run(tmp_path, [Seen(seen)], **STAMP), uninterrupted)
    assert seen[0] == 0


@pytest.mark.parametrize("left", [None, 0, 0.5], ids=["missing", "empty", "half"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "meter.json",
        "files.json",
    ],
)
def test_of_a_damaged_checkpoint_the_file_is_named_and_the_one_before_is_taken(
    tmp_path, uninterrupted, capsys, name, left
):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [Stop(7)], **STAMP)
    path = tmp_path / "checkpoint-6" / name
    content = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(content[: int(left * len(content))])
    seen = []
    assert_same(run(tmp_path, [Seen(seen)], **STAMP), uninterrupted)
    said = capsys.readouterr().err
    assert seen[0] == 3 and "checkpoint-6 is passed over" in said
    assert str(path) in said or name == "files.json" and "not written to its end" in said


def test_what_ends_with_a_damaged_best_checkpoint_is_passed_over_too(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "checkpoint-old").mkdir()
    # The newest and the best are kept
    best = next(other for other in (3, 6) if (tmp_path / f"checkpoint-{other}").exists())
    (tmp_path / f"checkpoint-{best}" / "model.safetensors").write_bytes(b"")
    seen = []
    run(tmp_path, [Seen(seen)])
    said = capsys.readouterr().err
    assert seen == list(range(8)) and said.count(f"checkpoint-{best}/model.safetensors") == 2
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json can't be read"):
        run(tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("stopped", [None, 4])
def test_more_updates_may_be_asked_of_a_finished_or_stopped_run(tmp_path, schedule, stopped):
    settings = {**STAMP, "schedule": schedule, "warmup": 0.0}
    rates = {}

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates[state.global_step] = optimizer.param_groups[0]["lr"]

    if stopped is None:
        run(tmp_path, max_updates=6, **settings)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, [Stop(stopped)], max_updates=6, **settings)
    longer = run(tmp_path, [Rates()], max_updates=9, **settings)
    assert longer.timing["updates"] == 9
    went_on = dict(rates)
    rates.clear()
    whole = run(callbacks=[Rates()], max_updates=9, **settings)
    # From there on the rates are those of a run that was to be as long from the start
    assert went_on == {step: rate for step, rate in rates.items() if step in went_on}
    assert min(went_on) == (6 if stopped is None else 3)
    if schedule == "constant":
        assert_same(longer, whole)
    # The same again is only read
    seen = []
    run(tmp_path, [Seen(seen)], max_updates=9, **settings)
    assert seen == []
    with pytest.raises(ValueError, match="a run of 9 updates already, more than the 6 asked for"):
        run(tmp_path, max_updates=6, **settings)


def test_a_checkpoint_holds_what_was_counted_before_it_counts_as_one(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoint-3").iterdir()] == ["meter.json"]


def test_a_finished_run_is_only_read(tmp_path):
    first = run(tmp_path, **STAMP)
    seen = []
    again = run(tmp_path, [Seen(seen)], **STAMP)
    assert_same(again, first)
    assert seen == [] and again.timing == first.timing


@pytest.fixture
def recalls(monkeypatch):
    """Prescribes recall@5 of the evaluations to come."""
    values = []

    def prescribed(*args, **kwargs):
        hits = values.pop(0)
        return np.repeat([1] * hits + [0] * (10 - hits), 2)  # 20 users

    monkeypatch.setattr(training, "evaluate", prescribed)
    return values


class Weights(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.kept.append(model.shared.weight.detach().clone())


def test_training_stops_early_and_the_best_model_is_returned(recalls):
    recalls += [1, 3, 2, 3, 1, 9, 9]
    kept = []
    result = run(callbacks=[Weights(kept)], max_updates=21, patience=3)
    assert [e["recall@5"] for e in result.log if "recall@5" in e] == [0.1, 0.3, 0.2, 0.3, 0.1]
    assert result.metrics["recall@5"] == 0.3 and result.timing["updates"] == 15
    assert torch.equal(result.model.shared.weight, kept[1]) and not torch.equal(kept[1], kept[3])


def test_patience_survives_being_killed(tmp_path, recalls):
    recalls += [3, 1, 1, 1, 9]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [Stop(7)], max_updates=21, patience=3)
    kept = []
    result = run(tmp_path, [Weights(kept)], max_updates=21, patience=3)
    assert result.timing["updates"] == 12 and len(kept) == 2 and recalls == [9]
    again = run(tmp_path, max_updates=21, patience=3)  # stopped early is finished, too
    assert_same(again, result)
    assert recalls == [9] and again.metrics["recall@5"] == 0.3


def test_another_run_s_folder_is_refused(tmp_path):
    run(tmp_path, max_updates=1)
    other_world = planted_catalogue(60, seed=2, shortest=5, longest=9)
    other_table = SidTable(WORLD.truth.tree[:, ::-1].copy(), TABLE.widths[::-1])
    for changes, world, table in (
        ({"seed": 1}, WORLD, TABLE),
        ({"pruning": PruningConfig()}, WORLD, TABLE),
        ({}, other_world, TABLE),
        ({}, WORLD, other_table),
    ):
        with pytest.raises(
            ValueError, match="holds a run of another configuration, catalogue, table or start"
        ):
            train(
                config(max_updates=1, **changes), world, table, output_dir=tmp_path, progress=False
            )
    assert run(tmp_path, max_updates=1).timing["updates"] == 1
    most = PruningConfig(scorer=lambda signals: signals.centrality)
    least = PruningConfig(scorer=lambda signals: -signals.centrality)
    run(tmp_path / "own", max_updates=1, pruning=most)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run(tmp_path / "own", max_updates=1, pruning=least)


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_on_disk(tmp_path, monkeypatch, killed):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    seen = []

    class Look(TrainerCallback):
        def on_save(self, *args, **kwargs):
            seen.extend((tmp_path / "temporary").rglob("model.safetensors"))

    if killed:
        with pytest.raises(KeyboardInterrupt):
            run(callbacks=[Stop(4), Look()])
    else:
        run(callbacks=[Look()])
    assert seen and sorted(p.name for p in tmp_path.rglob("*")) == ["here", "temporary"]


# --- Configuration


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    for changes in ({}, STAMP, {"seed": 3, "map": MapConfig(steps=4, unit="token", decay=0.5)}):
        one = TrainConfig.preset(name, **changes)
        assert TrainConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    def made(whole, real):
        return config(
            pruning=PruningConfig(whole(2), real(0.5)),
            map=MapConfig(whole(2), weight=real(0.25)),
            max_items=whole(4),
            learning_rate=real(0.5),
            max_updates=whole(1),
            seed=whole(1),
        )

    ours = made(np.int64, np.float32)
    assert json.dumps(ours.to_dict()) == json.dumps(made(int, float).to_dict())
    result = train(ours, WORLD, TABLE, output_dir=tmp_path / "run", progress=False)
    result.model.save_pretrained(tmp_path)
    assert (
        type(result.model).from_pretrained(tmp_path).config.pruning
        == made(int, float).pruning.to_dict()
    )


def test_an_own_scorer_is_named_and_used():
    def oldest(signals):
        called.append(signals.truth)
        return -signals.positions.float()

    called = []
    own = PruningConfig(scorer=oldest)
    assert config(pruning=own).to_dict()["pruning"]["scorer"] == "own:oldest"
    result = run(max_updates=1, pruning=own)
    assert called and result.model.config.pruning["scorer"] == "own:oldest"
    assert result.model.encoder.pruning.scorer is oldest


def test_preset_paper_is_the_published_model():
    published = TrainConfig.preset(
        "paper", padding="fixed", pruning=PruningConfig(mode="reference")
    )
    assert (published.max_items, published.padded_items) == (29, 30)
    model = build_model(published, TABLE)
    feed_forward = model.encoder.block[0].layer[-1].DenseReluDense
    assert [tuple(p.shape) for p in feed_forward.parameters()] == [
        (1024, 128),
        (1024,),
        (128, 1024),
        (128,),
        (1024, 1024),
        (1024,),
    ]
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    # A history fills 29 items at most, and is padded to 30
    collate = collator_of(published, TABLE, Windows([np.ones(40, np.int64)], 29))
    mask = collate([0, 38])["attention_mask"]
    per_item = TABLE.levels + 1
    assert mask.shape[1] == 30 * per_item and mask.sum(1).tolist() == [per_item, 29 * per_item]
    recommended = encode_histories(model, [np.ones(40, np.int64)])
    assert recommended.importance.shape[1] == 30 * per_item
    assert recommended.importance.isfinite().sum() == 29 * per_item
    # The other presets have none of it
    for name in ("smoke", "quick", "long", "gpu"):
        other = TrainConfig.preset(name)
        assert (other.padded_items, other.ffn, other.coupled_decay) == (None, "t5", False)


@pytest.mark.parametrize("coupled", [True, False])
def test_coupled_decay_is_part_of_the_gradient(coupled):
    """Two updates by hand of all parameters, from the gradients that the trainer had."""

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.append([p.grad.clone() for p in model.parameters()])

    gradients = []
    options = dict(
        coupled_decay=coupled,
        weight_decay=0.5,
        learning_rate=0.01,
        schedule="constant",
        warmup=0.0,
        max_updates=2,
        eval_every=2,
        max_grad_norm=0.0,
    )
    result = run(callbacks=[Gradients()], **options)
    weights = [p.detach().double() for p in build_model(config(**options), TABLE).parameters()]
    for index, expected in enumerate(weights):
        first = torch.zeros_like(expected)
        second = torch.zeros_like(expected)
        for step in (1, 2):
            slope = gradients[step - 1][index].double() + 0.5 * expected
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            rate = 0.01 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            expected = expected - rate * first / (second.sqrt() + 1e-8 * (1 - 0.999**step) ** 0.5)
        weights[index] = expected
    found = [p.detach().double() for p in result.model.parameters()]
    off = max(float((one - other).abs().max()) for one, other in zip(found, weights))
    assert (off < 1e-5) == coupled


def test_a_killed_run_with_coupled_decay_goes_on_as_if_nothing_had_happened(tmp_path):
    options = dict(coupled_decay=True, ffn="published", ffn_hidden_layers=2)
    expected = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [Stop(5)], **options)
    assert_same(run(tmp_path / "cut", **options), expected)


def test_the_oracle_is_given_the_truth():
    result = run(max_updates=1, pruning=PruningConfig(scorer="oracle"))
    assert result.metrics and result.log[0]["loss"] > 0


def test_presets_take_changes():
    assert TrainConfig.preset("paper", seed=4).seed == 4
    # Fewer items: padded to them, unless the caller says otherwise
    assert TrainConfig.preset("paper", max_items=10).padded_items is None
    assert TrainConfig.preset("paper", max_items=10, padded_items=20).padded_items == 20
    assert (
        TrainConfig.preset("quick", pruning=PruningConfig(after_layer=3)).pruning.after_layer == 3
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: TrainConfig.preset("slow"),
            "preset='slow' is unknown; use one of 'smoke', 'quick', 'long', 'gpu', 'paper'",
        ),
        (lambda: config(arch="gpt"), "arch='gpt' is unknown; use one of 't5'"),
        (lambda: config(padding="left"), "padding='left' is unknown; use one of 'batch', 'fixed'"),
        (lambda: config(precision="fp16"), "precision='fp16' is unknown"),
        (lambda: config(accumulation=0), "accumulation must be at least 1, got 0"),
        (lambda: config(d_model="64"), "d_model must be an integer, got '64'"),
        (lambda: config(learning_rate="1e-3"), "learning_rate must be a number, got '1e-3'"),
        (lambda: config(batch_tokens=None), "batch_tokens must be an integer, got None"),
        (
            lambda: config(pruning={"keep": 0.5}),
            "pruning must be a PruningConfig or None, got {'keep': 0.5}",
        ),
        (lambda: config(stock_kernels="no"), "stock_kernels must be True or False, got 'no'"),
        (
            lambda: config(pruning=PruningConfig(at_inference="no")),
            "at_inference must be True or False, got 'no'",
        ),
        (lambda: config(map=MapConfig(weight="0.3")), "weight must be a number, got '0.3'"),
        (lambda: config(strategy=Strategy(until=None)), "until must be a number, got None"),
        (lambda: config(dropout=np.nan), "dropout must be from 0 and below 1, got nan"),
        (lambda: config(weight_decay=-1), "weight_decay must be from 0 and below inf, got -1"),
        (lambda: config(muon=np.inf), "muon must be from 0 and below inf, got inf"),
        (
            lambda: config(schedule="foo"),
            "schedule='foo' is unknown; use one of 'linear', 'cosine'",
        ),
        (
            lambda: config(schedule="warmup_stable_decay"),
            "schedule='warmup_stable_decay' is unknown",
        ),
        (lambda: config(epochs=-1), "epochs must be above 0"),
        (
            lambda: config(warmup=100),
            r"warmup, a share of the updates, in \[0, 1\]; got .* and 100",
        ),
        *(
            (lambda name=name: config(**{name: 0}), f"{name} must be at least 1, got 0")
            for name in (
                "d_kv",
                "num_heads",
                "d_ff",
                "ffn_hidden_layers",
                "num_layers",
                "num_decoder_layers",
            )
        ),
        *(
            (
                lambda value=value: config(epochs=value),
                f"epochs must be above 0 and finite.* got {value}",
            )
            for value in (np.nan, np.inf)
        ),
        (lambda: config(seed=-1), "seed must be at least 0, got -1"),
        (lambda: config(padded_items=5), "padded_items=5 is less than max_items=6"),
        (lambda: config(ffn="deep"), "ffn='deep' is unknown; use one of 't5', 'published'"),
        (lambda: config(arch="qwen", ffn="published"), "ffn='published' belongs to arch='t5'"),
        (lambda: config(coupled_decay=True, muon=0.01), "muon=0.01 has a decay of its own"),
        (lambda: config(arch="qwen", d_kv=15), 'd_kv=15 must be even with arch="qwen"'),
        (lambda: config(num_heads=4, num_kv_heads=3), "num_kv_heads=3 must divide num_heads=4"),
        (lambda: PruningConfig(keep="1/3"), r"must lie in \(0, 1\], got '1/3'"),
        (lambda: PruningConfig(after_layer=1.5), "after_layer must be an integer, got 1.5"),
        (lambda: PruningConfig(scorer=None), "scorer=None is unknown; use one of 'rastp'"),
        (
            lambda: train(config(), "planted", TABLE),
            "train takes a Catalogue .* got a str and a SidTable",
        ),
        (
            lambda: build_model(config(), TABLE).set_pruning({"keep": 0.5}),
            "pruning must be a PruningConfig or None",
        ),
        (
            lambda: recommend(build_model(config(), TABLE), [1, 2, 3]),
            r"of a single one, give \[history\]",
        ),
        (
            lambda: config(pruning=PruningConfig(after_layer=4)),
            "after_layer=4 lies beyond the last encoder layer",
        ),
        (
            lambda: run(batch_tokens=7),
            "batch_tokens=7 is less than a window takes on average; use 24",
        ),
        (
            lambda: run(accumulation=1000),
            "accumulation=1000 batches an update need as many windows, got",
        ),
        (
            lambda: train(config(), WORLD, SidTable(WORLD.truth.tree[:9], TABLE.widths)),
            "table has 9 items, the catalogue",
        ),
        (
            lambda: train(
                config(pruning=PruningConfig(scorer="oracle")), planted_without_truth(), TABLE
            ),
            'scorer="oracle" needs catalogue.truth, which only the planted catalogue has',
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def planted_without_truth():
    return dataclasses.replace(WORLD, truth=None, embeddings=WORLD.embeddings)


def test_without_progress_nothing_is_printed(capfd):
    run()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_muon_has_the_matrices_inside_the_layers_and_adamw_the_rest(arch):
    model = build_model(config(arch=arch, map=MapConfig()), TABLE)
    optimiser = training.MuonAdamW(model, 0.02, 0.001, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in optimiser.parts
    )
    assert adamw | muon == set(names.values()) and not adamw & muon
    inside = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - {
        name for name in adamw if "layer" not in name
    }
    assert muon == {name for name in inside if "relative_attention_bias" not in name}
    assert {"shared.weight", "model.embed_tokens.weight"} & adamw and not any(
        "map_head" in name for name in muon
    )
    assert sorted({group["lr"] for group in optimiser.param_groups}) == [0.001, 0.02]
    # A head of its own, as some checkpoints have
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adamw = training.MuonAdamW(model, 0.02, 0.001, 0.1).parts[0]
    assert id(model.lm_head.weight) in {
        id(p) for group in adamw.param_groups for p in group["params"]
    }


def test_a_killed_run_with_muon_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = run(tmp_path / "whole", muon=0.01, **STAMP)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [Stop(5)], muon=0.01, **STAMP)
    assert_same(run(tmp_path / "cut", muon=0.01, **STAMP), expected)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(expected.model.parameters(), run(**STAMP).model.parameters())
    )


def test_building_a_model_draws_no_numbers_of_the_callers():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    build_model(config(), TABLE)
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())


@pytest.mark.parametrize("warmup, updates", [(0.0, 0), (0.05, 1), (0.5, 4), (1.0, 8)])
def test_warmup_is_a_share_of_all_updates(warmup, updates):
    """The learning rate rises in even steps until then."""
    arguments = training._arguments(
        config(warmup=warmup), "nowhere", 8, 1, keep=False, progress=False
    )
    assert arguments.get_warmup_steps(8) == updates


def test_gradients_are_cut_to_a_norm():
    class Norms(TrainerCallback):
        seen = []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.seen.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                .norm()
                .item()
            )

    run(callbacks=[Norms()], max_grad_norm=0.01)
    assert len(Norms.seen) == 8
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in Norms.seen)


class AllWeights(TrainerCallback):
    """Keeps the weights after each update."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen[state.global_step] = {
            name: weight.detach().clone() for name, weight in model.named_parameters()
        }


def test_the_average_of_the_last_weights_is_evaluated_returned_and_resumed(tmp_path):
    """Of 8 updates the last 7 are averaged, so every evaluation is one of an average."""
    watch = AllWeights()
    result = run(tmp_path / "whole", [watch], average_last=0.8, **STAMP)
    plain = run(**STAMP)
    best = max((e for e in result.log if "recall@5" in e), key=lambda e: e["recall@5"])["step"]
    expected = {
        name: torch.stack([watch.seen[step][name] for step in range(2, best + 1)]).mean(0)
        for name in watch.seen[8]
    }
    for name, weight in result.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    assert [e["loss"] for e in result.log if "loss" in e] == [
        e["loss"] for e in plain.log if "loss" in e
    ], "training is as it was"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [Stop(7)], average_last=0.8, **STAMP)
    assert_same(run(tmp_path / "cut", average_last=0.8, **STAMP), result)
