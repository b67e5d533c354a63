"""The bundled demo model: small, loads from the package alone, good enough to show something."""

import pytest

import sidlab
from sidlab.course import demo
from sidlab.files import read_json
from sidlab.metrics import rank_of_target, recall_at
from sidlab.pruning import PruningConfig
from sidlab.research.baselines import Popularity
from sidlab.training import evaluate
from sidlab.windows import leave_one_out


@pytest.fixture(scope="module")
def bundled():
    return demo.load()


@pytest.fixture(scope="module")
def cases(bundled):
    return leave_one_out(bundled.catalogue.histories[:600])


def test_its_files_are_small():
    assert sum(path.stat().st_size for path in demo.FOLDER.iterdir()) <= 4 * 2**20
    assert not [
        path for path in demo.FOLDER.iterdir() if path.suffix not in (".json", ".safetensors")
    ]


def test_its_parts_belong_together(bundled):
    catalogue = bundled.catalogue
    assert (bundled.encoder.encode(catalogue.embeddings) == bundled.table.codes).all()
    assert bundled.model.table is bundled.table and bundled.table.widths == tuple(
        bundled.model.config.widths
    )
    assert bundled.model.encoder.pruning is None and not bundled.model.training
    assert catalogue.items.title.notna().all()


@pytest.mark.parametrize("keep, share_of_bayes", [(1 / 3, 0.8), (1.0, 0.93)])
def test_it_recommends_far_better_than_popular_items(bundled, cases, keep, share_of_bayes):
    histories, targets = cases.cases("validation")
    popular = Popularity().fit(cases.train, bundled.catalogue.n_items).recommend(histories, k=10)
    popular = recall_at(rank_of_target(popular, targets), 10).mean()
    bundled.model.set_pruning(PruningConfig(keep=keep))
    try:
        ours = recall_at(evaluate(bundled.model, histories, targets), 10).mean()
    finally:
        bundled.model.set_pruning(None)
    assert ours > popular + 0.2
    assert ours > share_of_bayes * bundled.catalogue.truth.bayes_recall(histories, 10).mean()


def test_a_folder_from_before_new_fields_has_what_was_then(bundled):
    stored = read_json(demo.FOLDER / "config.json")
    assert not {"ffn", "padded_items"} & stored.keys()
    config = bundled.model.config
    assert (config.ffn, config.padded_items) == ("t5", None)
    assert not [name for name, _ in bundled.model.named_parameters() if name.endswith("bias")]


def test_build_makes_a_folder_that_loads(tmp_path, monkeypatch):
    demo.build(tmp_path, n_users=60, max_updates=2, eval_every=1, eval_users=10)
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    again = demo.load()
    items, _ = sidlab.recommend(again.model, again.catalogue.histories[:2], k=5)
    assert items.shape == (2, 5) and (items > 0).all()
    assert (again.encoder.encode(again.catalogue.embeddings) == again.table.codes).all()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * 2**20
