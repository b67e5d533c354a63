# %% [markdown]
# # 11. Beyond: several sources, and the neighbours
#
# Pruning and denser supervision change what the model reads and what it is told. This notebook looks at what stands around them: IDs from several sources, and four
# neighbouring ideas that readers of STAMP are pointed to. Each gets a paragraph and an experiment of one figure.
#
# **Goals**
#
# * Build semantic IDs from text and behaviour together, in two ways, and see what that does to collisions, to likeness and to recall.
# * Say of each neighbouring idea what this kit can show of it, what it cannot, and what pruning would do to it.
#
# **You need** [notebook 1](01_semantic_ids.ipynb) and [notebook 4](04_live_pruning.ipynb).
#
# **Time** 30 minutes.
#
# **Machine** Two cores, 1.2 GB of memory, no GPU, no network.

# %% tags=["parameters"]
# Real data: a folder with text and, if there is one, sasrec_item_emb_64d.float16.npy; empty: the
# planted world
folder = ""
n_users = 4000  # of the planted world
max_updates = 260  # of each training
test_users = 400  # of the experiments on the bundled model
beams = [1, 2, 5, 10, 20, 50]

# %% tags=["setup"]
import pathlib

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

import sidlab
from sidlab import PruningConfig, TrainConfig
from sidlab.course import teach
from sidlab.metrics import bootstrap_interval, rank_of_target, recall_at
from sidlab.sids.fusion import collaborative_embeddings, fuse_codes, fuse_embeddings
from sidlab.training import evaluate
from sidlab.figures.theme import BLUE, GREY, ORANGE, VERMILLION, template
from sidlab.windows import leave_one_out


def recall(ranks):
    """Recall@10 and its interval as text."""
    low, high = bootstrap_interval(recall_at(ranks, 10))
    return f"{recall_at(ranks, 10).mean():.3f} [{low:.3f}, {high:.3f}]"


# %% [markdown]
# ## Several sources
#
# An item has a text, often an image, and always a behaviour: what people buy around it. Three ways to an ID from two sources:
#
# * **before the encoder**: scale both to the same size, put one behind the other, and quantise the long vector (`fuse_embeddings`);
# * **at the encoder**: levels of its own for each source (`fuse_codes`), so that a shared first code means likeness in the first source, and a shared later one in the second;
# * one of the sources alone, to compare with.
#
# Behaviour comes from the *training part* of the histories only. If an embedding has seen the test targets, it leaks them into the IDs, and every method looks better than it is.

# %%
catalogue = (
    sidlab.load_catalogue(folder) if folder else sidlab.load_catalogue("planted", n_users=n_users)
)
train = leave_one_out(catalogue.histories).train
dim = 16 if not folder else 64
sources = {
    "text": catalogue.embeddings,
    "behaviour": collaborative_embeddings(train, catalogue.n_items, dim=dim),
}
given = pathlib.Path(folder or ".", "sasrec_item_emb_64d.float16.npy")
if folder and given.exists():
    # Row 0 is padding; its makers do not say which interactions it has seen
    sources["given"] = np.load(given)[1:].astype(np.float32)
