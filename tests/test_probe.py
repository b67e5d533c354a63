"""A probe says what `recommend` says, for every way to prune, without running the layers before the
pruner again.
"""

import pytest
import torch

import sidlab
from sidlab.course.probe import Probe
from sidlab.decoding import encode_histories
from sidlab.model_building import build_model
from sidlab.models.qwen import SidQwen, SidQwenConfig
from sidlab.pruning import POSITIONS, UNITS, PruningConfig
from sidlab.saliency import SCORERS


@pytest.fixture(scope="module", params=["full", "items"])
def world(request):
    catalogue = sidlab.load_catalogue("planted", n_users=20)
    encoder = sidlab.ResidualKMeans(3, (8, 8, 4), seed=0).fit(catalogue.embeddings)
    table = sidlab.SidTable(encoder.encode(catalogue.embeddings), (8, 8, 4))
    # Or a fresh model's layers would do nothing
    config = sidlab.TrainConfig.preset("quick", encoder_mask=request.param, zero_init=False)
    return build_model(config, table).eval(), catalogue


@pytest.fixture
def recommended(world):
    """A function of history and pruning: (kept positions, items, scores) by the model itself."""
    model, catalogue = world

    def run(history, pruning):
        model.set_pruning(pruning)
        with torch.no_grad():
            encoded = encode_histories(model, [history], catalogue.truth)
        items, scores = sidlab.recommend(model, [history], k=10, truth=catalogue.truth)
        used = encoded.attention_mask[0].bool()
        kept = used.nonzero().flatten() if pruning is None else encoded.positions[0][used]
        return kept.tolist(), items[0].tolist(), scores[0]

    yield run
    model.set_pruning(None)


