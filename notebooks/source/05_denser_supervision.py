# %% [markdown]
# # 5. Denser supervision: where labels come from, and what they cost
#
# One pass over a history can teach one item, a few more (MAP), or all of them. You count labels, measure what they
# cost and what their gradients know, and train each way for equally many seconds.
#
# **Goals**
# * Count labels per pass and per token read, and say which of them are new.
# * Show that one pass over all items has the gradient of many passes.
# * Say what MAP predicts, through which parameters, and which labels it must not see.
# * Judge a training by recall after equally many seconds.
#
# **You need** PyTorch, and [notebook 1](01_semantic_ids.ipynb). [Notebook 2](02_semantic_dilution.ipynb) says why
# labels are sparse.
#
# **Time** 35 minutes, of which about 4 for trainings of your own; 25 more with the two exercises.
#
# **Machine** 1–2 cores, about 1.3 GB of memory, no network, no GPU.

# %% tags=["parameters"]
steps = 2  # of MAP, how many items further ahead
weight = 0.3  # of its loss
users = 16  # whose labels and gradients are taken apart
draws = 10  # batches whose gradients are compared with that of 500 users
own_users = 2000  # of your own runs
own_seconds = 30  # for each of four
recorded = ""  # or the file that your own `make study` wrote

# %% tags=["setup"]
import json
import pathlib
import tempfile

import numpy as np
import pandas as pd
import plotly.express as px
import torch
import torch.nn.functional as F

import sidlab
from sidlab.course import demo
from sidlab.course import teach
from sidlab.model_building import build_model
from sidlab.viz import MapExplorer
from sidlab.figures.theme import template
from sidlab.windows import Collator, StretchCollator, Stretches, Windows, leave_one_out

catalogue, _, table, _ = demo.load()
split = leave_one_out(catalogue.histories)
windows = Windows(split.train, max_items=30)
stretches = Stretches(split.train, max_items=30)

# %% [markdown]
# ## Three ways to read one user
#
# 1. **One item a window.** Read a prefix of the history, predict the next item: a user of ten items is read nine times.
# 2. **MAP** (multi-step auxiliary prediction, of STAMP). The same windows; each also predicts items *after* the next.
# 3. **All items in one pass.** Read the history once, predict the next item at *every* place, as SASRec does.
#
# One user's training part; each row is a pass:

# %%
part = split.train[0]
n = len(part)
marks = [("all items", 1, item, "read") for item in range(1, n)] + [
    ("all items", 1, item, "label") for item in range(2, n + 1)
]
for row in range(1, n):  # the window with `row` items of history
    for way in ("one item a window", "MAP"):
        marks += [(way, row, item, "read") for item in range(1, row + 1)] + [
            (way, row, row + 1, "label")
        ]
    marks += [
        ("MAP", row, item, "MAP's label") for item in range(row + 2, min(row + 1 + steps, n) + 1)
    ]
marks = pd.DataFrame(marks, columns=["way", "pass", "item", "what"])
figure = px.scatter(
    marks,
    x="item",
    y="pass",
    facet_col="way",
    color="what",
    symbol="what",
    height=360,
    template=template(),
    category_orders={"way": ["one item a window", "MAP", "all items"]},
    symbol_sequence=["square-open", "circle", "x-thin-open"],
    title="What each pass reads of one user, and what it is asked",
)
figure.update_traces(marker_size=11, marker_line_width=2).update_traces(
    marker_size=7, marker_line_width=0, selector={"name": "label"}
)
figure.for_each_annotation(lambda a: a.update(text=a.text.removeprefix("way="))).update_yaxes(
    autorange="reversed"
)

# %% [markdown]
# **What to look for.** Windows read the first items again and again. MAP's labels are also labels of other windows.
#
# ## Labels by hand
#
# An item is three tokens, so a label of the figure is three for the loss. Stand one item before the end of that part,
# so that MAP's second step would be an item held out for validation. Such a label must not be, or MAP would train on
# what it is tested on. The package keeps to that border, where −100 means "no label". First the next item and MAP's
# steps of one window, then all items in one pass: `[B, T, L]` in place of `[B, L]`.