width = (8, 8, 4) if not folder else (min(256, max(4, catalogue.n_items // 12)),) * 3
print({name: x.shape for name, x in sources.items()}, "items × numbers; codes per level", width)

# %%
both = {name: sources[name] for name in ("text", "behaviour")}
codes = {}
for name, x in sources.items():
    codes[f"{name} alone"] = sidlab.ResidualKMeans(levels=3, width=width, seed=0).fit(x).encode(x)
joined = fuse_embeddings(both)
codes["joined before the encoder"] = (
    sidlab.ResidualKMeans(levels=3, width=width, seed=0).fit(joined).encode(joined)
)
codes["text, text, behaviour"], _ = fuse_codes(both, {"text": 2, "behaviour": 1}, width)
if "given" in sources:
    x = fuse_embeddings({name: sources[name] for name in ("text", "given")})
    codes["text and given, joined"] = (
        sidlab.ResidualKMeans(levels=3, width=width, seed=0).fit(x).encode(x)
    )
codes["behaviour, behaviour, text"], _ = fuse_codes(
    dict(reversed(both.items())), {"behaviour": 2, "text": 1}, width
)
tables = {name: sidlab.SidTable(c, width=width) for name, c in codes.items()}


def likeness(table, x):
    """Of an item's ten nearest neighbours in x, the share with its first code; by chance."""
    level = table.report(embeddings=x)["per_level"][0]
    return level["neighbour_overlap"]


quality = pd.DataFrame(
    {
        name: {
            "items that share their codes": table.report()["collision_rate"],
            "neighbours in text with the same code 1": likeness(table, sources["text"]),
            "neighbours in behaviour with the same code 1": likeness(table, sources["behaviour"]),
        }
        for name, table in tables.items()
    }
).T
quality.style.format("{:.0%}")

# %% [markdown]
# A first code from text gathers what is described alike, one from behaviour what is bought together. The joined vector keeps whichever source has the clearer clusters, unless weights say
# otherwise; in the planted world that is the text, which says exactly what an item is. Collisions rise where a source has fewer clear groups than codes to give. Now the question that counts:
# which of them recommends?

# %%
config = TrainConfig.preset(
    "quick" if not folder else "long",
    max_updates=max_updates,
    epochs=100,
    eval_every=max_updates,
    eval_users=500,
)
histories, targets = leave_one_out(catalogue.histories).cases("test")
chosen = np.random.default_rng(0).permutation(len(targets))[:2000]
ranks = {
    name: evaluate(
        sidlab.train(config, catalogue, tables[name], progress=False).model,
        [histories[i] for i in chosen],
        targets[chosen],
    )
    for name in (
        "text alone",
        "behaviour alone",
        "joined before the encoder",
        "text, text, behaviour",
        "text and given, joined",
    )
    if name in tables
}
quality["recall@10 [95 %]"] = pd.Series({name: recall(r) for name, r in ranks.items()})

# %%
teach.predict(
    "Which IDs recommend best after this training?",
    max(ranks, key=lambda name: recall_at(ranks[name], 10).mean()),
    choices=list(ranks),
    default="joined before the encoder",
    explain="In the planted world the embeddings say exactly what the items are, and behaviour can only take codes away from them: the more items "
    "share their codes, the more get an added one without meaning. On real data texts say less, and the order may be another: give `folder` to see.",
    then=quality.loc[list(ranks)],
)

# %% [markdown]
# ## Four neighbours
#
# All four experiments below use the bundled model, its test users, and pruning after layer 2. They are small on purpose: each shows one thing that pruning would meet there.

# %%
demo = sidlab.demo.load()
split = leave_one_out(demo.catalogue.histories)
demo_histories, demo_targets = (part[:test_users] for part in split.cases("test"))
third = PruningConfig(keep=1 / 3)

# %% [markdown]
# ### Differentiable semantic IDs
#
# IDs are usually made once, before training: no gradient of the recommender reaches the codebooks. Differentiable IDs let it through (a soft or straight-through choice of the code), so
# that items are grouped as recommending needs it. This kit does not train them: codes that move during training would make every cached history, trie and comparison here move with them.
# What it can show is what such IDs would *receive*: the gradient of the loss at every code of the history. A token that is pruned after layer 2 is still read by two layers, so something
# arrives. But how much, and is it the pruner's doing? A token that says little receives little whether it is pruned or not, so the same tokens are looked at with nothing pruned, too.

# %%
model = demo.model


def gradient_by_code(history, target, pruning, chosen=None):
    """(size of the gradient at each code of the history, its level, whether it is kept): `chosen`, or what `pruning` keeps."""
    tokens = sidlab.windows.history_tokens(
        np.asarray(history)[None, -30:], demo.table, model.config.separators
    )
    embedded = model.shared(tokens).detach().requires_grad_()
    model.set_pruning(pruning)
    out = model.encoder(inputs_embeds=embedded, attention_mask=torch.ones_like(tokens))
    model(encoder_outputs=out, labels=demo.table.item_tokens[[target]]).loss.backward()
    level = model.encoder.token_level[tokens[0]].numpy()
    if chosen is None:
        chosen = np.isin(
            np.arange(tokens.shape[1]), out.positions[0][out.attention_mask[0].bool()].numpy()
        )
    return embedded.grad[0].norm(dim=-1).numpy(), level, chosen


# [pruned or kept, code]
gradient = {"nothing pruned": np.zeros((2, 3)), "a third kept": np.zeros((2, 3))}
# Of each history, the share that reaches pruned tokens: [nothing pruned, a third kept]
to_pruned = []
for history, target in zip(demo_histories[:100], demo_targets[:100]):
    size, level, kept = gradient_by_code(history, target, third)
    of_history = []
    for name, sizes in (
        ("nothing pruned", gradient_by_code(history, target, None, kept)[0]),
        ("a third kept", size),
    ):
        codes_only = level < 3  # a separator is no code
        np.add.at(
            gradient[name], (kept[codes_only].astype(int), level[codes_only]), sizes[codes_only]
        )
        of_history.append(sizes[codes_only & ~kept].sum() / sizes[codes_only].sum())
    to_pruned.append(of_history)
model.zero_grad()
pruned_share = {name: float(g[0].sum() / g.sum()) for name, g in gradient.items()}
moved = np.subtract(*np.array(to_pruned).T[::-1])
print(
    f"Per history, pruning changes the share by {moved.mean():+.1%}",
    "[{:+.1%}, {:+.1%}]".format(*bootstrap_interval(moved)),
)
bars = [f"{name}<br>code {code}" for code in (1, 2, 3) for name in gradient]
go.Figure(
    [
        go.Bar(
            name=name,
            x=bars,
            y=[g[side, code] / g.sum() for code in range(3) for g in gradient.values()],
            marker_color=color,
            marker_pattern_shape=shape,
        )
        for side, name, color, shape in ((1, "kept", BLUE, ""), (0, "pruned", ORANGE, "/"))
    ]
).update_layout(
    template=template(),
    barmode="stack",
    height=380,
    yaxis_tickformat=".0%",
    yaxis_title="share of the gradient",
    title_text="The tokens that are pruned receive {:.0%} of it with nothing pruned, {:.0%} when they are".format(
        *pruned_share.values()
    ),
)

# %% [markdown]
# Two numbers in the title, and only their difference is pruning's. Pruned tokens do take part in learning, through the layers in front of the pruner; what they lose by being pruned is small
# beside what they receive. That kept tokens receive more than their share is mostly selection: the scorer chose what the loss depends on anyway. So codebooks that learn would go on learning
# from pruned tokens. (This is one trained model, and the gradient after training: early in training it may be another.)

# %% [markdown]
# ### IDs for search and recommendation together
#
# A shop that searches and recommends wants one ID for both: alike for the query *and* alike for the basket. These pull apart. The experiment: move the weight from text (what search needs) to
# behaviour (what recommending uses) and watch which likeness the first code keeps.

# %%
weights = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]
kept_likeness = []
for weight in weights:
    x = fuse_embeddings(both, {"text": 1 - weight, "behaviour": weight})
    table = sidlab.SidTable(
        sidlab.ResidualKMeans(levels=3, width=width, seed=0).fit(x).encode(x), width=width
    )
    kept_likeness.append((likeness(table, sources["text"]), likeness(table, sources["behaviour"])))
kept_likeness = np.array(kept_likeness)
go.Figure(
    [
        go.Scatter(
            x=weights,
            y=kept_likeness[:, side],
            name=name,
            mode="lines+markers",
            line_color=color,
            line_dash=dash,
            marker_symbol=symbol,
        )
        for side, (name, color, dash, symbol) in enumerate(
            (
                ("neighbours in text (search)", BLUE, "solid", "circle"),
                ("neighbours in behaviour (recommending)", VERMILLION, "dash", "square"),
            )
        )
    ]
).update_layout(
    template=template(),
    height=360,
    xaxis_title="weight of behaviour",
    yaxis_title="share with the same code 1",
    yaxis_tickformat=".0%",
    legend={"orientation": "h", "y": 1.15},
)

# %% [markdown]
# What pruning would do: a token's importance is measured on the task that is trained. A scorer that keeps what recommending needs may drop what a query would have matched, so a joint model
# wants scores from both tasks, or two pruners. This kit has one task, so it cannot show that.

# %% [markdown]
# ### Several businesses in one model
#
# Videos, goods and adverts in one history: most of it belongs to another business than the next item. Does a pruner know which? Here a "business" is one kind of item (the first code), and
# the experiment keeps, with a custom scorer, either the tokens of the target's business first or those of the others, at the same third.

# %%
business = demo.catalogue.truth.tree[:, 0]
first_code = {
    kind: demo.table.offsets[0] + np.bincount(demo.table.codes[business == kind, 0]).argmax()
    for kind in np.unique(business)
}


def by_owner(tokens, own_code, own_first):
    """A scorer for one history of `tokens` [1, N]: items whose first code is `own_code` before (or behind) the others, the newest first among equals."""

    def scorer(signals):
        own = (
            torch.zeros(tokens.shape)
            .scatter_add(1, signals.item_index, (tokens == own_code).float())
            .gather(1, signals.item_index)
            > 0
        )
        return (own == own_first) * 1000.0 + signals.positions

    return scorer


def keeping(own_first):
    """Ranks of the targets when tokens of the target's own business (or the others') are kept first."""
    ranks = []
    for history, target in zip(demo_histories, demo_targets):
        tokens = sidlab.windows.history_tokens(
            np.asarray(history)[None, -30:], demo.table, demo.model.config.separators
        )
        demo.model.set_pruning(
            PruningConfig(
                keep=1 / 3, scorer=by_owner(tokens, first_code[business[target - 1]], own_first)
            )
        )
        items, _ = sidlab.recommend(demo.model, [history], k=10)
        ranks.append(rank_of_target(items.numpy(), np.array([target]))[0])
    return np.array(ranks)


by_business = {"own business first": keeping(True), "other businesses first": keeping(False)}
for name, pruning in (
    ("rastp", third),
    ("newest", PruningConfig(keep=1 / 3, scorer="recent")),
    ("all tokens", None),
):
    demo.model.set_pruning(pruning)
    by_business[name] = evaluate(demo.model, demo_histories, demo_targets)
businesses = pd.Series(
    {name: recall(r) for name, r in by_business.items()}, name="recall@10 [95 %]"
).to_frame()
businesses

# %% [markdown]
# The order of the rows says whether a history's other businesses are ballast or context here. Whoever knows the business of the slot that is to be filled (here it was looked up in the answer, which
# no real scorer can) has something to choose by that centrality × saliency has not: those are computed before anybody asks. Mind the intervals: is `own business first` apart from `rastp`?

# %% [markdown]
# ### Reasoning in several semantic steps
#
# Some recommenders generate intermediate semantic tokens, a chain of thought in codes, before the item. **Not here**, because that needs targets for those steps, or reinforcement learning
# at a scale that no notebook has. What this kit has instead of more *steps* is more *width*: the beam is the compute that is spent at inference without more training. Does a pruned model make
# as much of it?

# %%
curves = {}
for name, pruning in (("all tokens", None), ("a third", third)):
    demo.model.set_pruning(pruning)
    found = [
        recall_at(evaluate(demo.model, demo_histories, demo_targets, k=1, beam=beam), 1)
        for beam in beams
    ]
    curves[name] = [hits.mean() for hits in found], [bootstrap_interval(hits) for hits in found]
demo.model.set_pruning(None)
go.Figure(
    [
        go.Scatter(
            x=beams,
            y=y,
            name=name,
            mode="lines+markers",
            line_color=color,
            line_dash=dash,
            marker_symbol=symbol,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - mean for mean, (_, high) in zip(y, ends)],
                "arrayminus": [mean - low for mean, (low, _) in zip(y, ends)],
            },
        )
        for (name, (y, ends)), (color, dash, symbol) in zip(
            curves.items(), ((GREY, "solid", "circle"), (BLUE, "dash", "diamond"))
        )
    ]
).update_layout(
    template=template(),
    height=340,
    xaxis_title="beams",
    xaxis_type="log",
    xaxis_tickvals=beams,
    xaxis_ticktext=[str(b) for b in beams],
    yaxis_title="recall@1 (the best item found)",
    legend={"orientation": "h", "y": 1.15},
)

