"""Residual k-means: item embeddings → semantic IDs, one k-means per level on what the levels before
left over.

The SID encoder of RASTP (arXiv 2511.16943) and of GRID, on which it builds: 3 levels of 256 codes
over mean-pooled text embeddings. The loop over levels is here; the k-means step is `faiss`, started
from Ward's hierarchical clustering of a sample: random starts often merge two clear clusters and
split a third, however many restarts; Ward's start rarely does.
"""

import numpy as np

from sidlab.sids.encoder import SidEncoder, distinct, nearest, residual_codes

SUBSET = 256  # embeddings per code that a level learns from, faiss's own limit
WARD_SAMPLE = 2048  # Ward's method takes memory and time quadratic in the sample
# With more codes than this the sample is too small for a start, and faiss starts from random items
WARD_WIDTH = 512


class ResidualKMeans(SidEncoder):
    """fit(embeddings) → self, encode(embeddings) → codes, decode(codes) → embeddings.

    Args: `levels` L; `width`: codes per level, an int or one int per level (`widths` afterwards);
    `seed`: equal seeds give equal codebooks; `iterations` of k-means per level. Beyond 256
    embeddings per code, a level learns from a random subset of that size, so that `fit` needs
    hardly any memory besides its input, which may be a float32 memory map.

    After fit: `codebooks_`, L float32 arrays [W_l, d]; an embedding is decoded as the sum of its
    centroids. Where a level has no more distinct residuals than codes, they become the codebook,
    and codes left over stand for zero (no refinement); of equal centroids only the first is ever
    used.
    """

    stem = "residual_kmeans"

    def __init__(self, levels: int = 3, width=256, seed: int = 0, iterations: int = 25):
        super().__init__(levels, width, seed, iterations=iterations)

    def _fit(self, x):
        codebooks = []
        for level, width in enumerate(self.widths):
            residual = _subset(x, SUBSET * width, self.seed + level)
            for book in codebooks:
                residual -= book[nearest(residual, book)]
            codebooks.append(_codebook(residual, width, self.seed + level, self.iterations))
        return codebooks, {}

    def _encode(self, x):
        return residual_codes(x, self.codebooks_)

    def _decode(self, codes):
        return sum(book[column] for book, column in zip(self.codebooks_, codes.T))


def _subset(x, size: int, seed: int) -> np.ndarray:
    """A copy of `size` random rows of `x`, in their order, or of all where it has no more."""
    return (
        x[np.sort(np.random.default_rng(seed).choice(len(x), size, replace=False))]
        if len(x) > size
        else x.copy()
    )


def _codebook(x, width: int, seed: int, iterations: int) -> np.ndarray:
    """k-means of `x` float32 [n, d] → centroids float32 [width, d]."""
    if len(distinct(x[: 4 * width])) <= width and len(rows := distinct(x)) <= width:
        return np.concatenate([x[rows], np.zeros((width - len(rows), x.shape[1]), np.float32)])
    # Here: a saved encoder needs no faiss, and neither does a model that knows its SIDs.
    import faiss

    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x = x - mean  # float32 distances lose digits where a common offset dominates
    kmeans = faiss.Kmeans(x.shape[1], width, niter=iterations, seed=seed, min_points_per_centroid=1)
    kmeans.train(x, init_centroids=_ward_start(x, width, seed) if width <= WARD_WIDTH else None)
    return kmeans.centroids + mean


def _ward_start(x, width: int, seed: int) -> np.ndarray:
    # Here, since it is slow to import.
    from scipy.cluster.hierarchy import fcluster, ward

    rng = np.random.default_rng(seed)
    sample = x[rng.permutation(len(x))[:WARD_SAMPLE]].astype(np.float64)
    label = fcluster(ward(sample), width, "maxclust") - 1
    starts = np.zeros((label.max() + 1, x.shape[1]))
    np.add.at(starts, label, sample)
    starts /= np.bincount(label)[:, None]
    # Ties (many equal items in the sample) can leave fewer clusters than asked for: any other items
    # start the rest.
    return np.concatenate(
        [starts, x[rng.choice(len(x), width - len(starts), replace=False)]]
    ).astype(np.float32)
