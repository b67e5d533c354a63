# %% [markdown]
# # 0. Start here: the whole idea in ten minutes
#
# A shop knows what you bought. Which parts of that history does a recommender really need to guess what comes next?
#
# **Goals**
#
# * See a user's history turn into semantic IDs, see tokens being pruned, and see what that does to the recommendations.
# * Do each of the four steps yourself, in a few lines of Python: *history → semantic IDs → prune → recommend*.
# * Know which questions the other notebooks answer.
#
# **You need** Python and PyTorch at the level of "I have trained a small network". You need no recommender systems. If you have never met a
# T5 transformer, read the one-page [T5 primer](../docs/t5-primer.md) first or when you get there.
#
# **Time** 10 minutes for the idea, 20 with the exercises.
#
# **Machine** Any laptop, or Binder: one core, under 1 GB of memory, no GPU, no network. The model is small and comes trained.

# %% tags=["parameters"]
user = 40  # whose history you look at first, 1 to 50
keep = 1 / 3  # the share of tokens that stays
test_users = 500  # over how many users numbers are averaged

# %% tags=["setup"]
import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab.course import teach

torch.set_num_threads(1)  # the model is too small to gain from more

# %% [markdown]
# ## Play first
#
# Run the cells up to the next one (Shift+Enter runs one) and **drag the first slider**, *kept share*, slowly to the left.
#
# Each group of boxes is an item that this user bought, the oldest first. Each box in it is a **token**, one number that describes a part of the
# item; the bar in it says how important the scorer finds it. Blue tokens are kept. Hatched ones are pruned: they fall out after layer 2, the row closes up, and the layers
# after it see only what is left. An orange dot marks a token that truly tells something about the next item. We can know that here because the
# shop is *planted*: we wrote the rules by which its customers shop. In the list on the right, the ★ item is the one that the user really took next.

# %%
from sidlab.course.demo import load
from sidlab.viz import PruningExplorer

demo = load()
explorer = PruningExplorer(demo.model, demo.catalogue, user=user, keep=1.0, simple=True)
explorer

# %% [markdown]
# **What to look for**
#
# * At 100 % nothing is pruned. Note which items are recommended. How far down can you go until the ★ item leaves the list?
# * The squares below the list are the attention maps before and after the pruner. Every token looks at every other, so half the tokens are a quarter of the area.
# * Open *cost and tables*. The *meter* says what this share costs: the arithmetic of training on this history, in millions of floating-point operations (MFLOPs), and the memory that training keeps for
#   it (activations). [Notebook 8](08_cost_and_scale.ipynb) counts both.
# * Click on the slider and use the arrow keys for small steps. Which tokens survive to the very end?
# * Change *user*. For some the ★ item stays to the end, for some it leaves early, and for many it is never there: nobody is that
#   predictable, and one click in five is pure chance.
# * Change *scorer* to `recent`: it keeps the newest tokens and nothing else.
# * Press *prune by hand* and click away the tokens that you would do without. You are scored at once against four scorers that keep as many. Can you beat `rastp`?
#
# Now the same by hand.
#
# ## 1. A history
#
# A **history** is the list of the items that a user bought, oldest first. We hide the last one: it is the **target**, what the model has to find.

# %%
catalogue = demo.catalogue
*history, target = catalogue.histories[user - 1].tolist()
titles = catalogue.items.title
print(len(catalogue.histories), "users,", catalogue.n_items, "items")
print("this user:", *[titles[item - 1] for item in history], sep="\n  ")
print("hidden:", titles[target - 1])

# %% [markdown]
# ## 2. Semantic IDs
#
# An item number such as 37 says nothing. A **semantic ID** (SID) is a short sequence of codes that does: items with the same first code are
# alike, with the same two codes even more so. It is made from the item's text by clustering, then clustering what is left over, and so on, a code
# per **level** ([notebook 1](01_semantic_ids.ipynb) does it step by step).

