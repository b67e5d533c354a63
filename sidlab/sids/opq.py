"""OPQ: item embeddings → long semantic IDs of independent codes, one per slice of a rotated space.

Optimised product quantisation (Ge et al., CVPR 2013), by `faiss`: a learned rotation spreads the
variance over L slices, and each slice has its own k-means. RPG (arXiv 2506.05781) generates such
SIDs, of up to 64 codes, in parallel. They have no order as residual codes have: a prefix tells some
directions of the space, not the item more coarsely.
"""

import numpy as np

from sidlab.sids.encoder import SidEncoder, nearest


class OPQ(SidEncoder):
    """fit(embeddings) → self, encode(embeddings) → codes, decode(codes) → embeddings.

    Args: `levels` L, the number of slices; `width`: codes per slice, one power of two for all;
    `seed`: equal seeds give equal codebooks; `iterations` of alternating between rotation and
    codebooks. The space is padded with zeros to the next multiple of L.

    After fit: `codebooks_`, L float32 arrays [W, dimensions of a slice]. `decode` puts the mean
    where a prefix says nothing.
    """

    stem = "opq"

    def __init__(self, levels: int = 8, width=256, seed: int = 0, iterations: int = 50):
        super().__init__(levels, width, seed, iterations=iterations)
        if len(set(self.widths)) > 1 or self.widths[0] < 2 or self.widths[0] & (self.widths[0] - 1):
            raise ValueError(
                "width must be one power of two from 2 on, the same for all levels of OPQ, got"
                f" {width}"
            )

    def _fit(self, x):
        # Here: a saved encoder needs no faiss.
        import faiss

        mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        x, dim = x - mean, -(-x.shape[1] // self.levels) * self.levels
        quantiser = faiss.ProductQuantizer(dim, self.levels, self.widths[0].bit_length() - 1)
        quantiser.cp.seed = self.seed
        quantiser.cp.min_points_per_centroid = 1
        start = np.linalg.qr(np.random.default_rng(self.seed).normal(size=(dim, dim)))[0].astype(
            np.float32
        )
        rotation = faiss.OPQMatrix(x.shape[1], self.levels, dim)
        faiss.copy_array_to_vector(start.ravel(), rotation.A)
        rotation.pq = quantiser
        rotation.niter = self.iterations
        rotation.train(x)
        quantiser.cp.niter = 25
        # From where they are: the last turn of the rotation left the codebooks behind
        quantiser.train(rotation.apply(x))
        books = faiss.vector_to_array(quantiser.centroids).reshape(self.levels, self.widths[0], -1)
        return list(books), {
            "mean": mean,
            "rotation": faiss.vector_to_array(rotation.A).reshape(dim, -1),
        }

    def _encode(self, x):
        slices = np.split(
            (x - self._arrays["mean"]) @ self._arrays["rotation"].T, self.levels, axis=1
        )
        return np.stack(
            [nearest(part, book) for part, book in zip(slices, self.codebooks_)], axis=1
        )

    def _decode(self, codes):
        known = np.concatenate(
            [book[column] for book, column in zip(self.codebooks_, codes.T)], axis=1
        )
        return known @ self._arrays["rotation"][: known.shape[1]] + self._arrays["mean"]
