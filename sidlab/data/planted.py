"""A synthetic shop whose informative tokens are known exactly: the embedded default catalogue.

Items stand in a tree: department → brand → kind. A user clicks through it like this:

* **Markov steps.** The next *department* depends on the department of the user's last real click.
* **Persistent intent.** In every department a user has a favourite *brand*, for good. It shows each
  time they come back, with probability `loyalty`. A tour of the departments takes long, so what
  decides the brand of the next click was often last seen far back: keeping only recent tokens is
  not enough.
* **Nothing.** The *kind* of an item is drawn from the department's popularity; past kinds say
  nothing about the next one.
* **Noise.** With probability `noise` a click goes to the household shelf, whose departments and
  brands are its own. It leaves no trace in what follows.

So the tokens of level 3 and those of noise clicks never carry information about the next item, and
the others do: the department and brand of real clicks. `PlantedTruth` computes how much, in nats,
and the exact next-item distribution. An item's embedding is the sum of one vector per level, of
falling size, so residual k-means can recover the tree.
"""

import dataclasses

import numpy as np
import pandas as pd

from sidlab.data.catalogue import Catalogue

DEPARTMENTS = ("Running", "Cycling", "Camping", "Climbing", "Swimming", "Skiing")
BRANDS = ("Alder", "Boreal", "Cairn", "Dune", "Ember", "Fjord")
KINDS = ("jacket", "gloves", "backpack", "bottle")
NOISE_DEPARTMENTS = ("Household", "Snacks")
NOISE_BRANDS = ("Everyday", "Value")
NOISE_KINDS = (("batteries", "bulbs", "tape", "sponges"), ("nuts", "bars", "crisps", "tea"))


