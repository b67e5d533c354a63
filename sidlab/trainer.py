"""The Trainer of `training.train`, in a module of its own: who only builds or judges a model does
not import the library's.
"""

import functools
import pathlib

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from sidlab.checkpoints import seal
from sidlab.fast.graphs import ReplayedPasses
from sidlab.metrics import summary


class SidTrainer(Trainer):
    """The Trainer with our batches, our evaluation and a meter.

    `rank`: function of a model and of `cases`, histories and their targets, to ranks int64 [U].
    `average`: what keeps the mean of the weights, which is evaluated in their place, or None.
    """

    def __init__(self, *, batches, cases, rank, meter, replay, average, **kwargs):
        super().__init__(**kwargs)
        self.average = average
        self.replay = replay
        self.passes = None
        self.batches = batches
        self.cases = cases
        self.rank = rank
        self.meter = meter
        # Since the last log: loss and main loss, each summed over targets, and the targets; on the
        # device, which is not waited for
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)

    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self.beside = outputs.main_loss.detach(), outputs.encoder_attention_mask.sum()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        # The Trainer would count all parameters for every batch, and `cost` says it exactly
        return 0

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:  # the library's is a mean over updates, which may differ in size
            loss, main_loss, targets = np.sum(gather_object([self.sums.tolist()]), axis=0)
            processes = self.args.world_size
            # Of each process, its part times their number
            logs["loss"] = float(loss / processes / targets)
            # Without MAP's part, to compare over methods
            logs["main_loss"] = float(main_loss / targets)
            self.sums.zero_()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.meter.pause()  # until the next update begins
        ranks = self._ranks()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary(ranks).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _ranks(self):
        """Every process takes a share of the users."""
        histories, targets = self.cases
        state = PartialState()
        mine = slice(state.process_index, None, state.num_processes)
        begun = self.average is not None and self.average.mean is not None
        model = self.average.mean.module if begun else self.model
        shares = gather_object([self.rank(model, histories[mine], targets[mine])])
        ranks = np.empty(len(targets), shares[0].dtype)
        for process, share in enumerate(shares):
            ranks[process :: state.num_processes] = share
        return ranks

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        # Rates came with the optimiser; where a run is to be longer than before, they are others
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            for group, rate, share in zip(
                self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = rate * share(schedule.last_epoch)

    def _save_checkpoint(self, model, trial):
        self.meter.pause()
        folder = pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.meter.save(folder)
        if self.average is not None and self.args.should_save:
            self.average.save(folder)
        super()._save_checkpoint(model, trial)
        # Each process has written its random state
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.meter.resume()  # an update begins; a strategy looks at its probe behind this
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Of each step, as the library counts the other labels: over batches and processes
        if batches and "map_labels" in batches[0]:
            # [S]
            counts = sum(
                (batch["map_labels"] != -100).sum(-1).flatten(0, -2).sum(0) for batch in batches
            )
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
        targets = (inputs["labels"] != -100).sum()
        self.meter.count(inputs["attention_mask"], kept, (inputs["labels"][..., 0] != -100).sum())
        self.sums += torch.stack([loss * num_items_in_batch, main_loss * targets, targets.float()])
        return loss

    def _passes(self, model, batch):
        inputs = {name: x for name, x in batch.items() if name != "num_items_in_batch"}
        loss = super().training_step(model, inputs, batch["num_items_in_batch"])
        return loss, *self.beside
