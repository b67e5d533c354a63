"""Make the notebooks of the studies, one for each in sidlab.research.studies: python
notebooks/studies.py

Each is run by papermill, with any data set, preset and number of seeds; what is done is kept in
`output_dir` and not done again:

    papermill notebooks/studies/layer-ratio.ipynb runs/layer-ratio.ipynb --cwd . -k python3 \\
        -p dataset planted -p preset quick -p seeds 2
"""

import pathlib

import build
from nbformat.v4 import new_code_cell, new_markdown_cell

from sidlab.research.studies import STUDIES

FOLDER = pathlib.Path(__file__).resolve().parent / "studies"
PARAMETERS = """# Parameters (papermill replaces them)
dataset = "planted"  # or a folder such as ../shared/data/amazon-beauty
preset = "quick"  # "smoke" | "quick" | "long" | "gpu" | "paper"
seeds = 2  # how many
arch = "t5"  # or "qwen": decoder-only
sids = ""  # a published SID file; empty: residual k-means on the item embeddings
output_dir = ""  # empty: runs/studies/<dataset>-<preset>, where studies share their runs
only = 0  # the first settings only; 0: all"""
CHECK = """import os
import pathlib

from sidlab.research import compare as comparison
from sidlab.research import studies

valid = ("dataset", "preset", "seeds", "arch", "sids", "output_dir", "only")
if unknown := comparison.unknown_parameters(\
globals(), {{*valid, "os", "pathlib", "studies", "valid"}}):
    raise ValueError(f"unknown parameter {{', '.join(unknown)}}; use {{', '.join(valid)}}")
if pathlib.Path.cwd().parts[-2:] == ("notebooks", "studies"):
    os.chdir("../..")  # opened in JupyterLab: paths mean what they mean on the command line

study = studies.STUDIES[{name!r}]
folder = output_dir or f"runs/studies/{{pathlib.Path(dataset).name}}-{{preset}}"\
 + (f"-{{arch}}" if arch != "t5" else "")"""
RUN = """runs = studies.run(\
{name!r}, folder, dataset=dataset, preset=preset, seeds=seeds, arch=arch, sids=sids, \
only=only or None)
rows = studies.summarise(runs)"""
QUALITY = """import pandas as pd


def ends(interval, form):
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


quality = pd.DataFrame({
    "setting": rows["label"], "recall@5": rows["recall@5"], \
"published (Beauty)": rows["label"].map(study.values),
    "recall@10": rows["recall@10"], "95 %": [ends(i, ".4f") for i in rows["recall@10_interval"]],
    "against the first": rows["difference"], \
"95 % of that": [ends(i, "+.4f") for i in rows["difference_interval"]],
    "codes a level": [" · ".join(map(str, one["widths"])) for one in rows["sids"]],
    "share their codes": [one["collision_rate"] for one in rows["sids"]]}).set_index("setting")
quality.dropna(axis="columns", how="all").style.format(
    {"against the first": "{:+.4f}", "share their codes": "{:.0%}"}, precision=4, na_rep="–")"""
COSTS = """if rows["busy"].any():
    print("Other jobs ran on the machine at the same time: the seconds say little.")
pd.DataFrame({
    "setting": rows["label"], "s per 1,000 windows": rows["seconds_per_1k_windows"],
    "s to 95 % of the first's recall": rows["seconds_to_recall"], "peak MB": rows["peak_memory_mb"],
    "real slots": rows["real_token_fraction"], "kept in training": rows["kept_token_fraction"],
    "updates": rows["updates"]}).set_index("setting").style.format({
        "s per 1,000 windows": "{:.3f}", "s to 95 % of the first's recall": "{:.0f}", \
"peak MB": "{:.0f}", "real slots": "{:.1%}",
        "kept in training": "{:.1%}", "updates": "{:.0f}"}, na_rep="–")"""
