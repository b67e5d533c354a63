# %% [markdown]
# # 6. Training runs: reading a comparison with intervals
#
# Train one model that works, prune it when it recommends, then train it on, pruned and unpruned. And say what the numbers mean.
#
# **Goals**
#
# * Train a model in about a minute that comes near the best possible, and see what pruning takes from it.
# * Continue it with and without a pruner: let the runs race, stop one, and resume it where it was.
# * Put an interval around a recall, compare two models on the same users, and know what one seed cannot tell.
# * Read a quality–cost frontier.
#
# **You need** the idea of pruning ([00](00_start_here.ipynb)); mean and variance.
#
# **Time** 40 minutes, of which about 4 are training and evaluation; 25 more with the two exercises.
#
# **Machine** Two cores and 1.5 GB of memory, as on Binder; no GPU, no network.

# %% tags=["parameters"]
arch = "qwen"  # "qwen", decoder-only, or "t5", encoder and decoder
n_users = 2000  # customers of the planted shop
epochs = 8  # how often the first model is taught every item
more_updates = 60  # of each run that continues
eval_every = 20  # updates between two evaluations
eval_users = 500  # users of each evaluation on validation items
keep = 1 / 3  # the share of tokens that pruned models keep
seed = 0  # weights and order of the batches
resamples = 1000  # of a bootstrap by hand

# %% tags=["setup"]
import itertools
import json
import pathlib
import tempfile

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import sidlab
from sidlab import PruningConfig, TrainConfig
from sidlab.course import teach
from sidlab.metrics import bootstrap_interval, paired_test, rank_of_target, recall_at
from sidlab.training import evaluate

# %% [markdown]
# ## 1. One model that works
#
# The data are the planted shop's, with SIDs from residual k-means. Each customer's last item is for the **test**, the one before for
# **validation**, all before that for training (*leave-one-out*).

# %%
catalogue = sidlab.load_catalogue("planted", n_users=n_users)
encoder = sidlab.ResidualKMeans(levels=3, width=(8, 8, 4), seed=0).fit(catalogue.embeddings)
table = sidlab.SidTable(encoder.encode(catalogue.embeddings), width=(8, 8, 4))
split = sidlab.windows.leave_one_out(catalogue.histories)
print(catalogue.n_items, "items,", sum(map(len, split.train)), "clicks to train on")

# %% [markdown]
# Two ways to teach. **One target**: read a history, predict the item after it. **Every target**: read a history once, and predict each of
# its items from those before it.

# %%
from sidlab.windows import training_windows

common = dict(arch=arch, eval_every=eval_every, eval_users=eval_users, seed=seed)
dense = TrainConfig.preset("quick", targets="all", epochs=epochs, **common)
single = TrainConfig.preset("quick", continued=True, epochs=100, max_updates=more_updates, **common)
stretches, windows = (training_windows(split.train, config) for config in (dense, single))

# %% [markdown]
# What is in one update? Batches of similar length, which need little padding. Together they sample all lengths in proportion, so every
# target weighs the same. An update of each kind by hand:

# %%
from sidlab.windows import Collator, StretchCollator
from sidlab.batches import LengthBatches, StratifiedBatches

slots = table.levels + single.separators  # of an item
every = LengthBatches(stretches.lengths, slots, dense.batch_tokens, seed, dense.accumulation)
one = StratifiedBatches(windows.lengths, slots, single.batch_tokens, seed, single.accumulation)
collators = (
    StretchCollator(stretches, table, separators=dense.separators),
    Collator(windows, table, separators=single.separators, max_items=single.max_items),
)
in_update = {}
for name, batches, collate in zip(("every target", "one target"), (every, one), collators):
    update = [collate(batch) for batch in itertools.islice(batches, batches.accumulation)]
    tokens = sum(batch["attention_mask"].sum().item() for batch in update)
    # −100 is no target
    taught = sum((batch["labels"][..., 0] >= 0).sum().item() for batch in update)
    in_update[name] = {
        "tokens read": tokens,
        "targets": taught,
        "tokens per target": tokens / taught,
    }
pd.DataFrame(in_update).T.round(1)

# %% [markdown]
# Every `eval_every` updates `sidlab.train` recommends to `eval_users` users and counts the validation items it finds. The checkpoint with
# the best recall@5 is the result. The next cell takes a minute or two.

