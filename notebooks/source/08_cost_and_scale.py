# %% [markdown]
# # 8. Cost and scale
#
# How cost grows with the history, the length of the SIDs and the catalogue, and when pruning does not pay: predicted, then measured on your machine.
#
# **Goals**
#
# * Read a training step as arithmetic, memory traffic and fixed prices, and know which of them a pruner touches.
# * Predict the seconds of a step you have not timed, and say how far off the prediction is.
# * See what a catalogue of a million items costs, and what it does not.
#
# **You need** [notebook 0](00_start_here.ipynb); [notebook 7](07_padding_is_not_pruning.ipynb) helps, for how to time two things fairly.
#
# **Time** 35 minutes, 20 of them with the exercises.
#
# **Machine** One core, about 1 GB of memory, no GPU, no network. With a GPU, training steps are timed there.

# %% tags=["parameters"]
threads = 1  # of the CPU; small steps gain little from more, and on one their times vary less
rounds = 5  # how often each step is timed
# Steps to predict: model width, layers, items, slots a batch
unseen = [(64, 3, 30, 1024), (128, 2, 10, 2048), (32, 6, 20, 512)]
catalogue_sizes = [1_000, 10_000, 100_000, 1_000_000]
users = 16  # recommended to at each size

# %% tags=["setup"]
import time

import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab import PruningConfig
from sidlab.course import teach

torch.set_num_threads(threads)

# %% [markdown]
# ## Where the FLOPs go
#
# A product of matrices [m, k] × [k, n] takes 2·m·k·n floating-point operations (FLOPs): a multiplication and an addition for each of its terms. For a layer over n tokens
# of width d, with feed-forward width f:
#
# ```
# projections        8 · n · d²        linear in the history
# scores and sum     4 · n² · d        quadratic in the history
# feed-forward       4 · n · d · f     linear again
# ```
#
# `sidlab.research.cost` adds them up for a whole model, exactly. To train on a history costs three times the forward pass, for the backward pass makes two products for each one
# of the forward pass. A model of ordinary proportions, d = 128 and f = 512, histories of 3 codes and a separator an item:

# %%
from sidlab.research.calibration import one_batch, plain_config
from sidlab.research.cost import cost


def costs_of(items, levels=3, width=256, pruning=None):
    config = plain_config(d_model=128, layers=4, items=items, pruning=pruning)
    return one_batch(config, (width,) * levels, slots=4096)


# %%
lengths = [10, 20, 40, 80, 160]
# MFLOPs of a forward pass per history
parts = pd.DataFrame({n: costs_of(n).flops for n in lengths}).T / 1e6
growth = costs_of(80).training / costs_of(40).training

# %%
teach.predict(
    "From 40 to 80 items, the tokens double. By which factor do the FLOPs of a training step per history grow?",
    growth,
    range=(1, 5),
    default=(2, 4),
    unit="×",
    explain="Only the scores and the sum grow by 4 ×. At this d and these lengths, projections and feed-forward are most of the work, so the whole grows by little more than 2 ×.",
    then=[
        "Million FLOPs of a forward pass:",
        parts[["encoder", "decoder", "cross", "heads"]].round(1).rename_axis("items"),
    ],
)

# %% [markdown]
# *cross* is the decoder's look at the history, *heads* is the output. Look at the encoder: from which length on does doubling cost clearly more than twice?
#
# The **levels** of a SID work the same way: every level is one token more per item, in each history, and one more step of the decoder. More **codes per level** are
# nearly free in FLOPs; they make the table of embeddings longer. *Activations* are the intermediate results that wait in memory for the backward pass.

# %%
rows = {
    f"{levels} × {width}": costs_of(20, levels, width)
    for levels, width in ((2, 256), (3, 256), (4, 256), (8, 256), (3, 1024), (3, 8192))
}
pd.DataFrame(
    {
        name: {
            "tokens per history": c.slots,
            "MFLOPs to train on it": c.training / 1e6,
            "activations, MB a batch": c.activation_bytes / 2**20,
            "parameters, millions": c.parameters / 1e6,
        }
        for name, c in rows.items()
    }
).T.round(1)

# %% [markdown]
# ## From FLOPs to seconds
#
# Seconds are not FLOPs divided by the speed on the data sheet. Numbers have to be fetched and written, and each layer has a price before it multiplies anything: Python,
# a dozen kernels to start. So take the simplest model that knows this, time a few real training steps, and fit its four coefficients, none below zero:
#
# ```
# seconds = a · FLOPs  +  m · bytes of activations  +  b · layers  +  c · [does it prune?]
# ```

