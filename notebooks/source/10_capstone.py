# %% [markdown]
# # 10. Capstone: beat RASTP
#
# Design a scorer that keeps one token in six and recommends better than RASTP's, show it with intervals, and write it on the board.
#
# **Goals**
#
# * Turn what you know about where information sits into a scorer, and test it in seconds on a trained model.
# * Judge it as a reviewer would: equal kept tokens, targets it was not tuned on, intervals, and bounds that nobody can pass.
# * Find out whether what helps a model that exists also helps one that is trained with it, on planted or on real data.
#
# **You need** [notebook 4](04_live_pruning.ipynb), and [notebook 9](09_your_own_data.ipynb) for the form of a scorer.
#
# **Time** 40 minutes, or an evening.
#
# **Machine** Two cores, 1.5 GB of memory, no GPU, no network. Stage 1 takes seconds for each idea, stage 2 about half a minute for each training.

# %% tags=["parameters"]
keep = 1 / 6  # the share of tokens that stays: fewer than one for each item
test_users = 1000  # of stage 1
dataset = "planted"  # of stage 2: "planted", or a folder of your own data (notebook 9)
n_users = 2000  # of the planted world in stage 2
max_updates = 260  # of each training in stage 2
board_file = "../runs/capstone/board.json"
seed = 0

# %% tags=["setup"]
import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab import PruningConfig
from sidlab.course import teach