# %%
first = sidlab.train(dense, catalogue, table, progress=False)
model = first.model
print(f"{first.timing['train_seconds']:.0f} s, the evaluations left out")
evaluations = {entry["step"]: entry["recall@10"] for entry in first.log if "recall@10" in entry}
pd.Series(evaluations, name="validation recall@10").round(3)

# %% [markdown]
# ## 2. What is a good number?
#
# A recall of its own says nothing. Three rulers: the most **popular** items for everyone; a table of what stood **next to** each item in
# the training histories; and, as this shop is planted, the **Bayes optimum**, the list of one who knows by which rules customers click.

# %%
from sidlab.research.baselines import NeighbourTable, Popularity

histories, targets = split.cases("test")
lists = {
    name: baseline().fit(split.train, catalogue.n_items).recommend(histories)
    for name, baseline in (("popularity", Popularity), ("neighbours", NeighbourTable))
}
lists["bayes"] = catalogue.truth.recommend(histories)
ranks = {name: rank_of_target(items, targets) for name, items in lists.items()}
ranks["base"] = evaluate(model, histories, targets)
pd.Series({name: recall_at(of, 10).mean() for name, of in ranks.items()}, name="recall@10").round(4)

# %% [markdown]
# `base` is our model. `ranks` holds for each test user the place of the hidden item in the list of ten, 0 where it is missing;
# **recall@10** is the share of users with a place.
#
# The best *validation* recall above is flattered: its checkpoint was chosen because it was high. Test items took no part in any choice.
#
# Other customers of the same shop would have given another recall. How different?

# %%
hits = recall_at(ranks["base"], 10)  # float [users], 1 where found


def width():
    low, high = bootstrap_interval(hits)
    return high - low


# %% [markdown]
# The **bootstrap** answers without a formula: draw as many users as there are, with replacement, again and again. Where do the middle 95 %
# of the recalls lie?

# %%
rng = np.random.default_rng(0)
means = [rng.choice(hits, len(hits)).mean() for _ in range(resamples)]

# %%
teach.predict(
    f"The model finds {hits.mean():.0%} of {len(hits)} hidden items. How wide is the 95 % interval of that recall?",
    width,
    range=(0, 0.2),
    default=(0.02, 0.06),
    explain="A share p of n users has the standard deviation √(p (1 − p) / n); about four of them make the interval.",
    then=lambda: (
        "By hand the middle 95 % lie from {:.4f} to {:.4f}, with `bootstrap_interval` from {:.4f} to {:.4f}.".format(
            *np.quantile(means, [0.025, 0.975]), *bootstrap_interval(hits)
        )
    ),
)

# %% [markdown]
# ## 3. Prune it when it recommends
#
# A pruner has no weights, so a trained model can take one on at once. Three scorers choose what stays after layer 2: `rastp`, `random` and
# `recent` (the newest).


# %%
def pruned(scorer, share):
    """Ranks of the test items, the model keeping `share` of the tokens after layer 2."""
    model.set_pruning(PruningConfig(after_layer=2, keep=share, scorer=scorer))
    found = evaluate(model, histories, targets)
    model.set_pruning(None)
    return found


scorers = ("rastp", "random", "recent")
shares = (1 / 2, keep, keep / 2)
tried = {(scorer, share): pruned(scorer, share) for scorer in scorers for share in shares}
ranks |= {f"base-{scorer}": tried[scorer, keep] for scorer in ("rastp", "random")}

# %%
from sidlab.figures.theme import mark, template

figure = go.Figure()
for place, scorer in enumerate(scorers):
    values = [recall_at(tried[scorer, share], 10) for share in shares]
    half = [np.ptp(bootstrap_interval(of)) / 2 for of in values]
    look = mark(scorer)
    figure.add_scatter(
        x=100 * np.array(shares) + place - 1,
        y=np.mean(values, axis=1),
        name=scorer,
        error_y_array=half,
        marker_symbol=look.symbol,
        marker_size=10,
        line_color=look.color,
        line_dash=look.dash,
    )
