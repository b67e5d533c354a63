# %% [markdown]
# # 7. Padding is not pruning
#
# Where the published speed of token pruning comes from, measured against the baseline that nobody reports: no padding at all.
#
# **Goals**
#
# * Count what a fixed number of slots costs: how many of them are real tokens, and what "keep a third" does to the others.
# * Time padded, pruned and unpadded training steps on your machine, and report a ratio with its spread.
# * Know the seven quirks of RASTP's published code, each as a switch with its visible effect.
#
# **You need** [notebook 0](00_start_here.ipynb); [notebook 4](04_live_pruning.ipynb) helps, for what a pruner does inside of the encoder.
#
# **Time** 35 minutes, 15 of them with the exercises.
#
# **Machine** One core, about 1 GB of memory, no GPU, no network.

# %% tags=["parameters"]
mean_items = 8.9  # items per history; Beauty has 198,502 actions of 22,363 users, so 8.9
windows_timed = 96  # training examples of the timed steps
rounds = 7  # how often each of them is timed
# A data set of your own joins the explorer (see notebook 9), such as
# "../../shared/data/amazon-beauty"
folder = ""

# %% tags=["setup"]
import dataclasses

import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab import PruningConfig
from sidlab.course import teach

torch.set_num_threads(1)  # steps as small as ours gain little from more, and their times vary less

# %% [markdown]
# ## A batch is a rectangle
#
# Histories have different lengths, and a tensor has none to spare: short rows are filled with **padding**, a token that means nothing, and a mask tells the model to
# look away. Looking away is not free. A padded slot passes through every projection and every feed-forward layer like a real one.
#
# RASTP's published code gives each history 30 items × (4 codes + 1 separator) = **150 slots**, always; at most 29 of the items are history, for the
# target counts among the 30. How many slots does a user fill? The Amazon 5-core sets have many short histories and few long ones. The function below draws lengths
# of that *shape* (a power law from 5 items on, an approximation, not the data).

# %%
from sidlab.viz.padding import five_core_lengths

lengths = five_core_lengths(mean_items)
test_items = np.minimum(lengths - 1, 29)  # of a test history: all but the last item, at most 29
# Share of users by items
pd.Series(test_items).value_counts(normalize=True).sort_index().head(8).round(3)

# %%
teach.predict(
    f"Histories of {mean_items} items on average, 150 slots each: what percentage of all slots of the test histories is padding?",
    float(100 - 100 * test_items.mean() / 30),
    range=(0, 100),
    default=(40, 90),
    unit="%",
    explain=f"Half of the test histories have at most {np.median(test_items):.0f} items, so at most {5 * np.median(test_items):.0f} real tokens in 150 slots.",
)

# %% [markdown]
# ## Keep a third, but of what?
#
# RASTP scores all slots and keeps the best ⌊150 / 3⌋ = 50 of them. Padding has the lowest score, so it goes first. A history of 8 items has 40 real tokens.

# %% [markdown]
# Both rules on four histories. `reference_choice` is the published one; `TokenPruner` keeps a share of each row's *own* tokens.

# %%
from sidlab.pruning import TokenPruner, reference_choice

items = np.array([5, 8, 14, 29])
mask = (torch.arange(150) < 5 * torch.from_numpy(items)[:, None]).long()  # [4, 150], 1 is real
importance = torch.rand(4, 150).masked_fill(mask == 0, -torch.inf)
positions = reference_choice(torch.zeros(4, 150, 1), mask, importance, 1 / 3).positions  # [4, 50]
kept_published = mask.gather(1, positions).sum(1)
kept_own = TokenPruner(1 / 3).choose(mask, importance).sum(1)
both_rules = pd.DataFrame(
    {
        "items": items,
        "real tokens": 5 * items,
        "kept, published rule": kept_published,
        "kept, own tokens": kept_own,
    }
)

# %%
teach.predict(
    "The published rule prunes a history of 8 items, 40 real tokens in 150 slots. How many real tokens does it remove?",
    0,
    choices=[0, 13, 27, 40],
    default=27,
    explain="50 slots stay and 40 tokens are real: all of them stay, with 10 slots of padding. Everything that was 'pruned' was padding.",
    then=[
        both_rules,
        "Only histories of more than ten items lose anything under the published rule. That is not a method that finds the informative "
        "third. It is a method that mostly removes padding which need not have been there.",
    ],
)