# %% [markdown]
# One beam commits to a first code and cannot turn back; more beams keep alternatives alive. Where a curve is flat, the search has found what the model thinks best, and only a better
# model would help; where it falls, what the model thinks best is not what the user took next. Compare the whiskers before you call a rise or a fall real. What pruning would do to reasoning: steps are generated after the history, so each of them reads the kept keys alone, and the more steps, the more pruning saves; a token
# that only a later step would have needed is gone, though, for importance is scored once, before the first step. (What a step has generated is never pruned here.)
#
# ### Exercise 1 · ★★☆ · 10 minutes
#
# Two sources of different size must not weigh by their size. Write `same_size`: centre a source `x` (float [n, d]) and scale it so that the **mean squared length** of its rows is 1.
#
# <details><summary>Hint</summary>
#
# The mean of `(x ** 2).sum(axis=1)` has to become 1. One number scales all rows.
# </details>

# %% tags=["setup"]
teach.register(
    "same_size",
    [(np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]]),), (np.array([[100.0], [300.0]]),)],
    lambda x: (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()),
    {
        "Each row has been scaled by itself; then all items are equally far from the middle. One number for all rows.": lambda x: (
            (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
        ),
        "Not centred: subtract the mean of every column first.": lambda x: (
            x / np.sqrt((x**2).sum(1).mean())
        ),
        "This subtracts one mean of all numbers: every column has its own.": lambda x: (
            (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).sum(1).mean())
        ),
    },
)


