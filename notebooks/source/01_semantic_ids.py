# %% [markdown]
# # 1. Semantic IDs: an item becomes a few codes
#
# You build the two usual makers of semantic IDs by hand, residual k-means and the RQ-VAE, compare them with the package's, and learn
# to judge what they make.
#
# **Goals**
#
# * Build residual k-means in ten lines and a residual quantiser inside an autoencoder in twenty, and know what each line is for.
# * Measure semantic IDs: collisions, dead codes, perplexity, reconstruction error. Know what each number cannot see.
# * Read a semantic ID from left to right: what a shared prefix says about two items, and what it does not say.
#
# **You need** PyTorch at the level of "I have trained a small network". What k-means does is shown here. Of
# [Start here](00_start_here.ipynb) only the idea that an item becomes several tokens.
#
# **Time** 40 minutes, of which 25 without the exercises.
#
# **Machine** 1–2 cores, under 1 GB of memory, no GPU, no network. The catalogue is generated.

# %% tags=["parameters"]
# Or a folder with items.jsonl.gz and sequences.txt.gz, as in notebook 09, and then a width of 64
dataset = "planted"
levels = 3  # L, codes in a semantic ID
# W, codes to choose from on each level (the explorer offers 2, 4, 6, 8, 12, 16, 24, 32, and more
# for large catalogues)
width = 8
steps = 400  # of training, for each autoencoder

# %% tags=["setup"]
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import sidlab
from sidlab.course import teach

torch.set_num_threads(1)  # the networks here are too small to gain from more
catalogue = sidlab.load_catalogue(dataset)
items = catalogue.items
x = catalogue.embeddings  # a row per item, a vector per item


def error(decoded):
    """The share of the squared length of all embeddings that `decoded` misses: 0 is perfect, 1 is as good as answering zero."""
    return float(((x - decoded) ** 2).sum() / (x**2).sum())


# %% [markdown]
# ## An item is a vector
#
# A generative recommender writes down the next item as a language model writes down a word, token by token. It needs a vocabulary. One
# token per item would be simple, but then millions of items mean millions of tokens, and two jackets are as unlike as a jacket and a tea bag.
# A **semantic ID** (SID) is the way out: a short sequence of codes from a small vocabulary, such that similar items begin alike.
#
# It is made from an **embedding**, a vector per item that stands for its content. On real data a text encoder reads title, brand and
# categories. Our planted shop adds up three vectors: one for the department, a shorter one for the brand, and a still shorter one for the
# kind of thing.

# %%
print(x.shape, x.dtype)
items[["title", "brand", "categories"]].iloc[
    sorted({0, 1, 4, 24, len(items) - 1} & set(range(len(items))))
]

# %% [markdown]
# Close vectors should be similar items. Which items are closest to the first one? (Distance 0 is the item itself.)

# %%
distance = np.linalg.norm(x - x[0], axis=1)
closest = np.argsort(distance)[:6]
pd.DataFrame({"title": items.title.iloc[closest], "distance": distance[closest].round(2)})

# %% [markdown]
# ## One level: k-means
#
# k-means puts `width` points, the **centroids**, among the vectors. It repeats two steps: each vector chooses its nearest centroid, then
# each centroid moves to the mean of those that chose it. The list of centroids is a **codebook**, the number of a centroid is a **code**.


# %%
def nearest(x, codebook):
    # ‖x − c‖² = ‖x‖² − 2 x·c + ‖c‖², and ‖x‖² is the same for every c.
    return ((codebook**2).sum(axis=1) - 2 * x @ codebook.T).argmin(axis=1)  # [n]


def kmeans(x, width, rounds=20, seed=0):
    # Random items to begin with
    codebook = x[np.random.default_rng(seed).choice(len(x), width, replace=False)].copy()
    for _ in range(rounds):
        code = nearest(x, codebook)
        for c in np.unique(code):
            codebook[c] = x[code == c].mean(axis=0)
    return codebook


# %% [markdown]
# One code stands for many items. Decoding gives back the centroid, and what the centroid does not say is lost.

# %%
codebook = kmeans(x, width)
code = nearest(x, codebook)
one_level = error(codebook[code])

