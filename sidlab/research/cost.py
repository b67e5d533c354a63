"""What a method costs, from its configuration and the lengths of the histories alone: FLOPs, kept
activations, parameters.

Histories come in the very batches of training's first epoch, so padding is in the numbers; and as a
pruner's number of slots follows from lengths and not from scores, they are exact for every scorer.
A product [m, k] × [k, n] counts 2mkn; look-ups, norms, softmax, dropout, the sums of scoring,
sorting, gathering and the optimiser count nothing. The backward pass counts twice the forward (a
fused attention also repeats its scores there, which is left out).
"""

import dataclasses

import numpy as np
import pandas as pd
import torch

from sidlab.batches import LengthBatches, StratifiedBatches, UserBatches
from sidlab.config import TrainConfig
from sidlab.fast.precision import uses_bf16
from sidlab.models.t5 import ITEMS_BACK
from sidlab.pruning import kept_count
from sidlab.research.cost_memory import activations, kv_size, qwen_activations, steps_ahead
from sidlab.windows import Stretches, Windows


@dataclasses.dataclass(frozen=True)
class Cost:
    """`flops`: of a forward pass per window, by part: "encoder" (layers up to the pruner; without
    one, all), "after" (layers after the pruner), "decoder" (self-attention and feed-forward),
    "cross" (its attention to the history), "heads", "map". `activation_bytes`: what autograd keeps
    until the backward pass, in the batch that keeps most. `state_bytes`: parameters, gradients and
    AdamW's two moments in float32 (an upper bound with `muon`, whose matrices have one). `slots`,
    `kept`: mean encoder slots per window before and after the pruner. `windows`, `batches`: of an
    epoch.
    """

    flops: dict[str, float]
    activation_bytes: int
    parameters: int
    slots: float
    kept: float
    windows: int
    batches: int

    forward = property(
        lambda self: sum(self.flops.values()), doc="FLOPs of the forward pass per window."
    )
    training = property(
        lambda self: 3 * self.forward, doc="FLOPs per window, backward pass included."
    )
    state_bytes = property(lambda self: 16 * self.parameters)


def cost(
    config: TrainConfig, widths, windows, *, fused: bool | None = None, bf16: bool | None = None
) -> Cost:
    """The cost of training `config`.

    Args: `widths`: codes per level, as in `SidTable.widths`; `windows`: the `Windows`, or (unless
    `config.windows` is "contiguous") their lengths alone, int [windows], items of history per
    window (cut to `max_items`); with `targets="all"` the `Stretches` or their lengths, and all is
    per target. For the activations: `fused`, whether attention runs in a fused kernel where nothing
    is scored (as on a GPU; on a CPU T5's learned position bias forbids it), and `bf16`, mixed
    precision. None: `fused` on a GPU; `bf16` as `config.precision` says, of which "auto", measured
    by training and not here, counts as float32 on a CPU and as what it takes on a GPU
    (`mode="reference"` is modelled as published, unfused in float32). Raises ValueError where
    training would (but fewer windows than `accumulation` are a batch each), and for what lengths do
    not tell: `mass` and `strategy`, by which the model decides what is kept, and the sizes of a
    `checkpoint`.
    """
    _check_known(config)
    if config.targets == "all":
        return _dense_cost(config, widths, windows, fused, bf16)
    size, shortest, longest = _batches(config, widths, windows)  # [batches] each
    # For so many items
    room = np.full_like(longest, _room(config)) if config.padding == "fixed" else longest
    slots = room * (len(widths) + config.separators)
    p = config.pruning
    # As in `TokenPruner`: from the shape alone, or from the longest history where items or
    # separators count.
    kept = _kept(
        config,
        widths,
        longest if p is not None and (p.unit == "item" or p.protect_separators) else room,
    )
    padded = (
        shortest < room,
        np.minimum(_kept(config, widths, shortest), shortest * (len(widths) + config.separators))
        < kept,
    )
    fused = torch.cuda.is_available() if fused is None else fused
    bf16 = uses_bf16(config.precision) if bf16 is None else bf16
    activations_of = qwen_activations if config.arch == "qwen" else activations
    memory = size * activations_of(config, widths, slots, kept, *padded, fused, bf16)
    flops = {
        part: _mean(value, size)
        for part, value in flops_by_part(config, widths, slots, kept).items()
    }
    parameters = _parameters(config, widths)
    # A copy of the weights is kept with them
    activation_bytes = int(memory.max()) + 2 * parameters * bf16
    return Cost(
        flops,
        activation_bytes,
        parameters,
        _mean(slots, size),
        _mean(kept, size),
        int(size.sum()),
        len(size),
    )