# %%
from sidlab.research.calibration import calibrate

begin = time.perf_counter()
speed = calibrate(rounds=rounds)
print(
    f"{speed.device}, calibrated in {time.perf_counter() - begin:.0f} s, the fit is at most {speed.error:.0%} off:\n"
    f"a GFLOP takes {1e12 * speed.flop:.0f} ms, 100 MB of activations {1e11 * speed.byte:.0f} ms, a layer {1000 * speed.layer:.1f} ms, "
    f"the pruner {1000 * speed.pruner:.1f} ms"
)
# Milliseconds
(1000 * speed.steps[["measured", "fitted"]]).round(1).join(
    speed.steps.drop(columns=["measured", "fitted"])
)

# %% [markdown]
# Run this cell twice before you believe the split: the sum is measured, but FLOPs and memory traffic mostly grow together, so which of them a millisecond belongs to is
# known less well.
#
# A fit that is good on its own points shows little, too. So predict steps that were **not** timed: other widths, other depths, other lengths.

# %%
from sidlab.research.calibration import time_steps, timed_size

cases = {
    (*size, pruned): timed_size(*size, PruningConfig(after_layer=1) if pruned else None)
    for size in unseen
    for pruned in (False, True)
}
measured = time_steps({name: step for name, (_, _, step) in cases.items()}, rounds)

# %%
predicted = {name: speed.seconds(config, batch) for name, (config, batch, _) in cases.items()}
held_out = pd.DataFrame(
    {
        "predicted, ms": 1000 * pd.Series(predicted),
        "median, ms": 1000 * measured.median(),
        "fastest, ms": 1000 * measured.min(),
        "slowest, ms": 1000 * measured.max(),
    }
)
held_out["predicted ÷ median"] = held_out["predicted, ms"] / held_out["median, ms"]
worst = float((held_out["predicted ÷ median"] - 1).abs().max())
noise = float((measured.max() / measured.min()).median())

# %%
teach.predict(
    "How far is the worst of these predictions from the median of its measurements, in percent?",
    min(100 * worst, 200),
    range=(0, 200),
    default=(5, 60),
    unit="%",
    explain=f"Four numbers for all sizes are a coarse model, and the clock is not exact either: of {rounds} times the same step, the slowest took {noise:.1f} × "
    "the fastest. Good enough to choose a size, not to compare two methods.",
    then=held_out.rename_axis(["width", "layers", "items", "slots", "pruned"]).round(2),
)

# %% [markdown]
# ## The calculator
#
# All of that behind sliders, with your machine's coefficients; *preset* sets them all at once, *all settings* shows those that are folded away. On the left what a step is made of; on the right what pruning leaves of seconds, FLOPs and memory at every length of
# history. (A *window* is one training example: a history and the item that followed.) Type in what a GPU of yours *sustains* (often far less than its data sheet says) and read off GPU-hours.

# %%
from sidlab.viz import CostCalculator

calculator = CostCalculator(speed)
calculator

# %% [markdown]
# **Things to try**
#
# * The preset *a step that mostly waits*: a narrow model, hardly any tokens in a batch. What does pruning save now?
# * Items per history down to 1 or 2, kept share 90 %. Where does the vermilion curve cross the line?
# * *All settings*: prune after the last layer. FLOPs are still saved, and where? (The decoder reads fewer tokens.)
# * The preset *wide and deep*: the fixed prices vanish. Now seconds follow FLOPs and bytes, and pruning pays what it promises.
# * The presets *my shop* and *a million items*. Then only the catalogue, from 10 thousand to 10 million items: what moves? What does not?
# * SID levels from 3 to 8: which rows of the table grow faster than the tokens?
#
# ## When pruning does not pay
#
# A pruner costs something of its own: scores by plain attention, a sort, a gather, a bias gathered for every row. It saves tokens in the layers behind. Where those
# layers wait for Python instead of for numbers, there is little to save. Measure both ends, interleaved, with the spread over rounds:

# %%
ends = {
    "small: width 32, 2 items, 128 slots": (32, 4, 2, 128),
    "large: width 128, 60 items, 2048 slots": (128, 4, 60, 2048),
}
steps = {
    (name, kind): timed_size(*size, PruningConfig() if kind == "pruned" else None)[2]
    for name, size in ends.items()
    for kind in ("plain", "pruned")
}
seconds = time_steps(steps, 2 * rounds)

