"""From FLOPs to seconds: time a few real training steps on this machine and fit how long a step
takes.

    seconds = flop · FLOPs + byte · activation bytes + layer · layers + pruner · [does it prune?]

Arithmetic, memory traffic, the fixed price of every layer (a small model waits for Python and for
kernels to start, not for numbers) and that of scoring, sorting and gathering. FLOPs and bytes come
from `cost`. Four coefficients for all sizes are a coarse model, so the fit says how far it is off.
"""

import dataclasses
import time

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls

from sidlab.config import TrainConfig
from sidlab.fast.graphs import ReplayedPasses
from sidlab.fast.meter import device_name
from sidlab.fast.precision import uses_bf16
from sidlab.model_building import build_model
from sidlab.pruning import PruningConfig
from sidlab.research.cost import Cost, cost
from sidlab.sids.table import SidTable
from sidlab.windows import Collator, Windows, add_padding_flag

# (d_model, layers, items of history, slots a batch), each timed with and without a pruner: small
# ones show the fixed prices, long histories the speed of memory, wide models that of arithmetic
# (without the widest, one coefficient would do for both, and the other come out as 0).
SIZES = (
    (32, 4, 10, 256),
    (32, 2, 60, 1024),
    (64, 4, 10, 1024),
    (64, 2, 60, 1024),
    (128, 3, 20, 1024),
    (256, 2, 10, 512),
)
GPU_SIZES = (
    (64, 4, 10, 1024),
    (128, 2, 60, 32768),
    (256, 4, 10, 32768),
    (256, 2, 100, 65536),
    (512, 4, 30, 65536),
)
LEVELS = 3
WIDTH = 64  # of the SIDs of the timed models


def plain_config(
    d_model: int, layers: int, items: int, pruning: PruningConfig | None = None
) -> TrainConfig:
    """A T5 of ordinary proportions for histories of `items`: heads of 64 (one of `d_model` where
    that is less), d_ff = 4 · d_model, `layers` in the encoder and as many in the decoder.
    """
    return TrainConfig(
        d_model=d_model,
        d_kv=min(64, d_model),
        num_heads=max(1, d_model // 64),
        d_ff=4 * d_model,
        ffn_hidden_layers=1,
        num_layers=layers,
        num_decoder_layers=layers,
        max_items=items,
        pruning=pruning,
    )


def one_batch(config: TrainConfig, widths, slots: int) -> Cost:
    """The cost of a batch of `slots` encoder slots in which every history has `config.max_items`
    items (at least one history).
    """
    size = max(1, slots // (config.max_items * (len(widths) + config.separators)))
    return cost(
        dataclasses.replace(config, batch_tokens=10**9, accumulation=1),
        widths,
        np.full(size, config.max_items),
    )


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds per FLOP, per byte of activations, per layer (of encoder or decoder) and per pruner
    in a training step. `error`: the largest relative deviation of the fit from the steps it was
    fitted to; `device`: where they ran; `steps`: them, as a data frame.
    """

    flop: float
    byte: float
    layer: float
    pruner: float
    error: float
    device: str
    steps: pd.DataFrame = dataclasses.field(repr=False, compare=False)

    def parts(self, config: TrainConfig, batch: Cost) -> dict[str, float]:
        """Predicted seconds of one training step, by part. `batch`: as `one_batch` gives it."""
        seconds = np.multiply(
            (self.flop, self.byte, self.layer, self.pruner), _terms(config, batch)
        )
        return dict(
            zip(
                ("arithmetic", "memory traffic", "fixed price of layers", "pruner"),
                seconds.tolist(),
            )
        )

    def seconds(self, config: TrainConfig, batch: Cost) -> float:
        """Predicted seconds of one training step."""
        return sum(self.parts(config, batch).values())


def _terms(config, batch):
    return (
        batch.training * batch.windows / batch.batches,
        batch.activation_bytes,
        config.num_layers + config.num_decoder_layers,
        float(config.pruning is not None),
    )


def stepper(config: TrainConfig, table: SidTable, batch: dict):
    """A function that makes one training step (forward, backward, AdamW) of a fresh model on
    `batch`, where training would run it, and returns its seconds. `batch`: a dict of tensors, as
    `Collator` makes it. Precision "auto" is fp32 on a CPU, as in `cost`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, table).train().to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    batch = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x
        for name, x in add_padding_flag(batch).items()
    }

    def passes(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config.precision)):
            loss = model(**batch).loss
        loss.backward()
        return (loss.detach(),)

    # As `train` does: run once as it is, recorded, and replayed from then on
    if device.type == "cuda":
        passes = ReplayedPasses(model, passes)
        passes(batch), passes(batch), optimiser.zero_grad()

    def step() -> float:
        begin = time.perf_counter()
        passes(batch)
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return step


def time_steps(steps: dict, rounds: int) -> pd.DataFrame:
    """Seconds of every step in every round, [rounds × steps]. Steps take turns within a round, so
    that whatever else the machine does meets all of them; a first round warms up and does not
    count.
    """
    times = [{name: step() for name, step in steps.items()} for _ in range(rounds + 1)]
    return pd.DataFrame(times[1:])


def random_table(n_items: int, levels: int, width: int, seed: int = 0) -> SidTable:
    """A catalogue of items with random SIDs; those with the same share it."""
    return SidTable(
        np.random.default_rng(seed).integers(0, width, (n_items, levels)), width, collisions="share"
    )


def timed_size(
    d_model: int, layers: int, items: int, slots: int, pruning: PruningConfig | None = None
):
    """A model and a batch of the given size: (its `TrainConfig`, its `Cost`, a function that makes
    one step).
    """
    table = random_table(200, LEVELS, WIDTH)
    config = plain_config(d_model, layers, items, pruning)
    predicted = one_batch(config, table.widths, slots)
    windows = Windows(
        list(np.random.default_rng(0).integers(1, 201, (predicted.windows, items + 1))), items
    )
    batch = Collator(windows, table, separators=True, max_items=items)(
        np.flatnonzero(windows.lengths == items)
    )
    return config, predicted, stepper(config, table, batch)


def calibrate(sizes=None, rounds: int = 5) -> Speed:
    """Time training steps of all `sizes` (default: some that take seconds here; see `SIZES`),
    unpruned and pruned, and fit `Speed`.

    Of each size the median of `rounds` counts. The fit minimises relative deviations, with no
    coefficient below 0.
    """
    sizes = sizes or (GPU_SIZES if torch.cuda.is_available() else SIZES)
    after_one = PruningConfig(after_layer=1)
    cases = {
        (*size, pruned): timed_size(*size, after_one if pruned else None)
        for size in sizes
        for pruned in (False, True)
    }
    times = time_steps({name: step for name, (_, _, step) in cases.items()}, rounds)
    measured = times.median().to_numpy()
    terms = np.array([_terms(config, batch) for config, batch, _ in cases.values()])
    scale = terms.max(axis=0)  # FLOPs are some 1e9, layers a few
    coefficients = nnls(terms / scale / measured[:, None], np.ones(len(measured)))[0] / scale
    fitted = terms @ coefficients
    steps = pd.DataFrame(
        [*cases], columns=["d_model", "layers", "items", "slots", "pruned"]
    ).assign(measured=measured, fitted=fitted)
    return Speed(
        *coefficients.tolist(), float(np.abs(fitted / measured - 1).max()), device_name(), steps
    )
