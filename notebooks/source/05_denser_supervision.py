# %% [markdown]
# # 5. Denser supervision: predicting further ahead
#
# Multi-step auxiliary prediction (MAP) asks a training window for more than its next item. You build its labels, its
# head and its loss by hand, measure which parameters feel them, and see what it brought in recorded runs and in one
# of your own.
#
# **Goals**
# * Say exactly what MAP predicts, through which parameters, and from which labels it must keep away.
# * Measure its gradient: how many labels an update has, how strongly each part of the model feels them, and whether
#   they pull the same way.
# * Judge learning curves over steps, weight and unit against a baseline that is always shown.
#
# **You need** PyTorch, and [notebook 1](01_semantic_ids.ipynb). [Notebook 2](02_semantic_dilution.ipynb) says why
# labels are sparse.
#
# **Time** 35 minutes, of which about 3 for a training of your own; 25 more with the two exercises.
#
# **Machine** 1–2 cores, about 1 GB of memory, no network, no GPU.

# %% tags=["parameters"]
steps = 2  # of the MAP that is taken apart here and trained below
weight = 0.3  # of its loss
batch_windows = 128  # of the batch whose labels and gradients are measured
recorded = "data/map.json"  # or a recording of your own
own_users = 2000  # of your own run: two trainings of about a minute each
own_updates = 200

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
from sidlab import demo, teach
from sidlab.map_loss import MapHead
from sidlab.training import build_model
from sidlab.viz import MapExplorer
from sidlab.viz.theme import template
from sidlab.windows import Collator, Windows, leave_one_out

catalogue, encoder, table, _ = demo.load()
split = leave_one_out(catalogue.histories)
windows = Windows(split.train, max_items=30)

# %% [markdown]
# ## The idea
#
# One window: a user's history, and the next item, spelled in three tokens. Those three tokens are all the labels that
# the window gives, however long its history is. STAMP (arXiv 2604.05329) adds labels: the model also predicts what
# comes *after* the next item. In training only; at inference the extra part is dropped.
#
# **What is known and what is ours.** The paper says: several future steps, a shared projection, an auxiliary term
# beside the next-token loss, heads dropped at inference. The number of steps, the weight and the formulas are not
# available to us. What follows is *our reading* of it:
#
# ```
# h_t      state that predicts token t of the next item                                   [d]
# h_t^(s)  = h_t + P(RMSNorm(h_t) + e_s)       s = 1 … S, one P for all steps, one e_s a step
# loss     = CE(next item) + weight · mean over s of CE(step s)
# ```
#
# Each h_t^(s) goes through the model's own output head. Its label is token t of the s-th item after the next one
# (`unit="item"`), or token t + s of the next item itself (`unit="token"`).
#
# ## Labels by hand
#
# Take one user's training part and stand near its end.

# %%
part = split.train[0]  # everything but the last two items, which are held out
target = len(part) - 2  # the place of the next item
ahead = part[target + 1 : target + 1 + steps]
titles = catalogue.items.title
print("history:", "; ".join(titles[i - 1] for i in part[max(0, target - 3) : target]))
print("next   :", titles[part[target] - 1], table.item_tokens[part[target]].tolist())
for s, i in enumerate(ahead, start=1):
    print(f"step {s} :", titles[i - 1], table.item_tokens[i].tolist())
print(f"{len(ahead)} of {steps} steps have a label")

# %% [markdown]
# One step has no label: the item behind it belongs to validation. If MAP could look there, it would train on what it
# is tested on. The package's collator keeps to the same border; −100 means "no label". Compare:

# %%
config = sidlab.MapConfig(steps=steps, weight=weight, unit="item")
collator = Collator(windows, table, separators=True, max_items=30, map_config=config)
window = int(np.flatnonzero(windows.target == target)[0])  # the first user's items stand first
batch = collator([window])
batch["labels"], batch["map_labels"]

# %% [markdown]
# With `unit="token"` nothing further in the future is asked. Position t predicts token t + s of the *same* item: the
# labels, moved to the left.