def assert_same(pruned, wanted):
    kept, items, scores = wanted
    assert pruned.kept.nonzero().flatten().tolist() == kept
    assert pruned.items.tolist() == items
    torch.testing.assert_close(pruned.scores, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_pruning_is_what_recommend_gives(world, recommended, scorer):
    model, catalogue = world
    history = catalogue.histories[2][:-1]
    probe = Probe(model, history, catalogue.truth)
    assert_same(probe.prune(None), recommended(history, None))
    for layer in (1, 2, 3, 4):
        for unit in UNITS:
            for positions in POSITIONS:
                pruning = PruningConfig(
                    after_layer=layer, keep=0.3, scorer=scorer, unit=unit, positions=positions
                )
                pruned = probe.prune(pruning)
                assert_same(pruned, recommended(history, pruning))
                assert pruned.attention.shape == (
                    4 - layer,
                    4,
                    int(pruned.kept.sum()),
                    int(pruned.kept.sum()),
                )


@pytest.mark.parametrize(
    "options", [{"protect_separators": True}, {"reduce": "pool"}, {"keep": 1.0}, {"keep": 0.01}]
)
def test_other_ways_to_prune(world, recommended, options):
    model, catalogue = world
    history = catalogue.histories[5]
    pruning = PruningConfig(**options)
    assert_same(Probe(model, history).prune(pruning), recommended(history, pruning))


def test_the_model_prunes_as_before(world):
    model, catalogue = world
    model.set_pruning(PruningConfig(keep=0.5, scorer="norm"))
    try:
        before = sidlab.recommend(model, catalogue.histories[:3])[1]
        Probe(model, catalogue.histories[0]).prune(PruningConfig(keep=0.1, after_layer=3))
        torch.testing.assert_close(sidlab.recommend(model, catalogue.histories[:3])[1], before)
        assert model.encoder.pruning.scorer == "norm"
    finally:
        model.set_pruning(None)


def test_what_it_opens_up(world):
    model, catalogue = world
    history = catalogue.histories[1]
    probe = Probe(model, history, catalogue.truth)
    n = 4 * len(history)
    assert probe.attention.shape == (4, 4, n, n)
    torch.testing.assert_close(probe.attention.sum(-1), torch.ones(4, 4, n))
    pruned = probe.prune(PruningConfig(keep=0.4, after_layer=2))
    torch.testing.assert_close(pruned.attention.sum(-1), torch.ones(pruned.attention.shape[:-1]))
    torch.testing.assert_close(probe.centrality(2), probe.attention[1].sum(dim=(0, 1)))
    assert probe.item_index.tolist() == [p // 4 for p in range(n)] and probe.levels.tolist() == [
        p % 4 for p in range(n)
    ]
    with torch.no_grad():
        last = model.encoder(
            input_ids=probe.input_ids, attention_mask=probe.mask
        ).last_hidden_state[0]
        torch.testing.assert_close(
            model.encoder.final_layer_norm(probe.hidden[-1]), last, atol=1e-5, rtol=1e-5
        )
    assert (
        (probe.truth.view(-1, 4) > 0).numpy()[:, :3] <= catalogue.truth.informative([history])[0]
    ).all()


def test_without_takes_tokens_out(world):
    model, catalogue = world
    probe = Probe(model, catalogue.histories[4])
    config = PruningConfig(keep=1.0, after_layer=2)
    for nothing in (None, PruningConfig(reduce="pool")):
        with pytest.raises(ValueError, match='without needs pruning with reduce="select"'):
            probe.prune(nothing, without=[0])
    n_items = probe.model.table.n_items
    assert sorted(probe.prune(config, k=n_items + 5, beam=n_items).items.tolist()) == list(
        range(1, n_items + 1)
    )
    out = probe.prune(config, without=[0, 5])
    assert (~out.kept).nonzero().flatten().tolist() == [0, 5] and out.attention.shape[-1] == len(
        probe.tokens
    ) - 2
    assert not torch.allclose(out.scores, probe.prune(config).scores), (
        "what is gone is not seen any more"
    )
    best = int(probe.prune(PruningConfig(keep=0.01)).kept.nonzero())
    second = probe.prune(PruningConfig(keep=0.01), without=[best])
    assert int(second.kept.sum()) == 1 and not second.kept[best]


def test_errors(world):
    model, catalogue = world
    for history in ([], [0, 3], [1, catalogue.n_items + 1]):
        with pytest.raises(ValueError, match="a history must hold item ids in 1..160"):
            Probe(model, history)
    with pytest.raises(ValueError, match='mode="reference"'):
        Probe(model, [1, 2]).prune(PruningConfig(mode="reference"))
    with pytest.raises(ValueError, match="beyond the last encoder layer"):
        Probe(model, [1, 2]).prune(PruningConfig(after_layer=5))


def test_a_long_history_counts_from_its_end(world):
    model, catalogue = world
    long = [1 + i % catalogue.n_items for i in range(model.config.max_items + 7)]
    probe = Probe(model, long)
    assert probe.history.tolist() == long[-model.config.max_items :]


def test_a_decoder_only_model_is_refused_in_words():
    with pytest.raises(ValueError, match="opens the encoder of a SidT5.*got a SidQwen"):
        Probe(
            SidQwen(
                SidQwenConfig(
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    num_key_value_heads=1,
                    head_dim=4,
                )
            ),
            [1],
        )


def test_a_probe_leaves_the_model_as_it_was(world):
    model, catalogue = world
    model.train().set_pruning(PruningConfig(keep=0.5))
    before = model.pruning
    try:
        probe = Probe(model, catalogue.histories[0][:-1])
        scores = [probe.prune(PruningConfig(keep=0.3)).scores for _ in range(2)]
        assert model.training and model.pruning is before
        assert all(module.training for module in model.modules())
        assert torch.equal(*scores), "no dropout in what it recommends"
        with pytest.raises(ValueError, match="reference"):
            probe.prune(PruningConfig(mode="reference"))
        assert model.training
    finally:
        model.eval().set_pruning(None)