@dataclasses.dataclass(frozen=True)
class PlantedTruth:
    """What is true of the planted world: a forward filter over its hidden states (the favourite
    brands).

    `tree` int64 [n, 3]: department, brand and kind of item id 1.. (row 0 is item 1). Real
    departments are 0..D-1 and real brands 0..S-1; larger codes are noise. `step` [D, D],
    `brand_prior` [D, S], `kind_popularity` [D, V]: the probabilities of the module docstring.
    `noise_popularity` [n]: the distribution of a noise click over all items.
    """

    tree: np.ndarray
    step: np.ndarray
    brand_prior: np.ndarray
    kind_popularity: np.ndarray
    noise_popularity: np.ndarray
    loyalty: float
    noise: float

    def next_item(self, histories) -> np.ndarray:
        """The exact distribution of the next item given each history alone: float64 [U, n_items]
        (column 0 is item 1).
        """
        state = self._filter(histories)
        real = state.next_department[:, :, None] * self._brand(state.counts)  # [U, D, S]
        department, brand, kind = self.tree.T
        signal = department < len(self.step)
        out = (
            self.noise * np.broadcast_to(self.noise_popularity, (len(real), len(self.tree))).copy()
        )
        d = department[signal]
        s = brand[signal]
        v = kind[signal]
        out[:, signal] += (1 - self.noise) * real[:, d, s] * self.kind_popularity[d, v]
        return out

    def recommend(self, histories, k: int = 10) -> np.ndarray:
        """The Bayes-optimal list: the k most probable item ids given each history, int64 [U, k]."""
        return np.concatenate(
            [np.argsort(-p, axis=1, kind="stable")[:, :k] + 1 for p in self._by_rows(histories)]
        )

    def bayes_recall(self, histories, k: int = 10) -> np.ndarray:
        """The probability that the next item is among the k most probable ones: the best expected
        recall@k, float64 [U].
        """
        return np.concatenate(
            [np.sort(p, axis=1)[:, ::-1][:, :k].sum(axis=1) for p in self._by_rows(histories)]
        )

    def _by_rows(self, histories, size=64):
        """`next_item` of a few histories at a time: of all at once, a large catalogue would take
        tens of GB.
        """
        return (
            self.next_item(histories[start : start + size])
            for start in range(0, max(len(histories), 1), size)
        )

    def informative(self, histories) -> np.ndarray:
        """Which tokens are informative: bool [U, M, 3], left-aligned. True where the conditional
        mutual information with the next item is not zero: the department and the brand of real
        clicks.
        """
        items = _pad(histories)
        real = (items > 0) & (self.tree[items - 1, 0] < len(self.step))
        return np.stack([real, real, np.zeros_like(real)], axis=-1)

    def information(self, histories) -> np.ndarray:
        """How many nats each history token holds about the next item, all others known: float64 [U,
        M, 3], left-aligned.

        The pointwise conditional information KL(p(next | history) ‖ p(next | history, this token
        unknown)), where an unknown token is summed out under the generating process. Its mean over
        histories is the conditional mutual information.
        """
        items = _pad(histories)
        state = self._filter(histories)
        n_dep = len(self.step)
        out = np.zeros((*items.shape, self.tree.shape[1]))
        # Every real click: R of them
        user, place = np.nonzero((items > 0) & (self.tree[items - 1, 0] < n_dep))
        if len(user) == 0:
            return out
        dep, brand, kind = self.tree[items[user, place] - 1].T
        rows = np.arange(len(user))
        full = state.counts[user]  # [R, D, S]
        without = full.copy()
        without[rows, dep, brand] -= 1
        p_full = self._brand(full)
        p_without = self._brand(without)  # [R, D, S]
        now = state.next_department[user]  # [R, D]

        # Brand unknown: only the brand distribution of this department changes.
        out[user, place, 1] = (
            (1 - self.noise) * now[rows, dep] * _kl(p_full[rows, dep], p_without[rows, dep])
        )

        # Department unknown: what its neighbours in the walk, the brand and the kind say about it.
        before = np.where(state.previous[user, place] >= 0, state.previous[user, place], n_dep)
        after = state.following[user, place]
        into = np.concatenate([self.step, np.full((1, n_dep), 1 / n_dep)])[before]  # [R, D]
        onward = np.where(after[:, None] >= 0, self.step.T[after], 1.0)  # [R, D]
        weight = into * onward * p_without[rows, :, brand] * self.kind_popularity.T[kind]
        weight /= weight.sum(axis=1, keepdims=True)
        # The brand counted everywhere
        with_here = without + (np.arange(self.brand_prior.shape[1]) == brand[:, None])[:, None]
        p_here = self._brand(with_here)
        # p(next department = g, brand | this click was in department e) differs from p_without only
        # where e = g.
        last = after < 0
        # [R, e, g]
        joint = np.where(
            last[:, None, None],
            weight[:, :, None] * self.step[None],
            weight[:, :, None] * now[:, None],
        )
        same = np.einsum("rgg->rg", joint)
        other = joint.sum(axis=1) - same
        unknown = same[..., None] * p_here + other[..., None] * p_without
        out[user, place, 0] = (1 - self.noise) * _kl(
            (now[..., None] * p_full).reshape(len(rows), -1), unknown.reshape(len(rows), -1)
        )
        return out

    def _brand(self, counts):
        """Brand counts per department [..., D, S] → the probability of the next click's brand there
        [..., D, S].
        """
        other = (1 - self.loyalty) / (counts.shape[-1] - 1)
        # Hundreds of clicks on one brand would overflow
        log = np.log(self.brand_prior) + counts * np.log(self.loyalty / other)
        favourite = np.exp(log - log.max(axis=-1, keepdims=True))
        favourite /= favourite.sum(axis=-1, keepdims=True)
        return other + (self.loyalty - other) * favourite

    def _filter(self, histories):
        items = _pad(histories)
        n_dep, n_brand = self.brand_prior.shape
        dep = np.where(items > 0, self.tree[items - 1, 0], n_dep)
        real = dep < n_dep
        counts = np.zeros((len(items), n_dep, n_brand))
        user, place = np.nonzero(real)
        np.add.at(counts, (user, dep[user, place], self.tree[items[user, place] - 1, 1]), 1)
        previous = np.full(items.shape, -1)
        following = np.full(items.shape, -1)
        last = np.full(len(items), -1)
        for m in range(items.shape[1]):
            previous[:, m] = last
            last = np.where(real[:, m], dep[:, m], last)
        after = np.full(len(items), -1)
        for m in reversed(range(items.shape[1])):
            following[:, m] = after
            after = np.where(real[:, m], dep[:, m], after)
        start = np.full((1, n_dep), 1 / n_dep)
        # Last = -1 picks the start distribution
        next_department = np.concatenate([self.step, start])[last]
        return _State(counts, next_department, previous, following)