def _dense_cost(config, widths, windows, fused, bf16):
    """`cost` where a pass teaches every item of a stretch: all per target."""
    lengths = (
        windows.lengths
        if isinstance(windows, Stretches)
        else np.minimum(np.asarray(windows, np.int64), config.max_items + 1)
    )
    targets = (
        int((windows.stop - windows.taught).sum())
        if isinstance(windows, Stretches)
        else int((lengths - 1).sum())
    )
    per_item = len(widths) + config.separators
    ordered = np.sort(lengths)
    cuts = LengthBatches(lengths, per_item, config.batch_tokens).cuts
    size = np.diff(cuts)
    shortest = ordered[cuts[:-1]]
    longest = ordered[cuts[1:] - 1]  # [batches] each
    taught = longest - 1
    # T5 reads all items but the last, beside the targets; a stream holds both, with BOS and without
    # what follows the last code.
    slots = (
        taught * per_item
        if config.arch == "t5"
        else longest * per_item - config.separators - len(widths)
    )
    fused = torch.cuda.is_available() if fused is None else fused
    bf16 = uses_bf16(config.precision) if bf16 is None else bf16
    activations_of = qwen_activations if config.arch == "qwen" else activations
    padded = shortest < longest
    memory = size * activations_of(
        config, widths, slots, slots, padded, padded, fused, bf16, taught
    )
    flops = {
        part: float((size * value).sum()) / targets
        for part, value in flops_by_part(config, widths, slots, slots, taught).items()
    }
    parameters = _parameters(config, widths)
    mean_slots = float((size * slots).sum()) / targets
    return Cost(
        flops,
        int(memory.max()) + 2 * parameters * bf16,
        parameters,
        mean_slots,
        mean_slots,
        targets,
        len(size),
    )