# %% [markdown]
# ## The explorer
#
# An average training **window** (a piece of a history and the item to predict from it) under six ways to train. RASTP cuts each history into all its contiguous stretches, so
# the averages differ a little from those of the test histories above. Blue is real and kept, crossed is real and lost, grey is padding that every layer computes, hatched
# is padding that the pruner drops. On the right the training cost in FLOPs of RASTP's own model, relative to 150 slots always; hollow diamonds are the same numbers on
# Beauty's own lengths, with a third kept.

# %%
from sidlab.viz import PaddingExplorer

own = (
    {folder: np.array([len(h) for h in sidlab.load_catalogue(folder).histories])} if folder else {}
)
padding = PaddingExplorer(own, mean=mean_items)
padding

# %% [markdown]
# **Things to try**
#
# * Compare the second row with the fifth, which throws nothing away. Which one is cheaper?
# * Drag *mean items* from 6 to 40. Where does the published rule begin to lose more real tokens than padding? Is unpadded training still cheaper there?
# * Drag *kept share* to 100 %. The published rule then costs as much as no pruning (and a little for the scores), and unpadded training does not move.
# * Set *histories* to `test histories`: here the published rule keeps 84 % and more of all real tokens, at the mean of the Amazon sets.
# * The last row is what pruning really means. How much of the whole way from 1.00 down is pruning, how much is padding?
#
# ## Does a stopwatch agree?
#
# FLOPs are a model. So time it: the same training windows in the same batches, each padded to 30 items (`padding="fixed"`) or to the batch's longest
# (`padding="batch"`, and batches hold windows of similar length), with and without pruning. The model is the small one of the preset `quick`.

# %%
from sidlab.research.calibration import stepper, time_steps
from sidlab.research.cost import cost
from sidlab.course.demo import load
from sidlab.windows import Collator, Windows
from sidlab.batches import StratifiedBatches

table = load().table
rng = np.random.default_rng(0)
# Training parts: random items
users = [rng.integers(1, table.n_items + 1, n - 2) for n in rng.choice(lengths, 200)]
windows = Windows(users, max_items=30)
chosen = rng.choice(len(windows), min(windows_timed, len(windows)), replace=False)

# %%
base = sidlab.TrainConfig.preset(
    "quick", batch_tokens=512, precision="fp32", dropout=0.15, residual_dropout=None
)
configs = {
    "padded": dataclasses.replace(base, padding="fixed"),
    "padded, published pruning": dataclasses.replace(
        base, padding="fixed", pruning=PruningConfig(mode="reference")
    ),
    "unpadded": base,
    "unpadded, own third": dataclasses.replace(base, pruning=PruningConfig()),
}

# %% [markdown]
# One step is forward, backward and an AdamW update on a batch; one measurement goes once through all the batches. The four ways take turns within a round, so that
# whatever else your machine does meets all of them.


# %%
def one_pass(config):
    """A function that makes a training step on every batch and returns the seconds of all."""
    collator = Collator(
        windows, table, separators=True, max_items=30, fixed_slots=config.padding == "fixed"
    )
    batches = StratifiedBatches(
        windows.lengths[chosen], 4, config.batch_tokens, accumulation=config.accumulation
    )
    steps = [stepper(config, table, collator(chosen[batch])) for batch in batches]
    return lambda: sum(step() for step in steps)


# A row a round
seconds = time_steps({name: one_pass(config) for name, config in configs.items()}, rounds)

# %% [markdown]
# A ratio of two noisy times is noisier than either. Report the **ratio of medians**, and beside it the lowest and the highest ratio of any single round: if that
# range holds 1, you have not shown a difference.

# %%
by_round = seconds.div(seconds["padded"], axis=0)
predicted = {
    name: cost(config, table.widths, windows.lengths[chosen]) for name, config in configs.items()
}
ratios = pd.DataFrame(
    {
        "ratio of medians": seconds.median() / seconds["padded"].median(),
        "lowest round": by_round.min(),
        "highest round": by_round.max(),
        "FLOPs": {name: c.training / predicted["padded"].training for name, c in predicted.items()},
        "slots a history": {name: c.slots for name, c in predicted.items()},
        "after the pruner": {name: c.kept for name, c in predicted.items()},
    }
)