# %%
by_token = sidlab.MapConfig(steps=steps, weight=weight, unit="token")
token_collator = Collator(windows, table, separators=True, max_items=30, map_config=by_token)
token_collator([window])["map_labels"]

# %% [markdown]
# From here on, a whole batch:

# %%
some = np.random.default_rng(0).permutation(len(windows))[:batch_windows].tolist()
batch = collator(some)
n_main, n_map = (int((batch[name] != -100).sum()) for name in ("labels", "map_labels"))
teach.predict(f"{batch_windows} windows have {n_main} labels. How many does MAP by item with {steps} steps add, in percent of these?",
              100 * n_map / n_main, range=(0, 100.0 * steps), default=(30.0 * steps, 90.0 * steps), unit="%",
              explain="Late windows lack steps: their users' training parts end too soon.")

# %%
rows = {}
for unit, most in (("item", 4), ("token", 2)):
    options = sidlab.MapConfig(steps=most, unit=unit)
    labels = Collator(windows, table, separators=True, max_items=30, map_config=options)(some)["map_labels"]  # [B, S, L]
    rows[f"by {unit}"] = {f"step {s + 1}": float((labels[:, s] != -100).float().mean()) for s in range(most)}
pd.DataFrame(rows).T.style.format("{:.0%} of positions", na_rep="–")

# %% [markdown]
# **What to look for.** By item the share falls slowly with the step. By token with three levels, two steps are all
# there is, and they add as many labels as one step with no gaps would.
#
# ## The shared projection by hand
#
# Four lines. The residual `hidden +` means: with P = 0 each step predicts exactly what the next-item head predicts.

# %%
d = 64
hidden = torch.randn(2, 3, d)  # [B, L, d], decoder states
P, e = torch.randn(d, d) / d**0.5, 0.02 * torch.randn(steps, d)
normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
states = hidden[:, None] + (normed[:, None] + e[:, None]) @ P.T  # [B, S, L, d]

# %%
head = MapHead(d, steps)
with torch.no_grad():
    head.projection.copy_(P)
    head.step.copy_(e)
    difference = float((head(hidden) - states).abs().max())
print(tuple(states.shape), "largest difference from the package:", difference)

# %% [markdown]
# **Sharing.** One projection serves all steps; only the small e_s says which step is meant. With one projection a
# step the head would grow with S, and each would see only its own step's labels:

# %%
sizes = [{"steps": s, "shared: d² + d + S·d": sum(p.numel() for p in MapHead(d, s).parameters()),
          "one P a step: S·d² + d": s * d * d + d} for s in (1, 2, 4, 8)]
pd.DataFrame(sizes).style.hide(axis="index")

# %% [markdown]
# ## The loss by hand
#
# A fresh model with a MAP head, and the batch from above. First what the package says, then the same step by step:
# decoder states, the head's states, and for each level the cross-entropy against the codes of that level.

# %%
model = build_model(sidlab.TrainConfig.preset("quick", map=config), table)
out = model(**batch)
print(f"next item {out.main_loss:.4f}, MAP {out.map_loss:.4f}, together {out.loss:.4f}")

# %%
decoded = model.decoder(input_ids=model._shift_right(batch["labels"]), encoder_attention_mask=out.encoder_attention_mask,
                        encoder_hidden_states=out.encoder_last_hidden_state)
ahead = model.map_head(decoded.last_hidden_state)  # [B, S, L, d]
per_step = []
for s in range(steps):
    total = 0.0
    for level, (first, width) in enumerate(zip(table.offsets, table.widths)):
        logits = F.linear(ahead[:, s, level], model.lm_head.weight[first : first + width])  # the model's own head
        label = batch["map_labels"][:, s, level]
        total += F.cross_entropy(logits[label != -100], label[label != -100] - first, reduction="sum").item()
    per_step.append(total / int((batch["map_labels"][:, s] != -100).sum()))
print("steps", [round(x, 4) for x in per_step], "→ mean", round(sum(per_step) / steps, 4))

