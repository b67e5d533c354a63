# %% [markdown]
# # 3. Which tokens matter?
#
# RASTP keeps the tokens with the largest *saliency × centrality*: take this score apart, and ask three different judges whether it is
# right.
#
# **Goals**
#
# * Compute attention from queries, keys and the position bias, then centrality, saliency and importance, each in a line or two, and get
#   the package's numbers.
# * Compare the score with its two factors, and all of them with the truth that the planted world knows.
# * Take tokens out one by one and see for yourself how much attention explains, and how much it does not.
#
# **You need** softmax attention in PyTorch, and [notebook 0](00_start_here.ipynb) for what a semantic ID and a pruner are.
#
# **Time** 40 minutes, 15 of them with the exercises.
#
# **Machine** One core, under 1 GB of memory, no GPU, no network. At its defaults it computes for about a minute.

# %% tags=["parameters"]
users = 60  # over how many users numbers are averaged
layer = 2  # whose attention and states are scored, from 1
keep = 1 / 3  # the share of tokens that a scorer may keep

# %% tags=["setup"]
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from sidlab import PruningConfig, TrainConfig
from sidlab.course import teach
from sidlab.model_building import build_model
from sidlab.figures.theme import BLUE, VERMILLION, template
from sidlab.windows import history_tokens

torch.set_num_threads(1)  # the model is too small to gain from more
torch.set_grad_enabled(False)  # we look into a model, we do not train one
pd.set_option("display.precision", 3)

# %% [markdown]
# ## One history, opened up
#
# The bundled model recommends the next item of a history in a small planted sports shop. Each item is four tokens: three codes, which
# stand for department (level 1), brand (level 2) and kind (level 3), and a separator. A `Probe` runs one history through the encoder and
# keeps everything that passes by.

# %%
from sidlab.course.demo import load
from sidlab.course.probe import Probe

demo = load()
model = demo.model
catalogue = demo.catalogue
history = catalogue.histories[0]
# Without its last item, which is the one to be found
probe = Probe(model, history[:-1], catalogue.truth)
n = len(probe.tokens)
print(
    len(probe.history),
    "items are",
    n,
    "tokens; attention",
    list(probe.attention.shape),
    "is [layers, heads, N, N]",
)

# %% [markdown]
# ## Attention by hand
#
# Each head of a layer turns the state of every token into a *query* ("what am I looking for?") and a *key* ("what do I offer?").
#
# ```
# scores[query, key]  =  q[query] · k[key]  +  bias[key − query]
# attention[query, :] =  softmax(scores[query, :])
# ```
#
# T5 has no position embeddings. All it knows of order is that **bias**: a learned number for each head and each distance, owned by the
# first layer and added in all of them. It also leaves out the usual division by √d.

# %%
block = model.encoder.block[layer - 1].layer[0]
x = block.layer_norm(probe.hidden[layer - 1])  # [N, d], what comes out of the layer before
heads = model.config.num_heads
size = model.config.d_kv
q = block.SelfAttention.q(x).view(n, heads, size).transpose(0, 1)  # [H, N, d_kv]
k = block.SelfAttention.k(x).view(n, heads, size).transpose(0, 1)  # [H, N, d_kv]
bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(n, n)[0]  # [H, N, N]
attention = (q @ k.transpose(1, 2) + bias).softmax(dim=-1)  # [H, N, N]; rows are queries
print(
    "largest difference from the package:",
    float((attention - probe.attention[layer - 1]).abs().max()),
)

# %% [markdown]
# Nothing but rounding is left. Here is the bias of each head between a token and its neighbours, as far as three tokens away:

# %%
middle = n // 2
pd.DataFrame(
    bias[:, middle, middle - 3 : middle + 4].numpy(),
    index=[f"head {h + 1}" for h in range(heads)],
    columns=[f"{d:+d}" if d else "itself" for d in range(-3, 4)],
)

# %% [markdown]
# Two heads prefer the token one and two places back so strongly that nearly nothing else counts. They were *initialised* like that
# (`position_init` in [t5.py](../sidlab/models/t5.py)), and training kept it: it is how the codes of one item find each other. You will
# see them as bright diagonals.
#
# ## Centrality: columns, not rows
#
# ```
# centrality(i) = Σ_heads Σ_queries attention[head, query, i]          how much attention token i RECEIVES
# ```