# %%
sids = pd.DataFrame(demo.table.codes, columns=["level 1", "level 2", "level 3"]).assign(
    title=titles
)
sids.loc[[item - 1 for item in history]].reset_index(drop=True)

# %%
first, second = demo.table.codes[history[0] - 1][:2]
alike = sids[(sids["level 1"] == first) & (sids["level 2"] == second)]
alike

# %% [markdown]
# These share their first two codes with the oldest item of the history. Here level 1 has found the department, level 2 the brand and level 3
# the kind of thing, although nobody told it these words.
#
# The model reads the codes of all items one after the other, and a **separator** behind each item. In its vocabulary every level has tokens of its own, so a token is not the code itself: 2 is
# the separator, and level by level the codes are counted on from 3. Long SIDs make long histories:

# %%
from sidlab.windows import history_tokens

tokens = history_tokens(np.array([history]), demo.table, separators=True)
n = tokens.shape[1]
print(tokens.shape, "=", len(history), "items ×", n // len(history), "tokens")
tokens.view(len(history), -1)  # [items, tokens per item]

# %% [markdown]
# A transformer compares every token with every other, so twice the tokens cost up to four times as much attention. That is why we want fewer.
#
# ## 3. Prune
#
# We keep a **share of the tokens**, in whole tokens.

# %%
teach.predict(
    f"This history has {n} tokens, and we keep {keep:.0%} of them ({n * keep:.2f}). How many stay?",
    int(sidlab.pruning.kept_count(torch.tensor(n), keep)),
    choices=sorted({max(int(n * keep) + more, 0) for more in (-1, 0, 1)} | {n}),
    default=int(n * keep),
    explain="The share is rounded up: a user with a single token keeps it.",
)

# %% [markdown]
# *Which* ones? The paper [RASTP](https://arxiv.org/abs/2511.16943) lets the model run up to its second layer, and then scores each token by
#
# ```
# importance = attention it receives × size of its hidden state
# ```
#
# Everybody looks at it, and it has a lot to say: then it stays. A `Probe` runs the model on one history and lets us look inside.

# %%
from sidlab.course.probe import Probe

probe = Probe(demo.model, history, catalogue.truth)
# Layer 2: [heads, from, to] → [to], the attention that each token receives
received = probe.attention[1].sum(dim=(0, 1))
size = probe.hidden[2].abs().sum(dim=-1)  # the state after layer 2: [N, d] → [N]
importance = received * size
kept = importance.topk(int(sidlab.pruning.kept_count(torch.tensor(n), keep))).indices.sort().values
kept.tolist()

# %% [markdown]
# `.sort()` matters: the kept tokens stay in their original order, for in a history order means something.
#
# The library's pruner must say the same:

# %%
pruned = probe.prune(sidlab.PruningConfig(after_layer=2, keep=keep, scorer="rastp"))
same = pruned.kept.nonzero().flatten().tolist() == kept.tolist()
print("the library keeps the same tokens:", same)

# %% [markdown]
# ## 4. Recommend
#
# The rest of the model sees only the kept tokens, and writes the SID of the next item code by code. `recommend` does all of it, for many users at
# once, and looks only at SIDs that belong to an item.

# %%
demo.model.set_pruning(sidlab.PruningConfig(after_layer=2, keep=keep, scorer="rastp"))
items, scores = sidlab.recommend(demo.model, [history], k=10)
pd.DataFrame(
    {
        "title": [titles[item - 1] for item in items[0].tolist()],
        "log probability": scores[0].numpy(),
        "the hidden one": items[0].numpy() == target,
    }
)

# %% [markdown]
# One user proves nothing. **recall@10** is the share of users whose hidden item is among the ten recommended ones. We take it over many users, none
# of whose last items the model has seen in training. The best that anybody could reach, knowing the rules of the shop, is called the **Bayes
# optimum**; popular items for everybody are the least that one should beat.

# %%
from sidlab.research.baselines import Popularity
from sidlab.metrics import rank_of_target, recall_at
from sidlab.training import evaluate
from sidlab.windows import leave_one_out

split = leave_one_out(catalogue.histories[:test_users])
histories, targets = split.cases("test")


def recall(pruning):
    """recall@10 of the demo model when pruned as `pruning` says."""
    demo.model.set_pruning(pruning)
    return float(
        recall_at(evaluate(demo.model, histories, targets, truth=catalogue.truth), 10).mean()
    )


# %%
unpruned = recall(None)
best = float(catalogue.truth.bayes_recall(histories, 10).mean())
popular = Popularity().fit(split.train, catalogue.n_items).recommend(histories, k=10)
popular = float(recall_at(rank_of_target(popular, targets), 10).mean())
print(
    f"recall@10 over {len(targets)} users: popular items {popular:.3f}, this model {unpruned:.3f}, Bayes optimum {best:.3f}"
)

# %% [markdown]
# And pruned? By `rastp`, by chance (`random`), and so that the newest tokens stay (`recent`). The next cell measures it, and says nothing yet.

# %%
scorers = ("rastp", "random", "recent")
by_scorer = {scorer: recall(sidlab.PruningConfig(keep=keep, scorer=scorer)) for scorer in scorers}

# %% [markdown]
# Guess before you look. You give a *range* that you are 80 % sure of: a good guesser is wrong with every fifth range.

# %%
teach.predict(
    f"Unpruned, the hidden item is in the list for {unpruned:.0%} of the users. For how many percent, if `rastp` keeps {keep:.0%} of the tokens?",
    100 * by_scorer["rastp"],
    range=(0, 100),
    default=(30, 65),
    unit="%",
    explain=f"Popular items reach {popular:.0%}, the Bayes optimum {best:.0%}.",
)

# %%
teach.predict(
    f"Keeping {keep:.0%}: which choice of tokens loses most?",
    min(by_scorer, key=by_scorer.get),
    choices=[*scorers],
    default="random",
    explain="; ".join(f"{scorer} {value:.3f}" for scorer, value in by_scorer.items())
    + ". In this shop people come back to the brands they like, "
    "so an old purchase can decide the next one. On other data it may be different: that is what one measures.",
)

# %% [markdown]
# Random tokens are the test that a clever scorer must pass, and newest tokens the habit that it must beat.
#
# ## What next
#
# | if you ask | open |
# |---|---|
# | Where do the codes come from, and what makes them good? | [1. Semantic IDs](01_semantic_ids.ipynb) |
# | Why not simply use longer, finer IDs? | [2. Semantic dilution](02_semantic_dilution.ipynb) |
# | Is attention a good judge of importance? | [3. Which tokens matter](03_which_tokens_matter.ipynb) |
# | What happens at other ratios, layers, scorers? | [4. Live pruning](04_live_pruning.ipynb) |
# | Can one learn more from what is left? | [5. Denser supervision](05_denser_supervision.ipynb) |
# | Is it worth it, in seconds and in recall? | [6](06_training_runs.ipynb), [7](07_padding_is_not_pruning.ipynb), [8](08_cost_and_scale.ipynb) |
# | And on my data? | [9. Your own data](09_your_own_data.ipynb), then the [capstone](10_capstone.ipynb) |

# %% [markdown]
# ### Exercise 1 · ★☆☆ · 5 minutes
#
# Write the rule of step 3: how many of `n` tokens stay when a share `keep` is kept? Rounded up, at least one token if there is any, and none of none.
#
# <details><summary>Hint</summary>
#
# `math.ceil(keep * n)` is nearly right. Try it on 30 tokens and a share of 1.1 / 3.3: floating-point numbers are a little off, and a product that is
# 10.000000000000002 must not become 11. Take a millionth away first.
# </details>

# %% tags=["exercise"]
import math


def kept_count(n: int, keep: float) -> int:
    """How many of n tokens are kept."""
    ### BEGIN SOLUTION
    if n == 0:
        return 0
    return max(1, math.ceil(keep * n - 1e-6))
    ### END SOLUTION


# %% tags=["check"]
teach.check("kept_count", kept_count)

# %% [markdown]
# ### Exercise 2 · ★☆☆ · 5 minutes
#
# `ranks` holds, for each user, the place of the hidden item in the list: 1 is the top, and **0 means that it is not in the list**. Return recall@k as one
# number.
#
# <details><summary>Hint</summary>
#
# A hit is a rank from 1 to k. What does `(ranks <= k)` say about rank 0?
# </details>


# %% tags=["exercise"]
def recall_at_k(ranks, k: int) -> float:
    """The share of users whose hidden item is among the first k."""
    ### BEGIN SOLUTION
    hits = (ranks >= 1) & (ranks <= k)
    return float(hits.mean())
    ### END SOLUTION


# %% tags=["check"]
teach.check("recall_at_k", recall_at_k)

# %% [markdown]
# ## Summary
#
# A history becomes a sequence of semantic-ID tokens, several for each item. A pruner scores them after an early layer, keeps the best share in their original
# order and drops the rest; later layers and the decoder work on the shorter sequence. Recall@10 says what it costs in quality, and it is read between
# two anchors: popular items below, and (only where the world is planted) the Bayes optimum above. How one chooses the tokens makes a difference, and
# random tokens and a simple rule such as "the newest" are the competitors to measure it against.

# %%
teach.quiz(
    teach.Question(
        "What is a semantic ID?",
        [
            "A random number per item",
            "A short sequence of codes; similar items share its beginning",
            "The item's title",
            "A vector of real numbers",
        ],
        1,
        "Clustering the item's embedding level by level gives the codes, so that a shared prefix means likeness.",
    ),
    teach.Question(
        "What is dropped for good by the pruner?",
        [
            "The oldest items",
            "Items that were bought once",
            "Tokens with a low score, for all layers after it",
            "Layers of the model",
        ],
        2,
        "Kept tokens are gathered into a shorter tensor; nothing after the pruner sees the others.",
    ),
    teach.Question(
        "Why do the kept tokens stay in their original order?",
        [
            "Sorting is cheaper that way",
            "Order in a history carries meaning",
            "The scorer needs it",
            "They do not",
        ],
        1,
        "What was bought last, and which code belongs to which item, can be read from the order.",
    ),
    teach.Question(
        "A user's hidden item is at place 12 of the ranking. What does this user add to recall@10?",
        ["0", "1", "10/12", "1/12"],
        0,
        "recall@10 of a single hidden item is 1 if it is among the first ten and 0 otherwise.",
    ),
    teach.Question(
        "Why do we compare with keeping random tokens?",
        [
            "Random is the fastest",
            "It shows how much of the quality comes from choosing well",
            "Random is always worst",
            "The paper asks for it",
        ],
        1,
        "What random tokens reach needs no cleverness; only what lies above it is the scorer's merit.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP, Representation-Aware Semantic Token Pruning: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943)
# * STAMP, Semantic Trimming and Auxiliary Multi-step Prediction: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329)
# * TIGER, generative retrieval with semantic IDs: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065)
# * Code: [the planted shop](../sidlab/data/planted.py), [the pruning layer](../sidlab/pruning.py), [the scorers](../sidlab/saliency.py),
#   [constrained beam search](../sidlab/decoding.py), [the demo model](../sidlab/course/demo.py), [this explorer](../sidlab/viz/pruning.py)
# * [T5 primer](../docs/t5-primer.md)

# %% tags=["record"]
record = {
    "recall_unpruned": unpruned,
    "recall_bayes": best,
    "recall_popular": popular,
    "same_tokens": int(same),
    **{f"recall_{scorer}": value for scorer, value in by_scorer.items()},
}
teach.record(record)
