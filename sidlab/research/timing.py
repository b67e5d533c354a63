"""Measuring training, recommending and encoding in turns: what `bench` reports on.

All variants have the same parameters, dropout rate and windows an update. Windows have the lengths
of Amazon Beauty's, so no data are needed; SIDs and items are random, which costs the same.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from sidlab.batches import StratifiedBatches
from sidlab.config import TrainConfig
from sidlab.decoding import recommend
from sidlab.fast.graphs import ReplayedPasses
from sidlab.fast.meter import clock, highest_mb, memory_mb, reset_highest_mb
from sidlab.fast.precision import faster_precision, sizes, uses_bf16
from sidlab.model_building import build_model
from sidlab.models.t5 import DeepFeedForward
from sidlab.research.calibration import random_table
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import BOS, PAD, SidTable
from sidlab.windows import (
    Collator,
    StretchCollator,
    Stretches,
    Windows,
    add_padding_flag,
    history_tokens,
    pad_histories,
)

# Beauty's 131,413 training windows (every prefix, leave-one-out) by items of history, 1 to 30 and
# cut there.
BEAUTY = (
    22363,
    22363,
    15201,
    10980,
    8300,
    6489,
    5123,
    4242,
    3547,
    2989,
    2550,
    2189,
    1927,
    1720,
    1507,
    1366,
    1248,
    1136,
    1019,
    935,
    869,
    796,
    722,
    661,
    607,
    563,
    519,
    481,
    451,
    8550,
)
# RASTP's; the width of its de-duplication digit is not published, and its head is under 0.1 % of
# the cost
WIDTHS = (256, 256, 256, 10)
PUBLISHED = TrainConfig.preset(
    "paper", windows="prefixes", padding="fixed", precision="fp32", stock_kernels=True
)
OURS = dataclasses.replace(PUBLISHED, padding="batch", precision="auto", stock_kernels=False)
# Ascending, cut to the published history
LENGTHS = np.repeat(np.arange(1, len(BEAUTY) + 1), BEAUTY).clip(max=PUBLISHED.max_items)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train. `stock`: with the library's own T5 of the same layers in place of ours;
    `replay`: from CUDA graphs, as `train` does on a GPU.
    """

    config: TrainConfig
    stock: bool = False
    replay: bool = False


def stock_model(table, config: TrainConfig):
    """The library's unmodified T5 in the shape of `config` but for the feed-forward layers, which
    the published code replaces too.
    """
    fields = dict(
        d_model=config.d_model,
        d_kv=config.d_kv,
        num_heads=config.num_heads,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_decoder_layers=config.num_decoder_layers,
        dropout_rate=config.dropout,
        vocab_size=table.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
    )
    model = T5ForConditionalGeneration(
        T5Config(
            **fields, pad_token_id=PAD, decoder_start_token_id=BOS, attn_implementation="eager"
        )
    )
    model.config.update(
        dict(ffn_hidden_layers=config.ffn_hidden_layers, ffn=config.ffn, residual_dropout=None)
    )
    if not config.tie_embeddings:  # the library ties its head whatever its configuration says
        model.lm_head = torch.nn.Linear(config.d_model, table.vocab_size, bias=False)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense = DeepFeedForward(model.config)
    return model


class Training:
    """A model of `variant` and its batches, `lengths`: a list of int arrays, the items of history
    of each batch's windows; `widths`: codes per level. `windows`: how many targets a pass of each
    batch teaches, one a window, or with `targets="all"` one for each item of it.
    """

    def __init__(self, variant: Variant, lengths, device="cpu", widths=WIDTHS):
        self.config = variant.config
        self.device = torch.device(device)
        rng = np.random.default_rng(0)
        table = SidTable(rng.integers(0, widths, (12101, len(widths))), widths, collisions="share")
        self.model = (
            stock_model(table, self.config) if variant.stock else build_model(self.config, table)
        )
        self.model.train().to(self.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=self.config.learning_rate, fused=True
        )
        self.batches = []
        self.windows = 0
        for items in lengths:
            histories = [rng.integers(1, table.n_items + 1, n + 1) for n in items]
            if self.config.targets == "all":
                stretches = Stretches(histories, self.config.max_items)
                batch = StretchCollator(stretches, table, separators=True)(
                    np.arange(len(stretches))
                )
            else:
                windows = Windows(histories, self.config.max_items)
                collator = Collator(
                    windows,
                    table,
                    separators=True,
                    max_items=self.config.padded_items or self.config.max_items,
                    fixed_slots=self.config.padding == "fixed",
                )
                # Of each user the last window, which has all of these items
                batch = collator(windows.of_user[1:] - 1)
            self.windows += int((batch["labels"][..., 0] != -100).sum())
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            self.batches.append(batch if variant.stock else add_padding_flag(batch))
        self.both_passes = functools.partial(
            _both_passes, self.model, uses_bf16(self.config.precision), len(lengths)
        )
        if variant.replay:  # the first time they run as they are, the second they are recorded
            self.both_passes = ReplayedPasses(self.model, self.both_passes)
            self.passes()
            self.passes()

    def passes(self) -> float:
        """Seconds of a forward and a backward pass of each batch; gradients add up."""
        begin = self._now()
        for batch in self.batches:
            self.both_passes(batch)
        return self._now() - begin

    def in_precision(self, dtype):
        """A forward and a backward pass of the first batch, for `faster_precision`."""
        _both_passes(self.model, dtype is not None, 1, self.batches[0])

    def step(self) -> float:
        """Seconds of the optimiser's step."""
        begin = self._now()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return self._now() - begin

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()