# %%
config = sidlab.MapConfig(steps=steps, weight=weight, unit="item")
collator = Collator(windows, table, separators=True, max_items=30, map_config=config)
dense_collator = StretchCollator(stretches, table, separators=True, map_config=config)
window = n - 3  # of the first user, whose windows stand first: n − 2 items of history
batch = collator([window])
batch["labels"], batch["map_labels"], dense_collator([0])["labels"]

# %% [markdown]
# Count, for a few users:

# %%
mine = np.arange(windows.of_user[users]).tolist()  # all windows of these users
batch = collator(mine)
# No history here is longer than a stretch, so each user is one
dense = dense_collator(range(users))


def count(batch, name):
    return int((batch[name] != -100).sum())


n_main = count(batch, "labels")
n_map = count(batch, "map_labels")
n_dense = count(dense, "labels")
read = int(batch["attention_mask"].sum())
read_dense = 4 * n_dense // 3  # before each item's labels, one of three codes and a separator
print(
    f"{users} users, one item a window: {n_main:,} labels from {read:,} tokens, {1000 * n_main / read:.0f} per 1,000"
)

# %%
rows = {
    "one item a window": (len(mine), read, n_main),
    "one item a window and MAP": (len(mine), read, n_main + n_map),
    "all items": (users, read_dense, n_dense),
    "all items and MAP": (users, read_dense, n_dense + count(dense, "map_labels")),
}
counts = pd.DataFrame(rows, index=["passes", "history tokens read", "labels"]).T
counts["labels a pass"] = counts["labels"] / counts["passes"]
counts["labels per 1,000 tokens"] = 1000 * counts["labels"] / counts["history tokens read"]
counts["different tokens asked for"] = n_main

# %%
teach.predict(
    "All items in one pass: how many labels per 1,000 history tokens read?",
    1000 * n_dense / read_dense,
    range=(0, 1000),
    default=(600, 900),
    explain="Each item read is followed by one that is asked for: three labels for every four tokens, however long the history.",
    then=[
        counts.style.format("{:,.0f}").format("{:.1f}", subset="labels a pass"),
        "**What to look for.** No way asks for a token that the others do not ask for. MAP asks for the same ones again, from further back. "
        "All items in one pass has exactly the windows' labels, for a fraction of the reading.",
    ],
)

# %% [markdown]
# ## The same gradient
#
# One pass may replace many only if no place sees what comes after it. In a decoder-only model attention is causal
# anyway. Here `encoder_mask="items"` lets a history token see its own item and those before it, and a target the
# items before it. Both ways then have the same mean loss, so their gradients must agree (in evaluation mode: dropout
# would draw different numbers).

# %%
model = build_model(
    sidlab.TrainConfig.preset("quick", arch="t5", targets="all", map=config, zero_init=False), table
).eval()


# Of all parameters, or of one part, without the head that only MAP has
def gradient(model, loss, part=""):
    parameters = [
        p
        for name, p in model.named_parameters()
        if name.startswith(part) and not name.startswith("map_head")
    ]
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    )


# %%
together = gradient(model, model(**dense).main_loss)
one_by_one = sum(gradient(model, model(**collator([window])).main_loss) for window in mine) / len(
    mine
)
gradient_difference = float((together - one_by_one).abs().max())
print(
    f"{users} rows in one pass, against {len(mine)} passes: largest difference {gradient_difference:.1e} "
    f"(gradient norm {together.norm():.2f}), cosine {F.cosine_similarity(together, one_by_one, dim=0):.4f}"
)

# %% [markdown]
# Equal, but for rounding.
#
# ## What a batch knows
#
# Let each batch read about 1,000 history tokens. How close is its gradient to that of 500 other users? Cosine 1: the
# same direction; 0: unrelated.


