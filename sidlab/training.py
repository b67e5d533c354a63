"""Training: one configuration, one catalogue, one SidTable → a trained model and what it cost.

Hugging Face's `Trainer` does the loop, the checkpoints and the resuming. Ours are the batches
(`batches.StratifiedBatches`), the evaluation (recall of constrained recommendation on validation
users, which also stops early and picks the best checkpoint) and the meter, which counts training
time and memory without evaluation and saving.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from sidlab.checkpoints import Average, average_as, newest_whole, prune_as, resume_point, stale
from sidlab.config import TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.decoding import recommend
from sidlab.fast.meter import Meter
from sidlab.fast.optimiser import MuonAdamW
from sidlab.files import read_json
from sidlab.metrics import rank_of_target, shared_ranks
from sidlab.model_building import build_model, load_model, start_model
from sidlab.models.qwen import SidQwen
from sidlab.models.t5 import SidT5
from sidlab.sids.table import SidTable
from sidlab.strategy import SCHEDULES, AdaptPruning
from sidlab.training_plan import (
    batches_of,
    collator_of,
    precision_of,
    probe_windows,
    temporary_folder,
    updates_of,
    validation_cases,
)
from sidlab.windows import (
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
    the newest whole one, also where more updates are asked for than before; a folder that holds a
    different configuration, data or table is refused. Without it nothing is left on disk.
    `start_from`: the folder of a saved model whose weights training begins with, under a new
    optimiser and schedule; sizes and SIDs must be the same, layout and mask stay unless `config`
    names them, and a MAP head that is missing there is drawn as in a fresh model. `callbacks`:
    further Hugging Face callbacks; each finds the run's `Meter` in its attribute `meter`, to pause
    it over what is no training. On one GPU the passes are replayed from CUDA graphs
    (`sidlab.fast.graphs`).

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
    collator = collator_of(config, table, windows, truth)
    batches = batches_of(config, table, windows)
    if len(batches) % processes:  # the library would hand out some windows twice
        raise ValueError(
            f"{len(batches)} batches an epoch can't be shared by {processes} processes; use a"
            " smaller batch_tokens"
        )
    updates = updates_of(config, batches)
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
        start_model(model, config, base, table)
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(quiet())
        folder = output_dir or stack.enter_context(temporary_folder())
        precision = precision_of(config, table, windows, pathlib.Path(folder) / "run.json")
        checkpoint = (
            resume_point(pathlib.Path(folder), config, updates, precision, catalogue, table, base)
            if output_dir
            else None
        )
        config = dataclasses.replace(config, precision=precision)
        for callback in callbacks or []:
            callback.meter = meter
        callbacks = [_Patience(config.patience), *(callbacks or [])]
        average = None
        if config.average_last != 0:
            average = Average(model, updates - math.ceil(config.average_last * updates))
            callbacks.append(average)
        if config.strategy is not None:
            callbacks.append(AdaptPruning(config.strategy, model, collator(probe_windows(windows))))
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
                prune_as(model, checkpoint)
            trainer.state = TrainerState.load_from_json(
                os.path.join(checkpoint, "trainer_state.json")
            )
        state = trainer.state
        if checkpoint is not None and (
            state.global_step >= updates or stale(state) >= config.patience
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
            prune_as(model, trainer.state.best_model_checkpoint)
        average_as(model, trainer.state.best_model_checkpoint)
    # Without the library's wrapper of `forward`, which would leave it in mixed precision and all
    # else of the model in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return _result(model, trainer.state, trainer.meter, precision)


def result_so_far(folder, config: TrainConfig) -> TrainResult:
    """What `train` would return had it ended with the newest checkpoint in its folder; the model is
    on the CPU. `config`: that of the run, with the precision in which it trains."""
    newest = newest_whole(pathlib.Path(folder))
    if newest is None:
        raise ValueError(f"{folder} holds no whole checkpoint: train first, until one is written")
    state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
    meter = Meter()
    meter.load(newest)
    model = load_model(state.best_model_checkpoint)
    average_as(model, state.best_model_checkpoint)
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
        and not config.stock_kernels
        and config.windows == "prefixes"
        and config.strategy is None
    )


class _Patience(EarlyStoppingCallback):
    """Early stopping whose count survives a resume."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = stale(state)
