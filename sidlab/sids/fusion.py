"""Several sources of item embeddings, such as text, image and behaviour, in one semantic ID.

`fuse_embeddings` joins them before the SID encoder, which then sees one vector; `fuse_codes` gives
each source levels of its own, so that a prefix means likeness in the first source.
`collaborative_embeddings` makes a source from training histories alone.
"""

import numpy as np
from scipy import sparse

from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.trie import as_widths


def fuse_embeddings(
    sources: dict[str, np.ndarray], weights: dict[str, float] | None = None
) -> np.ndarray:
    """One embedding an item from several: float32 [n, Σ d].

    Args: `sources`: {name: float [n, d]}, row 0 is item 1; `weights`: {name: finite weight > 0}
    (default 1). Each source is centred and scaled so that its mean squared norm is its weight: the
    share that it has in every distance. Raises ValueError on names, lengths or numbers that do not
    fit.
    """
    _check(sources)
    weights = dict.fromkeys(sources, 1.0) if weights is None else weights
    if weights.keys() != sources.keys() or not all(
        0 < weight < np.inf for weight in weights.values()
    ):
        raise ValueError(
            f"weights must give each of {', '.join(sources)} a finite number above 0, got {weights}"
        )
    parts = []
    for name, x in sources.items():
        centred = np.asarray(x, np.float64) - np.mean(x, axis=0)
        size = np.sqrt((centred**2).sum(1).mean())
        if not 0 < size < np.inf:
            raise ValueError(
                f"sources[{name!r}] holds numbers too small or too large for their squares;"
                " scale it"
            )
        parts.append(centred * np.sqrt(weights[name]) / size)
    return np.concatenate(parts, axis=1).astype(np.float32)


def fuse_codes(
    sources: dict[str, np.ndarray], levels: dict[str, int], width=256, seed: int = 0
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes int64 [n, Σ levels] and their widths: residual k-means of each source with
    `levels[name]` levels, in the order of `sources`. `width`: codes per level, an int or one for
    each level of all. Raises ValueError as `fuse_embeddings` does.
    """
    sources = {name: np.asarray(x, np.float32) for name, x in sources.items()}
    _check(sources)
    if levels.keys() != sources.keys() or min(levels.values()) < 1:
        raise ValueError(
            f"levels must give each of {', '.join(sources)} at least 1 level, got {levels}"
        )
    widths = as_widths(width, sum(levels.values()))
    codes = []
    first = 0
    for name, x in sources.items():
        own = widths[first : first + levels[name]]
        encoder = ResidualKMeans(levels=levels[name], width=own, seed=seed).fit(x)
        codes.append(encoder.encode(x))
        first += levels[name]
    return np.concatenate(codes, axis=1), widths


def collaborative_embeddings(
    train, n_items: int, dim: int = 64, window: int = 3, seed: int = 0
) -> np.ndarray:
    """What stands near what in training histories: float32 [n_items, dim], rows of length 1 (0 for
    items never seen).

    Positive pointwise mutual information of items at most `window` apart, then a truncated SVD
    (Levy and Goldberg 2014). `train`: the training part alone, `leave_one_out(histories).train`, or
    the targets leak into the SIDs. `dim` is cut to n_items − 1.
    """
    # Here, since scikit-learn is slow to import.
    from sklearn.decomposition import TruncatedSVD

    rows = []
    columns = []
    for history in train:
        history = np.asarray(history) - 1
        for apart in range(1, window + 1):
            rows += [history[:-apart], history[apart:]]
            columns += [history[apart:], history[:-apart]]
    if not rows or not sum(len(part) for part in rows):
        raise ValueError(
            "train holds no history of two items, so there is nothing that stands near anything"
        )
    pairs = np.concatenate(rows), np.concatenate(columns)
    count = sparse.coo_matrix((np.ones(len(pairs[0])), pairs), (n_items, n_items)).tocsr()
    total = count.sum()
    of_item = np.asarray(count.sum(1)).ravel()
    count = count.tocoo()
    information = np.log(count.data * total / (of_item[count.row] * of_item[count.col]))
    positive = sparse.coo_matrix(
        (np.maximum(information, 0), (count.row, count.col)), count.shape
    ).tocsr()
    vectors = TruncatedSVD(min(dim, n_items - 1), random_state=seed).fit_transform(positive)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 1e-9).astype(
        np.float32
    )


def _check(sources):
    lengths = {name: np.shape(x) for name, x in sources.items()}
    if len({shape[:1] for shape in lengths.values()}) != 1 or any(
        len(shape) != 2 or 0 in shape for shape in lengths.values()
    ):
        raise ValueError(f"sources must be float [n, d] each, with one row an item, got {lengths}")
    for name, x in sources.items():
        if not np.isfinite(x).all():
            raise ValueError(
                f"sources[{name!r}] must be finite; item"
                f" {1 + int(np.argmin(np.isfinite(x).all(axis=1)))} is not"
            )
        low, high = (end(x, axis=0).astype(np.float64) for end in (np.min, np.max))
        if (high - low <= 1e-6 * np.maximum(high, -low)).all():  # the rounding of float32
            raise ValueError(f"sources[{name!r}] says the same of every item; leave it out")