# %%
def agreement(model, tokens=1000, others=500):
    reference = 0.0
    for part in np.array_split(np.arange(others), 10):  # all at once would take a gigabyte
        b = dense_collator(part.tolist())
        reference += count(b, "labels") * gradient(model, model(**b).main_loss)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(draws):
        some = rng.permutation(np.arange(windows.of_user[others], len(windows)))
        few = rng.permutation(np.arange(others, len(stretches)))
        some = some[: np.searchsorted(np.cumsum(4 * windows.lengths[some]), tokens)]
        few = few[: np.searchsorted(np.cumsum(4 * (stretches.lengths[few] - 1)), tokens)]
        for way, b in (
            ("one item a window", collator(some.tolist())),
            ("all items", dense_collator(few.tolist())),
        ):
            out = model(**b)
            main = gradient(model, out.main_loss)
            auxiliary = gradient(model, weight * out.map_loss)
            for name, g, labels in (
                (way, main, count(b, "labels")),
                (f"{way} and MAP", main + auxiliary, count(b, "labels") + count(b, "map_labels")),
            ):
                rows.append(
                    {
                        "batch of": name,
                        "labels": labels,
                        "gradient norm": float(g.norm()),
                        "cosine with 500 users": float(F.cosine_similarity(g, reference, dim=0)),
                    }
                )
    return pd.DataFrame(rows).groupby("batch of", sort=False).mean()


fresh = agreement(model)
cosines = fresh["cosine with 500 users"]
gain = (
    cosines["all items"] - cosines["one item a window"],
    cosines["one item a window and MAP"] - cosines["one item a window"],
)
answers = ["MAP", "all items", "neither, by less than 0.05"]

# %%
teach.predict(
    "Which of the two brings a batch of 1,000 tokens closer to the gradient of 500 users?",
    answers[2] if max(gain) < 0.05 else answers[int(gain[0] > gain[1])],
    choices=answers,
    default=answers[1],
    explain="A mean over more of the labels that count is less noisy.",
    then=[
        fresh.style.format(precision=2).format("{:.0f}", subset="labels"),
        "**What to look for.** MAP's gradient is larger. Is it closer? More labels help if they point where the next item does.",
    ],
)

# %% [markdown]
# ## MAP by hand
#
# The paper says: several future steps, a shared projection, an auxiliary term beside the next-token loss, heads
# dropped at inference. Steps, weight and formulas are not available to us. This is *our reading*:
#
# ```
# h_t      state that predicts token t of the next item                                   [d]
# h_t^(s)  = h_t + P(RMSNorm(h_t) + e_s)       s = 1 … S, one P for all steps, one e_s a step
# loss     = CE(next item) + weight · mean over s of CE(step s)
# ```
#
# Each h_t^(s) goes through the model's own output head. Its label is token t of the s-th item after the next one
# (`unit="item"`), or token t + s of the next item itself (`unit="token"`). First what the package says of the windows
# above, then the same by hand.

# %%
out = model(**batch)
print(f"next item {out.main_loss:.4f}, MAP {out.map_loss:.4f}, together {out.loss:.4f}")
encoded = model.encode(batch["input_ids"], batch["attention_mask"])
h = model.decoder(
    input_ids=model.shifted(batch["labels"]),
    encoder_hidden_states=encoded.last_hidden_state,
    # [B, L, d]
    encoder_attention_mask=model.cross_mask(encoded, encoded.attention_mask),
).last_hidden_state
head = model.map_head
normed = head.norm * h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
states = h[:, None] + (normed[:, None] + head.step[:, None]) @ head.projection.T  # [B, S, L, d]

# %%
per_step = []
for s in range(steps):
    total = 0.0
    for level, (first, width) in enumerate(zip(table.offsets, table.widths)):
        # The codes of this level
        logits = F.linear(states[:, s, level], model.lm_head.weight[first : first + width])
        label = batch["map_labels"][:, s, level]
        total += F.cross_entropy(
            logits[label != -100], label[label != -100] - first, reduction="sum"
        ).item()
    per_step.append(total / int((batch["map_labels"][:, s] != -100).sum()))
print("steps", [round(x, 4) for x in per_step], "→ mean", round(sum(per_step) / steps, 4))

# %% [markdown]
# The state at level 3 has seen the next item's levels 1 and 2, but *not* those of the item after it, whose level 3 it
# is asked for.
#
# Which parts of the model feel MAP, and in which direction? Below 0 it pulls against the next item.