def recommend_flops(
    config: TrainConfig, widths, lengths, *, beam: int | None = None, batch_size: int = 256
) -> float:
    """Forward FLOPs per user of `recommend` for histories of `lengths` items; `beam`: default
    `config.beam`. An upper bound if the catalogue uses fewer first codes than that. Raises
    ValueError for a decoder-only model, which this does not cover, and as `cost`.
    """
    _check_known(config)
    if config.arch != "t5":
        raise ValueError(f'recommend_flops covers arch="t5", got arch={config.arch!r}')
    parts = np.array_split(
        np.sort(np.minimum(np.asarray(lengths, np.int64), config.max_items)),
        -(-len(lengths) // batch_size),
    )
    size = np.array([len(part) for part in parts])
    longest = np.array([part[-1] for part in parts])
    # `recommend` pads for it, as published
    if config.pruning is not None and config.pruning.mode == "reference":
        longest = np.full_like(longest, _room(config))
    slots = longest * (len(widths) + config.separators)
    d = config.d_model
    inner = config.num_heads * config.d_kv
    kept = (
        slots
        if config.pruning is not None and not config.pruning.at_inference
        else _kept(config, widths, longest)
    )
    flops = flops_by_part(config, widths, slots, kept)
    rows = 1
    total = flops["encoder"] + flops["after"] + config.num_decoder_layers * 4 * kept * d * inner
    for depth, width in enumerate(widths):  # one token a beam; keys and values are in the cache
        layer = _layer(config, 1, depth + 1) + 4 * inner * (d + kept)
        total = total + rows * (config.num_decoder_layers * layer + 2 * d * width)
        rows = min(beam or config.beam, rows * width)
    return _mean(total, size)


def _check_known(config):
    if config.strategy is not None or (
        config.pruning is not None and config.pruning.mass is not None
    ):
        raise ValueError(
            "the cost of strategy and mass does not follow from lengths: the model decides what"
            " they keep"
        )
    if config.checkpoint is not None:
        raise ValueError(
            f"checkpoint={config.checkpoint!r} has sizes of its own, which the configuration does"
            " not know"
        )


def cost_table(configs: dict[str, TrainConfig], widths, windows, **options) -> pd.DataFrame:
    """Predicted training cost, a row a named configuration; × is relative to the one named
    "unpadded". `options` as in `cost`.
    """
    costs = {name: cost(config, widths, windows, **options) for name, config in configs.items()}
    base = costs["unpadded"]
    return pd.DataFrame.from_dict(
        {
            name: {
                "× FLOPs": c.training / base.training,
                "× activations": c.activation_bytes / base.activation_bytes,
                "MFLOPs per window": c.training / 1e6,
                "activations MB": c.activation_bytes / 2**20,
                "state MB": c.state_bytes / 2**20,
                "slots": c.slots,
                "kept": c.kept,
            }
            for name, c in costs.items()
        },
        orient="index",
    )


def _batches(config, widths, windows):
    """Windows in each batch of an epoch, and the items of its shortest and its longest window:
    int64 [batches] each.
    """
    lengths = windows.lengths if isinstance(windows, Windows) else np.asarray(windows, np.int64)
    if config.windows == "contiguous":
        if not isinstance(windows, Windows):
            raise ValueError(
                'config.windows="contiguous" draws windows by user: give the Windows, not their'
                " lengths"
            )
        batches = [
            lengths[batch] for batch in UserBatches(windows, config.accumulation, config.seed)
        ]
        return tuple(np.array([f(batch) for batch in batches]) for f in (len, np.min, np.max))
    if not config.bucketing and config.padding != "fixed":
        raise ValueError(
            "bucketing=False leaves the padding to chance, so its cost does not follow from lengths"
        )
    lengths, accumulation = (
        np.minimum(lengths, config.max_items),
        min(config.accumulation, len(lengths)),
    )
    batches = StratifiedBatches(
        lengths, len(widths) + config.separators, config.batch_tokens, config.seed, accumulation
    )
    lengths = lengths[batches.updates()]  # [windows of an update, updates]
    ends = [
        ufunc.reduceat(lengths, batches.cuts[:-1]).ravel() for ufunc in (np.minimum, np.maximum)
    ]
    return np.repeat(np.diff(batches.cuts), lengths.shape[1]), *ends


def _room(config):
    """Items that padding="fixed" pads a history to."""
    return config.padded_items or config.max_items


def _mean(values, size):
    return float(np.average(np.broadcast_to(values, size.shape), weights=size))


def _kept(config, widths, items):
    """How many tokens stay of a history of `items` items: int64, the shape of `items`."""
    p = config.pruning
    codes = items * len(widths)
    separators = items * config.separators
    if p is None:
        return codes + separators
    if p.mode == "reference":
        return np.floor(p.keep * (codes + separators) + 1e-6).astype(np.int64)
    whole = p.unit == "item"
    # One token stays on top: of a stream the last one, otherwise the first, which no pooling
    # spares.
    sink = (
        config.arch == "qwen"
        and not whole
        and (p.reduce == "select" or config.completed().layout == "stream")
    )
    count = kept_count(torch.from_numpy(items if whole else codes + separators), p.keep).numpy()
    if p.protect_separators:
        return np.minimum(count * len(widths) if whole else count + sink, codes) + separators
    if sink:
        return np.minimum(count + 1, codes + separators)
    return count * (len(widths) + config.separators) if whole else count


def _layer(config, n, keys):
    """FLOPs of n tokens through self-attention with so many keys and feed-forward."""
    d = config.d_model
    f = config.d_ff
    inner = config.num_heads * config.d_kv
    # Keys and values may have fewer heads; the feed-forward layer is gated
    if config.arch == "qwen":
        return n * (4 * d * (inner + kv_size(config)) + 4 * keys * inner + 6 * d * f)
    return n * (
        8 * d * inner + 4 * keys * inner + 4 * d * f + 2 * (config.ffn_hidden_layers - 1) * f**2
    )


def flops_by_part(config, widths, slots, kept, taught=1):
    """FLOPs of a row by part; `taught`: how many targets it has."""
    d = config.d_model
    inner = config.num_heads * config.d_kv
    levels = len(widths) * taught
    layers = config.num_decoder_layers
    p = config.pruning
    ahead = steps_ahead(config, widths)
    before = p.after_layer if p is not None else config.num_layers
    if config.arch == "qwen":  # the target's tokens run in the same layers as the history
        slots_all = slots + len(widths)
        kept_all = kept + len(widths)
        return {
            "encoder": before * _layer(config, slots_all, slots_all),
            "after": (config.num_layers - before) * _layer(config, kept_all, kept_all),
            "decoder": 0 * slots,
            "cross": 0 * slots,
            "heads": 2 * d * sum(widths) * taught,
            "map": 2 * d * (len(ahead) * levels * d + sum(map(sum, ahead)) * taught),
        }
    return {
        "encoder": before * _layer(config, slots, slots),
        "after": (config.num_layers - before) * _layer(config, kept, kept),
        "decoder": layers * _layer(config, levels, levels),
        "cross": layers * 4 * inner * (levels * d + kept * d + levels * kept),
        "heads": 2 * d * sum(widths) * taught,
        "map": 2 * d * (len(ahead) * levels * d + sum(map(sum, ahead)) * taught),
    }


def _parameters(config, widths):
    d = config.d_model
    f = config.d_ff
    heads = config.num_heads
    steps = len(steps_ahead(config, widths))
    map_head = d * (1 + steps + d) if steps else 0
    tokens = 3 + sum(widths)
    embeddings = (
        tokens * d * (1 if config.tie_embeddings else 2)
        + config.level_embeddings * (len(widths) + 2) * d
    )
    if config.arch == "qwen":
        # Norms of queries and keys
        attention = 2 * d * (heads * config.d_kv + kv_size(config)) + 2 * config.d_kv
        return config.num_layers * (attention + 3 * d * f + 2 * d) + embeddings + d + map_head
    attention = 4 * d * heads * config.d_kv + d
    ffn = 2 * d * f + (config.ffn_hidden_layers - 1) * f**2 + d  # with their norms
    ffn += (config.ffn == "published") * (config.ffn_hidden_layers * f + d)  # biases
    layers = config.num_layers * (attention + ffn) + config.num_decoder_layers * (
        2 * attention + ffn
    )
    # And embeddings (the heads may be slices of them), two last norms, 32 position biases a head in
    # each stack, MAP's head.
    return (
        layers
        + embeddings
        + 2 * d
        + 64 * heads
        + config.cross_bias * ITEMS_BACK * heads
        + map_head
        + config.qk_norm * 2 * config.d_kv * (config.num_layers + 2 * config.num_decoder_layers)
    )