figure.add_hline(hits.mean(), line_dash="dot", annotation_text="nothing pruned")
figure.update_layout(
    template=template(), height=380, xaxis_title="tokens kept, %", yaxis_title="test recall@10"
)

# %%
teach.predict(
    f"RASTP keeps {keep:.0%} of the tokens, without training. How much of the recall is left?",
    100 * recall_at(ranks["base-rastp"], 10).mean() / hits.mean(),
    range=(0, 110),
    default=(60, 95),
    unit="%",
    explain="The layers after the pruner were trained with all tokens.",
    then=figure,
)

# %% [markdown]
# **What to look for**
#
# * Does any scorer reach the dotted line? How far is `rastp` above `random`, or below? That is what choosing is worth.
# * The bars are 95 % intervals, moved apart so that you see them. Where they overlap, is the order open? Hold that thought.
#
# ## 4. Train on, pruned and unpruned
#
# Can the model learn to do with fewer tokens? We continue it: the same weights, a new optimiser, small steps, few updates. A comparison is
# fair if all else is equal: start, data, batches, updates, learning rate, seed. So the unpruned model goes on, too. Else the pruner would
# be credited with what more training does.

# %%
import dataclasses

configs = {"unpruned": single}
for scorer in ("rastp", "random"):
    configs[scorer] = dataclasses.replace(
        single, pruning=PruningConfig(after_layer=2, keep=keep, scorer=scorer)
    )
folder = tempfile.TemporaryDirectory()
with sidlab.training.quiet():  # no bar over the saved files
    model.save_pretrained(folder.name)

# %% [markdown]
# These runs teach one target a window, since a pruner would keep other tokens for each target of a pass.
#
# Why not train each method from nothing, as the papers do (`protocol="scratch"` of [compare.py](../sidlab/research/compare.py))? Each would
# have to learn from single targets, and runs cut short show who learns faster. It matters where you ask what a model becomes that never
# saw all tokens: it may learn to put what it knows where its pruner looks.
#
# Press **Start all**. The three runs race in the background, a few updates each in turn: go on reading and running cells.

# %%
from sidlab.viz import TrainingMonitor

monitor = TrainingMonitor(configs, catalogue, table, start_from=folder.name)
monitor

# %% [markdown]
# **What to look for**
#
# * Where does each loss begin? All start from the same weights, but not with the same tokens.
# * How far does recall jump between evaluations? Few users are noisy, so a curve may even cross the Bayes line, which is the
#   best that can be expected, not the luckiest. The lines are the rulers of section 2, on these users.
# * After two evaluations: **which run would you stop?** Stop it. The others go on, and faster. Was it behind by more than recall jumps?
# * **Resume** it: a stopped run goes on where it was, to the same bit as if nothing had stopped it.
# * The seconds are each run's own, and rough: what you run meanwhile shares the CPU. (And PyTorch's random numbers; the next section
#   draws none.)
#
# ## 5. While it trains: a published claim
#
# The same arithmetic on RASTP's paper, which reports recall@10 on Amazon Beauty, with 22,363 test users:

# %%
beauty = sidlab.papers.published("amazon-beauty")
# Wherever this notebook lies
stored = pathlib.Path(sidlab.__file__).parents[1] / "results" / "amazon-beauty-long.json"
ours = {row["method"]: row["recall@10"] for row in json.loads(stored.read_text())["summary"]}
added = pd.DataFrame(
    [
        {"method": name, "source": "this kit", "recall@10": ours[name]}
        for name in ("neighbours", "sasrec", "unpadded")
    ]
)
both = pd.concat([beauty[["method", "source", "recall@10"]], added])
both.set_index("method").sort_values("recall@10")

# %% [markdown]
# `neighbours` is the table of section 2, `sasrec` a transformer over plain item ids, `unpadded` our unpruned SID model. **A table that
# knows only which items stand side by side finds more than TIGER and RASTP in their papers.** (Preparations of the data differ, so mind
# small gaps.) A comparison among SID models does not say whether to use one.


# %%
def of_rastp(published):
    return published[published.source.str.contains("2511.16943")].set_index("method")["recall@10"]