# %%
centrality = attention.sum(dim=(0, 1))  # over heads and queries: [N]
given = attention.sum(dim=(0, 2))  # the wrong axis: over heads and keys
print(
    "largest difference from the package:",
    float((centrality - probe.centrality(layer)).abs().max()),
)

# %%
teach.predict(
    f"This layer has {heads} heads, this history {n} tokens. What is the mean centrality of its tokens?",
    str(heads),
    choices=["1", str(heads), str(n), "one cannot know without computing it"],
    default="1",
    explain=f"Every query gives away exactly 1 in each head. {heads} heads × {n} queries give {heads * n} in total, shared by {n} tokens. "
    "So a centrality is a vote count: more for one token is less for others.",
    then=f"Centrality goes from {centrality.min():.3f} to {centrality.max():.3f}, with mean {centrality.mean():.3f}. Summed over the wrong "
    f"axis: from {given.min():.3f} to {given.max():.3f}. That gives every token the same number, since each row of a softmax sums to 1. "
    "Keep this in mind, it is a silent mistake: a score is still a score.",
)

# %% [markdown]
# ## Saliency, and the product
#
# ```
# saliency(i)   = ‖state of i after the layer‖₁  = Σ_dimensions |state|
# importance(i) = centrality(i) × saliency(i)                            RASTP's score
# ```

# %%
saliency = probe.hidden[layer].abs().sum(dim=-1)  # [N]
importance = centrality * saliency
package = probe.prune(PruningConfig(after_layer=layer, keep=keep)).importance
print(
    "largest relative difference from the package:", float((importance / package - 1).abs().max())
)
as_norm = pd.Series(given * saliency).corr(pd.Series(saliency), method="spearman")
print(
    "rank correlation of the product with the wrong axis and the saliency alone:", round(as_norm, 6)
)

# %% [markdown]
# The second line is the price of the wrong axis: the product becomes a constant times the saliency. Your "RASTP" would be another method,
# `norm`, and nothing would crash. (A **rank correlation** compares orders: 1 the same order, 0 none in common, −1 the reverse.)
#
# ## The explorer
#
# Left: every layer and head, small, each with a scale of its own, so that faint heads can be seen, too; click one to see it large. Right:
# the large one. Above it lines lead from the chosen token to those that it looks at, as thick as the weights; then come the sums of the
# columns (centrality), the saliencies, and their product. A star marks the tokens that **truly** tell something about the next item: the
# planted world knows. A click on a column or a bar chooses a token, and so does the slider; the text says how the recommendations move
# without it. Removal happens *after* the shown layer: the layers before have seen the token.

# %%
from sidlab.viz import AttentionExplorer

explorer = AttentionExplorer(model, catalogue, token=2, layer=layer)
explorer

# %% [markdown]
# **What to look for**
#
# * Heads 1 and 2 are stripes in all layers. Which heads have bright *columns*, and in which layer? A bright column is a token that
#   everybody looks at.
# * The chosen token is level 3 of the oldest item, the kind of thing. It has no star. What does its removal do to the ★ item, and to the
#   list?
# * Go one token to the left, to the brand: it is the most informative one of this history (the text says how many nats). Read its places
#   in centrality and importance. Then read by how much the log-probability of the ★ item changes without it.
# * Back at level 3: where do its thickest lines lead? Set *layer* to 1, so that it is taken out one layer earlier: the brand has been
#   handed on already. Then remove `its whole item`, layers 1 to 4: does anybody *outside* the item ever know the brand?
# * Compare the bars of saliency and centrality. Which of the two decides the order of the product, and which hardly differs between
#   tokens?
#
# ## First judge: the truth
#
# One history is an anecdote. We make a table of the tokens of many users with the score that each scorer gives them:
#
# * `rastp` is the product, `norm` the saliency alone, `centrality` the other factor alone;
# * `random` draws numbers, `recent` prefers the newest tokens: what a good score has to beat;
# * `oracle` is the truth itself: how much information about the next item the token holds when all others are known, in *nats* (bits with
#   the natural logarithm; 1 nat is 1.44 bits).

# %%
from sidlab.saliency import Signals, token_importance

scorers = ["rastp", "norm", "centrality", "random", "recent", "oracle"]


def scored(user, probe):
    """One row for each token of a history."""
    place = torch.arange(len(probe.tokens))[None]
    signals = Signals(
        probe.hidden[layer][None],
        probe.centrality(layer)[None],
        probe.mask,
        place,
        truth=probe.truth[None],
        seed=torch.tensor([user]),
    )
    scores = {name: token_importance(signals, name)[0].numpy() for name in scorers}
    return pd.DataFrame(scores).assign(user=user, level=probe.levels.numpy() + 1)