def _both_passes(model, bf16, batches, batch):
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    (loss / batches).backward()
    return (loss.detach(),)


def in_faster_precision(
    variants: dict[str, Variant], size: int, device="cpu", widths=WIDTHS
) -> dict[str, Variant]:
    """`variants` in the precision that is faster here where theirs is "auto".

    Measured once for each model size, unpruned, on `size` windows as long as fit.
    """
    found = dict(variants)
    answers = {}
    for name, variant in variants.items():
        config = variant.config
        if config.precision != "auto":
            continue
        if sizes(config) not in answers:
            plain = Variant(dataclasses.replace(config, pruning=None))
            training = Training(plain, [np.full(size, config.max_items)], device, widths)
            answers[sizes(config)] = faster_precision(training.in_precision, device)
        settled = dataclasses.replace(config, precision=answers[sizes(config)])
        found[name] = dataclasses.replace(variant, config=settled)
    return found


def beauty_batches(config: TrainConfig, count: int):
    """The `count` batches of an update over Beauty: (items of history of each batch's windows,
    batches of the epoch, share of the slots that are real). All updates have nearly the same
    lengths, so the seconds of this one, times updates of the epoch, are those of an epoch.
    """
    batches = StratifiedBatches(
        LENGTHS, len(WIDTHS) + config.separators, config.batch_tokens, accumulation=count
    )
    parts = np.split(LENGTHS[batches.updates()[:, 0]], batches.cuts[1:-1])
    return (
        parts,
        len(batches),
        float(sum(part.sum() for part in parts) / sum(len(part) * part.max() for part in parts)),
    )


def time_beauty(
    variants: dict[str, Variant], batch_tokens: int, count: int, rounds: int, device="cpu"
):
    """Seconds per 1,000 windows of Beauty's lengths of each variant in each round: {name: float
    [rounds]}.

    An update has `count` batches. With fixed slots a window costs the same whatever its length, so
    of such an update two batches of a quarter of its slots are run, and their seconds are scaled to
    all of its windows; the optimiser's are not.
    """
    parts, _, _ = beauty_batches(dataclasses.replace(OURS, batch_tokens=batch_tokens), count)
    of_update = sum(map(len, parts))
    few = count * batch_tokens // 4 // (PUBLISHED.padded_items * (len(WIDTHS) + 1))
    drawn = np.random.default_rng(0).choice(np.concatenate(parts), (2, few))
    runs = {
        name: Training(v, drawn if v.config.padding == "fixed" else parts, device)
        for name, v in variants.items()
    }

    def seconds(name):
        scale = of_update / runs[name].windows if variants[name].config.padding == "fixed" else 1.0
        return 1000 / of_update * (runs[name].passes() * scale + runs[name].step())

    return take_turns({name: lambda name=name: seconds(name) for name in variants}, rounds)


def time_histories(
    variants: dict[str, Variant], size: int, rounds: int, device="cpu", widths=WIDTHS
):
    """As `time_beauty`, of windows with as many items as fit (seconds per 1,000 targets, where a
    pass teaches them all); an update has four batches of `size`, and one of them is run.
    """
    runs = {
        name: Training(v, [np.full(size, v.config.max_items)], device, widths)
        for name, v in variants.items()
    }
    return take_turns(
        {
            name: lambda run=run: 1000 / run.windows * (run.passes() + run.step() / 4)
            for name, run in runs.items()
        },
        rounds,
    )


def take_turns(functions: dict, rounds: int) -> dict[str, np.ndarray]:
    """What each function returns in each round; they take turns within it, in an order that turns
    as well. A first round warms up.
    """
    found = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(functions[name]())
    return {name: np.array(values[1:]) for name, values in found.items()}