pair = of_rastp(beauty)
sports = of_rastp(sidlab.papers.published("amazon-sports"))
found = np.arange(22_363) < pair["TIGER"] * 22_363  # as many hits as the baseline had
low, high = bootstrap_interval(found)
print(f"the gain RASTP reports: {pair['RASTP'] - pair['TIGER']:+.4f}")
print(
    f"the interval of its baseline alone: [{low:.4f}, {high:.4f}], half of it is {(high - low) / 2:.4f}"
)
tiger = beauty[beauty.method == "TIGER"]["recall@10"]
print(f"TIGER as different people reproduce it: {tiger.min():.4f} to {tiger.max():.4f}")
print(f"on Amazon Sports RASTP reports {sports['RASTP'] - sports['TIGER']:+.4f}")

# %% [markdown]
# The reported gain is smaller than half the interval, and much smaller than the spread between honest reproductions of one method. That
# does not make it false, but these tables cannot show it.
#
# ## 6. The result
#
# The next cell waits until training is done; if you did not press Start, it does. A stopped run is there with its best checkpoint so far,
# but it had fewer updates.

# %%
results = monitor.wait()
assert {"unpruned", "rastp"} <= results.keys(), "stopped too early to compare: press Resume all"
ranks |= {name: evaluate(result.model, histories, targets) for name, result in results.items()}

# %%
from sidlab.research.summary import metrics_of
from sidlab.research.figures import quality

summary = [{"method": name, **metrics_of(of)} for name, of in ranks.items()]
quality({"dataset": "planted", "rows": [], "summary": summary})

# %%
pd.DataFrame(summary).set_index("method")[["recall@10", "ndcg@10"]].round(4)

# %% [markdown]
# **What to look for**
#
# * `base-rastp` is the first model, pruned; `rastp` was trained on, pruned. What did that give? What did it give `random`, and `unpruned`?
# * The price of pruning is `unpruned` against `rastp`, after the same updates, not `base` against `rastp`.
# * Do the intervals of `rastp` and `random` overlap?
#
# ## 7. The same users, twice
#
# The intervals above answer: *what if the users had been others?* But all models were tested on the **same** users. Those whom two models
# both find or both miss say nothing about which is better.

# %%
a, b = (recall_at(ranks[name], 10) for name in ("unpruned", "rastp"))
verdict = np.array(["misses it", "finds it"])
pd.crosstab(
    pd.Series(verdict[a.astype(int)], name="unpruned"),
    pd.Series(verdict[b.astype(int)], name="rastp"),
)


# %%
def ratio():
    (low_a, high_a), (low_b, high_b), (low, high) = (
        bootstrap_interval(values) for values in (a, b, a - b)
    )
    return (high - low) / (high_a - low_a + high_b - low_b)


# %%
teach.predict(
    "Subtract user by user and bootstrap the differences. How wide is their interval, relative to both recalls' widths added?",
    ratio,
    range=(0, 1.5),
    default=(0.3, 0.7),
    explain="Two independent samples would give 0.71. What is below that comes from pairing: what both find and both miss cancels.",
)

# %%
pairs = [
    ("base-rastp", "base"),
    ("unpruned", "base"),
    ("rastp", "base-rastp"),
    ("rastp", "unpruned"),
    ("base-rastp", "base-random"),
    ("rastp", "random"),
]
tests = {
    pair: paired_test(*(recall_at(ranks[name], 10) for name in pair))
    for pair in pairs
    if ranks.keys() >= set(pair)
}
rows = [
    (" minus ".join(pair), test.difference, *test.interval, test.p_value)
    for pair, test in tests.items()
]
pd.DataFrame(rows, columns=["", "recall@10", "from", "to", "p"]).set_index("").round(4)

