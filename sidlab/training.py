"""Training: one configuration, one catalogue, one SidTable → a trained model and what it cost.

Hugging Face's `Trainer` does the loop, the checkpoints and the resuming. Ours are the batches
(`windows.StratifiedBatches`), the evaluation (recall of constrained recommendation on validation
users, which also stops early and picks the best checkpoint) and the meter, which counts training
time and memory without evaluation and saving.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from sidlab.checks import one_of
from sidlab.config import FRESH, TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.decoding import recommend
from sidlab.fast import cpu_layers
from sidlab.fast.meter import Meter
from sidlab.fast.optimiser import MuonAdamW
from sidlab.fast.precision import faster_precision, kept_random_state, sizes, unmeasured
from sidlab.files import read_json, reading, write_json
from sidlab.metrics import rank_of_target, shared_ranks
from sidlab.models.qwen import SidQwen, SidQwenConfig
from sidlab.models.t5 import SidT5, SidT5Config
from sidlab.saliency import own_source
from sidlab.sids.table import SidTable
from sidlab.strategy import SCHEDULES, AdaptPruning
from sidlab.windows import (
    Collator,
    LengthBatches,
    StratifiedBatches,
    StretchCollator,
    Stretches,
    UserBatches,
    Windows,
    add_padding_flag,
    leave_one_out,
    training_windows,
)


@dataclasses.dataclass
class TrainResult:
    """`model`: the best checkpoint, in evaluation mode. `metrics`: validation recall and NDCG of
    it. `timing`: "train_seconds" (without evaluation and saving), "seconds_per_1k_windows",
    "windows", "updates". `peak_memory`: MB while training, resident memory on a CPU and allocated
    memory on a GPU. `tokens`: "real_token_fraction" of the slots and "kept_token_fraction" of the
    real tokens. `log`: dicts with "step" and what was logged there ("loss" and "main_loss", without
    MAP's part, means over all targets since the last log; "recall@5", …). `precision`: "fp32" or
    "bf16", in which it was trained.
    """

    model: SidT5 | SidQwen
    metrics: dict
    timing: dict
    peak_memory: float
    tokens: dict
    log: list[dict]
    precision: str


def build_model(config: TrainConfig, table: SidTable) -> SidT5 | SidQwen:
    """A fresh model; weights depend on `config.seed` alone, whatever is pruned or predicted
    besides. Random numbers that the caller draws stay as they were.
    """
    config = config.completed()
    fields = config.to_dict()
    with kept_random_state():
        set_seed(config.seed)
        model = MODELS[config.arch](config, table, {name: fields[name] for name in SHARED})
    # A custom scorer, by name or as it is: of the model's own configuration it would not be
    # imported.
    if config.pruning is not None:
        model.set_scorer(config.pruning.scorer)
    if config.plain:
        model.set_attn_implementation("eager")
        cpu_layers.replace_dropout(model, torch.nn.Dropout)
    return model


def _start(model, config, base, table):
    """Loads the weights of the model in the folder `base` into `model`, whose MAP head alone may be
    missing there. ValueError where the two differ in anything but what may change: how they prune,
    MAP, dropout and how histories are cut.
    """
    kind = read_json(base / "config.json", "model_type")["model_type"]
    if kind != model.config.model_type:
        raise ValueError(
            f"start_from={str(base)!r} holds a {kind!r} model, arch={config.arch!r} makes a"
            f" {model.config.model_type!r}"
        )
    # With the defaults of what an older model does not name
    theirs = type(model.config).from_pretrained(base)
    for name in MUST_MATCH:
        if hasattr(theirs, name) and getattr(theirs, name) != getattr(model.config, name):
            raise ValueError(
                f"start_from={str(base)!r} has {name}={getattr(theirs, name)!r}, this configuration"
                f" {getattr(model.config, name)!r}: a model that goes on keeps its architecture;"
                " give TrainConfig the same"
            )
    steps = [config and config["steps"] for config in (theirs.map, model.config.map)]
    if None not in steps and steps[0] != steps[1]:
        raise ValueError(
            f"start_from={str(base)!r} has a MAP head of map.steps={steps[0]}, this configuration"
            f" of {steps[1]}; use the same, or save that model with drop_map=True"
        )
    other = SidTable.load(base)
    with reading(base / "model.safetensors"):
        weights = load_file(base / "model.safetensors")
    if other.fingerprint() != table.fingerprint():
        raise ValueError(
            f"start_from={str(base)!r} speaks other SIDs ({other.fingerprint()}) than table"
            f" ({table.fingerprint()}): continue with SidTable.load of that folder"
        )
    if model.map_head is None:
        weights = {
            name: weight for name, weight in weights.items() if not name.startswith("map_head.")
        }
    found = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    missing = [
        key for key in found.missing_keys if key not in tied and not key.startswith("map_head.")
    ]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"start_from={str(base)!r} does not fit: missing {missing[:3]}, unexpected"
            f" {found.unexpected_keys[:3]}"
        )


def load_model(folder) -> SidT5 | SidQwen:
    """The model saved in `folder`, in evaluation mode. ValueError where there is none of ours."""
    kind = read_json(pathlib.Path(folder) / "config.json", "model_type")["model_type"]
    kinds = {of.config_class.model_type: of for of in (SidT5, SidQwen)}
    one_of("model_type", kind, kinds)
    return kinds[kind].from_pretrained(folder).eval()


def weights_digest(folder) -> str:
    """12 hex digits of SHA-256 of the weights in a model's folder."""
    with reading(folder):
        return hashlib.sha256(
            (pathlib.Path(folder) / "model.safetensors").read_bytes()
        ).hexdigest()[:12]


# In a checkpoint: the averaged weights, and of how many updates they are.
AVERAGE = "average.safetensors"
AVERAGED = "updates averaged"
# Fields of a model's configuration, T5's and Qwen3's, that a model which goes on keeps.
MUST_MATCH = (
    "widths",
    "text_vocab",
    "separators",
    "level_embeddings",
    "embedding_norm",
    "cross_bias",
    "qk_norm",
    "tie_embeddings",
    "tie_word_embeddings",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "ffn_hidden_layers",
    "ffn",
    "hidden_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
)
SHARED = (
    "separators",
    "max_items",
    "pruning",
    "map",
    "level_embeddings",
    "embedding_norm",
    "zero_init",
    "label_smoothing",
)


def _t5(config, table, shared):
    return SidT5(
        SidT5Config(
            widths=table.widths,
            d_model=config.d_model,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            d_ff=config.d_ff,
            ffn_hidden_layers=config.ffn_hidden_layers,
            ffn=config.ffn,
            padded_items=config.padded_items,
            num_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers,
            dropout_rate=config.dropout,
            embedding_init=config.embedding_init,
            position_init=config.position_init,
            encoder_mask=config.encoder_mask,
            cross_bias=config.cross_bias,
            qk_norm=config.qk_norm,
            residual_dropout=config.residual_dropout,
            tie_embeddings=config.tie_embeddings,
            **shared,
        ),
        table,
    )


def _qwen(config, table, shared):
    if config.checkpoint is not None:
        shared = {name: value for name, value in shared.items() if name not in FRESH}
        model = SidQwen.from_checkpoint(
            config.checkpoint,
            table,
            config.prompt,
            attention_dropout=config.dropout,
            layout=config.layout,
            residual_dropout=config.residual_dropout or 0.0,
            **shared,
        )
        return model.float()  # in bfloat16 most updates would be rounded away
    return SidQwen(
        SidQwenConfig(
            widths=table.widths,
            hidden_size=config.d_model,
            head_dim=config.d_kv,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            attention_dropout=config.dropout,
            embedding_init=config.embedding_init,
            residual_dropout=config.residual_dropout or 0.0,
            tie_word_embeddings=config.tie_embeddings,
            layout=config.layout,
            **shared,
        ),
        table,
    )


MODELS = {"t5": _t5, "qwen": _qwen}


def train(
    config: TrainConfig,
    catalogue: Catalogue,
    table: SidTable,
    *,
    output_dir=None,
    start_from=None,
    progress: bool = True,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainResult:
    """Train `config` on `catalogue` with the SIDs of `table`.

    With `output_dir` checkpoints are kept there, and a call with the same arguments goes on from
    the newest readable one; a folder that holds a different configuration, data or table is
    refused. Without it nothing is left on disk. `start_from`: the folder of a saved model whose
    weights training begins with, under a new optimiser and schedule; sizes and SIDs must be the
    same, layout and mask stay unless `config` names them, and a MAP head that is missing there is
    drawn as in a fresh model. `callbacks`: further Hugging Face callbacks; each finds the run's
    `Meter` in its attribute `meter`, to pause it over what is no training. On one GPU the passes
    are replayed from CUDA graphs (`sidlab.fast.graphs`).

    `precision="auto"` is measured before the first update (`measured_precision`), by one process
    for all. `output_dir/run.json` keeps the answer, and a run that goes on trains in that.
    """
    # Here, since nothing else of this module needs the library's Trainer, which is slow to import.
    from sidlab.trainer import SidTrainer

    if not isinstance(catalogue, Catalogue) or not isinstance(table, SidTable):
        raise TypeError(
            "train takes a Catalogue (load_catalogue gives one) and a SidTable (made of an"
            f" encoder's codes), got a {type(catalogue).__name__} and a {type(table).__name__}"
        )
    if table.n_items != catalogue.n_items:
        raise ValueError(f"the table has {table.n_items} items, the catalogue {catalogue.n_items}")
    oracle = config.pruning is not None and config.pruning.scorer == "oracle"
    if oracle and catalogue.truth is None:
        raise ValueError(
            'scorer="oracle" needs catalogue.truth, which only the planted catalogue has'
        )
    base = None if start_from is None else pathlib.Path(start_from)
    if base is not None and not (base / "config.json").is_file():
        raise ValueError(
            f"start_from={str(base)!r} holds no model: config.json is missing; give a folder that"
            " save_pretrained wrote"
        )
    config = config.completed(None if base is None else read_json(base / "config.json"))
    processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if config.accumulation % processes:
        raise ValueError(
            f"accumulation={config.accumulation} batches an update can't be shared by {processes}"
            " processes; use a multiple"
        )
    truth = catalogue.truth if oracle else None
    meter = Meter()  # first of all: what it finds in use is not the training's
    split = leave_one_out(catalogue.histories)
    windows = training_windows(split.train, config)
    collator = _collator(config, table, windows, truth)
    batches = _batches(config, table, windows)
    if len(batches) % processes:  # the library would hand out some windows twice
        raise ValueError(
            f"{len(batches)} batches an epoch can't be shared by {processes} processes; use a"
            " smaller batch_tokens"
        )
    updates = _updates(config, batches)
    if (
        config.strategy is not None
        and config.strategy.kind not in SCHEDULES
        and config.strategy.every >= updates
    ):
        raise ValueError(
            f"strategy.every={config.strategy.every} is never reached in {updates} updates; use"
            " less"
        )
    model = build_model(config, table)
    if base is not None:
        _start(model, config, base, table)
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(quiet())
        folder = output_dir or stack.enter_context(_temporary_folder())
        precision = _precision(config, table, windows, pathlib.Path(folder) / "run.json")
        checkpoint = (
            _resume_point(pathlib.Path(folder), config, precision, catalogue, table, base)
            if output_dir
            else None
        )
        config = dataclasses.replace(config, precision=precision)
        for callback in callbacks or []:
            callback.meter = meter
        callbacks = [_Patience(config.patience), *(callbacks or [])]
        average = None
        if config.average_last != 0:
            average = _Average(model, updates - math.ceil(config.average_last * updates))
            callbacks.append(average)
        if config.strategy is not None:
            callbacks.append(
                AdaptPruning(config.strategy, model, collator(_probe_windows(windows)))
            )
        set_seed(config.seed)
        trainer = SidTrainer(
            model=model,
            args=_arguments(
                config, folder, updates, processes, keep=bool(output_dir), progress=progress
            ),
            # The Trainer asks for the latter; `evaluate` uses `cases`
            train_dataset=windows,
            eval_dataset=windows,
            data_collator=lambda indices: add_padding_flag(collator(indices)),
            batches=batches,
            cases=validation_cases(split, config),
            rank=functools.partial(evaluate, beam=config.beam, truth=truth),
            meter=meter,
            replay=_replays(config, processes),
            callbacks=callbacks,
            average=average,
            optimizers=(_optimiser(config, model), None),
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        if checkpoint is not None:
            trainer.meter.load(checkpoint)
            if average is not None:
                average.load(checkpoint)
            if config.strategy is not None:
                _prune_as(model, checkpoint)
            trainer.state = TrainerState.load_from_json(
                os.path.join(checkpoint, "trainer_state.json")
            )
        state = trainer.state
        if state.max_steps and (
            state.global_step >= state.max_steps or _stale(state) >= config.patience
        ):
            # Complete already; the Trainer would add an update.
            state.best_model_checkpoint = os.path.join(
                folder, f"checkpoint-{state.best_global_step}"
            )
            trainer._load_best_model()
        else:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            finally:
                trainer.passes = None  # the memory of its graphs
        trainer.meter.pause()
        if config.strategy is not None:
            _prune_as(model, trainer.state.best_model_checkpoint)
        _average_as(model, trainer.state.best_model_checkpoint)
    # Without the library's wrapper of `forward`, which would leave it in mixed precision and all
    # else of the model in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return _result(model, trainer.state, trainer.meter, precision)


def result_so_far(folder, config: TrainConfig) -> TrainResult:
    """What `train` would return had it ended with the newest checkpoint in its folder; the model is
    on the CPU. `config`: that of the run, with the precision in which it trains."""
    checkpoints = pathlib.Path(folder).glob("checkpoint-*")
    newest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
    meter = Meter()
    meter.load(newest)
    model = load_model(state.best_model_checkpoint)
    _average_as(model, state.best_model_checkpoint)
    # A saved model imports no custom scorer, also of one that has a name.
    if config.pruning is not None:
        model.set_scorer(config.pruning.scorer)
    return _result(model, state, meter, config.precision)


def _result(model, state, meter, precision):
    best = max(
        (e for e in state.log_history if "eval_recall@5" in e), key=lambda e: e["eval_recall@5"]
    )
    return TrainResult(
        model=model,
        metrics={k.removeprefix("eval_"): v for k, v in best.items() if "@" in k},
        timing=meter.timing(state.global_step),
        peak_memory=meter.totals()["peak"],
        tokens=meter.tokens(),
        log=[
            {k.removeprefix("eval_"): v for k, v in e.items()}
            for e in state.log_history
            if "train_runtime" not in e
        ],
        precision=precision,
    )


def planned_updates(config: TrainConfig, table: SidTable, split) -> int:
    """Updates that `train` makes of a `windows.Split` if nothing stops it early."""
    return _updates(config, _batches(config, table, training_windows(split.train, config)))


def _updates(config, batches):
    updates = math.ceil(config.epochs * math.ceil(len(batches) / config.accumulation))
    return min(updates, config.max_updates or updates)


def _collator(config, table, windows, truth=None):
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


def _batches(config, table, windows):
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
TIMED_SLOTS = 2048
# What was measured in this process, by sizes and shapes.
_measured = {}


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
    some = list(itertools.islice(_batches(config, table, windows), 64))
    lengths = windows.lengths
    some.sort(key=lambda batch: lengths[batch].max())
    batch = some[len(some) // 2]
    longest = int(lengths[batch].max())
    rows = max(1, TIMED_SLOTS // (longest * (table.levels + config.separators)))
    batch = sorted(batch, key=lambda window: lengths[window])[-rows:]
    shape = len(batch), longest, config.separators, table.widths, config.plain
    key = sizes(config), shape, torch.get_num_threads()
    if key not in _measured:
        _measured[key] = faster_precision(_timed_passes(config, table, windows, batch), device)
    return _measured[key]


def _timed_passes(config, table, windows, indices):
    """A function for `faster_precision`, of a fresh model and a batch on the CPU."""
    batch = add_padding_flag(_collator(config, table, windows)(indices))
    # Its weights are drawn.
    with kept_random_state():
        model = build_model(config, table).train()

    def passes(dtype):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()

    return passes


def _precision(config, table, windows, stamp):
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
def _temporary_folder():
    """One for all processes of a run, gone when the last of them is done with it."""
    state = PartialState()
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory()) if state.is_main_process else None
        yield broadcast_object_list([mine])[0]
        state.wait_for_everyone()


@contextlib.contextmanager
def quiet():
    """Neither progress bars (the library shows one for every checkpoint) nor notes of the library,
    only errors.
    """
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def evaluate(
    model,
    histories,
    targets,
    *,
    k: int = 10,
    beam: int | None = None,
    exclude_seen: bool = False,
    truth=None,
) -> np.ndarray:
    """Rank of each target among the k recommended items, 0 where missing: int64 [U]. Feed it to
    `metrics.recall_at`.

    Where items share SIDs, the first place of all that share the target's and their number,
    `metrics.SHARED` [U]; with `exclude_seen`, a target that is in its history is missing, and the
    others of its group that are do not count.
    """
    items, _ = recommend(model, histories, k=k, beam=beam, exclude_seen=exclude_seen, truth=truth)
    sids = model.table.sid_numbers
    if sids is None:
        return rank_of_target(items.numpy(), targets)
    targets = np.asarray(targets)
    ranks = rank_of_target(sids[items.numpy()], sids[targets])
    sharers = np.bincount(sids)[sids[targets]]
    for user, seen in enumerate(map(np.unique, histories) if exclude_seen else ()):
        others = seen[seen != targets[user]]
        sharers[user] -= (sids[others] == sids[targets[user]]).sum()
        ranks[user] *= len(others) == len(seen)
    return shared_ranks(ranks, sharers)


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


def _probe_windows(windows, size=64):
    """The same windows for every method and seed, of similar length, since a probe is one batch:
    the middle ones by length.
    """
    order = np.argsort(windows.lengths, kind="stable")
    begin = max(0, len(order) // 2 - size // 2)
    return order[begin : begin + size].tolist()


def _prune_as(model, checkpoint):
    """Share and layer as a strategy had them when `checkpoint` was written."""
    then = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())["pruning"]
    model.set_pruning(
        dataclasses.replace(model.pruning, keep=then["keep"], after_layer=then["after_layer"])
    )


def _average_as(model, checkpoint):
    """The weights that were evaluated when `checkpoint` was written, where averaging had begun."""
    if (average := pathlib.Path(checkpoint, AVERAGE)).exists():
        model.load_state_dict(load_file(average), strict=False)


def _optimiser(config, model):
    """None: the Trainer's own AdamW."""
    if config.muon is not None:
        return MuonAdamW(
            model, config.muon, config.learning_rate, config.weight_decay, config.beta2
        )
    if config.coupled_decay:
        return torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
    return None


def _arguments(config, folder, updates, processes, *, keep, progress):
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=config.seed,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation // processes,
        adam_beta2=config.beta2,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        # In updates: the library takes a number below 1 for a share, but 1.0 for one update.
        warmup_steps=math.ceil(config.warmup * updates),
        max_steps=updates,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        save_total_limit=2,
        save_only_model=not keep,
        load_best_model_at_end=True,
        metric_for_best_model="recall@5",
        greater_is_better=True,
        logging_steps=max(1, config.eval_every // 5),
        bf16=config.precision == "bf16",
        optim="adamw_torch_fused",
        logging_nan_inf_filter=False,  # it would wait for the device after every batch
        # Or bf16 is refused on a CPU, and a Mac takes its GPU, which lacks float64
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not progress,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # A process has one GPU; the library would split each batch over all that it sees
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _replays(config, processes):
    """Whether passes come from CUDA graphs: on one GPU, where shapes come back and pruning does not
    change from update to update.
    """
    return (
        torch.cuda.is_available()
        and processes == 1
        and not config.plain
        and config.windows == "prefixes"
        and config.strategy is None
    )


def _resume_point(folder, config, precision, catalogue, table, base):
    """The newest checkpoint in `folder` whose state and meter can be read, or None; refuses another
    run's folder.
    """
    what = {
        "config": config.to_dict(),
        "catalogue": catalogue.fingerprint(),
        "table": table.fingerprint(),
    }
    what["precision"] = precision
    if base is not None:
        what["start_from"] = weights_digest(base)
    # Without one it is known by its name alone
    if config.pruning is not None and (source := own_source(config.pruning.scorer)):
        what["scorer"] = source
    stamp = folder / "run.json"
    if stamp.exists():
        if _in_its_precision(read_json(stamp)) != _in_its_precision(json.loads(json.dumps(what))):
            raise ValueError(
                f"output_dir={str(folder)!r} holds a run of another configuration, catalogue, table"
                " or start; choose another folder"
            )
    else:
        write_json(stamp, what)  # every process of a run writes the same
    checkpoints = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    for path in sorted(checkpoints, key=lambda p: -int(p.name.split("-")[1])):
        try:
            read_json(path / "trainer_state.json", "global_step", "max_steps", "log_history")
            read_json(
                path / "meter.json", "seconds", "peak", "windows", "slots", "real", "kept", "device"
            )
        except ValueError as error:
            print(f"{path} is not complete and is passed over: {error}", file=sys.stderr)
            continue
        return str(path)
    return None


def _in_its_precision(stamp):
    """A run.json with the answer in place of "auto": to ask for that by name is the same run."""
    return stamp | {"config": stamp.get("config", {}) | {"precision": stamp.get("precision")}}


class _Average(TrainerCallback):
    """The mean of the weights after each update beyond the first `begin` updates."""

    def __init__(self, model, begin):
        self.model = model
        self.begin = begin
        self.mean = None  # torch's AveragedModel, once it has begun

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.begin:
            self.mean = self.mean or AveragedModel(self.model)
            self.mean.update_parameters(self.model)

    def save(self, folder):
        """Writes the mean, if it has begun, into a checkpoint's folder."""
        if self.mean is not None:
            weights = {name: weight for name, weight in self.mean.module.named_parameters()}
            save_file(weights | {AVERAGED: self.mean.n_averaged}, folder / AVERAGE)

    def load(self, checkpoint):
        """The mean as it was when `checkpoint` was written, if it had begun."""
        path = pathlib.Path(checkpoint) / AVERAGE
        if path.exists():
            weights = load_file(path)
            self.mean = AveragedModel(self.model)
            self.mean.n_averaged.copy_(weights.pop(AVERAGED))
            self.mean.module.load_state_dict(weights, strict=False)


def _stale(state):
    """How many evaluations ago the best one was."""
    recalls = [e["eval_recall@5"] for e in state.log_history if "eval_recall@5" in e]
    return len(recalls) - 1 - int(np.argmax(recalls)) if recalls else 0


class _Patience(EarlyStoppingCallback):
    """Early stopping whose count survives a resume."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = _stale(state)