# %%
teach.predict(
    "Which is faster on your machine?",
    lambda: seconds.median().drop(["padded", "unpadded, own third"]).idxmin(),
    choices=["padded, published pruning", "unpadded"],
    default="unpadded",
    then=[
        "Milliseconds, a row a round:",
        (1000 * seconds).round().astype(int),
        "By how much, and how sure that is:",
        ratios.round(2),
    ],
)

# %% [markdown]
# The demo's items have three codes and a separator, so there are 120 slots here; and so few windows cannot be cut into batches of quite equal lengths, so a little padding is
# left in the unpadded rows. Measured ratios are not those of the FLOPs: memory traffic is not in them, nor the price of starting a layer, the same for 20 tokens as for
# 120. [Notebook 8](08_cost_and_scale.ipynb) takes that apart. But the point of this notebook does not hang on a digit: **any claim about the speed of pruning has to
# start from unpadded training.**
#
# The paper claims 26.7 % less training time (1.36 ×). Its baseline pads.
#
# ## Seven quirks
#
# Padding is the first of seven things that the published code does and the paper does not say. None of it is an accusation: you find such things in most research code,
# and only because it was published could they be found. `PruningConfig(mode="reference")` repeats all seven; `mode="corrected"` is what this kit uses everywhere else.
#
# |   | the published code | the consequence | corrected |
# |---|---|---|---|
# | 1 | keeps a third of the *padded* length | mostly padding is pruned | a share of each row's own tokens |
# | 2 | drops the position bias after the pruner: only the first block owns one | the layers behind have no position information at all | gathers the bias at the kept places |
# | 3 | hands the decoder the mask of the first K slots, K being how many are kept (the encoder's own layers get that of the kept ones) | right with padding on the right, wrong on the left | hands on the mask of the kept tokens |
# | 4 | padded queries vote in the centrality, the attention that a token receives; they read as code 0 of the first level, every fifth as the separator | in short histories most attention that is counted comes from padding | only real queries vote |
# | 5 | scores with the attention after dropout | the choice is noisy in training | scores with the clean attention |
# | 6 | separators compete with codes | items are cut apart | scores whole items, or protects separators |
# | 7 | asks all layers for attention weights | no *fused* attention anywhere, which is faster since it never writes these weights out | only the scoring layer pays |
#
# The preset `paper` has the rest of the published configuration: 29 of 30 items, feed-forward layers with biases, heads of their own, Adam with L2. It still differs
# in this: windows are drawn without replacement (there with), every target of an update weighs the same (there the loss is a mean of batch means), embeddings start
# small (there from N(0, 1)), and the search walks valid SIDs alone.

# %%
teach.predict(
    "After the pruner, kept tokens swap places: the last becomes the first. What happens to the published code's recommendation (quirk 2)?",
    "nothing at all",
    choices=["nothing at all", "its probability changes a little", "another item is recommended"],
    default="its probability changes a little",
    explain="Without a position bias, self-attention treats its tokens as a set, and so does the decoder's attention to them.",
)

# %% [markdown]
# The demo model, one history cut to 10, 6, 4 and 2 items, all padded to 10 items (40 slots), a third kept after the second layer. The picture on the left follows the
# switch; the bars on the right always show both codes. Everything is computed as you click.

# %%
from sidlab.viz import QuirkExplorer

quirks = QuirkExplorer()
quirks

# %% [markdown]
# **What to look for**
#
# * Quirk 1: the row of 2 items. Which slots stay, and what do they hold?
# * Quirk 2: in the reference the position bias is 0 everywhere. Check your prediction in the bars.
# * Quirk 3 changes *nothing* as long as padding stands on the right, as in the published code. It waits for the first person who pads on the left.
# * Quirk 4: in the picture, every padded query looks much the same way: dozens of copies of one vote.
# * Quirk 5: even the corrected choice wobbles. Dropout in the layers before shakes it, too, and that part is no quirk.
# * Quirk 6: count the items of which some tokens stay and others go.
# * Quirk 7 is invisible in results. On a GPU you would see it in memory and time.
#
# ## Exercises
#
# ### Exercise 1 · ★☆☆ · 5 minutes
#
# Histories of `lengths` items are padded to `max_items` items of `tokens_per_item` tokens each; longer ones are cut. Which **share of all slots** holds a real token?
#
# <details><summary>Hint</summary>
#
# Count real tokens over all histories, count slots over all histories, divide. Cut the lengths first.
# </details>


