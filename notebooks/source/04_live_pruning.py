# %% [markdown]
# # 4. Live pruning
#
# Turn every knob of the pruner on a trained model, and find out where the information of a history sits by the time it is pruned.
#
# **Goals**
#
# * Read the pruning explorer: which tokens stay at each ratio, layer, scorer, unit and position mode, and what that does to the list and the cost.
# * Measure what you see on one user over hundreds of users.
# * Find out whether a token that truly matters at the input is the one worth keeping two layers later.
#
# **You need** [notebook 0](00_start_here.ipynb); [notebook 3](03_which_tokens_matter.ipynb) helps, for what attention says and does not say.
#
# **Time** 35 minutes, 15 of them with the exercises.
#
# **Machine** One core, about 1 GB of memory, no GPU, no network.

# %% tags=["parameters"]
user = 44  # whose history you look at first
keep = 1 / 3  # the share of tokens that stays
test_users = 500  # over how many users numbers are averaged
ratios = [0.1, 0.2, 1 / 3, 0.5, 0.75, 1]  # of the curve

# %% tags=["setup"]
import json
import pathlib

import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab import PruningConfig
from sidlab.course import teach

torch.set_num_threads(1)  # the model is too small to gain from more

# %% [markdown]
# ## The explorer
#
# | control | what it does |
# |---|---|
# | kept share | how many of the history's tokens stay, rounded up |
# | scorer | what makes a token worth keeping: `rastp` (attention received × size of the state), its factors alone (`centrality`, `norm`), `random`, `recent`, `oracle` (what truly matters, known in a planted world) |
# | prune after layer | after which of the four encoder layers; that layer's attention votes |
# | unit | single tokens, or whole items by the sum of their scores |
# | positions | what later layers know about place: the `original` one, the place among the kept (`compact`), or `none` |
# | keep all separators | on top of the share |
#
# Tick *more controls* for the last four. Above the dashed line stand all tokens as the layers up to the pruner read them; below it, closed up, those that go on. On the right: the recommendations and who moved,
# and two attention maps, averaged over heads: a row is a token that looks, a column one that is looked at. Left: the scoring layer, where everything is still
# there. Right: the next layer, drawn to the same scale, so that its area is what is left to compute. *attention maps* shows them larger, *cost and tables* holds a meter of what was saved.

# %%
from sidlab.course.demo import load
from sidlab.viz import PruningExplorer

demo = load()
catalogue = demo.catalogue
explorer = PruningExplorer(demo.model, catalogue, user=user, keep=keep)
explorer

# %% [markdown]
# **Things to try**
#
# * Drag *kept share* from 100 % down. Which items leave the list first: those at its top or at its bottom?
# * `rastp` at 33 %: find blue tokens without an orange dot (truly informative), and hatched ones with one. Keep an eye on level 3. It never has a dot.
# * Move *prune after layer* to 4. Nothing lies behind, so the meter saves next to nothing: only the decoder reads fewer tokens.
# * Set *unit* to `item`. Whole columns stay or go, separators with them.
# * Set *positions* to `none`: the published RASTP code loses all positions after the pruner, by accident. Does the list notice?
# * Press *prune by hand*, click tokens away, and see how you do against the scorers at the same number. Then make a rule out of levels and recency (*a rule of your own*) and
#   score it over 200 users.
#
# ## What stays, over many users
#
# One user is an anecdote. `encode_histories` runs the pruned encoder over many histories at once and tells which positions it kept.

# %%
from sidlab.decoding import encode_histories
from sidlab.windows import history_tokens, leave_one_out, pad_histories

histories, targets = leave_one_out(catalogue.histories[:test_users]).cases("test")
# [U, N], 0 is padding
tokens = history_tokens(pad_histories(histories, 30, catalogue.n_items), demo.table)
real = tokens > 0
# 0, 1, 2: the three codes, 3: the separator
level = torch.arange(tokens.shape[1]).expand_as(tokens) % 4
names = ["level 1", "level 2", "level 3", "separator"]