# %% tags=["exercise"]
def same_size(x):
    """float [n, d] → float [n, d]."""
    ### BEGIN SOLUTION
    centred = x - x.mean(axis=0)
    return centred / np.sqrt((centred**2).sum(axis=1).mean())
    ### END SOLUTION


# %% tags=["check"]
teach.check("same_size", same_size)

# %% [markdown]
# ## Summary
#
# Sources can be joined before the encoder or given levels of their own; the first code then means what its source says. Behaviour must come from the training part alone. Of the neighbours,
# differentiable IDs would still learn from pruned tokens, through the layers in front, joint IDs trade one likeness for the other, several businesses may need a scorer that knows what is asked, and reasoning in steps
# is another way to spend compute that pruning has freed.

# %%
teach.quiz(
    teach.Question(
        "Behaviour embeddings are made from whole histories, test items included. What happens?",
        ["Nothing", "Collisions rise", "The IDs leak the test targets", "Training slows down"],
        2,
        "Items that are bought together in the test part get like IDs.",
    ),
    teach.Question(
        "Levels: two from text, one from behaviour. What does a shared first code mean?",
        ["Bought together", "Described alike", "Popular", "Nothing"],
        1,
        "The first level is the text's.",
    ),
    teach.Question(
        "Two sources are put side by side without scaling. Which one rules?",
        ["The first", "The one with the larger spread", "Neither", "The shorter one"],
        1,
        "Distances add squared differences.",
    ),
    teach.Question(
        "A token is pruned after layer 2. Does the loss reach its embedding?",
        [
            "Yes, through layers 1 and 2",
            "No",
            "Only in the last layer",
            "Only if it is a separator",
        ],
        0,
        "The kept tokens have attended to it there.",
    ),
    teach.Question(
        "Why are differentiable IDs not trained here?",
        [
            "They are slower",
            "Codes that move would change histories, tries and comparisons while one trains",
            "They do not work",
            "They need no pruning",
        ],
        1,
        "Everything in this kit stands on fixed IDs.",
    ),
)

# %% [markdown]
# ## Links
#
# * STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329); FORGE / AL-GR: [arXiv 2509.20904](https://arxiv.org/abs/2509.20904)
# * Code: [fusing sources](../sidlab/sids/fusion.py), [the SID table and its report](../sidlab/sids/table.py), [evaluation](../sidlab/training.py)

# %% tags=["record"]
record = {
    "collisions_text": float(quality.loc["text alone", "items that share their codes"]),
    "likeness_text": float(quality.loc["text alone", "neighbours in text with the same code 1"]),
    "likeness_behaviour": float(
        quality.loc["behaviour alone", "neighbours in behaviour with the same code 1"]
    ),
    "recall_text": float(recall_at(ranks["text alone"], 10).mean()),
    "recall_behaviour": float(recall_at(ranks["behaviour alone"], 10).mean()),
    "pruned_gradient": pruned_share["a third kept"],
    "same_gradient_unpruned": pruned_share["nothing pruned"],
    "own_business": float(recall_at(by_business["own business first"], 10).mean()),
    "other_business": float(recall_at(by_business["other businesses first"], 10).mean()),
    "beam_gain": curves["all tokens"][0][-1] - curves["all tokens"][0][0],
}
teach.record(record)