# %%
ratio = {name: seconds[name, "pruned"].median() / seconds[name, "plain"].median() for name in ends}
spread = {
    name: (seconds[name, "pruned"] / seconds[name, "plain"]).agg(["min", "max"]) for name in ends
}
small, large = ends
decided = 0.9 <= ratio[small] <= 1.1 or not spread[small]["min"] < 1 < spread[small]["max"]
outcome = (
    "it stays within 10 %"
    if 0.9 <= ratio[small] <= 1.1
    else "it falls by more"
    if ratio[small] < 0.9
    else "it grows by more"
)

# %%
teach.predict(
    "Width 32, histories of 2 items, 128 slots a batch: keeping a third, what becomes of the time of a training step?",
    outcome if decided else "these rounds cannot tell",
    choices=[
        "it falls by more",
        "it stays within 10 %",
        "it grows by more",
        "these rounds cannot tell",
    ],
    default="it stays within 10 %",
    explain=f"Ratio of medians {ratio[small]:.2f} (rounds from {spread[small]['min']:.2f} to {spread[small]['max']:.2f}).",
    then=pd.DataFrame(
        {
            name: {
                "ratio of medians, pruned ÷ plain": ratio[name],
                "lowest round": spread[name]["min"],
                "highest round": spread[name]["max"],
            }
            for name in ends
        }
    ).T.round(2),
)

# %% [markdown]
# ## A million items
#
# A classifier over items needs an output for each of them. A SID model does not: three levels of 256 codes are 768 outputs, and 16.8 million possible SIDs. What grows is the
# table that turns codes into items, and the **trie** that says which codes may follow. Both are sorted arrays, some 8 bytes an entry.
#
# Random SIDs for catalogues of growing size, an untrained model (its time does not depend on what it has learned). It recommends by **beam search**: at each level it
# extends the ten best beginnings of SIDs so far by the codes that the trie allows, and keeps the best ten again.

# %%
from sidlab.research.calibration import random_table
from sidlab.model_building import build_model
from sidlab.viz.cost import table_bytes


def recommending(n_items):
    """A function that recommends to `users` users of a catalogue of random SIDs and returns the seconds, and its table."""
    table = random_table(n_items, levels=3, width=256)
    model = build_model(sidlab.TrainConfig.preset("quick"), table).eval()
    histories = list(np.random.default_rng(0).integers(1, n_items + 1, (users, 20)))

    def run():
        begin = time.perf_counter()
        sidlab.recommend(model, histories, k=10)
        return time.perf_counter() - begin

    return run, table


# %%
made = {n: recommending(n) for n in catalogue_sizes}
times = time_steps({n: run for n, (run, _) in made.items()}, rounds)
rows = {}
for n, (_, table) in made.items():
    size = table.codes.nbytes + table.item_tokens.nbytes + table.trie.nbytes
    rows[n] = {
        "distinct SIDs": table.trie.n_nodes[-1],
        "MB": size / 2**20,
        "MB, predicted": table_bytes(n, table.widths) / 2**20,
        "ms per user": 1000 * times[n].median() / users,
        "fastest": 1000 * times[n].min() / users,
        "slowest": 1000 * times[n].max() / users,
    }
scale = pd.DataFrame(rows).T.rename_axis("items")
slower = scale["ms per user"].iloc[-1] / scale["ms per user"].iloc[0]

# %%
teach.predict(
    f"The catalogue grows from {catalogue_sizes[0]:,} to {catalogue_sizes[-1]:,} items. Recommending to one user takes how many times as long?",
    "under 3 ×" if slower < 3 else "3 to 30 ×" if slower < 30 else "more than 30 ×",
    choices=["under 3 ×", "3 to 30 ×", "more than 30 ×"],
    default="under 3 ×",
    explain="Beam search asks for the children of ten nodes at every level, however many items hang below them.",
    then=[scale.round(2), "Memory grows in step with the number of items, time hardly does."],
)

