"""Text to vectors without a network: TF-IDF of words and word pairs, reduced by a truncated SVD."""

import hashlib
import json
import os
import pathlib
import warnings

import numpy as np
import sklearn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize


def text_embeddings(texts, dim: int = 256, cache: bool = True) -> np.ndarray:
    """float32 [n, d] of `texts` (n str or None): rows of length 1, zero rows where there is no text (or no known word).

    Words and word pairs, sublinear TF-IDF, truncated SVD (latent semantic analysis, Deerwester et al. 1990). From 1,000
    texts on, a term must occur in two of them. d is `dim`, or less where there is not that much to reduce:
    d = min(dim, number of non-empty texts, number of terms).

    cache: keep the result under $SIDLAB_CACHE (default ~/.cache/sidlab), keyed by texts, settings and scikit-learn's
    version. ValueError if dim < 1 or if no text holds a word of two letters.
    """
    texts = [text or None for text in texts]
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    known = [row for row, text in enumerate(texts) if text]
    settings = {"ngram_range": (1, 2), "sublinear_tf": True, "min_df": 2 if len(known) >= 1000 else 1}
    path = _cache_path(texts, settings | {"dim": dim, "sklearn": sklearn.__version__})
    if cache and path.exists():
        try:
            return load_file(path)["embeddings"]
        except (SafetensorError, OSError, KeyError) as error:
            warnings.warn(f"recomputing text embeddings, {path} is unreadable: {error}", stacklevel=2)

    vectorizer = TfidfVectorizer(**settings, dtype=np.float32)
    try:
        terms = vectorizer.fit_transform([texts[row] for row in known])
    except ValueError as error:
        raise ValueError(f"texts must hold words to embed; of the {len(known)} non-empty ones: {error}") from error
    if min(terms.shape) > 1:
        reduced = TruncatedSVD(min(dim, *terms.shape), random_state=0).fit_transform(terms)
    else:  # one term or one text is one direction, and no case for the SVD
        reduced = np.asarray(terms.sum(axis=1))
    embeddings = np.zeros((len(texts), reduced.shape[1]), dtype=np.float32)
    embeddings[known] = normalize(reduced)
    if cache:
        _save(path, embeddings)
    return embeddings


def cache_folder() -> pathlib.Path:
    """$SIDLAB_CACHE, default ~/.cache/sidlab. It need not exist."""
    return pathlib.Path(os.environ.get("SIDLAB_CACHE") or pathlib.Path.home() / ".cache" / "sidlab")


def _cache_path(texts, settings):
    key = hashlib.sha256(json.dumps([settings, texts], sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"text-{key}.safetensors"


def _save(path, embeddings):
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": embeddings}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:  # a read-only home must not stop the work
        warnings.warn(f"text embeddings are not cached: {error}", stacklevel=3)
