# %% [markdown]
# # 2. Semantic dilution: what finer semantic IDs cost
#
# A finer semantic ID spells an item with more tokens. This notebook measures what those tokens hold, what they cost,
# and what they buy.
#
# **Goals**
# * Find out whether more tokens per item hold more information, in nats that you compute yourself.
# * Find where in a history the information about the next item sits, by level and by age, and whether norms and
#   attention know it.
# * Read a sweep over levels and widths honestly: cost, intervals, one seed, and what else changed on the way.
#
# **You need** [01 · semantic IDs](01_semantic_ids.ipynb) (levels, codes, residual k-means, collisions). Entropy is
# explained here.
#
# **Time** 40 minutes, of which 25 without the exercises.
#
# **Machine** 1–2 cores, under 1 GB of memory, no network, no GPU. The trainings behind the sweep were done before and
# are bundled.

# %% tags=["parameters"]
users = 300  # histories whose tokens are measured inside the model
levels_tried = [1, 2, 3, 4, 5, 6]
recorded = ""  # or the file that your own `make study` wrote
repeat = False  # True: train a small sweep yourself, further down (some minutes)

# %% tags=["setup"]
import json
import pathlib

import numpy as np
import pandas as pd
import plotly.express as px
import torch

import sidlab
from sidlab.course import demo
from sidlab.course import teach
from sidlab.course.probe import Probe
from sidlab.viz import DilutionExplorer
from sidlab.figures.theme import template

torch.set_num_threads(1)  # the model is too small to gain from more
catalogue, encoder, table, model = demo.load()
levels = ["department", "brand", "kind"]

# %% [markdown]
# ## The claim
#
# STAMP (arXiv 2604.05329) calls it the **semantic dilution effect**: finer SIDs raise the cost, and accuracy goes up
# and down instead of up. It gives two reasons. Information is spread *unevenly* over the tokens. And supervision is
# *sparse*: only the last item's tokens are targets. The paper's settings and numbers for this are not available to
# us, so we look at both reasons where the truth is known: in the planted shop.
#
# The shop has 160 items in a tree of departments, brands and kinds, and 2,000 users who click through it. Residual
# k-means recovers the tree: level 1 of the SIDs is the department, level 2 the brand, level 3 the kind.

# %%
item = 17
print(
    catalogue.items.title[item - 1],
    "→ SID",
    table.codes[item - 1],
    "→ tokens",
    table.item_tokens[item].tolist(),
)
print(
    f"{table.n_items} items, codes per level {table.widths}, model with {model.num_parameters():,} parameters"
)

# %% [markdown]
# ## More tokens, more information?
#
# How much can the tokens of an item tell at all? The entropy of a code that takes value c with probability p(c):
#
# ```
# H = −Σ p(c) log p(c)      in nats (log is the natural one); exp(H), the perplexity, is the number of equally frequent codes that would be as uncertain
# ```
#
# Whole SIDs have an entropy, too: count each combination of codes as one value. We count clicks, not items, because
# tokens come in clicks.

# %%
clicks = np.concatenate(catalogue.histories) - 1  # rows of `codes`