# %% [markdown]
# What a large catalogue may cost is *quality*, too, which is not measured here: more items share a
# prefix, so one wrong code at level 1 loses more of them, and codes per level or levels have to grow along. Random SIDs are spread as evenly as can be; real ones are not, and then some nodes have
# many more children than the mean. How the SIDs of a catalogue fare is the subject of [notebook 1](01_semantic_ids.ipynb).
#
# ## Exercises
#
# ### Exercise 1 · ★☆☆ · 5 minutes
#
# Pruning by half quarters the scores and the sum, and only halves the rest. From how many tokens on do **scores and sum** cost as much as **projections and feed-forward** together, in a
# layer of width `d` with feed-forward width `f`? Write `crossover(d, f)`, a number of tokens. (Then: how many items of this shop is that, at d = 128 and f = 512?)
#
# <details><summary>Hint</summary>
#
# Put the three lines of "Where the FLOPs go" into an equation and divide both sides by 4 · n · d.
# </details>


# %% tags=["exercise"]
def crossover(d, f):
    """int width, int feed-forward width → number of tokens."""
    ### BEGIN SOLUTION
    return 2 * d + f  # 4 n² d = 8 n d² + 4 n d f
    ### END SOLUTION


# %% tags=["check"]
teach.check("crossover", crossover)

# %% [markdown]
# ### Exercise 2 · ★★☆ · 15 minutes
#
# How large is a trie? Given `codes` int64 [items, L], count its **nodes at every depth** 1..L: how many different beginnings of that many codes there are. For
# `[[0, 1], [3, 1], [0, 2], [3, 1]]` these are `[2, 3]`.
#
# <details><summary>Hint</summary>
#
# `np.unique(array, axis=0)` keeps each row once. A beginning of two codes is a row of `codes[:, :2]`.
# </details>


# %% tags=["exercise"]
def trie_nodes(codes):
    """int64 [items, L] → list of L ints."""
    ### BEGIN SOLUTION
    depths = range(1, codes.shape[1] + 1)
    return [len(np.unique(codes[:, :depth], axis=0)) for depth in depths]
    ### END SOLUTION


# %% tags=["check"]
teach.check("trie_nodes", trie_nodes)

# %% [markdown]
# ## Summary
#
# FLOPs follow from configuration and lengths alone, exactly; seconds need a measurement, because memory traffic and fixed prices are not in the FLOPs. A fit of four
# coefficients predicts steps it has not seen roughly; how roughly, your table of held-out steps says. Pruning saves where layers after the pruner have work to do: long histories, wide models,
# large batches. Where a step only waits, it saves little or nothing. A catalogue of a million items costs memory for its table and trie, and hardly any time.

# %%
teach.quiz(
    teach.Question(
        "Histories become twice as long. Which part of a layer grows fourfold?",
        ["The projections", "The feed-forward part", "The scores and the weighted sum", "All"],
        2,
        "They have n² terms. The others have n.",
    ),
    teach.Question(
        "A step takes 40 ms, 36 of them the fixed price of layers. What can pruning save at most?",
        ["90 %", "10 %", "Two thirds", "Nothing can be said"],
        1,
        "Only the other 4 ms depend on the number of tokens.",
    ),
    teach.Question(
        "Why is the fit judged on steps that it was not made from?",
        [
            "They are faster",
            "Four coefficients can bend towards the points they were fitted to",
            "To save time",
            "Because of dropout",
        ],
        1,
        "Agreement on the points of the fit is not a prediction.",
    ),
    teach.Question(
        "From 1,000 to 1,000,000 items with the same levels and codes per level: what grows?",
        ["The model", "The beam", "The table and the trie", "All of them"],
        2,
        "The model speaks in codes, and there are as many as before.",
    ),
    teach.Question(
        "GPU-hours from FLOPs and the data sheet's peak are …",
        ["an upper bound", "a lower bound", "exact", "unrelated"],
        1,
        "No real step reaches the peak, and small ones are far from it.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943); STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329); TIGER: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065)
# * Code: [the cost model](../sidlab/research/cost.py) and [its test against counters](../tests/test_cost.py), [the calibration](../sidlab/research/calibration.py),
#   [the calculator](../sidlab/viz/cost.py), [the trie](../sidlab/sids/trie.py), [beam search](../sidlab/decoding.py)

# %% tags=["record"]
record = {
    "flops_growth": growth,
    "fit_error": speed.error,
    "worst_prediction": worst,
    "ratio_small": float(ratio[small]),
    "ratio_large": float(ratio[large]),
    "catalogue_slower": float(slower),
    "table_mb": float(scale["MB"].iloc[-1]),
    "table_mb_predicted": float(scale["MB, predicted"].iloc[-1]),
}
teach.record(record)