probes = [Probe(model, history[:-1], catalogue.truth) for history in catalogue.histories[:users]]
tokens = pd.concat([scored(user, probe) for user, probe in enumerate(probes)], ignore_index=True)
tokens["level"] = tokens["level"].map({1: "level 1", 2: "level 2", 3: "level 3", 4: "separator"})
informative = tokens["oracle"] > 0
print(len(tokens), "tokens,", f"{informative.mean():.0%} of them informative")

# %% [markdown]
# Each scorer may keep the best third of each history. **Precision**: the share of the kept tokens that are informative. **Recall**: the
# share of the informative tokens that are kept. **Nats kept**: the same, each token weighed by how much it holds, for many informative
# tokens hold very little.


# %%
def compare():
    # 1 is the best of its history
    place = tokens.groupby("user")[scorers].rank(ascending=False, method="first")
    length = tokens.groupby("user")["level"].transform("size")
    kept = place.le(np.ceil(keep * length - 1e-6), axis=0)
    nats = tokens["oracle"]
    return pd.DataFrame(
        {
            "precision": {s: informative[kept[s]].mean() for s in scorers},
            "recall": {s: kept.loc[informative, s].mean() for s in scorers},
            "nats kept": {s: nats[kept[s]].sum() / nats.sum() for s in scorers},
        }
    )


comparison = compare()
by_level = tokens.groupby("level")[["norm", "centrality", "rastp", "oracle"]].mean()

# %%
teach.predict(
    f"Apart from the oracle: which scorer finds the largest share of the informative tokens with its best {keep:.0%}?",
    comparison["recall"].drop("oracle").idxmax(),
    choices=scorers[:-1],
    default="rastp",
    explain="Recall: "
    + ", ".join(f"{name} {value:.2f}" for name, value in comparison["recall"].items())
    + ".",
    then=[
        comparison,
        "Read it against `random`, which knows nothing. Then compare `rastp` with its two factors: does the product beat both, one, or "
        "none of them here? The mean scores of each level show where that comes from:",
        by_level,
        "`oracle` has nothing at level 3 and at separators: past *kinds* say nothing about the next item. Which level has the largest norm? A norm "
        "says that a state is *large*, and a state can be large for any reason; here it costs the product some of what centrality had found.",
    ],
)

# %% [markdown]
# That is a finding about one small model, and the last word of this notebook on the product is not spoken yet.
#
# ## Second judge: take it out and look
#
# The truth is known in a planted world only. What one can always do is **occlusion**: hide one token and see how the prediction changes.
# We do it for all tokens of a history in one batch: copy *i* of the history lacks token *i*. At the input, the attention mask hides it
# from all layers and from the decoder. After the layer, a scorer of our own makes the pruner drop it: that is exactly what pruning does
# to a single token.


# %%
def without_each(probe, behind_layer):
    """The encoder's output for N copies of a history; copy i lacks token i, at the input or only after the scoring layer."""
    n = len(probe.tokens)
    copies = probe.input_ids.expand(n, -1)
    everything = torch.ones(n, n)
    one_each = torch.eye(n)
    if not behind_layer:
        return model.encoder(input_ids=copies, attention_mask=(everything - one_each).long())
    model.set_pruning(
        PruningConfig(after_layer=layer, keep=(n - 1) / n, scorer=lambda signals: -one_each)
    )
    encoded = model.encoder(input_ids=copies, attention_mask=everything.long())
    model.set_pruning(None)
    return encoded


# %% [markdown]
# What changes? First the obvious number, the log-probability of the item that the user really took next:


# %%
def log_p(encoded, item):
    """log p(item | history) of each row: the sum over its codes."""
    labels = demo.table.item_tokens[item].expand(len(encoded.last_hidden_state), -1)  # [B, L]
    logits = model(encoder_outputs=encoded, labels=labels).logits  # [B, L, V]
    return logits.log_softmax(-1).gather(-1, labels[..., None]).sum(dim=(1, 2))  # [B]


def drop(user, behind_layer=False):
    """By how much the log-probability of the true next item falls without each token: [N]."""
    item = int(catalogue.histories[user][-1])
    whole = model.encoder(input_ids=probes[user].input_ids)
    return (log_p(whole, item) - log_p(without_each(probes[user], behind_layer), item)).numpy()


