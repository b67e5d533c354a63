"""The bundled demo: a small model trained on the planted world, so that the first explorer stands
without any training.

    python -m sidlab.course.demo

trains it anew (minutes on two cores) and writes it into the package; so does `make demo-model`. In
every update another scorer keeps another share of the tokens after another layer, so each
position of an explorer's sliders finds a model that has seen the like. It trains on ten times the
users that `load` shows, in the same world.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from transformers import TrainerCallback

from sidlab.config import TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.data.load import load_catalogue
from sidlab.models.t5 import SidT5
from sidlab.pruning import PruningConfig
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.training import quiet, train

FOLDER = pathlib.Path(__file__).parent / "demo_model"
SCORERS = ("rastp", "norm", "centrality", "random", "recent")


class Demo(NamedTuple):
    """`catalogue` planted, 2,000 users; `encoder` and `table`, its SIDs; `model` trained on that
    world, in evaluation mode; it prunes nothing until `model.set_pruning` says so.
    """

    catalogue: Catalogue
    encoder: ResidualKMeans
    table: SidTable
    model: SidT5


def load() -> Demo:
    """The demo, from the package's own files: no network, no training."""
    with quiet():  # no bar over 64 small arrays
        model = SidT5.from_pretrained(FOLDER).eval()
    model.set_pruning(None)
    return Demo(load_catalogue("planted"), ResidualKMeans.load(FOLDER), model.table, model)


class AnyPruning(TrainerCallback):
    """Draws a `PruningConfig` before every update; checkpoints are judged by the default one."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def on_step_begin(self, args, state, control, model, **kwargs):
        layer = int(self.rng.integers(1, model.config.num_layers))
        scorer = SCORERS[self.rng.integers(len(SCORERS))]
        model.encoder.set_pruning(
            PruningConfig(after_layer=layer, keep=float(self.rng.uniform(0.1, 1)), scorer=scorer)
        )

    def on_step_end(self, args, state, control, model, **kwargs):
        if control.should_evaluate:
            model.encoder.set_pruning(PruningConfig())


def build(folder=FOLDER, *, n_users: int = 20_000, **overrides) -> None:
    """Train the demo and write model, SIDs and SID encoder to `folder`. `overrides`: fields of
    `TrainConfig`.
    """
    catalogue = load_catalogue("planted", n_users=n_users)
    # Those that `load` shows: the planted ones are drawn after the users
    embeddings = load_catalogue("planted").embeddings
    widths = tuple(int(w) for w in catalogue.truth.tree.max(axis=0) + 1)
    encoder = ResidualKMeans(levels=3, width=widths, seed=0).fit(embeddings)
    table = SidTable(encoder.encode(embeddings), width=widths)
    config = TrainConfig.preset(
        "quick",
        **{
            "max_updates": 3000,
            "epochs": 100,
            "eval_every": 500,
            "eval_users": 1000,
            "pruning": PruningConfig(),
        }
        | overrides,
    )
    result = train(config, catalogue, table, callbacks=[AnyPruning(config.seed)])
    result.model.set_pruning(config.pruning)
    result.model.save_pretrained(folder)
    encoder.save(folder)


if __name__ == "__main__":
    build()
