"""SidEncoder: what residual k-means, RQ-VAE and OPQ share, so that one can stand in for another
anywhere.
"""

import pathlib

import numpy as np
import safetensors.numpy

from sidlab.checks import integer
from sidlab.files import read_json, reading, write, write_json
from sidlab.sids.trie import as_codes, as_widths

CHUNK = 65536  # embeddings encoded at a time
SAMPLE = 10_000  # embeddings that are compared with one another before anything is fitted
LARGEST = 1e15  # from here on float32 can't hold sums of squares, and faiss would end the process


class SidEncoder:
    """fit(embeddings) → self, encode(embeddings) → codes, decode(codes) → embeddings, save(folder),
    load(folder).

    A subclass names its files (`stem`) and writes `_fit` (float32 [n, d] → codebooks and other
    arrays by name), `_encode` (float32 [m, d] → int [m, L]) and `_decode` (int64 [m, l], l ≤ L →
    float32 [m, d]). Attributes: the parameters, with `widths` a tuple of L ints; after fit
    `codebooks_`, L float32 arrays [W_l, ·], and `dead_codes_`, by level the number of codes that no
    training item has.
    """

    stem: str

    def __init__(self, levels: int, width, seed: int, **options):
        options = {
            name: (
                tuple(integer(name, x) for x in value)
                if isinstance(value, tuple)
                else integer(name, value)
            )
            for name, value in options.items()
        }
        self.levels = integer("levels", levels)
        self.seed = integer("seed", seed, least=0)
        self.widths = as_widths(width, self.levels)
        # Faiss counts so far, and every level has a seed of its own
        if self.seed + self.levels >= 2**31:
            raise ValueError(f"seed must lie below 2**31 − levels, got {self.seed}")
        self._parameters = {
            "levels": self.levels,
            "width": self.widths,
            "seed": self.seed,
            **options,
        }
        vars(self).update(options)

    def fit(self, embeddings) -> "SidEncoder":
        """Learns the codebooks from `embeddings` float [n, d], n at least the largest width, all
        finite. ValueError where hardly any are distinct: two at least, and one in a hundred items.
        """
        x = checked(embeddings)
        if len(x) < max(self.widths):
            raise ValueError(
                f"width {max(self.widths)} needs at least as many embeddings, got {len(x)}: "
                "choose a smaller width"
            )
        _tell_apart(x)
        self._dim, (self.codebooks_, self._arrays) = x.shape[1], self._fit(x)
        self.dead_codes_ = tuple(
            width - len(np.unique(code)) for width, code in zip(self.widths, self.encode(x).T)
        )
        return self

    def encode(self, embeddings) -> np.ndarray:
        """`embeddings` float [n, d] (a memory map is read in chunks) → codes int64 [n, L], each in
        0..W_l-1.
        """
        self._fitted()
        embeddings = np.asarray(embeddings)
        codes = np.empty((len(embeddings), self.levels), np.int64)
        for start in range(0, len(embeddings), CHUNK):
            codes[start : start + CHUNK] = self._encode(
                checked(embeddings[start : start + CHUNK], self._dim)
            )
        return codes

    def decode(self, codes) -> np.ndarray:
        """The embeddings that `codes` int [m, l] stand for → float32 [m, d]; with l < L, those of a
        prefix of the SID.
        """
        self._fitted()
        length = np.shape(codes)[-1] if np.ndim(codes) == 2 else 0
        if not 1 <= length <= self.levels:
            raise ValueError(
                f"codes must have the shape [m, 1..{self.levels}], got {list(np.shape(codes))}"
            )
        return self._decode(as_codes(codes, self.widths[:length])[0])

    def save(self, folder) -> None:
        """Writes the arrays (`stem`.safetensors) and the parameters (`stem`.json) into `folder`."""
        self._fitted()
        arrays = self._arrays | {
            f"codebook_{level}": book for level, book in enumerate(self.codebooks_, start=1)
        }
        save_arrays(
            folder,
            self.stem,
            arrays,
            self._parameters | {"dim": self._dim, "dead": self.dead_codes_},
        )

    @classmethod
    def load(cls, folder) -> "SidEncoder":
        """The encoder that `save` wrote into `folder`."""
        arrays, meta = load_arrays(folder, cls.stem, "levels", "width", "seed", "dim", "dead")
        dim = meta.pop("dim")
        dead = tuple(meta.pop("dead"))
        encoder = cls(**meta)
        encoder._dim = dim
        encoder.dead_codes_ = dead
        encoder._arrays = arrays
        encoder.codebooks_ = [
            arrays.pop(f"codebook_{level}") for level in range(1, encoder.levels + 1)
        ]
        found = tuple(len(book) for book in encoder.codebooks_)
        if found != encoder.widths:
            raise ValueError(
                f"{folder}: {cls.stem}.json says widths {encoder.widths}, the codebooks have"
                f" {found}"
            )
        return encoder

    def __repr__(self) -> str:
        shown = self._parameters | ({"width": self.widths[0]} if len(set(self.widths)) == 1 else {})
        dead = (
            f", {sum(self.dead_codes_)} of {sum(self.widths)} codes dead"
            if hasattr(self, "dead_codes_")
            else ""
        )
        values = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{type(self).__name__}({values}){dead}"

    def _fitted(self) -> None:
        if not hasattr(self, "codebooks_"):
            raise RuntimeError(
                f"this {type(self).__name__} has no codebooks yet: call fit(embeddings) first"
            )


