"""The child process of a run: train, test and write its result.

`jobs.start_child` starts `python -m sidlab.research.one_run FOLDER NAME`, which ends when its
standard input does.
"""

import os
import shutil
import sys
import threading
import time

import torch
import transformers
from filelock import FileLock
from transformers import TrainerCallback

from sidlab.config import TrainConfig
from sidlab.data.load import load_catalogue
from sidlab.decoding import encode_histories
from sidlab.fast.meter import Meter, device_name
from sidlab.files import read_json, write_json
from sidlab.metrics import rank_of_target, stored
from sidlab.model_building import load_model
from sidlab.pruning import PruningConfig
from sidlab.research import sasrec
from sidlab.research.jobs import MARK, file_of, path_of
from sidlab.research.machine import hardware, versions
from sidlab.research.runs import CHANGED, clip_max_items, truth_for, version
from sidlab.research.sid_tables import sid_table
from sidlab.research.summary import COSTS, SECONDS, metrics_of
from sidlab.training import evaluate, train
from sidlab.windows import leave_one_out, truth_tokens

SPEC = ("dataset", "sids", "config", "start")  # what `runs.spec` makes


def run(folder, name: str) -> None:
    """Train, test and write one run; the child process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = path_of(folder, name)
    spec = read_json(file_of(path, ".spec"))
    if spec["code"] != version(spec["config"]):
        raise RuntimeError(CHANGED)
    catalogue = load_catalogue(spec["dataset"])
    kinds = {"sasrec": _run_sasrec, "recommend": _run_recommend}
    run_one = next((kinds[kind] for kind in kinds if kind in spec["config"]), _run_model)
    result = run_one(spec, catalogue, folder, path)
    row = result["row"]
    if spec["beside"]:
        # What runs beside it took from its speed nobody knows
        row |= dict.fromkeys(SECONDS)
    result["busy"] = spec["beside"] or result.get("busy", False) or _busy()
    write_json(
        file_of(path, ".json"),
        {
            "key": spec["key"],
            "device": device_name(),
            "precision": spec["config"].get("precision"),
            "beside": spec["beside"],
            # What it takes to repeat the run, and to say where it was made.
            "spec": {
                part: spec[part] for part in ("dataset", "sids", "config", "start") if part in spec
            },
            "hardware": hardware(),
            "versions": versions(),
            **result,
        },
    )
    trained = f", trained {row['train_seconds']:.0f} s" if row["train_seconds"] is not None else ""
    log_progress(f"recall@10 {row['recall@10']:.4f} on {len(result['ranks'])} test users{trained}")


def _run_sasrec(spec, catalogue, folder, path):
    split = leave_one_out(catalogue.histories)
    meter = Meter()
    meter.resume()
    model = sasrec.SASRec(**spec["config"]["sasrec"]).fit(
        split.train, catalogue.n_items, split.cases("validation")
    )
    meter.pause()
    histories, targets = split.cases("test")
    begin = time.perf_counter()
    ranks = rank_of_target(model.recommend(histories), targets)
    # Its seconds include validation, and one row of it predicts several windows, so they make no
    # seconds per window.
    row = {
        **metrics_of(ranks),
        **dict.fromkeys(COSTS),
        "train_seconds": meter.seconds,
        "peak_memory_mb": meter.peak,
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    return {"row": row, "curve": None, **stored(ranks)}


def _start_of(spec, folder):
    """The folder of the model that a run starts from, or None."""
    return path_of(folder, spec["start"]) if "start" in spec else None


def _run_recommend(spec, catalogue, folder, path):
    """The model of another run, pruned as it never was in training."""
    pruning = PruningConfig(**spec["config"]["pruning"])
    model = load_model(_start_of(spec, folder))
    model.set_pruning(pruning)
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    truth = catalogue.truth if pruning.scorer == "oracle" else None
    begin = time.perf_counter()
    ranks = evaluate(model, histories, targets, beam=spec["config"]["recommend"], truth=truth)
    row = {
        **metrics_of(ranks),
        **dict.fromkeys(COSTS),
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    if catalogue.truth is not None and pruning.reduce == "select":
        row["kept_informative"] = kept_informative(model, catalogue.truth, histories)
    return {"row": row, "curve": None, **stored(ranks)}


def _run_model(spec, catalogue, folder, path):
    table, report = sid_table(catalogue, folder, spec["sids"])
    config = clip_max_items(TrainConfig.from_dict(spec["config"]), catalogue)
    progress = Progress()
    result = train(
        config,
        catalogue,
        table,
        output_dir=path,
        start_from=_start_of(spec, folder),
        progress=False,
        callbacks=[progress],
    )
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    begin = time.perf_counter()
    ranks = evaluate(
        result.model, histories, targets, beam=config.beam, truth=truth_for(config, catalogue)
    )
    row = {
        **metrics_of(ranks),
        **result.timing,
        **result.tokens,
        "peak_memory_mb": result.peak_memory,
        "evaluation_seconds": time.perf_counter() - begin,
        "kept_informative": None,
    }
    prunes = (
        config.pruning is not None
        and config.pruning.reduce == "select"
        and config.pruning.at_inference
    )
    if catalogue.truth is not None and prunes:
        row["kept_informative"] = kept_informative(result.model, catalogue.truth, histories)
    evaluations = [e for e in result.log if "recall@10" in e]
    losses = [e for e in result.log if "loss" in e]
    curve = {
        "step": [e["step"] for e in losses],
        "loss": [e["main_loss"] for e in losses],
        "eval_step": [e["step"] for e in evaluations],
        "recall@10": [e["recall@10"] for e in evaluations],
    }
    shutil.rmtree(path)  # the checkpoints
    result.model.save_pretrained(path)
    sids = {
        "widths": list(table.widths),
        "collision_rate": report["collision_rate"],
        "perplexity": [level["perplexity"] for level in report["per_level"]],
    }
    pruning = result.model.pruning
    agreement = [e["agreement"] for e in result.log if "agreement" in e]
    ended = pruning and {
        "keep": pruning.keep,
        "after_layer": pruning.after_layer,
        "layers": result.model.stack.config.num_hidden_layers,
        "agreement": agreement[0] if agreement else None,
    }
    return {
        "row": row,
        "curve": curve,
        **stored(ranks),
        "sids": sids,
        "ended": ended,
        "busy": progress.busy,
    }


@torch.no_grad()
def kept_informative(model, truth, histories, batch_size: int = 256) -> dict:
    """How well a pruned model keeps the truly informative tokens of planted histories:
    {"precision", "recall"} over all tokens.
    """
    kept_total = informative_total = both = 0
    for begin in range(0, len(histories), batch_size):
        part = [h[-model.config.max_items :] for h in histories[begin : begin + batch_size]]
        out = encode_histories(model, part, truth)
        kept = out.attention_mask.bool().cpu()  # [B, K]
        informative = (
            truth_tokens(
                truth.informative(part),
                model.table.levels,
                model.config.separators,
                out.importance.shape,
            )
            > 0
        )
        kept_total = kept_total + kept.sum().item()
        informative_total = informative_total + informative.sum().item()
        both += (informative.gather(1, out.positions.cpu()) & kept).sum().item()
    return {"precision": both / max(kept_total, 1), "recall": both / max(informative_total, 1)}


def log_progress(text: str) -> None:
    """A progress line, marked so that the parent process passes it on."""
    print(MARK + text, flush=True)


def _busy():
    """Whether other jobs ran in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads() + 0.5


class Progress(TrainerCallback):
    """Tells how far training is, and `busy`: whether other jobs ran beside."""

    busy = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.busy = self.busy or _busy()
        loss = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), float("nan"))
        log_progress(
            f"update {state.global_step}/{state.max_steps}, loss {loss:.3f}, validation recall@10"
            f" {metrics['eval_recall@10']:.4f}"
        )


def _end_with_input():
    """End this process when the worker that started it does, however that came about."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    # Whoever starts this run again waits until this process is gone
    with FileLock(file_of(path_of(*sys.argv[1:]), ".alive")):
        run(*sys.argv[1:])