# %%
@torch.no_grad()
def kept_tokens(pruning):
    """Which tokens stay: bool [U, N]."""
    demo.model.set_pruning(pruning)
    encoded = encode_histories(demo.model, histories, catalogue.truth)
    kept = torch.zeros_like(real)
    used = encoded.attention_mask.bool()
    row = torch.arange(len(kept))[:, None].expand_as(used)
    kept[row[used], encoded.positions[used]] = True
    return kept


# %%
scorers = ("rastp", "norm", "centrality", "random", "recent", "oracle")
kept = {scorer: kept_tokens(PruningConfig(keep=keep, scorer=scorer)) for scorer in scorers}
by_level = pd.DataFrame(
    {
        scorer: [k[real & (level == v)].float().mean().item() for v in range(4)]
        for scorer, k in kept.items()
    },
    index=names,
)

# %%
teach.predict(
    f"rastp keeps {keep:.0%} of all tokens. Of which kind does it keep the largest share?",
    by_level["rastp"].idxmax(),
    choices=names,
    default="level 1",
    explain="Shares kept by rastp: "
    + ", ".join(f"{name} {share:.0%}" for name, share in by_level["rastp"].items())
    + ".",
    then=["In percent, for all scorers:", (100 * by_level).round().astype(int)],
)

# %% [markdown]
# In this shop, level 1 is the department, level 2 the brand and level 3 the kind of thing. The world was built so that the kind of a past purchase says
# *nothing* about the next one, and neither do separators and noise clicks. `catalogue.truth` knows, token by token.
#
# **Precision** is the share of the kept tokens that are informative, **recall of tokens** the share of the informative ones that are kept.

# %%
from sidlab.metrics import paired_test, recall_at
from sidlab.training import evaluate
from sidlab.windows import truth_tokens

# Bool [U, N]
informative = truth_tokens(catalogue.truth.informative(histories), 3, True, tokens.shape) > 0


def hits(pruning, cases=(histories, targets)):
    """Whose item the demo model finds when pruned as `pruning` says: float [U], 1 or 0."""
    demo.model.set_pruning(pruning)
    return recall_at(evaluate(demo.model, *cases, truth=catalogue.truth), 10)


def recall(pruning):
    """recall@10 of the demo model when pruned as `pruning` says."""
    return float(hits(pruning).mean())


unpruned = recall(None)
recall_of_scorer = {scorer: recall(PruningConfig(keep=keep, scorer=scorer)) for scorer in scorers}
summary = pd.DataFrame(
    {
        "precision": {s: (k & informative).sum().item() / k.sum().item() for s, k in kept.items()},
        "recall of tokens": {
            s: (k & informative).sum().item() / informative.sum().item() for s, k in kept.items()
        },
        "recall@10": recall_of_scorer,
    }
)
recall_oracle, recall_rastp = (recall_of_scorer[scorer] for scorer in ("oracle", "rastp"))
outcome = (
    "the same"
    if abs(recall_oracle - recall_rastp) < 0.01
    else "oracle"
    if recall_oracle > recall_rastp
    else "rastp"
)

# %%
teach.predict(
    "`oracle` keeps the tokens that truly hold most information about the next item. Which recommends better after the second layer, `oracle` or `rastp`?",
    outcome,
    choices=["oracle", "rastp", "the same"],
    default="oracle",
    explain=f"recall@10: oracle {recall_oracle:.3f}, rastp {recall_rastp:.3f}, nothing pruned {unpruned:.3f}.",
    then=[
        summary.round(3),
        "Compare the first column with the last. If keeping the right *input* tokens were all that mattered, they would rise and "
        "fall together.",
    ],
)

# %% [markdown]
# How sure is a recall of this table? With 500 users each number is known to about ± 0.04, and a difference on the same users to about ± 0.03. Take
# two of them, RASTP and `norm`, its second factor alone, which needs no attention. All users of the shop, compared one by one:

