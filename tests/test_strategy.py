"""Pruning that changes while training: schedules, ratios by row, by loss and by layer, and that a
resumed run does the same.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import STAMP, TABLE, WORLD, Stop, assert_same, config, run
from transformers import TrainerCallback

from sidlab.config import TrainConfig
from sidlab.map_loss import MapConfig
from sidlab.model_building import build_model
from sidlab.pruning import PruningConfig, TokenPruner, kept_count
from sidlab.strategy import AdaptPruning, Strategy, keep_at, spearman
from sidlab.windows import Collator, Windows, leave_one_out

# --- Schedules


@given(
    st.sampled_from(("linear", "cosine", "stage")),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(0.1, 1),
)
def test_schedules_go_from_start_to_keep_and_never_back(kind, start, keep, until):
    strategy = Strategy(kind, start=start, until=until)
    values = [keep_at(strategy, keep, p) for p in np.linspace(0, 1, 60)]
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(keep)
    steps = np.sign(keep - start) * np.diff(values)
    assert (steps >= -1e-12).all()
    assert keep_at(strategy, keep, until) == pytest.approx(keep)
    if kind == "stage":
        assert len({round(v, 9) for v in values}) <= 4
    if kind == "cosine":
        assert keep_at(strategy, keep, until / 2) == pytest.approx((start + keep) / 2)


class Keeps(TrainerCallback):
    """What the model kept in each update."""

    def __init__(self):
        self.kept = []
        self.layers = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.kept.append(model.pruning.keep)
        self.layers.append(model.pruning.after_layer)


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_training_follows_its_schedule_and_keeps_what_it_ended_with(arch):
    keeps = Keeps()
    strategy = Strategy("linear", start=0.2, until=0.5, every=3)
    result = run(
        callbacks=[keeps],
        arch=arch,
        pruning=PruningConfig(keep=0.6, after_layer=1),
        strategy=strategy,
    )
    # The callback that adapts stands behind those that are given, but acts at the beginning of a
    # step.
    assert keeps.kept == pytest.approx([0.2 + 0.4 * min(step / 4, 1) for step in range(8)])
    assert result.model.pruning.keep in (pytest.approx(keeps.kept[2]), pytest.approx(0.6))
    assert result.model.config.pruning["keep"] == result.model.pruning.keep
    assert 0.2 < result.tokens["kept_token_fraction"] < 0.75


# --- Ratios by row


@settings(max_examples=80)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.floats(0.05, 1),
    st.floats(0.1, 1),
    st.integers(0, 10**6),
)
def test_mass_keeps_the_smallest_set_that_holds_it(batch, width, mass, keep, seed):
    rng = np.random.default_rng(seed)
    importance = rng.random((batch, width)).astype(np.float32)
    mask = np.arange(width) < rng.integers(1, width + 1, batch)[:, None]
    pruner = TokenPruner(keep, mass=mass)
    pruned = pruner(
        torch.zeros(batch, width, 2), torch.from_numpy(mask).long(), torch.from_numpy(importance)
    )
    assert pruned.mask.shape[1] == pruned.mask.sum(1).max()
    for row in range(batch):
        real = importance[row][mask[row]].astype(np.float64)
        n = int(mask[row].sum())
        most = int(kept_count(torch.tensor(n), keep))
        smallest = next(
            k
            for k in range(1, n + 1)
            if max(sum(c) for c in itertools.combinations(real, k))
            >= mass * real.sum() * (1 - 1e-7) - 1e-9
        )
        assert pruned.mask[row].sum() == min(most, smallest)
        kept = pruned.positions[row][pruned.mask[row].bool()].numpy()
        assert set(kept) == set(np.argsort(-importance[row][:n], kind="stable")[: len(kept)])


def test_mass_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="no score may be negative"):
        TokenPruner(1.0, mass=0.5)(
            torch.zeros(1, 2, 1), torch.ones(1, 2).long(), torch.tensor([[1.0, -1.0]])
        )
    for fields in ({"mass": 0.0}, {"mass": 1.5}, {"mass": 0.5, "unit": "item"}):
        with pytest.raises(ValueError, match="mass is a share"):
            PruningConfig(**fields)
    with pytest.raises(ValueError, match='reduce="pool" knows no mass=0.5'):
        PruningConfig(mass=0.5, reduce="pool")


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_a_model_keeps_by_mass_a_share_that_differs_by_row(arch):
    model = build_model(config(arch=arch, pruning=PruningConfig(keep=1.0, mass=0.6)), TABLE).eval()
    batch = probe()
    out = model.encode(batch["input_ids"], batch["attention_mask"])
    shares = out.attention_mask.sum(1) / batch["attention_mask"].sum(1)
    assert shares.min() < shares.max() <= 0.75 and shares.min() > 0.3


# --- By loss and by layer


def probe(count=40):
    windows = Windows(leave_one_out(WORLD.histories).train, 6)
    return Collator(windows, TABLE, separators=True, max_items=6)(list(range(count)))


def adapting(arch="t5", **fields):
    torch.manual_seed(0)
    model = build_model(
        config(
            arch=arch, dropout=0.1, pruning=PruningConfig(keep=0.5, after_layer=1), map=MapConfig()
        ),
        TABLE,
    ).train()
    with torch.no_grad():  # far from its initial values, where all tokens are alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, AdaptPruning(Strategy(**fields), model, probe())


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_the_share_goes_a_step_towards_the_bound(arch):
    model, adapt = adapting(arch, kind="loss-gap")
    batch = probe()
    shares = [0.5, 0.7, 1.0]  # none below the configured one
    gaps = []
    model.eval()
    for share in shares:
        model.set_pruning(PruningConfig(keep=share, after_layer=1))
        gaps.append(model(**batch).main_loss.item())
    model.set_pruning(None)
    gaps = np.array(gaps) - model(**batch).main_loss.item()
    assert gaps[-1] == pytest.approx(0, abs=1e-5) and np.ptp(gaps) > 1e-3
    model.train()
    for bound in (0.0, *np.sort(gaps[gaps > 0]) + 1e-4, 100.0):
        adapt.strategy = Strategy("loss-gap", bound=float(bound))
        within = gaps <= bound + 1e-6
        for place, share in enumerate(shares):
            present = PruningConfig(keep=share, after_layer=1)
            model.set_pruning(present)
            after = (
                place - 1 if place and within[place - 1] else place if within[place] else place + 1
            )
            assert adapt.within_bound() == shares[after]
            assert model.training and model.pruning == present


def test_a_share_guided_by_the_loss_begins_at_all_tokens_and_moves():
    keeps = Keeps()
    strategy = Strategy("loss-gap", bound=100.0, every=3)
    run(callbacks=[keeps], pruning=PruningConfig(keep=0.6, after_layer=1), strategy=strategy)
    assert keeps.kept == [1.0] * 3 + [0.7] * 3 + [0.6] * 2
    keeps.kept = []
    strategy = Strategy("loss-gap", bound=0.0, every=3)
    run(callbacks=[keeps], pruning=PruningConfig(keep=0.2, after_layer=1), strategy=strategy)
    assert keeps.kept[:3] == [1.0] * 3 and min(keeps.kept) >= 0.7


@pytest.mark.parametrize("arch", ("t5", "qwen"))
def test_the_first_settled_layer_is_taken(arch):
    _, adapt = adapting(arch, kind="settled-layer")
    agreement = adapt.agreement()
    assert len(agreement) == 2 and len(set(agreement)) == 2
    for threshold in (-1.0, *agreement, 1.0):
        adapt.strategy = Strategy("settled-layer", threshold=threshold)
        settled = [layer for layer, r in enumerate(agreement, 1) if r >= threshold]
        assert adapt.settled(agreement) == (settled[0] if settled else 2)


def test_the_pruner_moves_to_the_settled_layer_and_the_log_says_why():
    keeps = Keeps()
    pruning = PruningConfig(keep=0.5, after_layer=1)
    found = run(
        callbacks=[keeps],
        pruning=pruning,
        strategy=Strategy("settled-layer", threshold=1.0, every=3),
    )
    assert keeps.layers == [1] * 3 + [2] * 5
    (entry,) = [e for e in found.log if "agreement" in e]
    assert entry["step"] == 3 and len(entry["agreement"]) == 2 and max(entry["agreement"]) < 1


def test_the_loss_is_compared_with_that_of_all_tokens_where_rows_keep_by_mass():
    model, adapt = adapting(kind="loss-gap", bound=-0.0)
    model.set_pruning(PruningConfig(keep=1.0, after_layer=1, mass=0.3))
    adapt.keep = 0.5
    losses = {}
    original = adapt._probe
    adapt._probe = lambda pruning, **kwargs: losses.setdefault(
        (pruning.keep, pruning.mass), original(pruning, **kwargs)
    )
    adapt.within_bound()
    model.eval().set_pruning(None)
    assert losses[1.0, None].main_loss == pytest.approx(model(**probe()).main_loss.item(), abs=1e-6)
    assert abs(losses[1.0, None].main_loss - losses[0.7, 0.3].main_loss) > 1e-4


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    one, other = (torch.from_numpy(rng.random((3, 8))) for _ in "ab")
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    expected = [
        scipy.stats.spearmanr(a[:n], b[:n]).statistic for a, b, n in zip(one[:2], other[:2], (8, 5))
    ]
    assert spearman(one, other, mask) == pytest.approx(np.mean(expected))
    other[0] = 1.0  # tells none apart
    assert spearman(one, other, mask) == pytest.approx(expected[1])
    with pytest.raises(ValueError, match="two tokens to rank"):
        spearman(one[[0, 2]], other[[0, 2]], mask[[0, 2]])


def test_a_probe_leaves_random_numbers_and_gradients_alone():
    model, adapt = adapting(kind="loss-gap")
    state = torch.get_rng_state()
    adapt.within_bound()
    adapt.agreement()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


STRATEGIES = {
    "linear": Strategy("linear", start=0.2, every=3),
    "loss-gap": Strategy("loss-gap", bound=0.002, every=3),
    "settled-layer": Strategy("settled-layer", threshold=0.5, every=3),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, name):
    changes = STAMP | {
        "pruning": PruningConfig(keep=0.5, after_layer=1),
        "strategy": STRATEGIES[name],
    }
    expected = run(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [Stop(7)], **changes)
    keeps = Keeps()
    found = run(tmp_path / "cut", [keeps], **changes)
    assert_same(found, expected)
    assert found.model.pruning == expected.model.pruning and len(keeps.kept) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Strategy("sometimes"), "kind='sometimes' is unknown; use one of 'linear'"),
        (lambda: Strategy(start=0.0), r"must lie in \(0, 1\]"),
        (lambda: Strategy(until=0.0), "until must lie in"),
        (lambda: Strategy(bound=-1), "bound must be >= 0"),
        (lambda: keep_at(Strategy("loss-gap"), 0.5, 0.1), "follows no schedule"),
        (lambda: TrainConfig(strategy=Strategy()), "strategy changes pruning"),
        (
            lambda: TrainConfig(
                strategy=Strategy("settled-layer"), pruning=PruningConfig(reduce="pool")
            ),
            'reduce="pool" has none',
        ),
        (
            lambda: run(
                strategy=Strategy("loss-gap", every=8), pruning=PruningConfig(), eval_every=8
            ),
            "never reached in 8 updates",
        ),
        (
            lambda: TrainConfig(strategy=Strategy("loss-gap", every=30), pruning=PruningConfig()),
            "eval_every=100 must be a multiple of strategy.every=30",
        ),
    ],
)
def test_bad_settings_say_what_is_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_configuration_with_a_strategy_goes_through_json():
    one = TrainConfig(strategy=Strategy("stage"), pruning=PruningConfig(mass=0.9))
    assert TrainConfig.from_dict(one.to_dict()) == one
    assert dataclasses.replace(one, strategy=None).to_dict()["strategy"] is None
