"""What a run trains on: its batches and how many, whom it is validated on, its precision."""

import contextlib
import dataclasses
import itertools
import math
import tempfile

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sidlab.batches import LengthBatches, StratifiedBatches, UserBatches
from sidlab.config import TrainConfig
from sidlab.fast.precision import faster_precision, kept_random_state, sizes, unmeasured
from sidlab.files import read_json
from sidlab.model_building import build_model
from sidlab.sids.table import SidTable
from sidlab.windows import (
    Collator,
    StretchCollator,
    Stretches,
    Windows,
    add_padding_flag,
    training_windows,
)


def planned_updates(config: TrainConfig, table: SidTable, split) -> int:
    """Updates that `train` makes of a `windows.Split` if nothing stops it early."""
    return updates_of(config, batches_of(config, table, training_windows(split.train, config)))


def updates_of(config, batches):
    updates = math.ceil(config.epochs * math.ceil(len(batches) / config.accumulation))
    return min(updates, config.max_updates or updates)


def collator_of(config, table, windows, truth=None):
    if config.targets == "all":
        return StretchCollator(windows, table, separators=config.separators, map_config=config.map)
    return Collator(
        windows,
        table,
        separators=config.separators,
        max_items=config.padded_items or config.max_items,
        fixed_slots=config.padding == "fixed",
        map_config=config.map,
        truth=truth,
    )


def batches_of(config, table, windows):
    """Batches of window indices in the order of training."""
    per_item = table.levels + config.separators
    # As many slots hold about as many targets: more in long stretches, for the first item of each
    # is none
    if config.targets == "all":
        return LengthBatches(
            windows.lengths,
            per_item,
            config.batch_tokens,
            config.seed,
            config.accumulation,
            mixed=not config.bucketing,
        )
    if config.windows == "prefixes":
        return StratifiedBatches(
            windows.lengths,
            per_item,
            config.batch_tokens,
            config.seed,
            config.accumulation,
            mixed=not config.bucketing,
        )
    return UserBatches(windows, config.accumulation, config.seed)


# At most so many slots are timed: more take as much longer in either precision.
# What was measured in this process, by sizes and shapes.
_measured = {}
TIMED_SLOTS = 2048


def measured_precision(config: TrainConfig, table: SidTable, windows: Windows | Stretches) -> str:
    """ "fp32" or "bf16", the faster for `config` on the device that trains (`faster_precision`).

    Methods that are compared should train in one precision. So what tells them apart is left out:
    timed is a fresh model without pruner and MAP's head, on a batch without padding slots. And a
    later call in this process for the same sizes and shapes gets the same answer.

    The batch is one of the first 64 of training, the one whose windows have the median number of
    slots (batches have about as many slots all), cut to `TIMED_SLOTS`. Takes a second for the
    preset "quick" and up to ten for the paper's sizes. The process's random state stays as it was,
    but what PyTorch keeps in memory of it counts in `TrainResult.peak_memory`; in a sweep it does
    not, whose runs are told their precision.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (answer := unmeasured(device)) is not None:
        return answer
    config = dataclasses.replace(config, pruning=None, strategy=None, map=None, padding="batch")
    some = list(itertools.islice(batches_of(config, table, windows), 64))
    lengths = windows.lengths
    some.sort(key=lambda batch: lengths[batch].max())
    batch = some[len(some) // 2]
    longest = int(lengths[batch].max())
    rows = max(1, TIMED_SLOTS // (longest * (table.levels + config.separators)))
    batch = sorted(batch, key=lambda window: lengths[window])[-rows:]
    shape = len(batch), longest, config.separators, table.widths, config.stock_kernels
    key = sizes(config), shape, torch.get_num_threads()
    if key not in _measured:
        _measured[key] = faster_precision(_timed_passes(config, table, windows, batch), device)
    return _measured[key]


def _timed_passes(config, table, windows, indices):
    """A function for `faster_precision`, of a fresh model and a batch on the CPU."""
    batch = add_padding_flag(collator_of(config, table, windows)(indices))
    # Its weights are drawn.
    with kept_random_state():
        model = build_model(config, table).train()

    def passes(dtype):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()

    return passes


def precision_of(config, table, windows, stamp):
    """The precision in which `config` trains: "auto" is what a run began with, or else measured.

    `stamp`: the run.json of the run, if there is one. All processes get the main one's answer.
    """
    if config.precision != "auto":
        return config.precision
    answer = None
    if PartialState().is_main_process:
        # A file that can't be read, or of another run, is refused later, by every process.
        with contextlib.suppress(ValueError):
            answer = read_json(stamp, "precision")["precision"]
        answer = answer or measured_precision(config, table, windows)
    return broadcast_object_list([answer])[0]


@contextlib.contextmanager
def temporary_folder():
    """One for all processes of a run, gone when the last of them is done with it."""
    state = PartialState()
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory()) if state.is_main_process else None
        yield broadcast_object_list([mine])[0]
        state.wait_for_everyone()


def validation_cases(split, config: TrainConfig) -> tuple[list[np.ndarray], np.ndarray]:
    """Histories and targets int64 [U] of the users on whom training evaluates, of a
    `windows.Split`.
    """
    histories, targets = split.cases("validation")
    if config.eval_users is not None and config.eval_users < len(targets):
        # The same users for every method and seed of a comparison.
        chosen = np.sort(
            np.random.default_rng(0).choice(len(targets), config.eval_users, replace=False)
        )
        histories = [histories[i] for i in chosen]
        targets = targets[chosen]
    return histories, targets


def probe_windows(windows, size=64):
    """The same windows for every method and seed, of similar length, since a probe is one batch:
    the middle ones by length.
    """
    order = np.argsort(windows.lengths, kind="stable")
    begin = max(0, len(order) // 2 - size // 2)
    return order[begin : begin + size].tolist()
