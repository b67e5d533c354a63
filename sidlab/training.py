"""Training: one configuration, one catalogue, one SidTable → a trained model and what it cost.

Hugging Face's `Trainer` does the loop, the checkpoints and the resuming. Ours are the batches (`windows.StratifiedBatches`), the
evaluation (recall of constrained recommendation on validation users, which also stops early and picks the best checkpoint)
and the meter, which counts training time and memory without evaluation and saving.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import tempfile

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from sidlab.adaptive import SCHEDULES, AdaptPruning
from sidlab.config import TrainConfig
from sidlab.data.catalogue import Catalogue
from sidlab.decoding import recommend
from sidlab.files import read_json, write_json
from sidlab.graphs import ReplayedPasses
from sidlab.meter import Meter
from sidlab.metrics import rank_of_target, summary
from sidlab.models import fast
from sidlab.models.qwen import SidQwen, SidQwenConfig
from sidlab.models.t5 import SidT5, SidT5Config
from sidlab.muon import MuonAdamW
from sidlab.saliency import own_source
from sidlab.sids.table import SidTable
from sidlab.windows import Collator, StratifiedBatches, UserBatches, Windows, leave_one_out, tell_padding


@dataclasses.dataclass
class TrainResult:
    """`model`: the best checkpoint, in evaluation mode. `metrics`: validation recall and NDCG of it. `timing`: "train_seconds"
    (without evaluation and saving), "seconds_per_1k_windows", "windows", "updates". `peak_memory`: MB while training, resident
    memory on a CPU and allocated memory on a GPU. `tokens`: "real_token_fraction" of the slots and "kept_token_fraction" of
    the real tokens. `log`: dicts with "step" and what was logged there ("loss" and "main_loss", without
    MAP's part, means over all targets since the last log; "recall@5", …)."""

    model: SidT5 | SidQwen
    metrics: dict
    timing: dict
    peak_memory: float
    tokens: dict
    log: list[dict]


def build_model(config: TrainConfig, table: SidTable) -> SidT5 | SidQwen:
    """A fresh model; weights depend on `config.seed` alone, whatever is pruned or predicted besides."""
    fields = config.to_dict()
    set_seed(config.seed)
    model = MODELS[config.arch](config, table, {name: fields[name] for name in ("separators", "max_items", "pruning", "map")})
    if config.pruning is not None and callable(config.pruning.scorer):
        model.set_scorer(config.pruning.scorer)
    if config.plain:
        model.set_attn_implementation("eager")
        fast.replace_dropout(model, torch.nn.Dropout)
    return model


def _t5(config, table, shared):
    return SidT5(SidT5Config(
        widths=table.widths, d_model=config.d_model, d_kv=config.d_kv, num_heads=config.num_heads, d_ff=config.d_ff,
        ffn_hidden_layers=config.ffn_hidden_layers, num_layers=config.num_layers, num_decoder_layers=config.num_decoder_layers,
        dropout_rate=config.dropout, embedding_init=config.embedding_init, position_init=config.position_init, **shared), table)


def _qwen(config, table, shared):
    if config.checkpoint is not None:
        model = SidQwen.from_checkpoint(config.checkpoint, table, config.prompt, attention_dropout=config.dropout, **shared)
        return model.float()  # in bfloat16 most updates would be rounded away
    return SidQwen(SidQwenConfig(
        widths=table.widths, hidden_size=config.d_model, head_dim=config.d_kv, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads, intermediate_size=config.d_ff, num_hidden_layers=config.num_layers,
        attention_dropout=config.dropout, embedding_init=config.embedding_init, **shared), table)


MODELS = {"t5": _t5, "qwen": _qwen}


def train(config: TrainConfig, catalogue: Catalogue, table: SidTable, *, output_dir=None, progress: bool = True,
          callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Train `config` on `catalogue` with the SIDs of `table`.

    With `output_dir` checkpoints are kept there, and a call with the same arguments goes on from the newest readable one; a
    folder that holds a different configuration, data or table is refused. Without it nothing is left on disk. `callbacks`:
    further Hugging Face callbacks. On one GPU the passes are replayed from CUDA graphs (`sidlab.graphs`).
    """
    if not isinstance(catalogue, Catalogue) or not isinstance(table, SidTable):
        raise TypeError("train takes a Catalogue (load_catalogue gives one) and a SidTable (made of an encoder's codes), got a "
                        f"{type(catalogue).__name__} and a {type(table).__name__}")
    if table.n_items != catalogue.n_items:
        raise ValueError(f"the table has {table.n_items} items, the catalogue {catalogue.n_items}")
    oracle = config.pruning is not None and config.pruning.scorer == "oracle"
    if oracle and catalogue.truth is None:
        raise ValueError('scorer="oracle" needs catalogue.truth, which only the planted catalogue has')
    processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if config.accumulation % processes:
        raise ValueError(f"accumulation={config.accumulation} batches an update can't be shared by {processes} processes; use a multiple")
    truth = catalogue.truth if oracle else None
    meter = Meter()  # first of all: what it finds in use is not the training's
    split = leave_one_out(catalogue.histories)
    windows = Windows(split.train, config.max_items, config.windows)
    collator = Collator(windows, table, separators=config.separators, max_items=config.max_items,
                        fixed_slots=config.padding == "fixed", map_config=config.map, truth=truth)
    if config.windows == "prefixes":
        batches = StratifiedBatches(windows.lengths, table.levels + config.separators, config.batch_tokens, config.seed,
                                    config.accumulation, mixed=not config.bucketing)
    else:
        batches = UserBatches(windows, config.accumulation, config.seed)
    if len(batches) % processes:  # the library would hand out some windows twice
        raise ValueError(f"{len(batches)} batches an epoch can't be shared by {processes} processes; use a smaller batch_tokens")
    updates = math.ceil(config.epochs * math.ceil(len(batches) / config.accumulation))
    updates = min(updates, config.max_updates or updates)
    if config.strategy is not None and config.strategy.kind not in SCHEDULES and config.strategy.every >= updates:
        raise ValueError(f"strategy.every={config.strategy.every} is never reached in {updates} updates; use less")
    model = build_model(config, table)
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(quiet())
        folder = output_dir or stack.enter_context(_temporary_folder())
        checkpoint = _resume_point(pathlib.Path(folder), config, catalogue, table) if output_dir else None
        callbacks = [_Patience(config.patience), *(callbacks or [])]
        if config.strategy is not None:
            callbacks.append(AdaptPruning(config.strategy, model, collator(_probe_windows(windows))))
        set_seed(config.seed)
        trainer = _SidTrainer(
            model=model, args=_arguments(config, folder, updates, processes, keep=bool(output_dir), progress=progress),
            train_dataset=windows, eval_dataset=windows,  # the Trainer asks for the latter; `evaluate` uses `cases`
            data_collator=lambda indices: tell_padding(collator(indices)), batches=batches, cases=_eval_cases(split, config),
            beam=config.beam, truth=truth, meter=meter, replay=_replays(config, processes), callbacks=callbacks,
            optimizers=(None if config.muon is None else MuonAdamW(model, config.muon, config.learning_rate, config.weight_decay), None),
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        if checkpoint is not None:
            trainer.meter.load(checkpoint)
            if config.strategy is not None:
                _prune_as(model, checkpoint)
            trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        state = trainer.state
        if state.max_steps and (state.global_step >= state.max_steps or _stale(state) >= config.patience):
            # Complete already; the Trainer would add an update.
            state.best_model_checkpoint = os.path.join(folder, f"checkpoint-{state.best_global_step}")
            trainer._load_best_model()
        else:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            finally:
                trainer.passes = None  # the memory of its graphs
        trainer.meter.pause()
        if config.strategy is not None:
            _prune_as(model, trainer.state.best_model_checkpoint)
    # Without the library's wrapper of `forward`, which would leave it in mixed precision and all else of the model in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    best = max((e for e in trainer.state.log_history if "eval_recall@5" in e), key=lambda e: e["eval_recall@5"])
    return TrainResult(
        model=model, metrics={k.removeprefix("eval_"): v for k, v in best.items() if "@" in k},
        timing=trainer.meter.timing(trainer.state.global_step), peak_memory=trainer.meter.totals()["peak"], tokens=trainer.meter.tokens(),
        log=[{k.removeprefix("eval_"): v for k, v in e.items()} for e in trainer.state.log_history if "train_runtime" not in e],
    )


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
    """Neither progress bars (the library shows one for every checkpoint) nor notes of the library, only errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def evaluate(model, histories, targets, *, k: int = 10, beam: int | None = None, exclude_seen: bool = False, truth=None) -> np.ndarray:
    """Rank of each target among the k recommended items, 0 where missing: int64 [U]. Feed it to `metrics.recall_at`."""
    items, _ = recommend(model, histories, k=k, beam=beam, exclude_seen=exclude_seen, truth=truth)
    return rank_of_target(items.numpy(), targets)


def _eval_cases(split, config):
    histories, targets = split.cases("validation")
    if config.eval_users is not None and config.eval_users < len(targets):
        # The same users for every method and seed of a comparison.
        chosen = np.sort(np.random.default_rng(0).choice(len(targets), config.eval_users, replace=False))
        histories, targets = [histories[i] for i in chosen], targets[chosen]
    return histories, targets


def _probe_windows(windows, size=64):
    """The same windows for every method and seed, of similar length, since a probe is one batch: the middle ones by length."""
    order = np.argsort(windows.lengths, kind="stable")
    begin = max(0, len(order) // 2 - size // 2)
    return order[begin : begin + size].tolist()


def _prune_as(model, checkpoint):
    """Share and layer as a strategy had them when `checkpoint` was written."""
    then = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())["pruning"]
    model.set_pruning(dataclasses.replace(model.pruning, keep=then["keep"], after_layer=then["after_layer"]))


def _arguments(config, folder, updates, processes, *, keep, progress):
    arguments = TrainingArguments(
        output_dir=str(folder), seed=config.seed, per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation // processes,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup, max_steps=updates,
        eval_strategy="steps", eval_steps=config.eval_every, save_strategy="steps", save_steps=config.eval_every,
        save_total_limit=2, save_only_model=not keep, load_best_model_at_end=True, metric_for_best_model="recall@5",
        greater_is_better=True, logging_steps=max(1, config.eval_every // 5), bf16=_use_bf16(config), optim="adamw_torch_fused",
        logging_nan_inf_filter=False,  # it would wait for the device after every batch
        use_cpu=not torch.cuda.is_available(),  # or bf16 is refused on a CPU, and a Mac takes its GPU, which lacks float64
        disable_tqdm=not progress, report_to=[], remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one GPU; the library would split each batch over all that it sees
    return arguments


def _replays(config, processes):
    """Whether passes come from CUDA graphs: on one GPU, where shapes come back and pruning does not change from update to update."""
    return torch.cuda.is_available() and processes == 1 and not config.plain and config.windows == "prefixes" and config.strategy is None


def _use_bf16(config):
    if config.precision != "auto":
        return config.precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX makes bf16 products several times faster, AVX-512 somewhat; at small sizes the casts cost more than that saves.
    return (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()) and config.d_model >= 128


def _resume_point(folder, config, catalogue, table):
    """The newest checkpoint in `folder` whose state and meter can be read, or None; refuses another run's folder."""
    what = {"config": config.to_dict(), "catalogue": catalogue.fingerprint(), "table": table.fingerprint()}
    if config.pruning is not None and (source := own_source(config.pruning.scorer)):  # without one it is known by its name alone
        what["scorer"] = source
    stamp = folder / "run.json"
    if stamp.exists():
        if read_json(stamp) != json.loads(json.dumps(what)):
            raise ValueError(f"output_dir={str(folder)!r} holds a run of another configuration, catalogue or table; choose another folder")
    else:
        write_json(stamp, what)  # every process of a run writes the same
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(checkpoints, key=lambda p: -int(p.name.split("-")[1])):
        try:
            read_json(path / "trainer_state.json", "global_step", "max_steps", "log_history")
            read_json(path / "meter.json", "seconds", "peak", "windows", "slots", "real", "kept", "device")
        except ValueError as error:
            print(f"{path} is not complete and is passed over: {error}", file=sys.stderr)
            continue
        return str(path)
    return None


class _SidTrainer(Trainer):
    """The Trainer with our batches, our evaluation and a meter."""

    def __init__(self, *, batches, cases, beam, truth, meter, replay, **kwargs):
        super().__init__(**kwargs)
        self.replay, self.passes = replay, None
        self.batches, self.cases, self.beam, self.truth, self.meter = batches, cases, beam, truth, meter
        # Since the last log: loss and main loss, each summed over targets, and the targets; on the device, which is not waited for
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)

    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator,
                                             pin_memory=self.args.dataloader_pin_memory)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.beside = outputs.main_loss.detach(), outputs.encoder_attention_mask.sum()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        return 0  # the Trainer would count all parameters for every batch, and `cost` says it exactly

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:  # the library's is a mean over updates, which may differ in size
            (loss, main_loss, targets), processes = np.sum(gather_object([self.sums.tolist()]), axis=0), self.args.world_size
            logs["loss"] = float(loss / processes / targets)  # of each process, its part times their number
            logs["main_loss"] = float(main_loss / targets)  # without MAP's part, to compare over methods
            self.sums.zero_()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.meter.pause()  # until the next update begins
        ranks = self._ranks()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary(ranks).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _ranks(self):
        """Every process takes a share of the users."""
        (histories, targets), state = self.cases, PartialState()
        mine = slice(state.process_index, None, state.num_processes)
        shares = gather_object([evaluate(self.model, histories[mine], targets[mine], beam=self.beam, truth=self.truth)])
        ranks = np.empty(len(targets), np.int64)
        for process, share in enumerate(shares):
            ranks[process :: state.num_processes] = share
        return ranks

    def _save_checkpoint(self, model, trial):
        self.meter.pause()
        # The meter first: a checkpoint counts once its trainer_state.json, written last, can be read.
        self.meter.save(pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.meter.resume()  # an update begins; a strategy looks at its probe behind this
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "map_labels" in batches[0]:  # of each step, as the library counts the other labels: over batches and processes
            counts = sum((batch["map_labels"] != -100).sum(-1).flatten(0, -2).sum(0) for batch in batches)  # [S]
            counts = self.accelerator.gather(counts.to(device)[None]).sum(0)
            batches = [batch | {"map_items_in_batch": counts} for batch in batches]
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.passes is None:
            self.passes = functools.partial(self._passes, model)
            if self.replay:
                self.passes = ReplayedPasses(self.model, self.passes)
        inputs = self._prepare_inputs(inputs)
        loss, main_loss, kept = self.passes(inputs | {"num_items_in_batch": num_items_in_batch})
        self.meter.count(inputs["attention_mask"], kept)
        targets = (inputs["labels"] != -100).sum()
        self.sums += torch.stack([loss * num_items_in_batch, main_loss * targets, targets.float()])
        return loss

    def _passes(self, model, batch):
        inputs = {name: x for name, x in batch.items() if name != "num_items_in_batch"}
        loss = super().training_step(model, inputs, batch["num_items_in_batch"])
        return loss, *self.beside


def _stale(state):
    """How many evaluations ago the best one was."""
    recalls = [e["eval_recall@5"] for e in state.log_history if "eval_recall@5" in e]
    return len(recalls) - 1 - int(np.argmax(recalls)) if recalls else 0


class _Patience(EarlyStoppingCallback):
    """Early stopping whose count survives a resume."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = _stale(state)


if __name__ == "__main__":  # accelerate launch -m sidlab.training --config run.json
    from sidlab.sweeps import launch

    launch(sys.argv[1:])