tokens["drop"] = np.concatenate([drop(user) for user in range(users)])


# %%
def per_user(a, b):
    """The rank correlation of two columns within each history."""
    return np.array(
        [rows[a].corr(rows[b], method="spearman") for _, rows in tokens.groupby("user")]
    )


# %%
teach.predict(
    "Order the tokens of a history by RASTP's importance, and by the drop of the true next item's log-probability "
    "when they are hidden from the model. What is the rank correlation of the two orders, averaged over users?",
    float(per_user("rastp", "drop").mean()),
    range=(-1, 1),
    default=(0.2, 0.7),
    explain=f"With the truth in place of the importance it is {per_user('oracle', 'drop').mean():.2f}.",
    then="So does importance mean nothing? Not so fast: even the *truth* hardly agrees with that drop. The reason is the yardstick. What a user takes "
    "next is one draw from many possible items, a fifth of the time a noise click. A token that rightly moves the prediction from one brand to "
    "another makes *this* item more probable or less, by luck of the draw. The drop is right on average and useless for a single token.",
)

# %% [markdown]
# Another question is how much the *whole prediction* changes. We compare the distributions of the next department and brand with and
# without the token by their **KL divergence**, in nats: 0 if nothing changes. It is the average of the drop over all that could come
# next, each as probable as the model says; the truth of `oracle` is the same quantity for an ideal recommender.
#
# ```
# effect(i) = KL(p ‖ p without i) = Σ_next p(next) · (log p(next) − log p without i (next))
# ```

# %%
from sidlab.models.t5 import PrunedEncoderOutput

first, second = demo.table.widths[:2]  # numbers of codes
start = demo.table.offsets
# The decoder's start token and a first code: [W1, 2]
prefixes = torch.tensor([[1, start[0] + code] for code in range(first)])


def next_brand(encoded):
    """log p(first code, second code of the next item): [B, W1 · W2]."""
    rows = len(encoded.last_hidden_state)
    copies = PrunedEncoderOutput(
        last_hidden_state=encoded.last_hidden_state.repeat_interleave(first, 0),
        attention_mask=encoded.attention_mask.repeat_interleave(first, 0),
    )
    logits = model(
        encoder_outputs=copies, decoder_input_ids=prefixes.repeat(rows, 1)
    ).logits.log_softmax(-1)
    one = logits[::first, 0, start[0] : start[0] + first]  # [B, W1]
    two = logits[:, 1, start[1] : start[1] + second].view(rows, first, second)  # given the first
    return (one[:, :, None] + two).flatten(1)


# %%
def effect(probe, behind_layer=False):
    """KL(prediction ‖ prediction without token i): [N], nats."""
    whole = next_brand(model.encoder(input_ids=probe.input_ids))
    without = next_brand(without_each(probe, behind_layer))
    return (whole.exp() * (whole - without)).sum(-1).clamp_min(0).numpy()


tokens["effect"] = np.concatenate([effect(probe) for probe in probes])

# %%
import plotly.graph_objects as go
from sidlab.figures.theme import BLUE, GREY, template

figure = go.Figure()
for name, which, symbol, color in (
    ("truly informative", informative, "star", BLUE),
    ("not informative", ~informative, "circle-open", GREY),
):
    figure.add_scatter(
        x=tokens["rastp"][which],
        y=tokens["effect"][which],
        mode="markers",
        name=name,
        marker={"symbol": symbol, "color": color, "size": 7, "opacity": 0.6},
    )
figure.update_xaxes(type="log", dtick=1, title_text=f"RASTP's importance in layer {layer}")
figure.update_yaxes(
    type="log",
    range=[-6, 1],
    dtick=1,
    tickformat="~g",
    title_text="change of the prediction without it (nats)",
)
figure.update_layout(
    template=template(),
    height=500,
    title="Each token: its importance, and the change without it",
    margin_t=90,
    legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
)

# %%
from sidlab.metrics import bootstrap_interval

correlations = pd.DataFrame(
    {what: {s: per_user(s, what).mean() for s in scorers} for what in ("oracle", "drop", "effect")}
)
agreement = per_user("rastp", "effect")
low, high = bootstrap_interval(agreement)
print(
    f"importance and effect: mean rank correlation {agreement.mean():.2f}, 95 % interval over users {low:.2f} to {high:.2f}"
)
correlations.rename(
    columns={
        "oracle": "the truth",
        "drop": "drop of the next item",
        "effect": "change of the prediction",
    }
)

