# %% [markdown]
# # 9. Your own data
#
# From a table of purchases to semantic IDs, a trained model, and a scorer of your own that competes with RASTP.
#
# **Goals**
#
# * Go from a CSV file to recommendations in one screen, and see what happens to lines that are broken.
# * Judge semantic IDs before anything is trained on them: from TF-IDF, from an encoder of your own, from behaviour.
# * Write a scorer in a few lines, look at it in the explorer, and compare it fairly with `rastp` and `random`.
#
# **You need** [notebook 0](00_start_here.ipynb) and [notebook 1](01_semantic_ids.ipynb) for the words of the quality report.
#
# **Time** 35 minutes with the exercises.
#
# **Machine** Two cores, 1.5 GB of memory, no GPU, no network. The trainings take about a minute altogether.

# %% tags=["parameters"]
data = ""  # your own: a table of events, or a folder; empty: a small shop is made in a temporary folder
keep = 1 / 3  # the share of tokens that stays
max_updates = 150  # of each training; more give better models and take longer
seed = 0

# %% tags=["setup"]
import pathlib
import tempfile
import warnings

import numpy as np
import pandas as pd
import torch

import sidlab
from sidlab.course import teach

# %% [markdown]
# ## A small shop
#
# 120 items, 400 users with a simple habit: everybody has a favourite colour and goes round the departments. As in most shops, the data are two tables: an event
# a line, and a product a line.

# %%
rng = np.random.default_rng(seed)
colours = ("red", "blue", "green", "black", "white", "yellow")
things = {
    "kitchen": ("mug", "bowl", "kettle", "pan", "knife"),
    "desk": ("pen", "lamp", "notebook", "ruler", "stapler"),
    "garden": ("spade", "hose", "pot", "rake", "gloves"),
    "travel": ("bag", "bottle", "towel", "map case", "pillow"),
}
products = [
    (f"{colour}-{thing}".replace(" ", "-"), f"{colour} {thing}", f"home > {department}")
    for colour in colours
    for department, names in things.items()
    for thing in names
]


# %%
def visit(colour, department):
    """One purchase: nearly always in the favourite colour, always in the department."""
    colour = colour if rng.random() < 0.85 else rng.integers(len(colours))
    return products[colour * 20 + department * 5 + rng.integers(5)][0]


sales = []
for user in range(400):
    favourite = rng.integers(len(colours))
    start = rng.integers(4)
    for step in range(rng.integers(6, 13)):
        sales.append(
            (f"user{user}", visit(favourite, (start + step) % 4), 20_000 + 7 * step + user % 7)
        )

# %%
shop_folder = pathlib.Path(tempfile.mkdtemp())
sales = pd.DataFrame(sales, columns=["customer_id", "sku", "date"]).sort_values("date")
sales["date"] = pd.to_datetime(sales["date"], unit="D")
sales.to_csv(shop_folder / "sales.csv", index=False)
products = pd.DataFrame(products, columns=["sku", "name", "category"])
products.to_csv(shop_folder / "products.csv", index=False)
display(sales.head(3), products.head(3))

# %% [markdown]
# ## From a CSV file to recommendations
#
# This is all it takes. What the columns are is told by their names; for other names give `user=`, `item=`, `time=`. Users and items with fewer than five events
# are left out (`min_interactions=`). JSON lines, Parquet, RecBole's files, MovieLens and Amazon's reviews load the same way, and so does a data frame:
# `sidlab.catalogue_from_events(frame)`.

# %%
if data:
    shop = sidlab.load_catalogue(data)
else:
    shop = sidlab.load_catalogue(shop_folder / "sales.csv", items=shop_folder / "products.csv")