# %%
everybody = leave_one_out(catalogue.histories).cases("test")
test = paired_test(
    *(hits(PruningConfig(keep=keep, scorer=scorer), everybody) for scorer in ("norm", "rastp"))
)
print(
    f"{len(everybody[1]):,} users: norm − rastp {test.difference:+.3f}, 95 % interval {test.interval[0]:+.3f} to {test.interval[1]:+.3f}"
)
stored = pathlib.Path(sidlab.__file__).parents[1] / "results"  # wherever this notebook lies
study = {
    row["label"]: row
    for row in json.loads((stored / "studies/strategies-planted.json").read_text())["rows"]
}
for name in ("norm", "rastp"):
    print(
        "{seeds} models trained with {label}: recall@10 {recall:.3f}, 95 % interval {ends[0]:.3f} to {ends[1]:.3f}".format(
            **study[name], recall=study[name]["recall@10"], ends=study[name]["recall@10_interval"]
        )
    )

# %% [markdown]
# Where the first interval lies above 0, the product is worse than one of its factors, on this model. The last two lines are from [the study](study.ipynb) `strategies`, of models that
# were trained with one scorer each: there seeds differ by more than the two do.
#
# ## Where the information went
#
# The pruner does not choose among input tokens. It chooses among **states after layer 2**, and two layers of attention have moved things around by then. How
# much does a token of one level look at the tokens of its own item? We average the attention of layers 1 and 2 over the items of some users.

# %%
from sidlab.course.probe import Probe

looks = torch.zeros(4, 4)
for history in histories[:20]:
    # [N, N], mean over two layers and all heads
    attention = Probe(demo.model, history).attention[:2].mean(dim=(0, 1))
    items = len(history)
    blocks = attention.view(items, 4, items, 4)  # [item, level, item, level]
    looks += torch.stack([blocks[m, :, m] for m in range(items)]).mean(0) / 20
pd.DataFrame(looks, index=[f"{name} looks at" for name in names], columns=names).round(3)

# %% [markdown]
# Find the large numbers. Tokens look back at the codes of their own item, hardly ever forward, so the codes are handed on: the last code of an item has seen the
# others, the first has seen none. That suggests a scorer which knows nothing of attention or truth: keep **one level** and drop all others. A scorer is any
# function from signals to a number for each token, so four of them are quickly written:


# %%
def only(wanted):
    """A scorer that keeps the tokens of one level, the newest first."""

    def scorer(signals):
        return (signals.levels == wanted) * 1000.0 + signals.positions

    return scorer


one_level = {f"only {name}": only(v) for v, name in enumerate(names)}
recall_of = {
    name: recall(PruningConfig(keep=0.25, scorer=scorer)) for name, scorer in one_level.items()
}

# %%
teach.predict(
    "One token in four: exactly one for each item. Which one would you keep after layer 2?",
    max(recall_of, key=recall_of.get),
    choices=list(one_level),
    default="only level 2",
    explain=", ".join(f"{name} {value:.3f}" for name, value in recall_of.items())
    + f"; rastp at the same share "
    f"{recall(PruningConfig(keep=0.25)):.3f}, nothing pruned {unpruned:.3f}.",
)

# %% [markdown]
# Look at them on single users. Your scorers have joined the menu.

# %%
second = PruningExplorer(
    demo.model, catalogue, scorers=one_level, scorer="only level 1", keep=0.25, user=user
)
second

# %% [markdown]
# **What to look for**
#
# * Go through the four `only …` and watch the ★ item. Which list looks more like the unpruned one (fewer entries marked *new*)?
# * Open *attention maps*. In the left one, look for the line just below the diagonal: tokens that look at their left neighbour.
# * Prune after layer 1 instead of 2. Is one layer enough to hand the codes on?
# * The separators stand behind all codes of their item and could collect everything as well. Do they? The table above says whom they look at.
#
# Three cautions. Two heads of this model were **initialised** to look at the one and the two tokens before (`position_init`, [notebook 3](03_which_tokens_matter.ipynb)), which
# hands codes on; the papers' T5 was not, and who carries what in their models has to be measured there. The demo model was trained with the scorers `rastp`, `norm`, `centrality`, `random` and `recent` by turns, never with yours and never with
# `oracle`; a model trained *with* a scorer can learn to put things where that scorer looks ([capstone](10_capstone.ipynb)). And this is one small model on
# a planted world. What carries over is the question: ask where the information is *at the layer where you prune*.
#
# ## The ratio