VERSUS = """versus = studies.versus({name!r}, runs)
versus.assign(difference=versus["difference"].map("{{:+.4f}}".format), difference_interval=[
    ends(interval, "+.4f") for interval in versus["difference_interval"]])\
.set_index(["label", "against"])"""
ENDED = """for row in rows.to_dict("records"):
    for end in row["ended"] if row.get("strategy.kind") in ("loss-gap", "settled-layer") else ():
        agreement = "".join(f", {r:.2f}" for r in end["agreement"] or ())
        print(f"{row['label']}: {end['keep']:.0%} behind layer {end['after_layer']}" + agreement)"""
SCHEDULES = """from sidlab.research.study_figures import schedule_figure

schedule_figure(study.settings)"""
FIGURE = """import torch

from sidlab.research.study_figures import study_figure

study_figure(rows, study.x, study.panels(torch.cuda.is_available()))"""
STRATA = """from sidlab.research.study_figures import strata_figure

groups = studies.strata(runs, dataset)
strata_figure(groups)"""
CURVES = """from sidlab.research.study_figures import curves_figure

curves_figure(rows)"""
SAVE = """studies.save({name!r}, runs, folder, \
dataset=dataset, preset=preset, seeds=seeds, arch=arch, sids=sids, only=only)"""
ASIDE = {
    "strategies": "What a scorer is worth: against a random third, on the same users and seeds.",
    "granularity": "Finer SIDs against coarser ones, on the same users and seeds.",
    "adaptive": (
        "What adapts, against the constant share behind the second layer that leaves as much work"
        " (tokens × layers): between the two constant ones beside it."
    ),
}


def notebook(name: str) -> str:
    """The text of the study's .ipynb."""
    study = STUDIES[name]
    text = (
        f"# {study.title}\n\n**{study.question}** {len(study.settings)} settings, each in a process"
        " of its own; what is done already is not done again. On two cores a run of `planted` with"
        " `quick` takes about a minute, of Amazon Beauty five. From a terminal (`source"
        f" .venv/bin/activate`):\n\n```\nmkdir -p runs\npapermill notebooks/studies/{name}.ipynb"
        f" runs/{name}.ipynb --cwd . -k python3 -p dataset planted -p seeds 3\n```\n\n*What the"
        f" papers say.* {study.published}\n\n*How to read it.* Intervals are over test users and"
        " seeds; with one seed they know nothing of other seeds, with more the noise of seeds is"
        ' estimated from all settings together, as if it were alike in all. "Against the first"'
        " compares with the first setting on the same users and seeds: if its interval holds 0, do"
        " not call either better. Costs are medians, measured in training."
    )
    cells = [
        new_markdown_cell(text),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(CHECK.format(name=name)),
    ]
    if name == "adaptive":
        cells += [
            new_markdown_cell(
                "The schedules, before anything is trained. What follows the loss or the ranking"
                " isn't known yet."
            ),
            new_code_cell(SCHEDULES),
        ]
    cells += [
        new_code_cell(RUN.format(name=name)),
        new_code_cell(QUALITY),
        new_code_cell(COSTS),
        new_code_cell(FIGURE),
    ]
    if name in ASIDE:
        cells += [new_markdown_cell(ASIDE[name]), new_code_cell(VERSUS.format(name=name))]
    if name == "adaptive":
        cells += [
            new_markdown_cell(
                "What the two that look at a probe had chosen when the best checkpoint was written,"
                " seed by seed; the settled layer with the rank correlation of each layer with the"
                " one behind."
            ),
            new_code_cell(ENDED),
        ]
    if name == "strata":
        cells += [new_code_cell(STRATA), new_code_cell("groups.round(4)")]
    if name == "fast":
        cells.append(new_code_cell(CURVES))
    cells.append(new_code_cell(SAVE.format(name=name)))
    return build.notebook(name, cells)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for study_name in STUDIES:
        (FOLDER / f"{study_name}.ipynb").write_text(
            notebook(study_name), encoding="utf-8", newline="\n"
        )
    print(f"{len(STUDIES)} notebooks in {FOLDER}")