def fair(scorer):
    """[1, 1, 1] if it is a scorer: shape [B, N], no NaN, padding changes nothing. The truth is not there, so whoever needs it fails."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(8).repeat(2, 1)
    fields = {
        "hidden": torch.randn(2, 8, 4, generator=generator),
        "centrality": torch.rand(2, 8, generator=generator),
        "positions": place,
        "levels": place % 4,
        "item_index": place // 4,
        "mask": torch.ones(2, 8, dtype=torch.long),
    }
    full = scorer(sidlab.saliency.Signals(**fields))
    if full is None:
        raise ValueError(
            "the scorer returned None; `signals.truth` is None here, and no part of the contest"
        )
    if not isinstance(full, torch.Tensor) or full.shape != (2, 8):
        return [0, 1, 1]
    padded = {
        name: torch.nn.functional.pad(value, (0, 0, 0, 4) if name == "hidden" else (0, 4))
        for name, value in fields.items()
    }
    # A padded slot has a state, too: it is only not real
    padded["hidden"][:, 8:] = 3 * torch.randn(2, 4, 4, generator=generator)
    again = scorer(sidlab.saliency.Signals(**padded))[:, :8]
    return [
        1,
        int(not full.isnan().any()),
        int(torch.equal(full.argsort(stable=True), again.argsort(stable=True))),
    ]


teach.register(
    "my_scorer",
    [(fair,)],
    lambda f: f(lambda s: s.positions.float()),
    {
        "A scorer returns a float tensor of the shape [B, N], one number for each token.": lambda f: [
            0,
            1,
            1,
        ],
        "It returns NaN somewhere. A division by 0?": lambda f: [1, 0, 1],
        "Padding changes the order of the real tokens: leave tokens with mask 0 out of means, maxima and votes.": lambda f: [
            1,
            1,
            0,
        ],
    },
)

# %% [markdown]
# ## The contest
#
# * The model is the bundled demo, pruned after layer 2. Every scorer keeps the same number of tokens of every history; only *which* is yours.
# * A scorer may use everything in `signals` except `truth`.
# * **Develop on validation, report on test.** Of every user the last item is the target of the test, the one before it of the validation. Whoever tries thirty ideas on
#   the same targets and reports the best has tuned on them.
# * Two bounds. The **unpruned** model says what this model can do at all. The **Bayes optimum** says what anybody can do who knows the rules of the shop.
#   It is an expectation: on a few hundred users luck can lift a model a little above it.
# * `oracle` keeps the tokens that truly hold most information in the input. Whether that is a bound, too, you saw in notebook 4.

# %%
from sidlab.course.demo import load
from sidlab.metrics import bootstrap_interval, paired_test, recall_at
from sidlab.training import evaluate
from sidlab.windows import leave_one_out

demo = load()
split = leave_one_out(demo.catalogue.histories[:test_users])
truth = demo.catalogue.truth


def hits(scorer, part="validation"):
    """Whose target is among ten recommended items: float [U], 1 or 0. `scorer` None: nothing pruned."""
    demo.model.set_pruning(scorer and PruningConfig(after_layer=2, keep=keep, scorer=scorer))
    # Nobody else sees the truth
    return recall_at(
        evaluate(demo.model, *split.cases(part), truth=truth if scorer == "oracle" else None), 10
    )


# %%
bayes = float(truth.bayes_recall(split.cases("validation")[0], 10).mean())
starters = {
    name: hits(name) for name in ("rastp", "norm", "centrality", "random", "recent", "oracle")
}
unpruned = hits(None)
ratio = starters["oracle"].mean() / unpruned.mean()

# %%
teach.predict(
    f"One token in six stays. How much of the unpruned recall@10, {unpruned.mean():.3f}, does the best of six starters (rastp, its factors norm and centrality, random, recent, oracle) keep, in percent?",
    100 * max(h.mean() for h in starters.values()) / unpruned.mean(),
    range=(0, 100),
    default=(60, 90),
    unit="%",
    explain=f"The oracle keeps {ratio:.0%}: the right tokens of the input are not the right states after layer 2.",
    then=[
        pd.Series(
            {name: h.mean() for name, h in {**starters, "unpruned": unpruned}.items()}
            | {"Bayes optimum": bayes},
            name="recall@10",
        )
        .to_frame()
        .round(3),
        "Keeping one token in six costs RASTP a good part of what the model could do. That gap is your room.",
    ],
)

# %% [markdown]
# Mind the factors of RASTP: a scorer that is ahead of `rastp` and not of `norm` has found nothing new. (And mind the model: two of its heads were initialised to look at the tokens just before, so it hands codes on more readily than a T5 would,
# [notebook 4](04_live_pruning.ipynb).)
#
# Which tokens do they keep? **Precision** (share of the kept ones that are informative in the input) and **recall of tokens** (share of the informative ones that are kept):

# %%
from sidlab.decoding import encode_histories
from sidlab.windows import truth_tokens


@torch.no_grad()
def informative(scorer, part="validation"):
    """(precision, recall) of the kept tokens as to being informative in the input."""
    demo.model.set_pruning(PruningConfig(after_layer=2, keep=keep, scorer=scorer))
    histories = split.cases(part)[0]
    encoded = encode_histories(demo.model, histories, truth if scorer == "oracle" else None)
    # Bool [U, N]
    matters = (
        truth_tokens(
            truth.informative(histories), 3, True, (len(histories), 4 * max(map(len, histories)))
        )
        > 0
    )
    kept = encoded.attention_mask.bool()
    found = (matters.gather(1, encoded.positions) & kept).sum().item()
    return found / kept.sum().item(), found / matters.sum().item()


tokens = pd.DataFrame(
    {name: informative(name) for name in starters}, index=["precision", "recall of tokens"]
).T.round(3)
tokens

# %% [markdown]
# ## Watch before you write
#
# `last_code` keeps the last code of each item, the newest items first. It is a strong competitor that uses no attention at all. But there are more items than places. Which
# items does it give up, and which should it have given up?


# %%
def last_code(signals):
    """The last code of each item, the newest first."""
    last = signals.levels == 2
    return last * 1000.0 + signals.positions


starters["last_code"] = hits(last_code)
print(f"last_code {starters['last_code'].mean():.3f}, rastp {starters['rastp'].mean():.3f}")

# %%
from sidlab.viz import PruningExplorer

explorer = PruningExplorer(
    demo.model,
    demo.catalogue,
    scorers={"last_code": last_code},
    scorer="last_code",
    keep=keep,
    user=44,
)
explorer

# %% [markdown]
# **What to look for**
#
# * Users who buy the same brand in the same department again and again: how many of the kept tokens say the same thing?
# * Noise clicks (*Household*, *Snacks*: brands *Everyday* and *Value*) say nothing. Does the model know? Compare the size of their states, or the attention they receive.
# * Find a user whose ★ item is lost, raise the kept share until it comes back, and see which token brought it.

# %% [markdown]
# ### Exercise 1 · ★★★ · 20 minutes
#
# Your scorer. It gets the signals of a batch and returns float `[B, N]`. Rewrite it and run the next three cells again as often as you like: they look at validation only. Go on to the
# board with the version that is best there.
#
# <details><summary>Hint</summary>
#
# Three ideas that can be combined: keep codes that have collected what their item says; do not keep what is nearly the same as something that you keep already (compare the
# directions of states, and prefer the newer one); leave out items that nobody looks at. `[B, N, N]` comparisons are cheap for short histories.
# </details>


# %% tags=["exercise"]
def my_scorer(signals):
    """Signals → importance [B, N]."""
    ### BEGIN SOLUTION
    direction = torch.nn.functional.normalize(signals.hidden, dim=-1)
    last = signals.levels == 2
    # [B, N, N]
    newer = (signals.positions[:, None, :] > signals.positions[:, :, None]) & (
        last & signals.mask.bool()
    )[:, None, :]
    # To the newer last code that is most like it
    likeness = (direction @ direction.transpose(1, 2)).masked_fill(~newer, -1.0).amax(-1)
    return last * 10.0 - likeness
    ### END SOLUTION


# %% tags=["check"]
accepted = teach.check("my_scorer", lambda f: f(my_scorer))
accepted

# %%
if accepted.passed:
    print(
        f"validation recall@10: mine {hits(my_scorer).mean():.3f}, last_code {starters['last_code'].mean():.3f}, rastp {starters['rastp'].mean():.3f}"
    )

# %% [markdown]
# ## On the board
#
# Now the test. The board is a file, so it outlives the kernel. Entries of one *contest* may be compared: same data, same users, same kept share. A new entry of the same name takes
# the place of the old one.

# %%
from sidlab.course.board import Board

board = Board(board_file)
contest = f"demo model, test of {test_users} users, keep {keep:.3f}"


def enter(name, scorer):
    """Measure a scorer on the test and write it down; returns whose item was found."""
    found = hits(scorer, "test")
    low, high = bootstrap_interval(found)
    precision, coverage = informative(scorer, "test")
    board.add(
        name,
        contest,
        {
            "recall@10": float(found.mean()),
            "low": low,
            "high": high,
            "of unpruned": float(found.mean() / whole.mean()),
            "of Bayes": float(found.mean() / best),
            "precision": precision,
            "recall of tokens": coverage,
        },
    )
    return found


# %%
whole = hits(None, "test")
best = float(truth.bayes_recall(split.cases("test")[0], 10).mean())
board.add("unpruned", contest, {"recall@10": float(whole.mean()), "anchor": True})
board.add("Bayes optimum", contest, {"recall@10": best, "anchor": True})
entries = {name: name for name in ("rastp", "norm", "centrality", "random", "oracle")} | {
    "last_code": last_code
}
if accepted.passed:
    entries["mine"] = my_scorer
found = {name: enter(name, scorer) for name, scorer in entries.items()}

# %%
board.figure(contest)

# %%
board.table(contest)

# %% [markdown]
# Two entries saw the same users, so compare them user by user. The interval of the difference is much narrower than the two intervals suggest.

# %%
challenger = "mine" if "mine" in found else "last_code"
test = paired_test(found[challenger], found["rastp"])
low, high = test.interval
verdict = (
    "beats rastp"
    if low > 0
    else "loses to rastp"
    if high < 0
    else "cannot be told from rastp on these users"
)
print(
    f"{challenger} − rastp = {test.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}: {challenger} {verdict}"
)

# %% [markdown]
# ## Stage 2: train with it
#
# A model that is trained *with* a scorer can learn to put things where the scorer looks. So the ranking of stage 1 need not hold. All trainings below differ in nothing but the
# scorer. At the default `max_updates` they are far from done, and the question they answer is "who learns faster"; for the final word set ten times as many and go for lunch.
#
# Set `dataset` to a folder of your own (the Amazon data load this way, see the [README](../README.md)), and the same race runs there: without oracle and Bayes optimum, which only a
# planted world has, but with the table of neighbouring items that any model has to beat. `last_code` and many other scorers say `levels == 2`: the last code of three-level SIDs. If your table has another number of levels, because collisions added one, say
# `levels == table.levels - 1`, and ask yourself whether a de-duplication digit is the right place to look.

# %%
planted = dataset == "planted"
world = (
    sidlab.load_catalogue("planted", n_users=n_users) if planted else sidlab.load_catalogue(dataset)
)
table = demo.table  # the items are the demo's; only the users differ
if not planted:
    width = int(min(256, max(4, world.n_items // 12)))
    codes = (
        sidlab.ResidualKMeans(3, width, seed=seed).fit(world.embeddings).encode(world.embeddings)
    )
    table = sidlab.SidTable(codes, width)
histories, targets = leave_one_out(world.histories).cases("test")
print(world.n_items, "items,", len(targets), "users, SIDs of widths", table.widths)


# %%
def race(name, scorer):
    """Train with a scorer, test, write it on the board; returns whose item was found."""
    config = sidlab.TrainConfig.preset(
        "quick",
        pruning=PruningConfig(keep=keep, scorer=scorer),
        max_updates=max_updates,
        epochs=100,
        eval_every=max(1, max_updates // 3),
        eval_users=300,
        seed=seed,
    )
    result = sidlab.train(config, world, table, progress=False)
    found = recall_at(
        evaluate(
            result.model, histories, targets, truth=world.truth if scorer == "oracle" else None
        ),
        10,
    )
    low, high = bootstrap_interval(found)
    board.add(
        name,
        trained,
        {
            "recall@10": float(found.mean()),
            "low": low,
            "high": high,
            "seconds": result.timing["train_seconds"],
            "kept share": result.tokens["kept_token_fraction"],
        },
    )
    return found


trained = f"{world.name}, {len(targets)} users, {max_updates} updates, keep {keep:.3f}, seed {seed}"
runners = {
    "rastp": "rastp",
    challenger: entries[challenger],
    **({"oracle": "oracle"} if planted else {}),
}
raced = {name: race(name, scorer) for name, scorer in runners.items()}

# %%
from sidlab.research.baselines import NeighbourTable
from sidlab.metrics import rank_of_target

neighbours = (
    NeighbourTable()
    .fit(leave_one_out(world.histories).train, world.n_items)
    .recommend(histories, k=10)
)
board.add(
    "neighbour table",
    trained,
    {"recall@10": float(recall_at(rank_of_target(neighbours, targets), 10).mean()), "anchor": True},
)
if planted:
    board.add(
        "Bayes optimum",
        trained,
        {"recall@10": float(world.truth.bayes_recall(histories, 10).mean()), "anchor": True},
    )
race_test = paired_test(raced[challenger], raced["rastp"])

# %%
teach.predict(
    f"After {max_updates} updates with each scorer: who is ahead on the test?",
    max(raced, key=lambda name: raced[name].mean()),
    choices=list(raced),
    default="rastp",
    explain=", ".join(f"{name} {h.mean():.3f}" for name, h in raced.items())
    + f". {challenger} − rastp: {race_test.difference:+.3f}, 95 % interval "
    f"{race_test.interval[0]:+.3f} to {race_test.interval[1]:+.3f}, one seed.",
    then=lambda: [board.figure(trained), board],
)

# %% [markdown]
# **Before you claim a victory**
#
# * One seed is one model. Change `seed` and run stage 2 again; does the order hold?
# * Is the kept share really equal? The column says so.
# * Does it hold at `keep = 1 / 3`? On real data? A scorer that wins only on the world that it was made for is a finding about that world.
# * `sidlab.sweep` runs a grid of settings with several seeds, each in a process of its own; `make reproduce METHODS="…"` makes the full comparison.
#   Your scorer takes part by the name of a file: `mine.py` beside the notebook, or in the folder in which you call make, with a function `score` is `"mine:score"`.
#
# A scorer that loses is worth writing down as well: what did you expect, and what happened instead?

# %% [markdown]
# ### Exercise 2 · ★★☆ · 10 minutes
#
# Somebody's scorer divides the attention received by the **mean over the row**, to make rows comparable. In a padded batch the mean is wrong. Write `relative_centrality`:
# centrality `[B, N]` divided by its mean over the **real** tokens of the row, and 0 at padding.
#
# <details><summary>Hint</summary>
#
# The sum of `centrality * mask` over the row, divided by `mask.sum(1)`, is the mean over real tokens. Keep the dimension, so that it broadcasts.
# </details>


# %% tags=["exercise"]
def relative_centrality(centrality, mask):
    """float [B, N], [B, N] → float [B, N], mean 1 over the real tokens of each row, 0 at padding."""
    ### BEGIN SOLUTION
    real = centrality * mask
    mean = real.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return real / mean
    ### END SOLUTION


# %% tags=["check"]
teach.check("relative_centrality", relative_centrality)

# %% [markdown]
# ## Summary
#
# At an equal number of kept tokens a scorer is judged by what the model can still do, not by how many "right" tokens it keeps. Testing on a model that exists takes seconds and finds ideas;
# training with a scorer tests whether they survive when the model adapts. A claim needs targets that were not used for tuning, an interval of the difference, several seeds,
# and bounds that show how much there was to win. A negative result under these rules is a result.

# %%
teach.quiz(
    teach.Question(
        "Why is stage 1 developed on validation targets?",
        [
            "There are more of them",
            "So that test targets have not been used to choose among ideas",
            "They are easier",
            "The model was trained on them",
        ],
        1,
        "The best of many tries on the same targets looks better than it is.",
    ),
    teach.Question(
        "Scorer A keeps 20 % of the tokens and beats B, which keeps 10 %. What follows?",
        [
            "A is the better scorer",
            "B is the better scorer",
            "Nothing about the scorers",
            "A is cheaper",
        ],
        2,
        "More tokens are an advantage of their own. Compare at equal kept shares.",
    ),
    teach.Question(
        "What does the Bayes optimum tell you?",
        [
            "The best recall that training will reach",
            "The best expected recall of anybody who knows how the world works",
            "The recall of the oracle scorer",
            "An upper bound on real data",
        ],
        1,
        "It is computed from the rules of the planted world. Real worlds do not tell theirs.",
    ),
    teach.Question(
        "Why test two scorers user by user (paired)?",
        [
            "It needs fewer users for the same certainty",
            "It is the only test",
            "Unpaired tests are wrong",
            "To get a larger difference",
        ],
        0,
        "Easy and hard users are the same for both, and that part of the noise cancels.",
    ),
    teach.Question(
        "A scorer wins in stage 1 and loses in stage 2. How can that be?",
        [
            "A mistake",
            "The model of stage 2 adapted to each scorer",
            "Stage 1 has more users",
            "It cannot be",
        ],
        1,
        "Trained with a scorer, a model can move information to where that scorer looks.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943); STAMP, which names adaptive ratios and layers as future work: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329)
# * Code: [signals and scorers](../sidlab/saliency.py), [the planted truth](../sidlab/data/planted.py), [intervals and paired tests](../sidlab/metrics.py), [the board](../sidlab/course/board.py),
#   [sweeps](../sidlab/research/runs.py), [the fair comparison](../sidlab/research/compare.py)

# %% tags=["record"]
record = {
    "bayes": best,
    "unpruned": float(whole.mean()),
    **{f"demo_{name}": float(h.mean()) for name, h in found.items()},
    "difference_low": low,
    **{f"trained_{name}": float(h.mean()) for name, h in raced.items()},
}
teach.record(record)