# %% tags=["exercise"]
def real_tokens(lengths, max_items, tokens_per_item):
    """list of int, int, int → float."""
    ### BEGIN SOLUTION
    real = sum(min(n, max_items) * tokens_per_item for n in lengths)
    return real / (len(lengths) * max_items * tokens_per_item)
    ### END SOLUTION


# %% tags=["check"]
teach.check("real_tokens", real_tokens)

# %% [markdown]
# ### Exercise 2 · ★★☆ · 10 minutes
#
# The published rule leaves ⌊`keep` · slots⌋ places in a history padded to 30 items of 5 tokens, and padding goes first. Which **share of all real tokens**, over
# histories of `lengths` items, does it remove?
#
# <details><summary>Hint</summary>
#
# Per history: the real tokens of at most 30 items, and how many of them find no place. `int(keep * slots + 1e-6)` rounds down: a third of 150 need not be exactly 50
# in floating point. Sum both over all histories before you divide.
# </details>


# %% tags=["exercise"]
def lost_share(lengths, keep):
    """list of int, float → float."""
    ### BEGIN SOLUTION
    places = int(keep * 30 * 5 + 1e-6)
    real = [5 * min(n, 30) for n in lengths]
    return sum(max(0, n - places) for n in real) / sum(real)
    ### END SOLUTION


# %% tags=["check"]
teach.check("lost_share", lost_share)

# %% [markdown]
# ## Summary
#
# A fixed number of slots is mostly padding: 73 to 79 % on RASTP's data. A kept share of the padded length therefore removes padding first, and short histories lose
# nothing. Training without padding loses nothing either and is cheaper than the published pruning; that is where an honest comparison starts. What real pruning
# saves is what lies between *unpadded* and *unpadded, own third*. And six more quirks sit beside it: read the code behind a number before you build on
# the number.

# %%
teach.quiz(
    teach.Question(
        "A history of 9 items has 45 tokens in 150 slots. The published rule keeps 50 slots. How many real tokens are lost?",
        ["0", "15", "30", "45"],
        0,
        "All 45 fit into the 50 slots that stay.",
    ),
    teach.Question(
        "Why does a padded slot cost time although it is masked?",
        [
            "It does not",
            "Masks are slow",
            "It passes through all projections and feed-forward layers",
            "The optimiser updates it",
        ],
        2,
        "The mask only keeps others from looking at it.",
    ),
    teach.Question(
        "You measure 0.9 as the ratio of medians, and single rounds from 0.7 to 1.2. What have you shown?",
        ["10 % less time", "30 % less time", "No difference yet", "20 % more time"],
        2,
        "The range of rounds holds 1. Time more rounds on a quieter machine, or a larger difference.",
    ),
    teach.Question(
        "Which baseline does a claim about the speed of pruning need?",
        ["A padded model", "An unpadded model with nothing pruned", "A larger model", "None"],
        1,
        "Otherwise it claims the padding that it removes.",
    ),
    teach.Question(
        "Which quirk makes the recommendation independent of the kept tokens' order?",
        ["Padding votes", "Dropout in the scores", "The lost position bias", "Separators compete"],
        2,
        "Attention without position information sees a set.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943), its code: Yuzt-zju/RASTP on GitHub; STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329);
#   TIGER, whose model it prunes: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065)
# * Code: [both pruning rules](../sidlab/pruning.py), [where `mode="reference"` sits in T5](../sidlab/models/t5.py), [batches without padding](../sidlab/windows.py),
#   [the explorer](../sidlab/viz/padding.py) and [the quirks](../sidlab/viz/quirks.py), [a test of each quirk](../tests/test_reference.py)

# %% tags=["record"]
record = {
    "padding_share": padding.rows[0]["padding_kept"] / 150,
    "flops_published": padding.rows[1]["flops"],
    "flops_unpadded": padding.rows[4]["flops"],
    "test_padding_share": float(1 - test_items.mean() / 30),
    "measured_unpadded": float(ratios.loc["unpadded", "ratio of medians"]),
    "measured_published": float(ratios.loc["padded, published pruning", "ratio of medians"]),
    "predicted_unpadded": float(ratios.loc["unpadded", "FLOPs"]),
    "swap_reference": max(quirks.evidence(2)["reference"].bars.values()),
    "swap_corrected": max(quirks.evidence(2)["corrected"].bars.values()),
}
teach.record(record)