# %% [markdown]
# **How to read this.** The table holds rank correlations, averaged over users. The cloud rises to the right: important tokens tend to
# matter more. But look at one value of importance and how far the effects spread above it, over how many powers of ten. And compare the
# last column's `rastp` with `oracle`: both judges are imperfect views of the same thing.
#
# So *attention is not explanation*: it says where a layer looked, not what would have happened otherwise. It is not nothing either:
# compare with `random` and `recent`. A ranking that is right on average can be good enough to prune by, and still be wrong about the
# token in front of you.
#
# ## Third judge: after the pruner's layer
#
# Hiding a token at the input is not what a pruner does. It removes a *state* after a layer, after its neighbours have read it. Same
# measure, other place:

# %%
tokens["effect after"] = np.concatenate([effect(probe, behind_layer=True) for probe in probes])
by_place = tokens.groupby("level")[["oracle", "effect", "effect after"]].mean()

# %%
teach.predict(
    f"After layer {layer}: the removal of tokens of which level changes the prediction most, on average?",
    by_place["effect after"].idxmax(),
    choices=list(by_place.index),
    default="level 2",
    explain="Mean change in nats: "
    + ", ".join(f"{name} {value:.2g}" for name, value in by_place["effect after"].items())
    + ".",
    then=[
        by_place,
        "At the input (column `effect`) the model depends most on the levels that hold the truth, and more than an ideal recommender would: "
        "in training it never met a history with a hole at the input. After the layer, where it was trained with holes, the picture is another. The "
        "diagonal stripes have handed the codes of an item on to its later tokens; whoever holds the copy matters, whoever held the original does "
        "not any more. A pruner has to keep the *carriers*.",
    ],
)

# %% [markdown]
# Now ask the scorers once more:

# %%
from sidlab.metrics import paired_test

behind = pd.Series(
    {s: per_user(s, "effect after").mean() for s in scorers}, name=f"effect after layer {layer}"
)
test = paired_test(per_user("rastp", "effect after"), per_user("centrality", "effect after"))
print(
    "rastp minus centrality: {:+.3f}, 95 % interval over users {:+.3f} to {:+.3f}".format(
        test.difference, *test.interval
    )
)
pd.concat(
    [
        correlations[["oracle", "effect"]].rename(
            columns={"oracle": "the truth", "effect": "effect at the input"}
        ),
        behind,
    ],
    axis=1,
)

# %% [markdown]
# Compare the orders from column to column: the two judges of the input may agree, the one after the layer has an order of its own. Look
# for `oracle`: the truth about the *inputs* is a poor guide to the *states*. Look for `norm`: worse than chance before the first judge,
# and now? A large state can be one that carries something. And the product: does it beat its factors before this judge? The line above
# the table says whether that holds for these users, or could be luck.
#
# Still, no scorer comes close to 1, and this judge takes out **one** token. A pruner takes out two thirds at once, and then it matters
# whether what stays repeats itself. So its order need not be that of recall: [notebook 4](04_live_pruning.ipynb) prunes by each scorer
# and counts.
#
# ## Three pitfalls
#
# **The wrong axis** you have seen: each row sums to 1, so summing over the keys says nothing, and the product silently becomes the
# saliency alone.
#
# **Padding that votes.** In a batch, short histories are padded. Attention *to* padding is masked, but padded positions still are
# *queries*: their rows sum to 1 as well, and all that attention goes to real tokens. The published code counts it. We pad our history to
# 30 items, as it does:


# %%
def padded_centrality(pruning):
    ids = torch.nn.functional.pad(probe.input_ids, (0, model.config.max_items * 4 - n))  # PAD is 0
    model.set_pruning(pruning)
    encoded = model.encoder(input_ids=ids, attention_mask=(ids > 0).long())
    model.set_pruning(None)
    return encoded.centrality[0, :n]


clean = padded_centrality(PruningConfig(after_layer=layer))
# As the published code
voting = padded_centrality(PruningConfig(after_layer=layer, mode="reference"))

# %%
from_padding = 1 - float(clean.sum() / voting.sum())
agree = pd.Series(clean).corr(pd.Series(voting), method="spearman")
third = int(np.ceil(n * keep - 1e-6))
shared = len(set(clean.topk(third).indices.tolist()) & set(voting.topk(third).indices.tolist()))
print(f"{from_padding:.0%} of the attention received comes from padding.")
print(
    f"Rank correlation with and without it: {agree:.2f}; of the {third} highest tokens {shared} are the same."
)

