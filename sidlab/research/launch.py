"""One run on any number of processes and machines: `accelerate launch -m sidlab.research.launch
--config run.json`.
"""

import argparse
import datetime
import gc
import json
import pathlib
import sys

import torch
from accelerate import PartialState

from sidlab.data.load import load_catalogue
from sidlab.files import write_json
from sidlab.research.runs import clip_max_items, config_with, truth_for
from sidlab.research.sid_tables import check_sids, sid_table
from sidlab.research.summary import metrics_of
from sidlab.training import evaluate, train
from sidlab.windows import leave_one_out


def launch(arguments) -> None:
    """`accelerate launch -m sidlab.research.launch --config run.json`: one run on any number of
    processes and machines.

    The file: {"dataset", "output_dir", "preset", "seed", "settings": {name: value, as in `sweep`},
    "sids": {name: value, as in `sid_table`}, "start_from": folder of a model to go on from}; only
    `output_dir` must be there. Writes the model, its table and result.json (configuration, test
    metrics, costs) into it; a run that was stopped goes on.
    """
    parser = argparse.ArgumentParser(
        "sidlab.research.launch",
        description=launch.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="the JSON file")
    path = pathlib.Path(parser.parse_args(arguments).config)
    given = json.loads(path.read_text())
    known = {
        "dataset": "planted",
        "output_dir": None,
        "preset": "quick",
        "seed": 0,
        "settings": {},
        "sids": {},
        "start_from": None,
    }
    if unknown := given.keys() - known.keys():
        raise ValueError(f"{path}: {sorted(unknown)} are unknown; use {', '.join(known)}")
    if not given.get("output_dir"):
        raise ValueError(f"{path}: output_dir is missing: where checkpoints, model and result go")
    # The others wait for the first process to make SIDs, which takes longer than the 10 minutes
    # that the library allows.
    options = known | given
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=6))
    check_sids(options["sids"])
    sids = options["sids"] | {
        name.removeprefix("sids."): value
        for name, value in options["settings"].items()
        if name.startswith("sids.")
    }
    check_sids(sids)
    config = config_with(
        options["preset"],
        options["seed"],
        {k: v for k, v in options["settings"].items() if not k.startswith("sids.")},
        continued=options["start_from"] is not None,
    )
    folder = pathlib.Path(options["output_dir"])
    catalogue = load_catalogue(options["dataset"])
    with state.main_process_first():  # the others read what it made
        table, _ = sid_table(catalogue, folder, sids)
    config = clip_max_items(config, catalogue)
    result = train(
        config,
        catalogue,
        table,
        output_dir=folder / "run",
        start_from=options["start_from"],
        progress=state.is_main_process,
    )
    gc.collect()  # the trainer's cycles hold the group of processes
    # An interpreter that ends while the group's threads still drop tensors aborts, now and then
    state.destroy_process_group()
    if not state.is_main_process:
        return
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    ranks = evaluate(
        result.model, histories, targets, beam=config.beam, truth=truth_for(config, catalogue)
    )
    result.model.save_pretrained(folder)
    write_json(
        folder / "result.json",
        {
            "config": config.to_dict() | {"precision": result.precision},
            "processes": state.num_processes,
            "test": metrics_of(ranks),
            "validation": result.metrics,
            **result.timing,
            **result.tokens,
            "peak_memory_mb": result.peak_memory,
            "log": result.log,
        },
    )
    print(
        f"recall@10 {metrics_of(ranks)['recall@10']:.4f} on {len(targets)} test users;"
        f" {folder / 'result.json'}"
    )


if __name__ == "__main__":
    launch(sys.argv[1:])