# %%
def density(model):
    out = model(**batch)
    parts = {}
    for part in ("shared", "encoder", "decoder"):  # shared: the embeddings
        a = gradient(model, out.main_loss, part)
        b = gradient(model, weight * out.map_loss, part)
        parts[part] = {
            "‖next item‖": float(a.norm()),
            "‖weight · MAP‖": float(b.norm()),
            "cosine": float(F.cosine_similarity(a, b, dim=0)),
        }
    return pd.DataFrame(parts).T


before = density(model)
before.style.format(precision=3)

# %% [markdown]
# MAP's head makes no recommendation. Save the model without it, and compare what both recommend:

# %%
histories = [history[:-1] for history in catalogue.histories[:50]]
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, drop_map=True)
    bare = sidlab.SidT5.from_pretrained(folder).eval()
same = torch.equal(sidlab.recommend(model, histories)[0], sidlab.recommend(bare, histories)[0])
print(
    f"with head {model.num_parameters():,} parameters, without {bare.num_parameters():,}; same recommendations: {same}"
)

# %% [markdown]
# ## What a target costs
#
# A target is one next item to learn from. FLOPs of training per target, by the cost model, for the whole shop:

# %%
common = {"arch": "t5", "encoder_mask": "items", "precision": "fp32"}
ways = {
    "one item a window": {},
    "one item a window and MAP": {"map": config},
    "all items": {"targets": "all"},
    "all items and MAP": {"targets": "all", "map": config},
}
costs = {
    way: sidlab.cost.cost(
        sidlab.TrainConfig.preset("quick", **common, **fields),
        table.widths,
        stretches if "targets" in fields else windows,
    )
    for way, fields in ways.items()
}
flops = (
    pd.DataFrame(
        {way: {**c.flops, "forward": c.forward, "training": c.training} for way, c in costs.items()}
    ).T
    / 1e6
)
relative = flops["training"] / flops["training"]["one item a window"]

# %%
teach.predict(
    "Training FLOPs per target of one item a window are 100 %. And of all items in one pass?",
    100 * relative["all items"],
    range=(0, 100),
    default=(5, 40),
    unit="%",
    explain="The encoder reads an item once, not in every window. The decoder's work stays: it spells every target.",
    then=[
        flops.assign(relative=relative).drop(columns="after").style.format(precision=2),
        "Millions; *relative* compares the column *training*.",
    ],
)

# %% [markdown]
# Small operations take longer than their FLOPs say: compare the
# seconds below.
#
# ## Runs of your own
#
# Four trainings, equal but for their labels: model, initial weights (MAP's head draws its weights aside), users,
# seconds. A few updates tell how many fit. The learning rate falls to zero at the end of each.

# %%
# The same world, as many users as you like
shop = sidlab.load_catalogue("planted", n_users=own_users)