# %%
best_level = max(recall_of, key=recall_of.get)
curves = {
    name: [recall(PruningConfig(keep=ratio, scorer=one_level.get(name, name))) for ratio in ratios]
    for name in ("rastp", "random", "recent", best_level)
}

# %%
import plotly.graph_objects as go
from sidlab.figures.theme import VERMILLION, mark, template

figure = go.Figure()
for name, values in curves.items():
    look = mark(name)
    color = VERMILLION if name.startswith("only") else look.color
    figure.add_scatter(
        x=ratios,
        y=values,
        name=name,
        mode="lines+markers",
        line={"color": color, "dash": look.dash},
        marker={"symbol": look.symbol, "size": 9},
    )
figure.update_xaxes(title_text="kept share of the tokens", tickformat=".0%").update_yaxes(
    title_text="recall@10"
)
figure.update_layout(
    template=template(), height=400, title="What a kept share costs in recall, by scorer"
)

# %%
pd.DataFrame(curves.values(), index=curves, columns=[f"{ratio:.0%}" for ratio in ratios]).round(3)

# %% [markdown]
# The same as a table, for those who read numbers. The users are 500: a point above nothing pruned (100 %) by 0.02 is no gain. Where does each curve leave the plateau? A share is a promise about *cost*; what it costs in quality depends
# on the scorer.
#
# ## The layer
#
# Prune early and you save more layers; prune late and the scorer has seen more of the computation. Is it the wiser for it? (Not only the layer changes: a scorer has other attention to go by there.) `cost_table` predicts the cost of training from the configuration and the lengths
# alone ([notebook 8](08_cost_and_scale.ipynb)).

# %%
from sidlab.research.cost import cost_table

pruning = {f"after layer {v}": PruningConfig(after_layer=v, keep=keep) for v in (1, 2, 3, 4)}
configs = {
    name: sidlab.TrainConfig.preset("quick", pruning=p)
    for name, p in {"unpadded": None, **pruning}.items()
}
layers = cost_table(configs, demo.table.widths, np.array([len(h) for h in histories]))[
    ["× FLOPs", "× activations"]
]
layers["recall@10"] = [recall(p) for p in (None, *pruning.values())]
layers.round(3)

# %% [markdown]
# "unpadded" is the model that prunes nothing. The saving shrinks with every layer. Does the recall grow in return? A later layer is the better judge only if
# its attention still points at what matters, and nobody promised that. (In training the demo model was pruned after layers 1 to 3 by turns, never behind 4.)
#
# ## Unit and positions

# %%
variants = {
    (unit, positions): recall(PruningConfig(keep=keep, unit=unit, positions=positions))
    for unit in ("token", "item")
    for positions in ("original", "compact", "none")
}
pd.Series(variants).unstack()[["original", "compact", "none"]].round(3)

# %% [markdown]
# Whole items keep their codes together, but then the kept share of the *items* is all that is left. Across a row: differences of a few thousandths, a few users
# more or less, say that the layers after the pruner hardly use positions. This model was trained with `original`, so a large loss elsewhere would say that they do.

# %% [markdown]
# ### Exercise 1 · ★★☆ · 10 minutes
#
# Write the choice itself. `importance` is float `[B, N]`, with −∞ at padding; `mask` is 1 for real tokens and 0 for padding. Return, for each row, the
# **original positions** of the kept tokens as an **ascending** list: the `ceil(keep · n)` most important of the row's `n` *real* tokens.
#
# <details><summary>Hint</summary>
#
# Go row by row. `n = mask[b].sum()`, the count is `sidlab.pruning.kept_count(n, keep)`, and `importance[b].topk(count).indices` are positions in order of
# importance. Two lines are still missing.
# </details>


# %% tags=["exercise"]
def keep_top(importance, mask, keep):
    """float [B, N], [B, N], share → a list of ascending positions for each row."""
    ### BEGIN SOLUTION
    rows = []
    for scores, valid in zip(importance, mask):
        count = int(sidlab.pruning.kept_count(valid.sum(), keep))
        rows.append(sorted(scores.topk(count).indices.tolist()))
    return rows
    ### END SOLUTION