# %% [markdown]
# Read a row like this:
#
# * **The interval leaves 0 out**: on users like these, *this* trained model is better (or worse) than *that* trained model.
# * **The interval holds 0**: these users do not tell them apart. That is not "equal". The ends say what would still go unnoticed.
# * **p** asks: if the two models were interchangeable, how often would chance alone give a difference at least this large? (Swap the two
#   results of random users, again and again.) A small p does not say that the difference *matters*; look at its size.
#
# Then compare `base-rastp minus base-random` with `rastp minus random`. What of RASTP's lead is left when both were trained on?
#
# ## 8. What one seed cannot say
#
# All of that is about these models. With another seed, the weights, the batches and the result are others. One seed cannot show how much.
#
# | you want to say | you need |
# |---|---|
# | this model beats that model on users like these | one run of each, paired on the same users |
# | this *method* beats that method | five seeds or more of each: an interval over seeds, and one over users |
# | this method is better in general | several data sets as well |
# | this method is cheaper | both costs measured the same way, on a machine with nothing else to do |
#
# `paired_test` takes `[seeds, users]` as well, and gives each seed's difference. Three numbers say too little about their own spread for an
# interval; from five on it gives one. `make reproduce` in a terminal does this notebook's comparison for eight methods and three seeds.
#
# **Try it:** `seed = 1` in the parameters cell, and run the notebook again. Which rows of the last table keep their sign?
#
# **And then:** `arch = "t5"`. Taught this way, its encoder lets no token see later items, so the oldest are seen by most. What does that
# do to `rastp`? Add `"rastp-visible"` to `scorers`: it divides by how many see a token.
#
# ## 9. What it cost
#
# Seconds are of training alone, without evaluation. FLOPs are predicted from the configuration and the lengths of the histories.

# %%
from sidlab.research.cost import cost

runs = {"base": (dense, stretches, first)}
runs |= {name: (configs[name], windows, result) for name, result in results.items()}
costs = pd.DataFrame(
    {
        name: {
            "MFLOPs per target": cost(config, table.widths, of).training / 1e6,
            "seconds per 1,000": result.timing["seconds_per_1k_windows"],
            "tokens after the pruner": result.tokens["kept_token_fraction"],
        }
        for name, (config, of, result) in runs.items()
    }
).T
costs.round(3)

# %% [markdown]
# * The largest saving needs no pruner: `base` reads a history once for all its targets.
# * Layers 1 and 2 see all tokens, so FLOPs shrink less than tokens do. Seconds rarely shrink as much as FLOPs, if at all: a small model
#   spends much of its time on what is no product of matrices.
# * Nothing here is padded to a fixed length. RASTP's paper compares with a model that is: [notebook 07](07_padding_is_not_pruning.ipynb).
#
# ## 10. The frontier
#
# Models **recorded** on the same shop for several kept shares and scorers, three seeds each, all trained from nothing, the papers' way.
# The slider stops at recorded shares only.

# %%
from sidlab.viz import FrontierExplorer

frontier = FrontierExplorer(keep=1 / 3)
frontier

# %% [markdown]
# **What to look for**
#
# * Up and left is better. Move the slider through all shares. Does the interval of any scorer reach the dotted line, nothing pruned?
# * Where is `rastp` ahead of `recent`, and where not? In this shop, what matters was often last seen far back. But where hardly anything
#   may stay, the newest items are a safe choice.
# * Compare with section 3. Is the order of the scorers the same for models that pruned from the start?

# %% [markdown]
# ### Exercise 1 · ★★☆ · 10 minutes
#
# Recall does not care whether the target is first or tenth. **NDCG** does. With a single target it is, for each user,
#
# ```
# 1 / log2(1 + rank)   where the target is among the first k, else 0
# ```
#
# Write `ndcg(ranks, k)`, the mean over users.
#
# <details><summary>Hint</summary><code>np.where(found, value, 0)</code> computes <code>value</code> everywhere, at rank 0 too. Use
# <code>np.maximum(ranks, 1)</code> in the logarithm, or the division by log2(1) = 0 warns.</details>


# %% tags=["exercise"]
def ndcg(ranks, k):
    ### BEGIN SOLUTION
    found = (ranks >= 1) & (ranks <= k)
    return float(np.where(found, 1 / np.log2(1 + np.maximum(ranks, 1)), 0).mean())
    ### END SOLUTION


# %% tags=["check"]
teach.check("ndcg", ndcg)

# %% [markdown]
# ### Exercise 2 · ★★★ · 15 minutes
#
# Write `paired_interval(a, b, users)`: the 95 % bootstrap interval of the mean of a − b. `a` and `b` are float arrays `[U]`, a value for
# each user. The drawing is done for you, so that your answer can be compared: `users` is an integer array `[R, U]`, and each of its rows
# is one resample, the U users that were drawn. Return the 2.5 % and the 97.5 % quantile of the R means.
#
# <details><summary>Hint</summary>Subtract first. Indexing an array <code>[U]</code> with <code>users</code> gives <code>[R, U]</code>: a
# row of drawn values for each resample. Over which axis is the mean? Then <code>np.quantile(means, [0.025, 0.975])</code>.</details>


