"""Residual k-means: item embeddings → semantic IDs, one k-means per level on what the levels before left over.

The SID encoder of RASTP (arXiv 2511.16943) and of GRID, on which it builds: 3 levels of 256 codes over mean-pooled text
embeddings. The loop over levels is here; the k-means step is `faiss`, started from Ward's hierarchical clustering of a
sample: random starts often merge two clear clusters and split a third, however many restarts; Ward's start rarely does.
"""

import json
import os
import pathlib

import faiss
import numpy as np
import safetensors.numpy
from scipy.cluster.hierarchy import fcluster, ward

from sidlab.sids.trie import as_codes, as_widths

CHUNK = 65536  # embeddings encoded at a time
WARD_SAMPLE = 2048  # Ward's method takes memory and time quadratic in the sample
WARD_WIDTH = 512  # with more codes than this the sample is too small for a start, and faiss starts from random items


class ResidualKMeans:
    """fit(embeddings) → self, encode(embeddings) → codes, decode(codes) → embeddings.

    Args: `levels` L; `width`: codes per level, an int or one int per level (`widths` afterwards); `seed`: equal seeds
    give equal codebooks; `iterations` of k-means per level. Beyond 256 embeddings per code, faiss trains on a random
    subset of that size.

    After fit: `codebooks_`, L float32 arrays [W_l, d]. Where a level has no more distinct residuals than codes, they
    become the codebook, and codes left over stand for zero (no refinement); of equal centroids only the first is ever
    used.
    """

    def __init__(self, levels: int = 3, width=256, seed: int = 0, iterations: int = 25):
        for name, value in (("levels", levels), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.levels, self.widths, self.seed, self.iterations = levels, as_widths(width, levels), seed, iterations

    def fit(self, embeddings) -> "ResidualKMeans":
        """Learns the codebooks from `embeddings` float [n, d], n at least the largest width, all finite."""
        embeddings = np.asarray(embeddings)
        residual = _checked(embeddings, embeddings.shape[-1] if embeddings.ndim else 0).copy()
        if len(residual) < max(self.widths):
            raise ValueError(f"width {max(self.widths)} needs at least as many embeddings, got {len(residual)}: "
                             "choose a smaller width")
        codebooks = []
        for level, width in enumerate(self.widths):
            codebooks.append(_codebook(residual, width, self.seed + level, self.iterations))
            residual -= codebooks[-1][_nearest(residual, codebooks[-1])]
        self.codebooks_ = codebooks
        return self

    def encode(self, embeddings) -> np.ndarray:
        """`embeddings` float [n, d] (a memory map is read in chunks) → codes int64 [n, L], each in 0..W_l-1."""
        codebooks, embeddings = self._fitted(), np.asarray(embeddings)
        codes = np.empty((len(embeddings), self.levels), np.int64)
        for start in range(0, len(embeddings), CHUNK):
            residual = _checked(embeddings[start : start + CHUNK], codebooks[0].shape[1])
            for level, book in enumerate(codebooks):
                code = codes[start : start + CHUNK, level] = _nearest(residual, book)
                residual = residual - book[code]
        return codes

    def decode(self, codes) -> np.ndarray:
        """The sums of the centroids of `codes` int [m, l] → float32 [m, d]; with l < L, of a prefix of the SID."""
        codebooks, length = self._fitted(), np.shape(codes)[-1] if np.ndim(codes) == 2 else 0
        if not 1 <= length <= self.levels:
            raise ValueError(f"codes must have the shape [m, 1..{self.levels}], got {list(np.shape(codes))}")
        codes, _ = as_codes(codes, self.widths[:length])
        return sum(book[column] for book, column in zip(codebooks, codes.T))

    def save(self, folder) -> None:
        """Writes `residual_kmeans.safetensors` and `residual_kmeans.json` into `folder`."""
        arrays = {f"codebook_{level}": book for level, book in enumerate(self._fitted(), start=1)}
        meta = {"levels": self.levels, "widths": self.widths, "seed": self.seed, "iterations": self.iterations}
        save_arrays(folder, "residual_kmeans", arrays, meta)

    @classmethod
    def load(cls, folder) -> "ResidualKMeans":
        """The encoder that `save` wrote into `folder`."""
        arrays, meta = load_arrays(folder, "residual_kmeans")
        encoder = cls(meta["levels"], meta["widths"], meta["seed"], meta["iterations"])
        encoder.codebooks_ = [arrays[f"codebook_{level}"] for level in range(1, encoder.levels + 1)]
        found = tuple(len(book) for book in encoder.codebooks_)
        if found != encoder.widths:
            raise ValueError(f"{folder}: residual_kmeans.json says widths {encoder.widths}, the codebooks have {found}")
        return encoder

    def _fitted(self) -> list[np.ndarray]:
        if not hasattr(self, "codebooks_"):
            raise RuntimeError("this ResidualKMeans has no codebooks yet: call fit(embeddings) first")
        return self.codebooks_


def save_arrays(folder, stem: str, arrays: dict, meta: dict) -> None:
    """Writes numpy `arrays` as `stem`.safetensors and `meta` as `stem`.json into `folder`, each atomically."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    for suffix, content in ((".safetensors", tensors), (".json", json.dumps(meta, indent=1).encode())):
        beside = folder / f".{stem}{suffix}.{os.getpid()}"
        beside.write_bytes(content)
        os.replace(beside, folder / (stem + suffix))


def load_arrays(folder, stem: str) -> tuple[dict, dict]:
    """What `save_arrays` wrote: the numpy arrays by name, and the metadata."""
    folder = pathlib.Path(folder)
    meta = json.loads((folder / f"{stem}.json").read_text())
    return safetensors.numpy.load_file(folder / f"{stem}.safetensors"), meta


def _checked(embeddings, dim: int) -> np.ndarray:
    """`embeddings` as float32 [n, dim]; ValueError where the shape differs or a number is not finite."""
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or dim == 0:
        raise ValueError(f"embeddings must have the shape [n, {dim or 'd'}], got {list(embeddings.shape)}")
    embeddings = embeddings.astype(np.float32, copy=False)
    wrong = ~np.isfinite(embeddings).all(axis=1)
    if wrong.any():
        raise ValueError(f"embeddings must be finite float32 numbers: {wrong.sum()} rows are not, "
                         f"the first is row {wrong.argmax()}")
    return embeddings


def _codebook(x, width: int, seed: int, iterations: int) -> np.ndarray:
    """k-means of `x` float32 [n, d] → centroids float32 [width, d]."""
    if len(_distinct(x[: 4 * width])) <= width and len(rows := _distinct(x)) <= width:
        return np.concatenate([x[rows], np.zeros((width - len(rows), x.shape[1]), np.float32)])
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x = x - mean  # float32 distances lose digits where a common offset dominates
    kmeans = faiss.Kmeans(x.shape[1], width, niter=iterations, seed=seed, min_points_per_centroid=1)
    kmeans.train(x, init_centroids=_ward_start(x, width, seed) if width <= WARD_WIDTH else None)
    return kmeans.centroids + mean


def _ward_start(x, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sample = x[rng.permutation(len(x))[:WARD_SAMPLE]].astype(np.float64)
    label = fcluster(ward(sample), width, "maxclust") - 1
    starts = np.zeros((label.max() + 1, x.shape[1]))
    np.add.at(starts, label, sample)
    starts /= np.bincount(label)[:, None]
    # Ties (many equal items in the sample) can leave fewer clusters than asked for: any other items start the rest.
    return np.concatenate([starts, x[rng.choice(len(x), width - len(starts), replace=False)]]).astype(np.float32)


def _nearest(x, book) -> np.ndarray:
    """The nearest row of `book` [W, d] for each row of `x` [n, d]: int64 [n]; of equal rows the first."""
    rows = _distinct(book)
    centre = book[rows].mean(axis=0)
    book = book[rows] - centre
    half = 0.5 * (book * book).sum(axis=1)
    nearest = np.empty(len(x), np.int64)
    step = max(1, 2**24 // len(rows))  # scores of at most 64 MiB at a time
    for i in range(0, len(x), step):
        nearest[i : i + step] = rows[((x[i : i + step] - centre) @ book.T - half).argmax(axis=1)]
    return nearest


def _distinct(x) -> np.ndarray:
    """The indices of the rows of `x` [n, d] that equal none before them, ascending: int64."""
    x = np.ascontiguousarray(x) + 0.0  # -0.0 becomes 0.0: rows are compared as bytes
    return np.sort(np.unique(x.view(np.dtype((np.void, x.dtype.itemsize * x.shape[1]))), return_index=True)[1])