# %% tags=["check"]
teach.check("keep_top", keep_top)

# %% [markdown]
# ### Exercise 2 · ★★☆ · 5 minutes
#
# Masking pruned tokens would hide them and save nothing: the tensor is as long as before. **Gather** the kept ones into a shorter tensor: `hidden` `[B, N, d]` and
# `positions` int64 `[B, K]` give `[B, K, d]`, every row by its own positions.
#
# <details><summary>Hint</summary>
#
# `torch.gather(hidden, 1, index)` wants an index of the shape of the result. `positions.unsqueeze(-1)` has one column: `expand` it to `d`. Or index with
# two tensors, one of rows `[B, 1]` and one of positions `[B, K]`.
# </details>


# %% tags=["exercise"]
def gather(hidden, positions):
    """float [B, N, d], int64 [B, K] → [B, K, d]."""
    ### BEGIN SOLUTION
    rows = torch.arange(len(hidden))[:, None]  # [B, 1]
    return hidden[rows, positions]
    ### END SOLUTION


# %% tags=["check"]
teach.check("gather", gather)

# %% [markdown]
# ## Summary
#
# The kept share fixes the cost, the scorer decides what is paid for it. Attention moves information between tokens before the pruner sees them, so the token that is
# informative in the input is not necessarily the state that is worth keeping; on this model, whose heads start out looking back, one code of each item has collected what the item says. Pruning
# later saves less and is not better by itself. Units and positions are part of the method, not details: change them and you have another method. And all of this can be
# measured in seconds on a model that exists, before anything is trained.

# %%
teach.quiz(
    teach.Question(
        "A history of 31 tokens, kept share 1/3: how many stay?",
        ["10", "11", "31", "it depends on the scorer"],
        1,
        "ceil(31 / 3) = 11. The scorer decides which ones, never how many.",
    ),
    teach.Question(
        "Why gather kept tokens instead of masking the others?",
        [
            "Masking gives other results",
            "Gathered tensors are shorter: later layers get cheaper",
            "Masks do not work in encoders",
            "It needs less code",
        ],
        1,
        "With a mask every later layer still multiplies tensors of the full length.",
    ),
    teach.Question(
        "The oracle keeps the truly informative input tokens, yet may recommend badly. Why?",
        [
            "The truth is wrong",
            "It keeps fewer tokens",
            "Behind some layers, their information sits in other tokens' states",
            "It prunes the target",
        ],
        2,
        "Attention hands information on. What counts is where it is at the layer where one prunes.",
    ),
    teach.Question(
        "Pruning after the last encoder layer saves little. What does it still save?",
        [
            "All self-attention of the encoder",
            "The decoder's attention to the history",
            "The embeddings",
            "Nothing at all",
        ],
        1,
        "Cross-attention reads fewer states; the encoder has done its work by then.",
    ),
    teach.Question(
        "Which control changes the recommendations without changing the number of kept tokens?",
        ["kept share", "scorer", "keep all separators", "none of them"],
        1,
        "The scorer picks others of the same number. Separators come on top of the share.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943); STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329)
# * Code: [the pruning layer](../sidlab/pruning.py), [the scorers](../sidlab/saliency.py), [where it sits in T5](../sidlab/models/t5.py), [the probe](../sidlab/course/probe.py),
#   [the explorer](../sidlab/viz/pruning.py), [how the demo model was trained](../sidlab/course/demo.py)

# %% tags=["record"]
record = {
    "recall_unpruned": unpruned,
    "recall_rastp": recall_rastp,
    "recall_oracle": recall_oracle,
    "precision_oracle": float(summary.loc["oracle", "precision"]),
    "precision_random": float(summary.loc["random", "precision"]),
    **{name.replace(" ", "_"): value for name, value in recall_of.items()},
    **{f"layer_{v}": float(layers["recall@10"].iloc[v]) for v in (1, 2, 3, 4)},
}
teach.record(record)