# %% [markdown]
# One thing to notice, because it limits what can be learned. The state at level 3 has seen the next item's levels 1
# and 2. It has *not* seen levels 1 and 2 of the item after that, whose level 3 it is asked for. So the steps' losses
# can't come down as far as the main one.
#
# ## Gradient density
#
# "Denser supervision" can be measured. On one batch: how many labels are there, how large is the gradient of each
# loss in each part of the model, and do the two gradients point the same way? The cosine is 1 where they agree, 0
# where they have nothing to do with each other, below 0 where MAP pulls against the next item.

# %%
def gradients(model, loss):
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


def part_of(name):
    parts = {"shared": "embeddings = output head", "map_head": "MAP head"}
    return parts.get(name.split(".")[0], name.split(".")[0])


# %%
def density(model, batch):
    out, rows = model(**batch), []
    main, auxiliary = gradients(model, out.main_loss), gradients(model, weight * out.map_loss)
    for part in dict.fromkeys(map(part_of, main)):
        a, b = (torch.cat([g.flatten() for name, g in of.items() if part_of(name) == part]) for of in (main, auxiliary))
        cosine = float(F.cosine_similarity(a, b, dim=0)) if a.any() else float("nan")  # the head has no part in the main loss
        rows.append({"part": part, "parameters": len(a), "‖next item‖": float(a.norm()), "‖weight · MAP‖": float(b.norm()),
                     "‖both‖": float((a + b).norm()), "cosine": cosine})
    return pd.DataFrame(rows).set_index("part")


# %%
before = density(model, batch)


def direction(cosine):
    return "mostly the same" if cosine > 0.3 else "against each other" if cosine < -0.3 else "hardly related"


teach.predict("In this fresh model, in which direction do the two losses pull the encoder?", direction(before.cosine["encoder"]),
              choices=["mostly the same", "hardly related", "against each other"], default="hardly related",
              explain="At first both gain from the same things, such as knowing which codes are frequent.")

# %%
before.style.format(precision=3, na_rep="–")

# %%
parameters = sum(p.numel() for p in model.parameters())
rows = {name: {"labels": n, "labels per 1,000 parameters": 1000 * n / parameters, "gradient norm": (norms**2).sum() ** 0.5}
        for name, n, norms in (("next item alone", n_main, before["‖next item‖"]), ("with MAP", n_main + n_map, before["‖both‖"]))}
totals = pd.DataFrame(rows).T
totals["gradient norm per label"] = totals["gradient norm"] / totals["labels"]
totals.style.format(precision=4).format("{:.0f}", subset="labels")

# %% [markdown]
# **What to look for.** Every part of the model feels MAP, not only its head: the extra labels reach embeddings,
# decoder and encoder *through* the head. The norm per label says how much a label moves the model; more labels at the
# same total norm are not more learning by themselves. Set `weight = 1.0` in the parameters: which column changes, and
# does the cosine?
#
# ## Dropped at inference
#
# The head makes no recommendation. Save the model without it, and compare what both recommend:

# %%
histories = [history[:-1] for history in catalogue.histories[:50]]
with tempfile.TemporaryDirectory() as folder:
    model.eval().save_pretrained(folder, drop_map=True)
    bare = sidlab.SidT5.from_pretrained(folder).eval()
same = torch.equal(sidlab.recommend(model, histories)[0], sidlab.recommend(bare, histories)[0])
print(f"with head {model.num_parameters():,} parameters, without {bare.num_parameters():,}; same recommendations: {same}")

# %% [markdown]
# So MAP costs nothing at inference. It costs something in training: a few products of [d, d] a window, and a softmax
# a step and level. The model of cost knows how many FLOPs. (Compare the seconds in the runs below: many small
# operations take longer than their FLOPs say.)

# %%
def flops(map_config):
    return sidlab.cost.cost(sidlab.TrainConfig.preset("quick", map=map_config), table.widths, windows.lengths).training


relative = {f"{s} steps": flops(sidlab.MapConfig(steps=s)) / flops(None) for s in (1, 2, 4)}
pd.DataFrame({"training FLOPs, × no MAP": relative}).style.format(precision=3)