# %% tags=["exercise"]
def paired_interval(a, b, users):
    ### BEGIN SOLUTION
    means = (a - b)[users].mean(axis=1)  # [R]
    return np.quantile(means, [0.025, 0.975])
    ### END SOLUTION


# %% tags=["check"]
teach.check("paired_interval", paired_interval)

# %% [markdown]
# ## Summary
#
# A fair comparison changes one thing and keeps start, data, batches, updates and seed. A recall on a few thousand users is known to about
# two digits; drawing users again gives its interval. Models tested on the same users are compared user by user, which is sharper than two
# intervals. One seed speaks about models, not about methods. And a pruner is judged at every kept share, against random choice and an
# unpruned model that had the same updates.

# %%
teach.quiz(
    teach.Question(
        "A model finds the targets of 45 % of 2,000 test users. Roughly, the 95 % interval of its recall is",
        ["0.449 to 0.451", "0.43 to 0.47", "0.35 to 0.55"],
        1,
        "The standard deviation is √(0.45 · 0.55 / 2000) ≈ 0.011, and the interval reaches about two of them to each side.",
    ),
    teach.Question(
        "The intervals of two recalls, measured on the same users, overlap. Then",
        [
            "the models are equally good",
            "the models may still differ, compared user by user",
            "more epochs are needed",
        ],
        1,
        "Users whom both find or both miss widen both intervals, but cancel in the difference.",
    ),
    teach.Question(
        "Why is the best validation recall of a run a poor estimate of its test recall?",
        [
            "Validation items are harder",
            "The checkpoint was chosen because it was high",
            "Validation uses another metric",
        ],
        1,
        "The maximum of noisy numbers is flattered by the noise. Test items take no part in any choice.",
    ),
    teach.Question(
        "One run of RASTP, one unpruned, the same seed; paired interval of the difference [−0.03, −0.01]. What may you say?",
        [
            "RASTP loses recall on this data set",
            "This RASTP model finds fewer targets than this unpruned model",
            "RASTP loses between 1 and 3 % on any shop",
        ],
        1,
        "Users were resampled, seeds and data sets were not.",
    ),
    teach.Question(
        "A pruner keeps a third, saves 30 % of the time and loses 0.02 of recall. What shows that its scorer is any good?",
        [
            "Its recall against random pruning at the same kept share",
            "Its recall against popularity",
            "The falling loss",
        ],
        0,
        "Random pruning saves the same time. The scorer is what is different.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943). STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329). TIGER, the
#   model that both prune: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065).
# * NDCG: K. Järvelin and J. Kekäläinen, *Cumulated gain-based evaluation of IR techniques* (2002). The bootstrap: B. Efron and R.
#   Tibshirani, *An Introduction to the Bootstrap* (1993).
# * In the kit: [training.py](../sidlab/training.py), [metrics.py](../sidlab/metrics.py), [baselines.py](../sidlab/research/baselines.py),
#   [compare.py](../sidlab/research/compare.py), [viz/training.py](../sidlab/viz/training.py). Section 10 is made by [study.ipynb](study.ipynb).

# %% tags=["record"]
record = {f"recall_{name}": float(recall_at(of, 10).mean()) for name, of in ranks.items()}
record |= {"_minus_".join(pair): float(test.difference) for pair, test in tests.items()}
record |= {"runs": len(results), "updates": results["unpruned"].timing["updates"]}
record["tokens_per_target"] = {
    kind: float(of["tokens per target"]) for kind, of in in_update.items()
}
# What the questions of section 10 rest on
recall = {(row["pruning.scorer"], row["pruning.keep"]): row["recall@10"] for row in frontier.runs}
record |= {
    f"rastp_minus_recent_at_{keep}": recall["rastp", keep] - recall["recent", keep]
    for keep in (0.1, 0.5)
}
record |= {
    "recorded_reaching_unpruned": sum(row["difference_interval"][1] >= 0 for row in frontier.runs)
}
teach.record(record)