# %%
teach.predict(
    f"{len(x):,} items are now described by one of {width} codes. What share of the squared length of the embeddings is lost?",
    100 * one_level,
    range=(0, 100),
    default=(20, 60),
    unit="%",
    explain="In the planted shop the department is the longest of the three vectors; one level can catch that, at best.",
)

# %% [markdown]
# Each row below is one of the most common categories (in the planted shop: all departments), each column a code.

# %%
category = items.categories.str[-1].rename("category")
common = sorted(category.value_counts().index[:8])
pd.crosstab(category, pd.Series(code, name="code")).loc[common]

# %% [markdown]
# **What to look for.** The planted shop has 8 departments, and there are 8 codes, so every department could have its own. Does it? Look
# for a column with several departments (merged) and for a row that is spread over several columns (split). k-means only ever improves from where
# it starts, and random starts are often unlucky.
#
# The package starts from Ward's hierarchical clustering, which merges the closest groups until `width` are left. Compare:

# %%
starts = [kmeans(x, width, seed=seed) for seed in range(8)]
print("by hand, 8 random starts:", [round(error(book[nearest(x, book)]), 3) for book in starts])
encoder = sidlab.ResidualKMeans(levels, width, seed=0).fit(x)
print("sidlab.ResidualKMeans, level 1:", round(error(encoder.decode(encoder.encode(x)[:, :1])), 3))

# %% [markdown]
# ## More levels: k-means on what is left
#
# Subtract the centroid from each item. What remains is the **residual**: what the first code did not say. Run k-means again, on the
# residuals. Their codes are the second level. And so on (we take start 1, one of the luckier ones):
#
# ```
# r₁ = x,   cₗ = the nearest code to rₗ in codebook l,   rₗ₊₁ = rₗ − codebookₗ[cₗ],   x ≈ codebook₁[c₁] + … + codebook_L[c_L]
# ```

# %%
left = x.copy()
codebooks = []
sids = []
for level in range(levels):
    codebooks.append(kmeans(left, width, seed=1))
    sids.append(nearest(left, codebooks[-1]))
    left = left - codebooks[-1][sids[-1]]
    print(f"after level {level + 1}: {error(x - left):.1%} of the squared length is left")
by_hand = np.stack(sids, axis=1)  # [n, L]

# %% [markdown]
# That is the whole algorithm. Three small codebooks make many SIDs: with 8 codes and 3 levels, 8³ = 512, spelled with only 3 × 8 = 24 tokens, for code 5
# of level 1 and code 5 of level 2 are different tokens. Look at some SIDs, beside the package's. (The numbers of the codes mean nothing. That two items
# share one does.)

# %%
codes = encoder.encode(x)  # int64 [n, L]
spelled = pd.DataFrame(
    {
        "title": items.title,
        "by hand": ["-".join(map(str, sid)) for sid in by_hand],
        "package": ["-".join(map(str, sid)) for sid in codes],
    }
)
spelled.iloc[:10]

# %% [markdown]
# ## See it: residuals shrink, prefixes form
#
# Left: the items on the two main directions of the embeddings, marked by the code that they get next. Right: the tree of all SIDs, first code
# innermost; the ring of the level shown on the left has the same colours. A word says what sets the items under a prefix apart; where there is no
# room for it, it comes with the mouse.

# %%
from sidlab.viz import SidExplorer

SidExplorer(catalogue, levels=levels, width=width)

# %% [markdown]
# **What to look for**
#
# * The meters. *Used codes*: the others are **dead**, no item has them. *Perplexity*: how many codes are used in effect; W if all are equally
#   common, 1 if one code has all items (exercise 3 builds it).
# * Move *map after level* from 0 to 1 and watch: each item loses the centroid of its code, all items of a code move by the same step. The clusters lie
#   on top of each other now: the directions in which departments differ are used up.
# * Go on to 3. The dashed circle is the root mean square length of what is left, in all dimensions. Which level takes the most away?
# * Set *main directions* to *of what is left* after level 1: brands differ in other directions. The map falls into new clusters: what are they now?
#   (The ring of level 2 tells. These axes change with the level, so no item moves from one such map to the next.)
# * With *levels* at 3, move *codes per level* from 8 down to 4. Hatched parts of the tree are SIDs that several items share.
# * Now go up to 32. Do the words on level 1 still name departments only? More codes than departments must split something.
# * Find a setting with 3 levels and no collisions whose codes are used most evenly (perplexity close to the number of codes).
#
# ## Collisions, and the digit that resolves them
#
# Two items with the same SID are a **collision**: the recommender cannot tell them apart. Let us take two levels only, with just enough codes that
# there are 1.6 times as many possible SIDs as items.