def timed(function) -> float:
    begin = clock()
    function()
    return clock() - begin


def ratio(over, under, transform=lambda r: r) -> tuple[float, tuple[float, float]]:
    """median(over) / median(under) and the 95 % interval of it over 2,000 bootstrap draws of
    rounds; of `transform` of it, if given.
    """
    draws = np.random.default_rng(0).integers(0, len(over), (2000, len(over)))
    values = transform(np.median(over[draws], axis=1) / np.median(under[draws], axis=1))
    return float(transform(np.median(over) / np.median(under))), tuple(
        np.quantile(values, (0.025, 0.975)).tolist()
    )


# --- In child processes


# Read when a process starts: its allocator then gives freed memory back at once, so that its peak
# is what was in use.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def in_child(function, *arguments):
    """The result of `function` in a fresh process that gives freed memory back."""
    os.environ |= GIVE_BACK
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, *arguments).result()


def peak_mb(function, device: str = "cpu") -> float:
    """By how many MB the memory at its highest, while `function` runs, lies above that before:
    allocated on a GPU, else the resident memory of this process, which Linux alone tells.
    """
    reset_highest_mb(gpu := device == "cuda")
    base = memory_mb(gpu)
    function()
    return highest_mb(gpu) - base


def training_peak(variant: Variant, size: int, device: str = "cpu") -> float:
    """MB that forward and backward pass of `size` windows as long as fit need beyond model,
    gradients and the optimiser's state.
    """
    training = Training(variant, [np.full(size, variant.config.max_items)], device)
    training.passes()
    training.step()
    # From now on there are gradients, as in all batches of an update but the first
    training.passes()
    return peak_mb(training.passes, device)


def kmeans_peak(n: int, d: int) -> tuple[float, float]:
    """Peak memory ÷ size of the input of ResidualKMeans' fit and encode on a memory map of float32
    [n, d], and their seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "embeddings.npy")
        rng = np.random.default_rng(0)
        array = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
        begin = 0
        centres = rng.standard_normal((1000, d), np.float32)
        for begin in range(0, n, 65536):
            size = min(65536, n - begin)
            array[begin : begin + size] = centres[
                rng.integers(0, 1000, size)
            ] + rng.standard_normal((size, d), np.float32)
        array.flush()
        del array
        seconds = []

        def encode():
            embeddings = np.load(path, mmap_mode="r")
            start = time.perf_counter()
            ResidualKMeans(levels=3, width=256).fit(embeddings).encode(embeddings)
            seconds.append(time.perf_counter() - start)

        return peak_mb(encode) * 2**20 / (4 * n * d), seconds[0]


# --- Recommending


def dict_trie(table) -> dict:
    """The valid SIDs as nested dicts from token id to dict, as implementations on
    `prefix_allowed_tokens_fn` have it.
    """
    root = {}
    for sid in table.item_tokens[1:].tolist():
        node = root
        for token in sid:
            node = node.setdefault(token, {})
    return root


def time_recommend(
    n_items, users: int, beam: int, rounds: int, device: str = "cpu", *, library: bool = False
) -> dict:
    """Seconds per user of `recommend` for catalogues of `n_items` (a sequence); with `library` also
    of Hugging Face's own constrained beam search over a dict of dicts, as "library", for the first.
    """
    lengths = LENGTHS[((np.arange(users) + 0.5) / users * len(LENGTHS)).astype(int)]
    functions = {}
    rng = np.random.default_rng(0)
    for n in n_items:
        table = random_table(n, 3, 256)
        model = build_model(OURS, table).eval().to(device)
        histories = [rng.integers(1, n + 1, size) for size in lengths]
        functions[n] = lambda m=model, h=histories: (
            timed(lambda: recommend(m, h, k=beam, beam=beam)) / users
        )
        if library and "library" not in functions:
            search = library_search(model, table, histories, beam)
            functions["library"] = lambda search=search: timed(search) / users
    return take_turns(functions, rounds)


def library_search(model, table, histories, beam: int):
    """A function that runs Hugging Face's beam search over `dict_trie`: token ids int64 [U · beam,
    1 + L], best first for each history.
    """
    trie = dict_trie(table)
    tokens = history_tokens(
        pad_histories(histories, OURS.max_items, table.n_items), table, OURS.separators
    )

    def allowed(row, sent):
        node = trie
        for token in sent.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [PAD]

    def search():
        with torch.no_grad():
            return model.generate(
                input_ids=tokens,
                attention_mask=(tokens != PAD).long(),
                num_beams=beam,
                num_return_sequences=beam,
                prefix_allowed_tokens_fn=allowed,
            )

    return search