def entropy(codes):
    _, counts = np.unique(codes, axis=0, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


print(
    f"which item: {entropy(clicks):.2f} nats, perplexity {np.exp(entropy(clicks)):.0f} of {catalogue.n_items} items"
)

# %% [markdown]
# Now let residual k-means spell the same items with one level, two, three …, of 4 codes each. Where items collide,
# the table adds one more level that only tells them apart. So every spelling is unique, and only its length changes.

# %%
rows = []
for n in levels_tried:
    fitted = sidlab.ResidualKMeans(levels=n, width=4, seed=0).fit(catalogue.embeddings)
    spelled = sidlab.SidTable(fitted.encode(catalogue.embeddings), width=4)
    nats = entropy(spelled.codes[clicks])
    rows.append(
        {
            "levels": n,
            "added level": spelled.widths[-1] if spelled.levels > n else 0,
            "tokens per item": spelled.levels,
            "nats per item": nats,
            "nats per token": nats / spelled.levels,
        }
    )
spellings = pd.DataFrame(rows)
shortest, *_, longest = spellings["nats per token"]
few, *_, many = spellings["tokens per item"]

# %%
teach.predict(
    f"The longest spelling has {many} tokens an item, the shortest {few}. How many nats does an average token of the longest hold, in percent of "
    "one of the shortest?",
    100 * longest / shortest,
    range=(0, 150),
    default=(20, 60),
    unit="%",
    explain="The item stays the same, and so does its entropy. More tokens only divide it: that is the dilution.",
    then=[
        spellings.style.format(precision=2).hide(axis="index"),
        "**What to look for.** “nats per item” is one number all the way down: a unique spelling says which item it is, no more. "
        "Only “nats per token” moves.",
    ],
)

# %% [markdown]
# Try `levels_tried = [1, 3, 9]` in the parameters, or `width=16` in the loop: what happens to the added level?
#
# ## Not every level says the same
#
# A token is read after its prefix, so what it adds is its entropy *given* the codes before it:
#
# ```
# H(c₂ | c₁) = H(c₁, c₂) − H(c₁)
# ```

# %%
codes = table.codes[clicks]  # [clicks, 3]
rows = []
for level, name in enumerate(levels):
    before = entropy(codes[:, :level]) if level else 0.0
    rows.append(
        {
            "level": f"{level + 1} ({name})",
            "codes": table.widths[level],
            "log W": np.log(table.widths[level]),
            "entropy": entropy(codes[:, level]),
            "given the prefix": entropy(codes[:, : level + 1]) - before,
        }
    )
by_level = pd.DataFrame(rows)
by_level["perplexity given the prefix"] = np.exp(by_level["given the prefix"])
by_level.style.format(precision=2).hide(axis="index")

# %% [markdown]
# Level 2 could tell 8 brands apart. Once you know the department, fewer are left, so the token is worth less than it
# looks. The three numbers "given the prefix" add up to the entropy of the item.
#
# ## What tokens know about the *next* item
#
# Entropy says how surprising a token is. A recommender asks something else: what does it tell about the item that
# comes next? In the planted shop that can be computed exactly, for each token of each history, all others known
# (`catalogue.truth.information`, in nats).

# %%
# The last item is the one to be found
histories = [history[:-1] for history in catalogue.histories]
nats = catalogue.truth.information(histories)  # [users, items, 3], left-aligned
lengths = np.array([len(history) for history in histories])
# 1 for the last item, 2 for the one before it, …; below 1: padding
age = lengths[:, None] - np.arange(nats.shape[1])
user, place = np.nonzero(age >= 1)
truth = pd.DataFrame(nats[user, place], columns=levels).assign(age=age[user, place])

# %%
by_age = truth[truth.age <= 12].groupby("age").mean()
long = by_age.reset_index().melt("age", var_name="level", value_name="nats")
figure = px.line(
    long,
    x="age",
    y="nats",
    color="level",
    symbol="level",
    line_dash="level",
    markers=True,
    height=380,
    template=template(),
    title="True information about the next item, by level and age",
    labels={"age": "age (1 = last item)", "nats": "mean nats per token"},
)

# %%
teach.predict(
    "Which level of the SIDs tells nothing at all about the next item?",
    "kind",
    choices=levels,
    default="kind",
    explain="Kinds are drawn anew for each click from the department's popularity. The token costs as much as any other.",
    then=[
        truth[levels].mean().to_frame("mean nats per token").T.style.format(precision=4),
        figure,
        "**What to look for.** The department matters at age 1 and little elsewhere: the next department follows from the last one. "
        "(At age 2 it still counts where the last click was noise.) The brand is the other way round. A user comes back to a department "
        "after a tour of a few clicks, and what they bought *then* decides the brand now. So the best token is neither always the newest "
        "nor always of one level. The table says the same:",
        by_age.T.style.format(precision=3),
    ],
)

# %% [markdown]
# ## Do norms and attention know it?
#
# A pruner can't see the truth. RASTP and STAMP look at two things after some encoder layer: the L1 norm of a token's
# hidden state (*saliency*) and the attention it receives (*centrality*). `Probe` opens the bundled model on one
# history; we look after layer 2.

# %%
frames = []
for history in histories[:users]:
    probe = Probe(model, history, catalogue.truth)
    frames.append(
        pd.DataFrame(
            {
                "level": probe.levels,
                "age": len(probe.history) - probe.item_index,
                "norm": probe.hidden[2].abs().sum(-1),
                "centrality": probe.centrality(2),
                "nats": probe.truth,
            }
        )
    )
tokens = pd.concat(frames)
tokens["norm × centrality"] = tokens["norm"] * tokens["centrality"]
tokens["level"] = tokens["level"].map(dict(enumerate([*levels, "separator"])))

# %%
signals = ["norm", "centrality", "norm × centrality", "nats"]
means = tokens.groupby("level", sort=False)[signals].mean()
seen = tokens[tokens.age <= 12].groupby(["level", "age"])[["norm", "centrality"]].mean()
shown = seen.reset_index().melt(["level", "age"], var_name="signal")
figure = px.line(
    shown,
    x="age",
    y="value",
    color="level",
    symbol="level",
    line_dash="level",
    facet_col="signal",
    markers=True,
    height=400,
    template=template(),
    title="What a pruner sees after layer 2",
    labels={"age": "age (1 = last item)", "value": ""},
    category_orders={"level": [*levels, "separator"]},
)
figure = figure.update_yaxes(matches=None, showticklabels=True)

# %%
teach.predict(
    "Does the level without information have the smallest norm of the three levels?",
    "yes" if means["norm"][levels].idxmin() == "kind" else "no",
    choices=["yes", "no"],
    default="yes",
    explain="A norm is the size of a state. It does not say whether anybody needs it.",
    then=[means.style.format(precision=3), figure],
)

# %%
seen.unstack("age").loc[[*levels, "separator"], "centrality"].style.format(precision=1)

# %% [markdown]
# **What to look for.** Compare the right picture, and its numbers, with the true ones above. Which token of the last
# item gets most attention, and which holds most? Is there anything at ages 4 to 6, where the brand holds most? Is the
# line of "kind" the lowest? Then in one number each: rank all tokens of these histories by each signal and by the
# true nats, and correlate the ranks (Spearman's ρ: 1 is the same order, 0 none, −1 the reverse).

# %%
agreement = tokens[tokens.level != "separator"][signals].corr("spearman")["nats"].drop("nats")
agreement.to_frame("rank correlation with the true nats").style.format(precision=2)

# %% [markdown]
# That is **information non-uniformity**: tokens differ a lot in what they hold, by level and by age. It makes pruning
# possible. It does not say that any cheap signal finds the right tokens: that is the question of [03 · which tokens
# matter](03_which_tokens_matter.ipynb). This is one model of one planted world; look before you generalise.
#
# ## Sparse supervision
#
# A training window is a history and its next item. The encoder reads every token of the history; only the next item's
# tokens are labels.

# %%
split = sidlab.windows.leave_one_out(catalogue.histories)
windows = sidlab.windows.Windows(split.train, max_items=30)
per_item = table.levels + 1  # with the separator
print(f"{len(windows):,} windows with {windows.lengths.mean():.1f} items of history on average")

# %% [markdown]
# Do finer SIDs make it sparser? Count labels, and then what the labels are worth: the whole label of a window tells
# which item came next, so it holds the entropy of an item, however many tokens spell it.

# %%
sparsity = float(100 * table.levels * len(windows) / (per_item * windows.lengths.sum()))
supervision = pd.DataFrame(
    [
        {
            "tokens per item": n,
            "tokens read per window": (n + 1) * windows.lengths.mean(),
            "labels per 100 tokens read": 100 * n / ((n + 1) * windows.lengths.mean()),
            "label nats per 100 tokens read": 100
            * entropy(clicks)
            / ((n + 1) * windows.lengths.mean()),
        }
        for n in (2, 3, 4, 6, 8)
    ]
)

# %%
teach.predict(
    "Here an item is 3 tokens and a separator. How many labels are there for 100 tokens that the encoder reads?",
    sparsity,
    range=(0, 100),
    default=(5, 30),
    explain="A language model has 100: every token is the label of the ones before it. With longer histories it gets sparser.",
    then=supervision.style.format(precision=1).hide(axis="index"),
)

# %% [markdown]
# The *count* of labels keeps up with the tokens, roughly. What they *say* does not: each label is worth less, and the
# encoder reads more tokens for the same nats. (MAP, in [05 · denser supervision](05_denser_supervision.ipynb), adds
# labels.)
#
# ## What the tokens cost
#
# Attention compares every token with every other: scores and weighted sum take about `4 · N² · d` FLOPs a layer.
# Everything else grows with N. `sidlab.research.cost` counts all of it, from the configuration and the lengths alone.

# %%
config = sidlab.TrainConfig.preset("quick")


def flops(n_levels, width, lengths):
    return sidlab.cost.cost(config, (width,) * n_levels, lengths).training


rows = []
for items in (int(windows.lengths.mean()), 30, 100):
    long_config = sidlab.TrainConfig.preset("quick", max_items=items, batch_tokens=2048)
    for n in (1, 2, 3, 4, 6, 8):
        c = sidlab.cost.cost(long_config, (256,) * n, np.full(64, items))
        rows.append(
            {
                "items of history": items,
                "levels": n,
                "tokens": round(c.slots),
                "MFLOPs per window": c.training / 1e6,
            }
        )
growth = pd.DataFrame(rows)
growth["× against 1 level"] = growth["MFLOPs per window"] / growth.groupby("items of history")[
    "MFLOPs per window"
].transform("first")
growth = growth.pivot(index="levels", columns="items of history", values="× against 1 level")

# %%
teach.predict(
    "From 2 levels to 5 an item takes twice the tokens (3 → 6, with the separator). By what factor do the training FLOPs grow?",
    lambda: flops(5, 256, windows.lengths) / flops(2, 256, windows.lengths),
    range=(1, 5),
    default=(2, 4),
    unit="×",
    explain="At a few dozen tokens the linear layers do most of the work, and they grow with N. N² shows further on.",
    then=growth.style.format(precision=1),
)

# %% [markdown]
# From 1 level to 8, an item takes 4.5 times the tokens (2 → 9, with the separator). Compare that with the last row.
#
# And the width? It buys parameters (an embedding per code) and a larger softmax, but no tokens:

# %%
wider = {
    f"W = {width}": sidlab.cost.cost(config, (width,) * 3, windows.lengths)
    for width in (16, 256, 4096)
}
pd.DataFrame(
    {
        name: {"parameters": c.parameters, "MFLOPs per window": c.training / 1e6}
        for name, c in wider.items()
    }
).T.style.format({"parameters": "{:,.0f}", "MFLOPs per window": "{:.1f}"})

# %% [markdown]
# ## What they buy: a recorded sweep
#
# Cost is arithmetic. Accuracy has to be measured. These models were trained with the `quick` preset (a small model, a minute each) on the planted shop: every number of levels with every width,
# three seeds each. A point is the mean over seeds. Before you look:

# %%
explorer = DilutionExplorer(json.loads(pathlib.Path(recorded).read_text()) if recorded else None)
rows = explorer.runs
recall = {(row["sids.levels"], row["sids.width"]): row["recall@10"] for row in rows}
finer = [(size, (size[0] + 1, size[1])) for size in recall if (size[0] + 1, size[1]) in recall]
rises = int(sum(recall[after] > recall[before] for before, after in finer))

# %%
teach.predict(
    f"There are {len(finer)} ways to add one level at the same width. In how many of them does recall@10 rise?",
    rises,
    range=(0, len(finer)),
    default=(len(finer) / 4, 3 * len(finer) / 4),
    explain="Had accuracy simply risen with finer SIDs, it would be all of them.",
)

# %%
explorer

# %% [markdown]
# **What to look for.**
# * A panel for each number of levels: recall above, cost below. Go through the levels at `W = 8`, the width of the planted tree, and watch the cursor. Is its bar higher with every level?
#   (2 × 8 has a level more, against collisions, so as many tokens as 3 × 8.) Is its point?
# * And at `W = 4`, with too few codes? At `W = 16`, with too many?
# * Switch the cost from predicted FLOPs to measured seconds. FLOPs are exact arithmetic; seconds also tell what else
#   the machine was doing, so trust them only where the order of the bars makes sense.
# * Take `L = 1`: one level of 4 codes leaves 160 items in 4 groups. The table says how many items share their codes,
#   and how large the added level has to be. It numbers the items of a group, without meaning: coarse SIDs move the
#   difficulty into that number. What does it cost in recall?
# * Compare the perplexity of a level with its width. Unused codes cost parameters and bring nothing.
#
# The best that any recommender can reach here is known, too:

# %%
ceiling = float(catalogue.truth.bayes_recall(histories).mean())
best = max(rows, key=lambda row: row["recall@10"])
print(
    f"Bayes-optimal recall@10: {ceiling:.3f}; best of the sweep: {best['recall@10']:.3f} "
    f"with {best['sids.levels']:g} levels of {best['sids.width']:g} codes"
)

# %% [markdown]
# ## Reading it honestly
#
# Each point is three trained models. Its interval says how far it would move with other *test users* and other *seeds*. But all models were tested on the same users, so compare
# them user by user ([notebook 6](06_training_runs.ipynb) shows how): which of the steps "one level more" are clear?

# %%
row_of = {(row["sids.levels"], row["sids.width"]): row for row in rows}
pair_of = {(pair["label"], pair["against"]): pair for pair in explorer.data["versus"]}


def step(a, b):
    # Of recall@10, with its 95 % interval
    pair = pair_of[row_of[b]["label"], row_of[a]["label"]]
    low, high = pair["difference_interval"]
    return {
        "from": "{} × {}".format(*a),
        "to": "{} × {}".format(*b),
        "change of recall@10": pair["difference"],
        "low": low,
        "high": high,
        "clear": "yes" if low > 0 or high < 0 else "no",
        "updates": f"{row_of[a]['updates']:g} → {row_of[b]['updates']:g}",
    }


steps = pd.DataFrame([step(a, b) for a, b in finer])
steps.style.format({name: "{:+.3f}" for name in ("change of recall@10", "low", "high")}).hide(
    axis="index"
)

# %% [markdown]
# Where a step is clear, it goes up while the SIDs are coarse and down where they are finer than the shop's own tree, 8 × 8 × 4: accuracy is not monotone in granularity, as STAMP says.
# Whether the reason is *dilution* is another question. Four warnings before you conclude anything:
#
# * **Three seeds are few.** That is why the intervals are wide; a step whose interval holds 0 is undecided. And of
#   twelve steps that do nothing at all, one may look clear by chance.
# * **The updates differ.** All runs saw the same windows, in batches of the same number of *tokens*. Longer SIDs make
#   fewer windows a batch, so more updates. See the last column: part of a gain can be those.
# * **The collision level differs.** "1 × 4" has two levels. What changes from left to right is not one thing.
# * **They are short trainings.** A setting that learns more slowly looks worse here and may win in the end.
#
# The paper's finding, non-monotone accuracy, is a statement about its data and its settings. Ours is about this shop,
# this preset and these seeds.
#
# ## Repeat it
#
# This is all it takes. `sidlab.sweep` trains each setting in a process of its own, keeps the results in a folder and
# never does a run twice. `preset="quick"`, all levels and widths and `seeds=3` made the recording; a run takes about a
# minute. [The study](study.ipynb) `granularity` made it, with STAMP beside it, and takes data of your own. Set
# `repeat = True` to start with two small ones.

# %%
if repeat:
    frame = sidlab.sweep(
        {"sids.levels": [2, 3], "sids.width": [8]}, "../runs/my-dilution", preset="smoke", seeds=1
    )
    print(
        frame[
            ["sids.levels", "sids.width", "seed", "recall@10", "seconds_per_1k_windows", "updates"]
        ].to_string(index=False)
    )
else:
    print("repeat is False: nothing was trained")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · ★☆☆ · 5 minutes
#
# Write `attention_flops(n, d)`: FLOPs of one self-attention over `n` tokens whose heads have `d` numbers in total:
# the scores, and the weighted sum of the values. A multiply and an add are 2 FLOPs. (Then: by what factor does it
# grow from 3 tokens per item to 6?)
#
# <details><summary>Hint</summary>
#
# A product `[n, d] × [d, n]` takes 2 · n · d · n FLOPs. There are two products of this size.
#
# </details>


# %% tags=["exercise"]
def attention_flops(n, d):
    ### BEGIN SOLUTION
    scores = 2 * n * d * n
    weighted_sum = 2 * n * n * d
    return scores + weighted_sum
    ### END SOLUTION


# %% tags=["check"]
teach.check("attention_flops", attention_flops)

# %% [markdown]
# ### Exercise 2 · ★★☆ · 10 minutes
#
# Write `mean_by_age(values, lengths)`. `values` is float `[U, M]`, one number per item of each history, oldest first,
# *left-aligned*: row u has `lengths[u]` of them and zeros behind. Return the mean for age 1 (each history's last
# item), age 2, … up to the longest history, over those histories that reach so far back. The check is registered in
# the next cell, as you would register one of your own.
#
# <details><summary>Hint</summary>
#
# Age a of row u stands in column `lengths[u] - a`. Rows with `lengths[u] < a` must neither add to the sum nor to the
# count.
#
# </details>


# %% tags=["setup"]
def _mean_by_age(values, lengths):
    return [
        float(np.mean([row[n - a] for row, n in zip(values, lengths) if n >= a]))
        for a in range(1, max(lengths) + 1)
    ]


_lengths = np.array([5, 2, 3, 5, 1])
_values = np.random.default_rng(0).normal(1, 1, (5, 5)) * (np.arange(5) < _lengths[:, None])
teach.register(
    "mean_by_age",
    [(_values, _lengths), (_values[1:3], _lengths[1:3])],
    _mean_by_age,
    {
        "This counts from the oldest item: age 1 is the last item of each history.": lambda v, n: [
            float(np.mean([row[a] for row, m in zip(v, n) if m > a])) for a in range(max(n))
        ],
        "Histories that do not reach so far back are counted as zeros.": lambda v, n: [
            float(np.mean([row[m - a] if m >= a else 0.0 for row, m in zip(v, n)]))
            for a in range(1, max(n) + 1)
        ],
        "This aligns the rows on the right edge of the array: row u ends at lengths[u], not at M.": lambda v, n: [
            float(np.mean([row[-a] for row, m in zip(v, n) if m >= a]))
            for a in range(1, max(n) + 1)
        ],
    },
)


# %% tags=["exercise"]
def mean_by_age(values, lengths):
    ### BEGIN SOLUTION
    age = lengths[:, None] - np.arange(values.shape[1])  # [U, M]
    return [float(values[age == a].mean()) for a in range(1, lengths.max() + 1)]
    ### END SOLUTION


# %% tags=["check"]
teach.check("mean_by_age", mean_by_age)

# %% [markdown]
# ## Summary
#
# A unique SID holds the entropy of an item, however long it is: finer SIDs spread the same nats over more tokens.
# What a token tells about the next item depends on its level and its age, and a whole level can tell nothing. Norms
# and attention see part of this, and can point the wrong way. Tokens cost FLOPs at least in proportion, more where
# histories are long. What they buy has to be measured, with intervals, with more than one seed, and with an eye on
# what else changed.

# %%
teach.quiz(
    teach.Question(
        "Two spellings give every item a unique SID, with 3 and with 6 tokens. Which has the higher entropy per item?",
        ["3 tokens", "6 tokens", "both the same"],
        2,
        "A unique SID tells which item it is, and no more.",
    ),
    teach.Question(
        "What does a token add to its prefix?",
        ["its entropy", "its entropy given the codes before it", "log of the width"],
        1,
        "What follows from the codes before it is not news.",
    ),
    teach.Question(
        "A level has high entropy. What follows for the next item?",
        ["it is informative", "it is useless", "nothing yet"],
        2,
        "Surprise is not information about the next item: the planted kinds vary and tell nothing.",
    ),
    teach.Question(
        "Why is supervision sparse in these models?",
        [
            "labels are missing",
            "only the next item's tokens are labels",
            "the loss leaves out separators",
        ],
        1,
        "The encoder reads the whole history, and a few tokens of one item are to be predicted.",
    ),
    teach.Question(
        "Two points of a one-seed sweep have intervals (over users) that are apart. What is shown?",
        ["these two models differ on users like these", "one granularity is better", "nothing"],
        0,
        "Another seed makes another model; the interval does not cover that.",
    ),
)

# %% [markdown]
# ## Links
#
# * STAMP, the semantic dilution effect: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329). RASTP: [arXiv
#   2511.16943](https://arxiv.org/abs/2511.16943). TIGER, residual SIDs and the digit against collisions: [arXiv
#   2305.05065](https://arxiv.org/abs/2305.05065).
# * Code: [sids/table.py](../sidlab/sids/table.py) (reports), [data/planted.py](../sidlab/data/planted.py) (the exact
#   information), [probe.py](../sidlab/course/probe.py), [cost.py](../sidlab/research/cost.py), [sweeps.py](../sidlab/research/runs.py),
#   [viz/recorded.py](../sidlab/viz/recorded.py); [study.ipynb](study.ipynb) makes the recording.

# %% tags=["record"]
record = {
    "nats_per_item": float(spellings["nats per item"].mean()),
    "spread_of_nats_per_item": float(np.ptp(spellings["nats per item"])),
    "nats_of_kind": float(truth["kind"].mean()),
    "nats_of_brand": float(truth["brand"].mean()),
    "centrality_agreement": float(agreement["centrality"]),
    "norm_agreement": float(agreement["norm"]),
    "labels_per_100_tokens": sparsity,
    "flops_factor": float(flops(5, 256, windows.lengths) / flops(2, 256, windows.lengths)),
    "recorded_runs": len(rows),
    "steps_that_rise": rises,
    "clear_up": int((steps["low"] > 0).sum()),
    "clear_down": int((steps["high"] < 0).sum()),
    "ceiling": ceiling,
}
teach.record(record)