# %% [markdown]
# ## What it brought: recorded runs
#
# Trained with the `quick` preset on the planted shop: no MAP, MAP by item (1, 2 and 4 steps, three weights each), and
# MAP by token (1 and 2 steps, one weight), three seeds each. With one seed all saw the same windows in the same order, from the same
# initial weights; curves and points are means over seeds.

# %%
data = json.loads(pathlib.Path(recorded).read_text())
base = next(row for row in data["rows"] if row["map.unit"] is None)
with_map = [row for row in data["rows"] if row is not base]
differences = [row["against"][base["number"]] for row in with_map]  # mean, low, high of recall@10 − that of the baseline
better, worse = sum(low > 0 for _, low, _ in differences), sum(high < 0 for _, _, high in differences)
width = float(np.median([high - low for _, low, high in differences]))
teach.predict(f"Of {len(with_map)} settings of MAP, how many are clearly better than the baseline, on the same users and seeds?",
              better, range=(0, len(with_map)), default=(0, 5),
              explain=f"The 95 % intervals of the differences are some {width / 2:.3f} to either side: what is smaller is undecided here.")

# %%
MapExplorer(data)

# %% [markdown]
# **What to look for.**
# * Move the weight from 0.1 to 1. The left curve is recall, the right one the loss of the next item *alone*, so all
#   runs compare there.
# * Compare 1, 2 and 4 steps by item: the further ahead, the less the present history tells.
# * Switch to tokens. Two steps are all there is with three levels, and one weight was recorded: sliders that stood
#   elsewhere move there.
# * The lower figure shows all settings at once: how much more (or less) recall than without MAP, on the same users and with the same
#   seeds. Which intervals leave the line?

# %%
best = max(with_map, key=lambda row: row["recall@10"])
above = sum(row["recall@10"] > base["recall@10"] for row in with_map)
ceiling = float(catalogue.truth.bayes_recall(split.cases("test")[0]).mean())
print(f"no MAP {base['recall@10']:.3f}; {above} of {len(with_map)} settings are above it; clearly better {better}, clearly worse {worse}")
print(f"best: by {best['map.unit']}, {best['map.steps']:g} steps, weight {best['map.weight']:g}: {best['recall@10']:.3f}")
print(f"Bayes optimum {ceiling:.3f}")

# %% [markdown]
# So none of these settings is clearly better than no MAP in this shop, and a weight of 1 is clearly worse where three seeds suffice to say so: the auxiliary labels then take
# from the next item what it needs.
#
# Read that with care. The best of many settings is partly the luckiest: picking it on the test items and reporting its
# number is cheating, if a mild kind. Three seeds say little about others. These trainings are short, so "better"
# may mean "faster at first". And whatever you see is about our reading of MAP in this shop, not about the paper's.
#
# ## A run of your own
#
# Two trainings, the second with MAP. Everything else is equal, the initial weights included: the head draws its
# weights aside, so that it shifts no other random number.