def run(way, updates, points=5, eval_users=300):
    options = sidlab.TrainConfig.preset(
        "quick",
        max_updates=updates,
        epochs=1000,
        eval_every=max(1, updates // points),
        eval_users=eval_users,
        **common,
        **ways[way],
    )
    return sidlab.train(options, shop, table, progress=False)


own = {}
for way in ways:
    pace = run(way, updates=5, points=1, eval_users=10).timing["train_seconds"] / 5
    own[way] = run(way, updates=max(5, 5 * int(own_seconds / pace / 5)))
    timing = own[way].timing
    print(
        f"{way:26}: {timing['train_seconds']:.0f} s, {timing['updates']} updates, {timing['windows']:,} targets, "
        f"{timing['windows'] / timing['train_seconds']:,.0f} a second"
    )

# %%
curves = pd.DataFrame(
    [
        {
            "way": way,
            "seconds": result.timing["train_seconds"] * entry["step"] / result.timing["updates"],
            "recall@10": entry["recall@10"],
        }
        for way, result in own.items()
        for entry in result.log
        if "recall@10" in entry
    ]
)
final = curves.groupby("way", sort=False)["recall@10"].last()
ceiling = float(catalogue.truth.bayes_recall(split.cases("validation")[0]).mean())
print(
    f"validation recall@10 after as many seconds, one item a window: {final['one item a window']:.3f}; Bayes optimum: {ceiling:.3f}"
)
figure = px.line(
    curves,
    x="seconds",
    y="recall@10",
    color="way",
    symbol="way",
    line_dash="way",
    markers=True,
    height=420,
    template=template(),
    title="Validation recall@10 against seconds of training",
    range_y=[0, 0.7],
)
figure = figure.add_hline(y=ceiling, line_dash="dot", annotation_text="Bayes optimum")

# %%
teach.predict(
    f"After as many seconds, validation recall@10 is {final['one item a window']:.3f} with one item a window. And with all items in one pass?",
    final["all items"],
    range=(0, 0.7),
    default=(0.35, 0.6),
    explain="It has seen several times as many targets in the same time.",
    then=[
        figure,
        final.to_frame().style.format("{:.3f}"),
        "**What to look for.**\n"
        "* 300 users, one seed: each recall is sure to about ± 0.06. Which differences are larger?\n"
        "* At which second does “all items” reach the last value of one item a window?\n"
        "* What does MAP add to the windows, and on top of all items?",
    ],
)

# %% [markdown]
# And the gradients after training, when MAP's head has learned its task?

# %%
trained = own["all items and MAP"].model.cpu().eval()
after = density(trained)
late = agreement(trained)
both = pd.DataFrame({"fresh": cosines, "trained": late["cosine with 500 users"]}).rename(
    "batch of {}, with 500 users".format
)
pd.concat(
    [
        both,
        pd.DataFrame({"fresh": before.cosine, "trained": after.cosine}).rename(
            "MAP with the next item, {}".format
        ),
    ]
).style.format(precision=2)

# %% [markdown]
# **What to look for.** What is common is learned, and a batch knows less of the direction. Where MAP's cosine with the
# next item falls towards 0, its labels ask for something else by now. Only recall on held-out users can say whether
# that helps or takes room.
#
# ## What MAP brought: recorded runs
#
# One item a window with the `quick` preset: no MAP, MAP by item (1, 2 and 4 steps, three weights each) and by token (1
# and 2 steps, one weight). Three seeds each, with the same windows, order and initial weights for all.

# %%
explorer = MapExplorer(json.loads(pathlib.Path(recorded).read_text()) if recorded else None)
base = explorer.base
with_map = explorer.runs
# Low and high of recall@10 − that of the baseline
ends = [row["difference_interval"] for row in with_map]
better = sum(low > 0 for low, _ in ends)
worse = sum(high < 0 for _, high in ends)
best = max(with_map, key=lambda row: row["recall@10"])

# %%
teach.predict(
    f"Of {len(with_map)} settings of MAP, how many are clearly better than the baseline, on the same users and seeds?",
    better,
    range=(0, len(with_map)),
    default=(0, 5),
    explain="Clearly: the 95 % interval of the difference lies above 0.",
    then=lambda: [
        f"No MAP {base['recall@10']:.3f}; of {len(with_map)} settings {better} clearly better, {worse} clearly worse; best {best['recall@10']:.3f}: "
        f"by {best['map.unit']}, {best['map.steps']:g} steps, weight {best['map.weight']:g}",
        explorer,
        "**What to look for.** Move the weight from 0.1 to 1: the right curve is the loss of the next item *alone*, so all runs compare there. "
        "Compare 1, 2 and 4 steps by item. In the lower figure, which intervals leave the line of no MAP? "
        "Read that with care: it is our reading of MAP, one shop, short trainings. And the best of many settings is partly the luckiest.",
    ],
)

# %% [markdown]
# Things to try: `steps, weight = 1, 0.1`; `own_seconds = 120`; `encoder_mask="full"` for the two ways with windows.
#
# ## Exercises
#
# ### Exercise 1 · ★★☆ · 10 minutes
#
# Write `map_labels(items, target, steps)`: `items` is the list of item ids of a user's *training part*, `target` the
# place of the next item in it (0 is the first). Return a list of `steps` item ids, the ones after the target, with
# None where there is none.
#
# <details><summary>Hint</summary>
#
# Step s (from 1) is at place `target + s`. Step 0 would be the target itself: if your labels begin with it, they are
# misaligned by one.
#
# </details>


# %% tags=["exercise"]
def map_labels(items, target, steps):
    ### BEGIN SOLUTION
    places = range(target + 1, target + 1 + steps)
    return [items[place] if place < len(items) else None for place in places]
    ### END SOLUTION


# %% tags=["check"]
teach.check("map_labels", map_labels)

# %% [markdown]
# ### Exercise 2 · ★★★ · 15 minutes
#
# Write `map_loss(step_losses, labels)`: `step_losses` float `[B, S, L]` are cross-entropies, with anything in them
# where there is no label; `labels` int64 `[B, S, L]` are −100 there. First the mean over each step's labels, then the
# mean over those steps that have a label at all. Return a scalar.
#
# <details><summary>Hint</summary>
#
# One mean over everything would let step 1, which has most labels, outvote the others. And "anything" may be NaN or
# infinite, so multiplying by a 0/1 mask is not enough: `torch.where`.
#
# </details>


# %% tags=["exercise"]
def map_loss(step_losses, labels):
    ### BEGIN SOLUTION
    present = labels != -100
    count = present.sum((0, 2))  # [S]
    total = torch.where(present, step_losses, 0.0).sum((0, 2))  # [S]
    means = total / count.clamp_min(1)
    return means.sum() / (count > 0).sum().clamp_min(1)
    ### END SOLUTION


# %% tags=["check"]
teach.check("map_loss", map_loss)

# %% [markdown]
# ## Summary
#
# A history holds a label for every code; what costs is reading it again for each. One pass with a mask has the gradient
# of all windows for a fraction of the FLOPs. MAP asks for the same items from further back, and its head is gone at
# inference. Whether it brings recall is an empirical question, which one seed does not answer.

# %%
teach.quiz(
    teach.Question(
        "Why may one pass teach all items of a history?",
        ["the items are independent", "no place sees what comes after it", "the loss is a mean"],
        1,
        "Its gradient is then the mean of the windows' gradients.",
    ),
    teach.Question(
        "Which tokens does MAP by item ask for that the windows alone do not?",
        [
            "those of the held-out items",
            "none: the same items, from further back",
            "the first item's",
        ],
        1,
        "And never the validation and test items, so late windows lack labels.",
    ),
    teach.Question(
        "Where does one pass over all items save most?",
        ["in the encoder", "in the decoder", "in the output heads"],
        0,
        "It reads each item once; the decoder still spells every target.",
    ),
    teach.Question(
        "What does MAP cost at inference?",
        ["S times the decoder", "one projection", "nothing"],
        2,
        "The head is dropped; the recommendations are the same.",
    ),
    teach.Question(
        "The best of many settings beats the baseline by 0.01, and the interval of the difference holds 0. What follows?",
        ["MAP works", "MAP does not work", "nothing is decided"],
        2,
        "Repeat it with other seeds, and choose on validation items.",
    ),
)

# %% [markdown]
# ## Links
#
# * STAMP, which proposes MAP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329). SASRec, all items in one pass:
#   [arXiv 1808.09781](https://arxiv.org/abs/1808.09781).
# * Code: [windows.py](../sidlab/windows.py), [map_loss.py](../sidlab/map_loss.py),
#   [models/t5.py](../sidlab/models/t5.py), [cost.py](../sidlab/research/cost.py); [study.ipynb](study.ipynb) makes the recording.

# %% tags=["record"]
record = {
    "added_labels": n_map / n_main,
    "labels_factor": n_dense / read_dense / (n_main / read),
    "gradient_difference": gradient_difference,
    "cosine_of_batch": cosines.to_dict(),
    "cosine_of_batch_trained": late["cosine with 500 users"].to_dict(),
    "cosine_gain_fresh": float(gain[0]),
    "loss_difference_by_hand": abs(sum(per_step) / steps - out.map_loss.item()),
    "same_recommendations": float(same),
    "flops_factor": float(relative["all items"]),
    "cosine_fresh_encoder": float(before.cosine["encoder"]),
    "cosine_trained_encoder": float(after.cosine["encoder"]),
    "recorded_runs": 1 + len(with_map),
    "clearly_better": better,
    "clearly_worse": worse,
    "own_recall": final.to_dict(),
    "own_targets_a_second": {
        way: r.timing["windows"] / r.timing["train_seconds"] for way, r in own.items()
    },
}
teach.record(record)