@dataclasses.dataclass(frozen=True)
class _State:
    counts: np.ndarray  # [U, D, S] real clicks by department and brand
    next_department: np.ndarray  # [U, D]
    previous: np.ndarray  # [U, M] department of the real click before, -1 if none
    following: np.ndarray  # [U, M]


def planted_catalogue(
    n_users: int = 2000,
    seed: int = 0,
    *,
    loyalty: float = 0.9,
    noise: float = 0.2,
    dim: int = 48,
    shortest: int = 6,
    longest: int = 18,
    kinds: int = len(KINDS),
) -> Catalogue:
    """The planted world as a `Catalogue` with `truth`.

    Args: `n_users` histories of uniform length in [`shortest`, `longest`]; `seed` draws the world
    and the users; `loyalty` and `noise` as in the module docstring; `dim`: size of the embeddings;
    `kinds` of every brand: there are 40 brands, so 40 · `kinds` items, a million with 25,000.
    """
    for name, value in (("loyalty", loyalty), ("noise", noise)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if not 3 <= shortest <= longest:
        raise ValueError(
            f"shortest and longest must satisfy 3 <= shortest <= longest, got {shortest} and"
            f" {longest}"
        )
    if n_users < 1:
        raise ValueError(f"n_users must be at least 1, got {n_users}")
    if kinds < 2:
        raise ValueError(f"kinds must be at least 2, got {kinds}")
    rng = np.random.default_rng(seed)
    truth = _world(rng, loyalty, noise, kinds)
    branches = truth.tree[:, :2].max() + 1
    if dim < branches:
        raise ValueError(
            f"dim must be at least {branches}, the width of the widest level above the last, got"
            f" {dim}"
        )
    lengths = rng.integers(shortest, longest + 1, n_users)
    histories = _walk(rng, truth, lengths)
    scale = (1.0, 0.6, 0.35)
    widths = truth.tree.max(axis=0) + 1
    embeddings = rng.normal(0, 0.01, (len(truth.tree), dim))
    for level, width in enumerate(widths):
        vectors = rng.normal(size=(dim, width))
        if width <= dim:
            vectors = np.linalg.qr(vectors)[0]  # orthonormal: no two branches look alike by chance
        else:
            vectors /= np.linalg.norm(vectors, axis=0)
        vectors = vectors.T
        embeddings += scale[level] * vectors[truth.tree[:, level]]
    return Catalogue(
        name="planted",
        items=_items(truth.tree),
        histories=histories,
        user_ids=[str(i) for i in range(1, n_users + 1)],
        truth=truth,
        embeddings=embeddings.astype(np.float32),
    )


def _world(rng, loyalty, noise, v):
    d = len(DEPARTMENTS)
    s = len(BRANDS)
    real = np.stack(np.meshgrid(range(d), range(s), range(v), indexing="ij"), -1).reshape(-1, 3)
    noisy = np.stack(np.meshgrid(range(2), range(2), range(v), indexing="ij"), -1).reshape(
        -1, 3
    ) + (d, s, 0)
    tree = np.concatenate([real, noisy])
    # A department leads to the next two of a round tour, and now and then anywhere.
    step = np.full((d, d), 0.1 / d)
    for g in range(d):
        step[g, (g + 1) % d] += 0.6
        step[g, (g + 2) % d] += 0.3
    brand_prior = rng.dirichlet(np.full(s, 5.0), d)
    # A few kinds: each half as popular as the one before. Many: Zipf's law, or nobody would ever
    # buy most of them.
    popular = 0.5 ** np.arange(v) if v <= 8 else 1 / np.arange(1, v + 1)
    popular /= popular.sum()
    kind_popularity = np.stack([rng.permutation(popular) for _ in range(d)])
    noise_popularity = np.zeros(len(tree))
    noise_popularity[len(real) :] = rng.dirichlet(np.full(len(noisy), 2.0))
    return PlantedTruth(tree, step, brand_prior, kind_popularity, noise_popularity, loyalty, noise)


def _walk(rng, truth, lengths):
    """All users' clicks, one step of the walk at a time for everyone."""
    n = len(lengths)
    longest = int(max(lengths))
    d, s = truth.brand_prior.shape
    v = truth.kind_popularity.shape[1]
    # [n, D]
    favourite = np.stack([rng.choice(s, n, p=truth.brand_prior[g]) for g in range(d)], axis=1)
    here = rng.integers(0, d, n)
    clicks = np.empty((n, longest), np.int64)
    kinds = truth.kind_popularity.cumsum(axis=1)
    # The first real click falls into the start department, which is uniform
    first = np.ones(n, bool)
    for m in range(longest):
        noisy = rng.random(n) < truth.noise
        onward = (truth.step.cumsum(axis=1)[here] < rng.random((n, 1))).sum(axis=1).clip(max=d - 1)
        here = np.where(noisy | first, here, onward)
        first &= noisy
        brand = favourite[np.arange(n), here]
        stray = (brand + rng.integers(1, s, n)) % s
        brand = np.where(rng.random(n) < truth.loyalty, brand, stray)
        draw = rng.random(n)
        kind = np.empty(n, np.int64)
        for g in range(d):  # by department, for a table [n, kinds] would be large
            kind[here == g] = np.searchsorted(kinds[g], draw[here == g]).clip(max=v - 1)
        noise_click = rng.choice(len(truth.tree), n, p=truth.noise_popularity)
        clicks[:, m] = np.where(noisy, noise_click, (here * s + brand) * v + kind) + 1
    return [clicks[i, :length].copy() for i, length in enumerate(lengths)]


def _items(tree):
    d = len(DEPARTMENTS)
    s = len(BRANDS)
    rows = []
    for i, (dep, brand, kind) in enumerate(tree.tolist(), start=1):
        real = dep < d
        department = DEPARTMENTS[dep] if real else NOISE_DEPARTMENTS[dep - d]
        name = BRANDS[brand] if real else NOISE_BRANDS[brand - s]
        number, which = divmod(kind, len(KINDS))
        noun = (KINDS[which] if real else NOISE_KINDS[dep - d][which]) + f" {number + 1}" * (
            number > 0
        )
        title = f"{name} {department.lower()} {noun}" if real else f"{name} {noun}"
        path = ["Sports" if real else "Home", department]
        text = f"Title: {title}; Brand: {name}; Categories: {' > '.join(path)}"
        rows.append({"item_id": i, "title": title, "brand": name, "categories": path, "text": text})
    return pd.DataFrame(rows)


def _pad(histories):
    """Histories → int64 [U, longest], left-aligned, 0 where there is none."""
    out = np.zeros((len(histories), max((len(h) for h in histories), default=0)), np.int64)
    for row, history in zip(out, histories):
        row[: len(history)] = history
    return out


def _kl(p, q):
    """KL(p ‖ q) in nats over the last axis; p and q need not sum to one as long as they have the
    same mass.
    """
    return np.maximum((p * (np.log(p) - np.log(q))).sum(axis=-1), 0.0)