# %%
shop = sidlab.load_catalogue("planted", n_users=own_users)  # the same world, as many users as you like
common = {"max_updates": own_updates, "epochs": 100, "eval_every": max(1, own_updates // 5), "eval_users": 300}
own = {name: sidlab.train(sidlab.TrainConfig.preset("quick", map=chosen, **common), shop, table, progress=False)
       for name, chosen in (("no MAP", None), ("MAP", config))}
for name, result in own.items():
    print(f"{name}: {result.timing['train_seconds']:.0f} s, validation recall@10 {result.metrics['recall@10']:.3f}")

# %%
curve = pd.concat([pd.DataFrame(result.log).dropna(subset="main_loss")[["step", "main_loss"]].assign(run=name)
                   for name, result in own.items()])
last = curve.groupby("run").main_loss.apply(lambda losses: losses.tail(5).mean())
answers = ["lower with MAP", "not lower with MAP"]
teach.predict("After equally many updates, the training loss of the next item alone (mean of the last five values) is …", answers[int(last["MAP"] >= last["no MAP"])],
              choices=answers, default=answers[0], explain="One run each: train with another seed (seed=1) before you believe it.")

# %%
px.line(curve, x="step", y="main_loss", color="run", symbol="run", line_dash="run", markers=True, height=360, template=template(),
        title="Training loss of the next item alone, your own run", labels={"step": "updates", "main_loss": "loss (nats per token)"})

# %%
curve.pivot(index="step", columns="run", values="main_loss").iloc[::3].style.format(precision=3)

# %% [markdown]
# The loss compares well, for both runs saw the same batches. The two recalls above stand on 300 users: such a
# number is sure to about ± 0.06, so a smaller difference decides nothing.
#
# And the gradients, after training? The head has learned its task now, so the comparison with the fresh model is
# fair:

# %%
after = density(own["MAP"].model.cpu().train(), batch)
compared = {f"{what}, {when}": values for when, t in (("fresh", before), ("trained", after)) for what, values in (
    ("cosine", t.cosine), ("‖weight · MAP‖ / ‖next item‖", t["‖weight · MAP‖"] / t["‖next item‖"]))}
pd.DataFrame(compared).drop("MAP head").style.format(precision=2)

# %% [markdown]
# **What to look for.** Where the cosine falls towards 0, the auxiliary labels ask for something else than the next
# item by now. They may still help (a richer state) or only take room. Which of the two it is, only the recall on
# held-out users can say. Things to try: `steps, weight = 1, 0.1`; `config` with `unit="token"`; 1,000 updates.
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
# MAP, as we read it, predicts the same level of the items after the next one, through one shared projection with a
# small embedding a step, and never looks into the held-out items. It gives a window more labels, which reach the
# whole model, and is gone at inference. Its gradient agrees with the main one in a fresh model; later that has to be
# measured. Whether it brings recall is an empirical question with three knobs, and one seed does not answer it.

# %%
teach.quiz(
    teach.Question("What does step 2 of MAP by item predict at level 1?",
                   ["level 3 of the next item", "level 1 of the second item after the next one", "level 2 of the next item"], 1,
                   "The same level, so many items further on. Within the item it would be unit=\"token\"."),
    teach.Question("Why do late windows of a user lack labels?",
                   ["their history is too long", "MAP never looks into validation and test items", "they are dropped at random"], 1,
                   "Otherwise it would train on what it is tested on."),
    teach.Question("What do the steps share?", ["the projection and the output head", "the step embedding", "nothing"], 0,
                   "Only e_s differs between the steps."),
    teach.Question("What does MAP cost at inference?", ["S times the decoder", "one projection", "nothing"], 2,
                   "The head is dropped; the recommendations are the same."),
    teach.Question("The best of many settings beats the baseline by 0.01, and the interval of the difference holds 0. What follows?",
                   ["MAP works", "MAP does not work", "nothing is decided"], 2,
                   "The best of many is partly the luckiest; repeat it with other seeds, and choose on validation items."),
)

# %% [markdown]
# ## Links
#
# * STAMP, which proposes MAP: [arXiv 2604.05329](https://arxiv.org/abs/2604.05329) (steps and weight are not known to
#   us). TIGER: [arXiv 2305.05065](https://arxiv.org/abs/2305.05065).
# * Code: [map_loss.py](../sidlab/map_loss.py) (labels, head, loss), [windows.py](../sidlab/windows.py) (the border of
#   the held-out items), [models/t5.py](../sidlab/models/t5.py) (where the loss is added),
#   [viz/recorded.py](../sidlab/viz/recorded.py); [record.py](record.py) made the recording.

# %% tags=["record"]
record = {
    "added_labels": n_map / n_main, "loss_difference_by_hand": abs(sum(per_step) / steps - out.map_loss.item()),
    "same_recommendations": float(same), "cosine_fresh_encoder": float(before.cosine["encoder"]),
    "cosine_trained_encoder": float(after.cosine["encoder"]), "map_share_of_encoder_gradient": float(
        before["‖weight · MAP‖"]["encoder"] / before["‖next item‖"]["encoder"]),
    "recorded_runs": len(data["rows"]), "clearly_better": better, "clearly_worse": worse, "own_recall": {n: r.metrics["recall@10"] for n, r in own.items()},
    "own_last_loss": {name: float(x) for name, x in last.items()},
}
teach.record(record)