# %%
wide = int(np.ceil(np.sqrt(1.6 * len(x))))
two = sidlab.ResidualKMeans(levels=2, width=wide, seed=0).fit(x)
crowded = sidlab.SidTable(two.encode(x), wide, collisions="extend")
report = crowded.report()
shared = report["collision_rate"]
at_random = 1 - (1 - 1 / wide**2) ** (len(x) - 1)  # that at least one other item draws the same

# %%
teach.predict(
    f"{wide} × {wide} = {wide**2:,} possible SIDs for {len(x):,} items. What share of the items has to share its SID with another?",
    100 * shared,
    range=(0, 100),
    default=(0, 30),
    unit="%",
    explain="Possible SIDs are not used SIDs: codes bunch, and even drawn at random they would collide.",
    then=f"Drawn at random it would be {at_random:.1%}. {report['unique_sids']:,} of {wide**2:,} possible SIDs are used, and the largest group has "
    f"{report['largest_group']} items. This is the birthday problem: to be safe from collisions you need far more SIDs than items.",
)

# %% [markdown]
# RASTP has 3 levels of 256 codes, 16.8 million possible SIDs for some ten thousand items, and adds a **de-duplication digit**: one more code, 0 for
# the first item of a group, 1 for the second, and so on. `SidTable(..., collisions="extend")` does that.

# %%
# The largest group
group = crowded.codes[:, :2] == crowded.codes[crowded.codes[:, -1].argmax(), :2]
pd.DataFrame({"title": items.title, "SID": crowded.codes.tolist()})[group.all(axis=1)]

# %% [markdown]
# The digit makes SIDs unique, but says nothing about the item, and *every* item pays a token for it. The other way, `collisions="share"`, leaves
# the codes as they are. The model cannot tell such items apart, so recall and NDCG count what a random order among them gives on average.
#
# ## Prefixes that carry meaning
#
# In the planted shop we know what the codes should stand for. Is code 2 a brand, whatever the department?

# %%
brands = sorted(items.brand.value_counts().index[:8])
pd.crosstab(items.brand, pd.Series(codes[:, min(1, levels - 1)], name="code 2")).loc[brands]

# %% [markdown]
# One level has one codebook for all prefixes, so a code can only
# mean the same thing everywhere. Where the embedding is not a sum of independent parts, that is a limit of residual quantisation.
#
# A number for "similar items begin alike": take an item's 10 nearest neighbours; which share of them has its prefix (`neighbour_overlap`), against
# any other item (`chance_overlap`)? And the same for codes that are dealt out to the items at random:

# %%
table = sidlab.SidTable(codes, width)
dealt = sidlab.SidTable(np.random.default_rng(0).permutation(codes), width)
pd.concat(
    {
        name: t.report(embeddings=x).frame()[
            ["perplexity", "prefixes", "neighbour_overlap", "chance_overlap"]
        ]
        for name, t in (("residual k-means", table), ("the same codes, dealt at random", dealt))
    }
).round(3)

# %% [markdown]
# (Where few items share a prefix, few of the ten neighbours can: with four items to a prefix 0.30 is the most there can be, and where every SID is unique it is 0.)
#
# Perplexity and the number of different prefixes (on the last level: of different SIDs) are the same to the last digit, and all meaning is gone. **Numbers that count codes cannot see meaning.** Whoever
# reports only collisions and utilisation has not shown that the SIDs are semantic.
#
# ## RQ-VAE: let a network choose the space
#
# k-means has to take the embeddings as they are. TIGER trains an autoencoder instead: a network maps `x` to a smaller **latent** `z`, a residual
# quantiser replaces `z` by a sum of codes, and a second network maps the sum back to `x`. Networks and codebooks learn together. One problem: "choose the
# nearest" has no gradient. Two tricks solve it:
#
# ```
# straight-through:  z_q = z + stop(Σ codes − z)        forward it is the codes, backward it is z, as if nothing had been rounded
# two more losses:   ‖code − stop(rest)‖²  moves codes to the latents      ¼ ‖stop(code) − rest‖²  keeps latents near their codes ("commitment")
# ```