# %% [markdown]
# Most votes come from positions that hold no item (to the published code they look like code 0 of the first level, and the separator), and the shorter the history, the more of them: the published code always pads to 30 items. Without padded voters,
# `clean` is what the probe found for the history alone. [Notebook 7](07_padding_is_not_pruning.ipynb) is about padding.
#
# **The front seat.** In a decoder-only model, such as STAMP's Qwen, a token is seen by itself and the tokens *after* it alone. The first token of a history of n has n voters, the last
# one has itself. A sum of votes then says mostly how early a token stands. The scorer `rastp-visible` divides it by the number of queries that can see the token. To see what comes from the
# mask and nothing else, take a decoder-only model whose weights are random:

# %%
# Items, so that all histories are of one length
m = int(np.median([len(history) for history in catalogue.histories]))
batch = history_tokens(
    np.stack([history[-m:] for history in catalogue.histories if len(history) >= m][:users]),
    demo.table,
    model.config.separators,
)
causal = build_model(
    TrainConfig.preset(
        "smoke",
        arch="qwen",
        max_items=model.config.max_items,
        zero_init=False,
        pruning=PruningConfig(keep=1.0),
    ),
    demo.table,
).eval()
by_position = {}
for scorer in ("rastp", "rastp-visible"):
    causal.set_pruning(PruningConfig(keep=1.0, scorer=scorer))
    score = causal.encode(batch, torch.ones_like(batch)).importance
    by_position[scorer] = (score / score.sum(1, keepdim=True)).mean(0).numpy() * batch.shape[1]
go.Figure(
    [
        go.Scatter(
            x=np.arange(1, batch.shape[1] + 1),
            y=y,
            name=name,
            mode="lines",
            line_color=color,
            line_dash=dash,
        )
        for (name, y), color, dash in zip(
            by_position.items(), (VERMILLION, BLUE), ("solid", "dash")
        )
    ]
).update_layout(
    template=template(),
    height=340,
    xaxis_title="place in the history, 1 = oldest",
    yaxis_title="importance ÷ its mean",
    yaxis_range=[0, None],
    legend={"orientation": "h", "y": 1.15},
)

# %% [markdown]
# The plain sum would prune the newest items, whatever they hold, before the model has learned anything. The normalised one falls far less, but it isn't flat: a query that stands early has few
# tokens to share its vote among, so each of them gets more. A trained model can work against either; [the results](../results/README.md) have both scorers on real histories. (What the kit never prunes there: the first token, on which attention rests when it has nothing to look at, and the tokens being predicted.)

# %% [markdown]
# ### Exercise 1 · ★★☆ · 7 minutes
#
# Write the centrality of a padded batch: `attention` float `[B, H, N, N]`, rows are queries; `mask` `[B, N]`, 1 for real tokens and 0 for
# padding. Only real queries vote, and padding receives 0. Return `[B, N]`.
#
# <details><summary>Hint</summary>
#
# Which of the two last axes are the queries? Give `mask` the shape `[B, 1, N, 1]` and multiply before you sum.
# </details>


# %% tags=["exercise"]
def centrality_of(attention, mask):
    """[B, H, N, N], [B, N] → [B, N]."""
    ### BEGIN SOLUTION
    votes = attention * mask[:, None, :, None]
    return votes.sum(dim=(1, 2)) * mask
    ### END SOLUTION


# %% tags=["check"]
teach.check("centrality_of", centrality_of)

# %% [markdown]
# ### Exercise 2 · ★☆☆ · 3 minutes
#
# Write the saliency: `hidden` `[B, N, d]` → its L1 norm, `[B, N]`.
#
# <details><summary>Hint</summary>
#
# Absolute values first; then there is one axis too many.
# </details>


# %% tags=["exercise"]
def saliency_of(hidden):
    """[B, N, d] → [B, N]."""
    ### BEGIN SOLUTION
    return hidden.abs().sum(-1)
    ### END SOLUTION


# %% tags=["check"]
teach.check("saliency_of", saliency_of)

# %% [markdown]
# ### Exercise 3 · ★★☆ · 5 minutes
#
# Write RASTP's importance from `centrality` `[B, N]`, `hidden` `[B, N, d]` and `mask` `[B, N]`. A padded position must never be chosen
# before a real one, however small the scores are: give it −∞.
#
# <details><summary>Hint</summary>
#
# `tensor.masked_fill(condition, value)`. Why is 0 not enough? Think of a scorer whose values may be negative.
# </details>