def save_arrays(folder, stem: str, arrays: dict, meta: dict) -> None:
    """Writes numpy `arrays` as `stem`.safetensors and `meta` as `stem`.json into `folder`, each
    atomically.
    """
    tensors = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    )
    write(pathlib.Path(folder, f"{stem}.safetensors"), tensors)
    write_json(pathlib.Path(folder, f"{stem}.json"), meta)


def load_arrays(folder, stem: str, *fields) -> tuple[dict, dict]:
    """What `save_arrays` wrote: the numpy arrays by name, and the metadata. ValueError where a file
    is damaged or the metadata lack one of `fields`.
    """
    meta = read_json(pathlib.Path(folder, f"{stem}.json"), *fields)
    path = pathlib.Path(folder, f"{stem}.safetensors")
    with reading(path):
        return safetensors.numpy.load_file(path), meta


def residual_codes(x, codebooks) -> np.ndarray:
    """Level by level, the nearest code to what the levels before left of `x` float32 [n, d]: int64
    [n, L].
    """
    codes = np.empty((len(x), len(codebooks)), np.int64)
    for level, book in enumerate(codebooks):
        codes[:, level] = nearest(x, book)
        x = x - book[codes[:, level]]
    return codes


def nearest(x, book) -> np.ndarray:
    """The nearest row of `book` [W, d] for each row of `x` [n, d]: int64 [n]; of equal rows the
    first.
    """
    rows = distinct(book)
    centre = book[rows].mean(axis=0)
    book = book[rows] - centre
    half = 0.5 * (book * book).sum(axis=1)
    found = np.empty(len(x), np.int64)
    step = max(1, 2**24 // len(rows))  # scores of at most 64 MiB at a time
    for i in range(0, len(x), step):
        found[i : i + step] = rows[((x[i : i + step] - centre) @ book.T - half).argmax(axis=1)]
    return found


def _tell_apart(x) -> None:
    """ValueError where so few rows of `x` [n, d] are distinct that SIDs would be the same for
    nearly all items.
    """
    sample = (
        x
        if len(x) <= SAMPLE
        else x[np.sort(np.random.default_rng(0).choice(len(x), SAMPLE, replace=False))]
    )
    low = sample.min(axis=0)
    high = sample.max(axis=0)
    # Equal but for the rounding of float32: encoders give such rows to equal texts in different
    # batches.
    count = 1 if (high - low <= 1e-6 * np.maximum(high, -low)).all() else len(distinct(sample))
    if count < min(len(sample), max(2, len(sample) // 100)):
        where = "" if sample is x else " looked at"
        raise ValueError(
            f"embeddings must tell items apart, but only {count} of the {len(sample)} rows{where}"
            f" {'is' if count == 1 else 'are'} distinct, so nearly all items would share a SID."
            " Look at the texts or at what made the embeddings"
        )


def distinct(x) -> np.ndarray:
    """The indices of the rows of `x` [n, d] that equal none before them, ascending: int64."""
    x = np.ascontiguousarray(x) + 0.0  # -0.0 becomes 0.0: rows are compared as bytes
    return np.sort(
        np.unique(x.view(np.dtype((np.void, x.dtype.itemsize * x.shape[1]))), return_index=True)[1]
    )


def checked(embeddings, dim: int | None = None) -> np.ndarray:
    """`embeddings` as float32 [n, dim], any dim if none is given; ValueError where the shape
    differs or a number is not finite or too large to be squared and summed.
    """
    embeddings = np.asarray(embeddings)
    dim = (embeddings.shape or (0,))[-1] if dim is None else dim
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or dim == 0:
        raise ValueError(
            f"embeddings must have the shape [n, {dim or 'd'}], got {list(embeddings.shape)}"
        )
    embeddings = embeddings.astype(np.float32, copy=False)
    parts = range(0, len(embeddings), CHUNK)
    wrong = np.concatenate(
        [
            np.zeros(0, bool),
            *(~(np.abs(embeddings[i : i + CHUNK]) < LARGEST).all(axis=1) for i in parts),
        ]
    )
    if wrong.any():
        raise ValueError(
            f"embeddings must be finite float32 numbers of size below {LARGEST:g}: {wrong.sum()}"
            f" rows are not, the first is row {wrong.argmax()}"
        )
    return embeddings