# %%
def quantise(z, codebooks):
    """z [n, d] → (what the decoder gets [n, d], codes [n, L], the two losses)."""
    rest = z
    total = 0
    loss = 0
    codes = []
    for codebook in codebooks:  # [W, d]
        code = torch.cdist(rest, codebook).argmin(dim=1)
        chosen = codebook[code]
        loss = loss + F.mse_loss(chosen, rest.detach()) + 0.25 * F.mse_loss(rest, chosen.detach())
        rest = rest - chosen.detach()
        total = total + chosen
        codes.append(code)
    return z + (total - z).detach(), torch.stack(codes, dim=1), loss


# %% [markdown]
# The rest is an ordinary autoencoder. `start(z)` gives the codebooks to begin with; until step `free` the network trains without any codes.

# %%
mean = x.mean(axis=0)
scale = x.std()
data = torch.from_numpy((x - mean) / scale)
latent = 16


def train_by_hand(start, free):
    torch.manual_seed(0)
    encode = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, latent))
    decode = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, x.shape[1]))
    codebooks = nn.Parameter(torch.zeros(levels, width, latent))
    optimiser = torch.optim.Adam([*encode.parameters(), *decode.parameters(), codebooks], lr=3e-3)
    for step in range(steps):
        batch = data[torch.randint(len(data), (256,))]
        if step == free:
            codebooks.data = start(encode(data).detach())
        z = encode(batch)
        z_q, _, loss = quantise(z, codebooks) if step >= free else (z, None, 0)
        loss = loss + F.mse_loss(decode(z_q), batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    z_q, codes, _ = quantise(encode(data), codebooks)
    return codes.numpy(), error(decode(z_q).detach().numpy() * scale + mean)


# %% [markdown]
# First the way that comes to mind: codebooks of random numbers, everything trained together from the first step.


# %%
def random_start(z):
    return torch.randn(levels, width, latent)


from_random, from_random_error = train_by_hand(random_start, free=0)
used = [len(np.unique(column)) for column in from_random.T]

# %%
teach.predict(
    f"How many of the {width} codes of level 1 are still in use after {steps} steps?",
    used[0],
    range=(0, width),
    default=(width / 2, width),
    explain="A code that nobody chooses gets no gradient and never moves again: it is dead. This is called codebook collapse.",
    then=f"Codes in use, by level: {used} of {width}; error {from_random_error:.1%}. Items by code of level 1: "
    f"{np.bincount(from_random[:, 0], minlength=width).tolist()}.",
)

# %% [markdown]
# Now another start: half of the steps without any codes, then codebooks from residual k-means on the latents. Each code begins where items are.


# %%
def kmeans_start(z):
    return torch.from_numpy(
        np.stack(sidlab.ResidualKMeans(levels, width, seed=0).fit(z.numpy()).codebooks_)
    )


revived, revived_error = train_by_hand(kmeans_start, free=steps // 2)
print(
    "codes in use, by level:",
    [len(np.unique(column)) for column in revived.T],
    "of",
    width,
    f"   error {revived_error:.1%}",
)
print("items by code of level 1:", np.bincount(revived[:, 0], minlength=width))

# %% [markdown]
# Same network, same losses, same number of steps. But two things changed at once: half of the steps are without codes, and the codebooks start where items are. Which of them made
# the difference? Each alone, and a third start that has nothing of the items but the *size* of their latents:

# %%
alone = {
    "random codes after a free half": train_by_hand(random_start, free=steps // 2),
    "k-means codes from the first step on": train_by_hand(kmeans_start, free=0),
    "random codes as large as the latents": train_by_hand(
        lambda z: torch.randn(levels, width, latent) * z.std(), free=0
    ),
}
pd.DataFrame(
    {
        name: {"codes of level 1 in use": len(np.unique(codes[:, 0])), "error": lost}
        for name, (codes, lost) in alone.items()
    }
).T.round(3)

# %% [markdown]
# A code that lies far from all items wins none of them, whether it is far in direction or in size. (One seed: try another in `train_by_hand`.)
#
# `sidlab.RQVAE` starts from k-means after a free half, too, and adds three things: codebooks that
# follow their latents by moving averages (no gradient), a better gradient than straight-through (the rotation trick,
# [arXiv 2410.06424](https://arxiv.org/abs/2410.06424)), and a search for dead codes now and then, which are moved to items that are described badly.

# %%
rqvae = sidlab.RQVAE(levels, width, seed=0, hidden=(64,), latent=latent, steps=steps).fit(x)
rqvae_codes = rqvae.encode(x)
package_error = {
    "residual k-means": error(encoder.decode(codes)),
    "RQ-VAE": error(rqvae.decode(rqvae_codes)),
}

# %% [markdown]
# ## All of them side by side

# %%
made = {
    "residual k-means by hand": (by_hand, error(x - left)),
    "residual k-means": (codes, package_error["residual k-means"]),
    "RQ-VAE by hand, random start": (from_random, from_random_error),
    "RQ-VAE by hand, k-means start": (revived, revived_error),
    "RQ-VAE": (rqvae_codes, package_error["RQ-VAE"]),
}
rows = {}
for name, (sid, lost) in made.items():
    report = sidlab.SidTable(sid, width, collisions="share").report(embeddings=x)
    level = report["per_level"]
    rows[name] = {
        "items that share": report["collision_rate"],
        "dead codes": sum(width - row["used"] for row in level),
        "perplexity, level 1": level[0]["perplexity"],
        "error": lost,
        "neighbours with the same code 1": level[0]["neighbour_overlap"],
    }
compared = pd.DataFrame(rows).T

# %%
teach.predict(
    "Both from the package, same levels, same width. Which one loses less of the embeddings?",
    min(package_error, key=package_error.get),
    choices=["residual k-means", "RQ-VAE"],
    default="RQ-VAE",
    explain="A network can bend the space where that helps. The planted vectors are sums of three: nothing to bend, and the network has to "
    "learn even that.",
    then=compared.round(3),
)

# %% [markdown]
# **What to look for**
#
# * Which row would you hand to a recommender, and which number decided it?
# * In one row neighbours nearly always share their first code. Why is that no praise? (Look at its perplexity: when almost all items have one code,
#   everybody shares it. `chance_overlap` is there for that.)
# * The winner on this catalogue need not win on yours. Run this notebook with `dataset` set to a folder of real items (width 64) and look again.
#
# The error is not the goal either. SIDs serve a recommender, and the next notebook asks what finer ones cost it and bring it.
#
# ## Exercises
#
# ### Exercise 1 · ★★☆ · 7 minutes
#
# New items arrive after the codebooks were made. Give them SIDs: return the codes, `int64 [n, L]`, of `x`, `float32 [n, d]`, with the given
# `codebooks`, a list of L arrays `[W, d]`.
#
# <details><summary>Hint</summary>
#
# The loop from "More levels", without `kmeans`: nearest code, then subtract. Each level works on what the levels before have left.
# </details>


# %% tags=["exercise"]
def residual_codes(x, codebooks):
    """Level by level, the nearest code to what the levels before have left."""
    ### BEGIN SOLUTION
    left = x
    codes = []
    for codebook in codebooks:
        distance = ((left[:, None] - codebook) ** 2).sum(axis=-1)  # [n, W]
        codes.append(distance.argmin(axis=1))
        left = left - codebook[codes[-1]]
    return np.stack(codes, axis=1)
    ### END SOLUTION


# %% tags=["check"]
teach.check("residual_codes", residual_codes)

# %% [markdown]
# ### Exercise 2 · ★☆☆ · 3 minutes
#
# Return the share of the items whose SID another item has, too, for `codes`, `int64 [n, L]`. Careful: if three items share one SID, all three count.
#
# <details><summary>Hint</summary>
#
# `np.unique(codes, axis=0, return_inverse=True, return_counts=True)` says how often each distinct row occurs.
# </details>


# %% tags=["exercise"]
def collisions(codes) -> float:
    """The share of the items that share their SID."""
    ### BEGIN SOLUTION
    count = np.unique(codes, axis=0, return_counts=True)[1]
    return float(count[count > 1].sum() / len(codes))
    ### END SOLUTION


# %% tags=["check"]
teach.check("collisions", collisions)

# %% [markdown]
# ### Exercise 3 · ★☆☆ · 5 minutes
#
# The perplexity of one level: how many codes it uses *in effect*. With `p` the share of the items that have each code,
#
# ```
# perplexity = exp(−Σ p ln p)
# ```
#
# where `p` is 0 the summand counts as 0. `codes` is `int64 [n]`, each in 0..`width`−1. If all codes are equally common, it is `width`; if all items have one
# code, it is 1.
#
# <details><summary>Hint</summary>
#
# `np.bincount` counts. 0 · ln 0 is NaN in NumPy: leave unused codes out first. The logarithm is the natural one.
# </details>


# %% tags=["exercise"]
def perplexity(codes, width: int) -> float:
    """exp of the entropy of the code usage."""
    ### BEGIN SOLUTION
    p = np.bincount(codes, minlength=width) / len(codes)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
    ### END SOLUTION


# %% tags=["check"]
teach.check("perplexity", perplexity)

# %% [markdown]
# ## Summary
#
# Residual k-means makes a semantic ID level by level: each code says what the codes before did not. Collisions come
# earlier than the number of possible SIDs suggests, and a de-duplication digit buys uniqueness for one more token per item. Codes that nobody chooses die,
# which is why a good start matters more than a clever loss. Counts of codes do not show meaning: for that, ask whether neighbours share prefixes, and
# compare with chance.

# %%
teach.quiz(
    teach.Question(
        "What does level 2 of residual k-means cluster?",
        [
            "The embeddings again, from another start",
            "What is left of each embedding after subtracting its centroid of level 1",
            "The centroids of level 1",
            "The items of one centroid, separately for each",
        ],
        1,
        "There is one codebook per level, fitted to the residuals of all items together.",
    ),
    teach.Question(
        "4 levels of 16 codes: how many SIDs are possible, and how many code tokens are in the vocabulary?",
        ["64 and 64", "65,536 and 16", "65,536 and 64", "64 and 65,536"],
        2,
        "16⁴ = 65,536 SIDs; a code has its own token on each level, 4 × 16 = 64.",
    ),
    teach.Question(
        "Two codes are used by half of the items each, the other 254 by none. What is the perplexity of the level?",
        ["2", "128", "254", "256"],
        0,
        "exp(ln 2) = 2: in effect the level has two codes.",
    ),
    teach.Question(
        "Why does a dead code of a straight-through quantiser stay dead?",
        [
            "Weight decay shrinks it to zero",
            "Only chosen codes get a gradient",
            "The commitment loss pushes it away",
            "It is removed",
        ],
        1,
        "Codes learn from the items that choose them; without any there is nothing to learn from. So one revives them by moving them to items.",
    ),
    teach.Question(
        "You deal the same SIDs out to the items in random order. Which number notices?",
        [
            "Perplexity",
            "Utilisation",
            "The share of items that collide",
            "The share of neighbours that share a prefix",
        ],
        3,
        "The first three only count codes. The last compares codes with what items are.",
    ),
)

# %% [markdown]
# ## Links
#
# * TIGER, semantic IDs by an RQ-VAE for generative retrieval: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065)
# * RASTP, whose SIDs are residual k-means, 3 × 256 codes and a de-duplication digit: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943)
# * STAMP, which asks what finer SIDs cost: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329)
# * Code: [residual k-means](../sidlab/sids/residual_kmeans.py), [RQ-VAE](../sidlab/sids/rqvae.py), [what they share](../sidlab/sids/encoder.py),
#   [the table and its report](../sidlab/sids/table.py), [the planted shop](../sidlab/data/planted.py), [this explorer](../sidlab/viz/sids.py)

# %% tags=["record"]
record = {
    "error_one_level_by_hand": one_level,
    "error_by_hand": error(x - left),
    "error_random_start": from_random_error,
    "error_kmeans_start": revived_error,
    **{f"error of {name}": value for name, value in package_error.items()},
    "collisions_two_levels": shared,
    "codes_used_random_start": used[0],
    "codes_used_kmeans_start": len(np.unique(revived[:, 0])),
    **{
        f"overlap of {name}": value
        for name, value in compared["neighbours with the same code 1"].astype(float).items()
    },
}
teach.record(record)