codes = int(min(256, max(4, shop.n_items // 12)))  # of each level
encoder = sidlab.ResidualKMeans(3, codes, seed=seed).fit(shop.embeddings)
table = sidlab.SidTable(encoder.encode(shop.embeddings), codes)
config = sidlab.TrainConfig.preset(
    "quick", max_updates=max_updates, epochs=100, eval_every=max(1, max_updates // 3), seed=seed
)
model = sidlab.train(config, shop, table, progress=False).model
recommended, scores = sidlab.recommend(model, shop.histories[:3], k=4)

# %%
for user, history, items in zip(shop.user_ids, shop.histories, recommended):
    print(f"{user}: … {', '.join(map(str, shop.ids_of(history[-3:])))}")
    print(f"    → {', '.join(map(str, shop.ids_of(items)))}\n")

# %% [markdown]
# `ids_of` gives the names that your table has; inside, items are numbers from 1 on.
#
# ## Two files
#
# `save_catalogue` writes a format that loads faster, and that you can write yourself:
#
# * `items.jsonl`: a JSON object a line, with `item_id` 1, 2, 3 … and any of `title`, `brand`, `categories` (a list), `text`.
# * `sequences.txt`: a user a line, `user item item item …`, oldest first.
# * `embeddings.npy`, if you have vectors of your own: row 0 is item 1. Both text files may be gzipped.

# %%
import gzip

sidlab.save_catalogue(shop, shop_folder / "saved")
for name in ("items.jsonl.gz", "sequences.txt.gz"):
    print(gzip.decompress((shop_folder / "saved" / name).read_bytes()).decode()[:150], "…\n")

# %% [markdown]
# ## Real files are dirty
#
# We break a copy on purpose: a user with an unknown item, one with a word where a number should be, one who appears twice, an item whose title is a number.

# %%
dirty_folder = pathlib.Path(tempfile.mkdtemp())
(dirty_folder / "items.jsonl").write_text(
    '{"item_id": 1, "title": "red mug"}\n{"item_id": 2, "title": 7}\n{"item_id": 3, "title": "blue pen"}\n'
)
(dirty_folder / "sequences.txt").write_text(
    "ann 1 2 3\nbob 1 99\ncem 1 two 3\nann 3 2 1\ndee 3 2\n"
)
print((dirty_folder / "sequences.txt").read_text())

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the same text as below the question
    dirty = sidlab.load_catalogue(dirty_folder)

# %%
teach.predict(
    "How many users does the catalogue of these two files have in the end?",
    2,
    choices=[1, 2, 4, 5],
    default=4,
    explain="ann and dee. A sequence with an unknown item or a word is left out as a whole, and so is a second line of the same user: nothing is guessed.",
    then="\n".join(
        [
            f"{len(dirty.histories)} users, {dirty.n_items} items\n",
            *(
                f"* {found['count']} × {kind}; first: {found['first']}"
                for kind, found in dirty.dirty.items()
            ),
        ]
    ),
)

# %% [markdown]
# Nothing is skipped in silence: it is counted, the first of each kind is named, and `on_dirty="raise"` stops there instead. A gap in the item ids is always an
# error, since ids are positions.

# %%
shop = sidlab.load_catalogue(shop_folder / "saved")
print(shop.n_items, "items,", len(shop.histories), "users, dirty lines:", shop.dirty)

# %% [markdown]
# ## Semantic IDs from three kinds of vectors
#
# Unless told otherwise, texts become vectors by TF-IDF (counts of words and of short runs of letters, rare ones weighing more, the title more than the categories) and a truncated SVD. Any Hugging Face encoder works by name or folder,
# `load_catalogue(folder, text_encoder="google/flan-t5-xl")`, where there is a network or a local copy. Or you bring vectors: any function from texts to an
# array is a text encoder. This one counts letter triples alone: *mug* and *mugs* are alike, and no word is worth more than its letters.

# %%
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer


def my_encoder(texts, dim=32):
    """Texts → float32 [n, dim], by letter triples."""
    counts = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=2**12).transform(
        [text or "" for text in texts]
    )
    return (
        TruncatedSVD(min(dim, len(texts) - 1), random_state=0)
        .fit_transform(counts)
        .astype(np.float32)
    )


by_letters = sidlab.load_catalogue(shop_folder / "saved", embeddings=my_encoder(shop.items["text"]))

# %% [markdown]
# And vectors without any text: items that stand next to each other in the *training part* of many histories are alike.

# %%
train_part = sidlab.windows.leave_one_out(shop.histories).train
pairs = np.concatenate([np.stack([h[:-1], h[1:]]) for h in train_part if len(h) > 1], axis=1) - 1
beside = np.zeros((shop.n_items, shop.n_items))
np.add.at(beside, tuple(pairs), 1)
behaviour = (
    TruncatedSVD(min(32, shop.n_items - 1), random_state=0)
    .fit_transform(np.log1p(beside + beside.T))
    .astype(np.float32)
)
by_behaviour = sidlab.load_catalogue(shop_folder / "saved", embeddings=behaviour)

# %% [markdown]
# Which of them gives good SIDs? `SidTable.report` answers before anything is trained ([notebook 1](01_semantic_ids.ipynb)): collisions, how evenly codes are used,
# how much is lost, and whether near neighbours share a prefix more often than chance.


# %%
def make_sids(catalogue, levels=3, width=None):
    """(encoder, SidTable) of a catalogue."""
    width = width or int(min(256, max(4, catalogue.n_items // 12)))
    encoder = sidlab.ResidualKMeans(levels, width, seed=seed).fit(catalogue.embeddings)
    return encoder, sidlab.SidTable(encoder.encode(catalogue.embeddings), width)


sources = {"TF-IDF": shop, "letters": by_letters, "behaviour": by_behaviour}
made = {name: make_sids(catalogue) for name, catalogue in sources.items()}
reports = {
    name: table.report(encoder, sources[name].embeddings) for name, (encoder, table) in made.items()
}

# %%
quality = pd.DataFrame(
    {
        name: {
            "collision rate": report["collision_rate"],
            "levels with the added one": report["levels"],
            "perplexity of level 1": report["per_level"][0]["perplexity"],
            "error after level 1": report["per_level"][0]["reconstruction_error"],
            "error after level 3": report["per_level"][2]["reconstruction_error"],
            "neighbours with my level 1": report["per_level"][0]["neighbour_overlap"],
            "by chance": report["per_level"][0]["chance_overlap"],
        }
        for name, report in reports.items()
    }
).T.round(3)
quality

# %% [markdown]
# **What to look for.** A single collision adds one more level for *everyone*, a quarter more tokens. Would any of the three sources avoid it? A low error says that the
# codes tell the vectors apart, not that the vectors tell anything useful. What is useful shows only in recommendations. Look at what the first code from TF-IDF has
# learned. Customers of this shop have a favourite colour: does the first code know it?

# %%
_, table = made["TF-IDF"]
for code in range(3):
    members = shop.items["title"][table.codes[:, 0] == code]
    print(
        f"code {code}:",
        ", ".join(str(title) for title in members[:8]),
        "…" if len(members) > 8 else "",
    )

# %% [markdown]
# ## A scorer in ten lines
#
# A scorer maps **signals** to a number for each token, float `[B, N]`; more is better. It may look at `hidden` `[B, N, d]`, `centrality` `[B, N]`,
# `positions` (0 is the oldest), `levels` (0, 1, …, and L for a separator), `item_index` and `mask`. This one takes the size of the state. Where several states
# point in nearly the same direction, only the newest counts in full: what you have seen twice tells you less.


# %%
def fresh(signals):
    """Size of the state, halved for each later token whose state points in nearly the same direction."""
    size = signals.hidden.abs().sum(-1)  # [B, N]
    direction = torch.nn.functional.normalize(signals.hidden, dim=-1)
    alike = direction @ direction.transpose(1, 2) > 0.95  # [B, N, N]
    later = signals.positions[:, None, :] > signals.positions[:, :, None]  # [B, N, N]
    repeats = (alike & later & signals.mask[:, None, :].bool()).sum(-1)  # [B, N]
    return size / 2.0**repeats


# %% [markdown]
# Train models that differ in nothing but the scorer: the same windows in the same batches, the same number of updates, the same kept share. Beside them one that
# prunes nothing, and the table of neighbouring items, which takes a second.

# %%
from sidlab.metrics import bootstrap_interval, paired_test, recall_at
from sidlab.training import evaluate

histories, targets = sidlab.windows.leave_one_out(shop.histories).cases("test")
results = {}
hits = {}
for name, scorer in {
    "rastp": "rastp",
    "random": "random",
    "fresh": fresh,
    "nothing pruned": None,
}.items():
    config = sidlab.TrainConfig.preset(
        "quick",
        max_updates=max_updates,
        epochs=100,
        eval_every=max(1, max_updates // 3),
        eval_users=200,
        seed=seed,
        pruning=scorer and sidlab.PruningConfig(keep=keep, scorer=scorer),
    )
    results[name] = sidlab.train(config, shop, table, progress=False)
    hits[name] = recall_at(evaluate(results[name].model, histories, targets), 10)  # [U], 1 or 0

# %%
from sidlab.research.baselines import NeighbourTable
from sidlab.metrics import rank_of_target

neighbours = NeighbourTable().fit(train_part, shop.n_items).recommend(histories, k=10)
print(
    f"table of neighbouring items: recall@10 {recall_at(rank_of_target(neighbours, targets), 10).mean():.3f}"
)
compared = pd.DataFrame(
    {
        name: {
            "recall@10": h.mean(),
            "low": bootstrap_interval(h)[0],
            "high": bootstrap_interval(h)[1],
            "kept share of the tokens": results[name].tokens["kept_token_fraction"],
            "p against rastp": paired_test(h, hits["rastp"]).p_value,
        }
        for name, h in hits.items()
    }
).T.round(3)
scorers = ["rastp", "random", "fresh"]
best = max(scorers, key=lambda name: hits[name].mean())

# %%
teach.predict(
    "Which of the three scorers finds the hidden item most often?",
    best,
    choices=scorers,
    default="rastp",
    explain=", ".join(f"{name} {h.mean():.3f}" for name, h in hits.items())
    + f"; one user is worth {1 / len(targets):.4f}.",
    then=[
        compared,
        "Every item of this shop says the favourite colour, so nearly any third of the tokens tells it: is `random` as good as "
        "RASTP here? Such data cannot test a scorer.",
    ],
)

# %% [markdown]
# The kept share is a little above the one asked for, because every history is rounded up; it is the same for all three scorers, and that makes it a fair race. *p* is how often chance
# alone would make a difference at least this large ([notebook 6](06_training_runs.ipynb)). Where it is not small, the honest sentence is "we cannot tell them apart". And where it is small? It speaks of these trained models only: with
# another `seed` the sign may change, so one seed is no finding about scorers. Try two more.
#
# Your scorer in the explorer, on a model that was trained with it:

# %%
from sidlab.viz import PruningExplorer

explorer = PruningExplorer(
    results["fresh"].model, shop, scorers={"fresh": fresh}, scorer="fresh", keep=keep
)
explorer

# %% [markdown]
# **What to look for**
#
# * No token carries an orange dot: on real data nobody knows which are truly informative. The ★ marks only the item that came next.
# * Switch between `fresh`, `norm` and `rastp`. Which kept tokens change? Find a user who bought in one colour only.
# * Set `folder` in the second cell to your own data and run everything again. Small data first: 10,000 users train in minutes, millions want a GPU.

# %% [markdown]
# ### Exercise 1 · ★★☆ · 10 minutes
#
# A scorer that never spends a place on a separator: RASTP's importance (attention received × L1 size of the state) for codes, −∞ for separators, whose level is
# `levels.max()`.
#
# <details><summary>Hint</summary>
#
# `signals.centrality * signals.hidden.abs().sum(-1)` is RASTP. Multiplying separators by 0 is not enough: a code may score next to 0, too.
# `tensor.masked_fill(condition, -torch.inf)` does it.
# </details>


# %% tags=["exercise"]
def codes_only(signals):
    """Signals → importance [B, N], −∞ for separators."""
    ### BEGIN SOLUTION
    importance = signals.centrality * signals.hidden.abs().sum(-1)
    separator = signals.levels == signals.levels.max()
    return importance.masked_fill(separator, -torch.inf)
    ### END SOLUTION


# %% tags=["check"]
teach.check("codes_only", codes_only)

# %% [markdown]
# ### Exercise 2 · ★★☆ · 10 minutes
#
# Judge SIDs yourself: for each item, find its **nearest other item** by cosine similarity of the embeddings. Return the share of items whose nearest one has the same
# first code.
#
# <details><summary>Hint</summary>
#
# Normalise the rows, multiply the matrix with its transpose, and put −∞ on the diagonal (`np.fill_diagonal`), or every item is its own nearest one.
# </details>


# %% tags=["exercise"]
def nearest_share(embeddings, codes):
    """float [n, d], int [n, L] → share of items whose nearest other item has the same first code."""
    ### BEGIN SOLUTION
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    return float((codes[nearest, 0] == codes[:, 0]).mean())
    ### END SOLUTION


# %% tags=["check"]
teach.check("nearest_share", nearest_share)

# %% [markdown]
# ## Summary
#
# Two text files are a catalogue, and a broken line is reported, never guessed at. Semantic IDs can come from any vectors; their report tells collisions, use of codes and
# reconstruction before training, but not whether the vectors know what decides the next purchase. A scorer is a function from signals to importance. It competes
# fairly when everything else, kept share included, is the same, and the result is read with an interval.

# %%
teach.quiz(
    teach.Question(
        "Item ids in items.jsonl are 1, 2, 4. What happens?",
        [
            "4 becomes 3",
            "An error: ids are positions, so there must be no gap",
            "A warning",
            "Item 3 is empty",
        ],
        1,
        "A silent shift would attach histories to wrong items, so the reader stops.",
    ),
    teach.Question(
        "Where do embeddings from behaviour have to come from?",
        ["All histories", "The training part of the histories", "The test items", "The texts"],
        1,
        "Each user's last two items are held out. Vectors made from them would know the answers.",
    ),
    teach.Question(
        "A report shows no collisions and a low reconstruction error. What follows?",
        [
            "Recommendations will be good",
            "The codes tell the vectors apart",
            "The vectors are good",
            "Training will be fast",
        ],
        1,
        "Whether the vectors hold what matters shows only in recommendations.",
    ),
    teach.Question(
        "What may a scorer not look at if it is to work on real data?",
        ["signals.hidden", "signals.truth", "signals.positions", "signals.levels"],
        1,
        "The truth is known in the planted world only.",
    ),
    teach.Question(
        "Your scorer beats random by 0.01 with p = 0.4. What do you report?",
        ["It is better", "It is worse", "No difference that these users could show", "It is equal"],
        2,
        "A difference that chance often makes is not evidence for one, nor for equality.",
    ),
)

# %% [markdown]
# ## Links
#
# * Code: [the folder format](../sidlab/data/folder.py), [text embeddings](../sidlab/data/text.py), [SID encoders](../sidlab/sids/encoder.py), [the SID table and its report](../sidlab/sids/table.py),
#   [signals and scorers](../sidlab/saliency.py), [training](../sidlab/training.py)
# * TIGER, semantic IDs for recommendation: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065); RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943)
# * The Amazon data of 2014 load the same way: see *Your own data* in the [README](../README.md)

# %% tags=["record"]
record = {
    "users": len(shop.histories),
    "items": shop.n_items,
    "dirty_kinds": len(dirty.dirty),
    "users_of_dirty": len(dirty.histories),
    "collision_rate": float(quality.loc["TF-IDF", "collision rate"]),
    **{f"recall_{name}": float(h.mean()) for name, h in hits.items()},
    "kept_share": float(compared.loc["fresh", "kept share of the tokens"]),
    "kept_share_rastp": float(compared.loc["rastp", "kept share of the tokens"]),
}
teach.record(record)
