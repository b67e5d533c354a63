"""What a killed run goes on from, and what a checkpoint holds besides the Trainer's."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import sys
import zlib

import numpy as np
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import (
    TrainerCallback,
)

from sidlab.files import read_json, write_json
from sidlab.model_building import weights_digest
from sidlab.saliency import own_source

# In a checkpoint: the averaged weights, and of how many updates they are.
AVERAGE = "average.safetensors"
AVERAGED = "updates averaged"
SEAL = "files.json"  # written last


def prune_as(model, checkpoint):
    """Share and layer as a strategy had them when `checkpoint` was written."""
    then = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())["pruning"]
    model.set_pruning(
        dataclasses.replace(model.pruning, keep=then["keep"], after_layer=then["after_layer"])
    )


def average_as(model, checkpoint):
    """The weights that were evaluated when `checkpoint` was written, where averaging had begun."""
    if (average := pathlib.Path(checkpoint, AVERAGE)).exists():
        model.load_state_dict(load_file(average), strict=False)


def resume_point(folder, config, updates, precision, catalogue, table, base):
    """`newest_whole` of `folder`; newer ones are removed. Refuses another run's folder, and fewer
    `updates` than it has done.
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
    asked = _whatever_its_length(json.loads(json.dumps(what)))
    if stamp.exists() and _whatever_its_length(read_json(stamp)) != asked:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a run of another configuration, catalogue, table"
            " or start; choose another folder"
        )
    found = newest_whole(folder)
    done = read_json(found / "trainer_state.json")["global_step"] if found else 0
    if done > updates:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a run of {done} updates already, more than the"
            f" {updates} asked for by max_updates and epochs; give more, or choose another folder"
        )
    write_json(stamp, what)  # every process of a run writes the same
    # The library would take what was passed over for the newest, and remove those to come
    for path in itertools.takewhile(lambda path: path != found, _checkpoints(folder)):
        shutil.rmtree(path, ignore_errors=True)
    return found and str(found)


def newest_whole(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint in `folder` that can be gone on from, or None. Of those that are passed
    over it is said which file is why.
    """
    for path in _checkpoints(folder):
        fault = fault_in(path)
        if fault is None:
            state = read_json(path / "trainer_state.json", "global_step", "max_steps")
            best = folder / f"checkpoint-{state.get('best_global_step')}"
            # Training would end with the best one's weights
            fault = fault_in(best) if best != path else None
        if fault is None:
            return path
        print(f"{path} is passed over: {fault}", file=sys.stderr)
    return None


def _checkpoints(folder):
    """Newest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def seal(folder: pathlib.Path) -> None:
    """Notes the size and a checksum of each file of a checkpoint, which is whole with that."""
    found = sorted(path for path in folder.iterdir() if path.name != SEAL)
    write_json(folder / SEAL, {path.name: _state_of(path) for path in found})


def fault_in(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None where each file is as it
    was when it was sealed.
    """
    if not (folder / SEAL).exists():
        return f"{folder} was not written to its end"
    try:
        sealed = read_json(folder / SEAL)
        for name, state in sealed.items():
            path = folder / name
            if not path.exists():
                return f"{path} is missing"
            if _state_of(path) != state:
                return f"{path} is damaged: it is not as it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _state_of(path):
    """[bytes, CRC-32]"""
    size = 0
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            size += len(part)
            checksum = zlib.crc32(part, checksum)
    return [size, checksum]


def _whatever_its_length(stamp):
    """What a run.json says of the run but how long it is to be, with the precision in place of
    "auto": to ask for that by name is the same run.
    """
    same = {"precision": stamp.get("precision"), "max_updates": None, "epochs": None}
    return stamp | {"config": stamp.get("config", {}) | same}


class Average(TrainerCallback):
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


def stale(state):
    """How many evaluations ago the best one was."""
    recalls = [e["eval_recall@5"] for e in state.log_history if "eval_recall@5" in e]
    return len(recalls) - 1 - int(np.argmax(recalls)) if recalls else 0