# %% tags=["exercise"]
def importance_of(centrality, hidden, mask):
    """[B, N], [B, N, d], [B, N] → [B, N]."""
    ### BEGIN SOLUTION
    product = centrality * hidden.abs().sum(dim=2)
    return product.masked_fill(mask == 0, -torch.inf)
    ### END SOLUTION


# %% tags=["check"]
teach.check("importance_of", importance_of)

# %% [markdown]
# ## Summary
#
# Attention is a softmax of query · key plus position bias; the sum of a *column* is what a token receives. RASTP multiplies it by the L1
# norm of the token's state. On this model the score finds more informative input tokens than chance, though fewer than centrality alone,
# and it agrees only in part with what happens when tokens are taken out. The answer depends on the place: what is informative at the
# input and what carries the information after a layer are different tokens, and the judge after the layer ranks the scorers in another order. Test a
# scorer by intervention, at the layer where you prune, and against `random`.

# %%
teach.quiz(
    teach.Question(
        "Which sum is the attention that tokens receive? attention is [heads, queries, keys].",
        [
            "attention.sum(dim=(0, 1))",
            "attention.sum(dim=(0, 2))",
            "attention.sum(dim=(1, 2))",
            "attention.mean(dim=2)",
        ],
        0,
        "Over heads and queries, so that the keys are left.",
    ),
    teach.Question(
        "You sum over the keys by mistake and multiply by the saliency. What do you get?",
        ["An error", "A random order", "The order of the saliency alone", "RASTP, only scaled"],
        2,
        "Each row sums to 1, so the first factor is the same for all tokens.",
    ),
    teach.Question(
        "Why is the drop of the true next item's log-probability a poor judge of one token?",
        [
            "Logarithms are unstable",
            "The next item is one random draw of many possible ones",
            "The model is too small",
            "It needs a GPU",
        ],
        1,
        "A single draw goes up or down by luck. The change of the whole prediction averages over the draws.",
    ),
    teach.Question(
        "A token is truly informative, but its removal after layer 2 changes nothing. How can that be?",
        [
            "The truth is wrong",
            "Other tokens have read it in the layers before and carry it now",
            "Its attention is zero",
            "The decoder sees the input",
        ],
        1,
        "Two layers of attention have copied it. The pruner chooses among states, not among inputs.",
    ),
    teach.Question(
        "“Attention is not explanation” means:",
        [
            "Attention is random",
            "Attention says where a layer looked, not what would change without it",
            "Attention cannot be used for pruning",
            "Only saliency explains",
        ],
        1,
        "Only an intervention says what would change. As a ranking to prune by, attention can still be better than chance.",
    ),
)

# %% [markdown]
# ## Links
#
# * RASTP: [arXiv 2511.16943](https://arxiv.org/abs/2511.16943); STAMP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329)
# * Jain and Wallace, *Attention is not Explanation*: [arXiv 1902.10186](https://arxiv.org/abs/1902.10186); an answer, Wiegreffe and
#   Pinter, *Attention is not not Explanation*: [arXiv 1908.04626](https://arxiv.org/abs/1908.04626)
# * Code: [the scorers](../sidlab/saliency.py), [attention and its centrality inside T5](../sidlab/models/t5.py), [the
#   probe](../sidlab/course/probe.py), [the planted truth](../sidlab/data/planted.py), [the explorer](../sidlab/viz/attention.py)

# %% tags=["record"]
record = {
    "attention_difference": float((attention - probe.attention[layer - 1]).abs().max()),
    "informative": float(informative.mean()),
    "rastp_minus_centrality_behind": test.difference,
    "from_padding": from_padding,
    "front": float(by_position["rastp"][:4].mean() / by_position["rastp"][-4:].mean()),
    "front_visible": float(
        by_position["rastp-visible"][:4].mean() / by_position["rastp-visible"][-4:].mean()
    ),
}
columns = {
    "precision": comparison["precision"],
    "recall": comparison["recall"],
    "truth": correlations["oracle"],
    "drop": correlations["drop"],
    "effect": correlations["effect"],
    "behind": behind,
}
record |= {f"{name}_{s}": float(column[s]) for name, column in columns.items() for s in scorers}
teach.record(record)
