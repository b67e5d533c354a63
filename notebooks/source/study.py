# %% [markdown]
# # A study: a sweep that the papers plot, or leave open
#
# Each study of [studies.py](../sidlab/research/studies.py) is a grid of settings and a question.
# This notebook runs one, each run in a process of its own, and shows what came out. What is done
# already is not done again, and studies in one folder share the settings that they have in common.
# On two cores a run of `planted` with `quick` takes about a minute, of Amazon Beauty five. From a
# terminal:
#
# ```
# make study STUDY=map DATASET=planted PRESET=quick SEEDS=3
# ```
#
# With `KEEP=1` its summary is kept in `results/studies` (`python results/show.py` makes the pages
# anew) and, where the course's explorers show it, in the package.
#
# *How to read it.* Intervals are over test users and seeds; with one seed they know nothing of
# other seeds. "Against the first" compares with the first setting on the same users and seeds: if
# its interval holds 0, do not call either better. Costs are medians, measured in training.

# %% tags=["parameters"]
# Parameters (papermill replaces them)
study = "strategies"  # another name, and the error lists all
dataset = "planted"  # or a folder such as ../shared/data/amazon-beauty
preset = "quick"  # "smoke" | "quick" | "long" | "gpu" | "paper"
seeds = 2  # how many
arch = "t5"  # or "qwen": decoder-only
sids = ""  # a published SID file; "behaviour": of embeddings and training histories; empty: residual k-means on the item embeddings
output_dir = ""  # empty: runs/studies/<dataset>-<preset>, where studies share their runs
only = 0  # the first settings only; 0: all
keep = False  # True: its summary becomes one of this repository's results
cluster = ""  # address of a Dask scheduler, tcp://…, whose workers do the runs side by side

# %%
from sidlab.research import compare as comparison

made_with = {
    "dataset": dataset,
    "preset": preset,
    "seeds": seeds,
    "arch": arch,
    "sids": sids,
}
valid = ("study", *made_with, "output_dir", "only", "keep", "cluster")
if unknown := comparison.unknown_parameters(globals(), {*valid, "made_with", "valid"}):
    raise ValueError(f"unknown parameter {', '.join(unknown)}; use {', '.join(valid)}")

import os
import pathlib

from IPython.display import Markdown, display

from sidlab.checks import one_of
from sidlab.research import jobs, studies

one_of("study", study, studies.STUDIES)
if pathlib.Path.cwd().name == "notebooks":
    os.chdir("..")  # opened in JupyterLab: paths mean what they mean on the command line

chosen = studies.STUDIES[study]
own_arch = f"-{arch}" if arch != "t5" else ""
folder = output_dir or f"runs/studies/{pathlib.Path(dataset).name}-{preset}{own_arch}"
Markdown(chosen.about())

# %%
from sidlab.research.study_figures import (
    curves_figure,
    schedule_figure,
    strata_figure,
    study_figure,
)

if "schedules" in chosen.shows:
    display(schedule_figure(chosen.settings))

# %%
runs = studies.run(study, folder, only=only or None, executor=jobs.cluster(cluster), **made_with)
rows = studies.summarise(runs)

# %%
import pandas as pd


def ends(interval, form):
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


quality = pd.DataFrame(
    {
        "setting": rows["label"],
        "recall@5": rows["recall@5"],
        "published (Beauty)": rows["label"].map(chosen.values),
        "recall@10": rows["recall@10"],
        "95 %": [ends(interval, ".4f") for interval in rows["recall@10_interval"]],
        "against the first": rows["difference"],
        "95 % of that": [ends(interval, "+.4f") for interval in rows["difference_interval"]],
        "codes a level": [" · ".join(map(str, one["widths"])) for one in rows["sids"]],
        "share their codes": [one["collision_rate"] for one in rows["sids"]],
    }
).set_index("setting")
quality.dropna(axis="columns", how="all").style.format(
    {"against the first": "{:+.4f}", "share their codes": "{:.0%}"}, precision=4, na_rep="–"
)

# %%
if rows["busy"].any():
    print("Other jobs ran on the machine at the same time: the seconds say little.")
costs = {
    "s per 1,000 windows": ("seconds_per_1k_windows", "{:.3f}"),
    "MFLOPs per window, predicted": ("mflops", "{:.1f}"),
    "s to 95 % of the first's recall": ("seconds_to_recall", "{:.0f}"),
    "peak MB": ("peak_memory_mb", "{:.0f}"),
    "real slots": ("real_token_fraction", "{:.1%}"),
    "kept in training": ("kept_token_fraction", "{:.1%}"),
    "updates": ("updates", "{:.0f}"),
}
table = pd.DataFrame({title: rows[field] for title, (field, _) in costs.items()})
table.set_index(rows["label"].rename("setting")).style.format(
    {title: form for title, (_, form) in costs.items()}, na_rep="–"
)

# %%
import torch

study_figure(rows, chosen.x, chosen.panels(torch.cuda.is_available()))

# %%
versus = studies.versus(study, runs)
if len(versus):
    versus["95 %"] = [ends(interval, "+.4f") for interval in versus.pop("difference_interval")]
    display(versus.set_index(["label", "against"]).style.format({"difference": "{:+.4f}"}))

# %%
for row in rows.to_dict("records") if "ended" in chosen.shows else ():
    for end in row["ended"] if row.get("strategy.kind") in ("loss-gap", "settled-layer") else ():
        agreement = "".join(f", {r:.2f}" for r in end["agreement"] or ())
        print(f"{row['label']}: {end['keep']:.0%} after layer {end['after_layer']}" + agreement)
if "curves" in chosen.shows:
    display(curves_figure(rows))
if "strata" in chosen.shows:
    groups = studies.strata(runs, dataset)
    display(strata_figure(groups), groups.round(4))

# %%
studies.save(study, runs, folder, only=only, keep=keep, **made_with)
