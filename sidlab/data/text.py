"""Text to vectors: offline by TF-IDF and a truncated SVD, or by any Hugging Face encoder."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import unicodedata
import warnings

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy import sparse

from sidlab.files import write

MAX_TOKENS = 512
BATCH = 64  # of a text, for an encoder by name; texts encoded at a time
# Words and word pairs, and within words all runs of two to four characters: these find likeness in
# scripts that write no spaces between words, and tell a 2 oz from a 4 oz bottle. Their weight
# beside words is less than 1, since a word holds many of them.
TERMS = {
    "words": (1.0, {"token_pattern": r"\S+", "ngram_range": (1, 2)}),
    "characters": (0.7, {"analyzer": "char_wb", "ngram_range": (2, 4)}),
}


def text_embeddings(
    texts, dim: int = 256, cache: bool = True, encoder: str | None = None, weights=None
) -> np.ndarray:
    """float32 [n, d] of `texts`: zero rows where there is no text, or nothing in it but what all
    texts have.

    texts: n str or None; or n tuples of them, the parts of a text, with `weights`: a number ≥ 0 for
    each part.

    Without an `encoder`: words, word pairs and runs of characters (`TERMS`), so any script will do;
    sublinear TF-IDF of each part, their weighted sum, truncated SVD (latent semantic analysis,
    Deerwester et al. 1990), rows of length 1. From 1,000 texts on, a term must occur in two of
    them, and what all texts hold says nothing and is left out. d is `dim`, or less where there is
    not that much to reduce: d = min(dim, number of non-empty texts, number of terms).

    encoder: name or local folder of a Hugging Face model. A row is the mean of its last hidden
    states over the real tokens (512 at most), of any length; d is the hidden size, whatever `dim`.
    Encoder-decoders lend their encoder (RASTP: Flan-T5-XL's). Where there is a modules.json,
    sentence-transformers pools as it says; if it is not installed, a warning says that the mean is
    taken. A name that is not in Hugging Face's cache is downloaded, with a progress bar. ValueError
    if it can't be loaded.

    cache: keep the result under $SIDLAB_CACHE (default ~/.cache/sidlab), keyed by texts, settings
    and the version of scikit-learn or of the encoder's files. ValueError if dim < 1, if weights do
    not fit, if no text holds a letter or digit, and if all texts say the same.
    """
    if weights is None:
        texts = [(text,) for text in texts]
        weights = (1.0,)
    elif encoder is not None:
        raise ValueError("weights are for TF-IDF: an encoder takes whole texts, so leave them out")
    texts = [tuple(part or None for part in parts) for parts in texts]
    weights = tuple(map(float, weights))
    if {len(parts) for parts in texts} - {len(weights)} or not all(
        0 <= weight < np.inf for weight in weights
    ):
        raise ValueError(
            "weights must hold a finite number of at least 0 for each part of every text, got"
            f" {weights}"
        )
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    known = [row for row, parts in enumerate(texts) if any(parts)]
    if not known:
        raise ValueError(f"texts must hold words to embed; all {len(texts)} are empty")
    if encoder is None:
        settings = {
            "sublinear_tf": True,
            "min_df": 2 if len(known) >= 1000 else 1,
            "max_df": max(1, len(known) - 1),
        }
        key = settings | {
            "dim": dim,
            "weights": weights,
            "terms": TERMS,
            "sklearn": importlib.metadata.version("scikit-learn"),
        }

        def embed(some):
            return _tf_idf(some, dim, weights, settings)

    else:
        texts = [text for (text,) in texts]
        key, embed = _pretrained(str(encoder))
    path = _cache_path(texts, key)
    if cache and path.exists():
        try:
            return load_file(path)["embeddings"]
        except (SafetensorError, OSError, KeyError) as error:
            warnings.warn(
                f"recomputing text embeddings, {path} is unreadable: {error}", stacklevel=2
            )

    rows = embed([texts[row] for row in known])
    embeddings = np.zeros((len(texts), rows.shape[1]), dtype=np.float32)
    embeddings[known] = rows
    if cache:
        _save(path, embeddings)
    return embeddings


class _Separators(dict):
    """For `str.translate`: whatever is no letter, mark or digit becomes a space. (A \\w of `re` is
    no vowel sign of Devanagari.)
    """

    def __missing__(self, code):
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else ord(" ")
        return self[code]


def _tf_idf(texts, dim, weights, settings):
    """`texts`: tuples of parts. Parts share the terms and their rarity, so that a word of the title
    is the same in a category.
    """
    # Here, since scikit-learn is slow to import, and no model needs it.
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    separators = _Separators()

    def plain(text):
        return " ".join(
            unicodedata.normalize("NFKC", text or "").lower().translate(separators).split()
        )

    columns = [[plain(part) for part in column] for column in zip(*texts)]
    whole = [" ".join(filter(None, parts)) for parts in zip(*columns)]
    if not any(whole):
        raise ValueError(
            f"texts must hold words to embed; there is no letter or digit in the {len(whole)}"
            " non-empty ones"
        )
    blocks = []
    for of_kind, kind in TERMS.values():
        vectorizer = TfidfVectorizer(**kind, **settings, lowercase=False, dtype=np.float32)
        # No term of this kind is in some texts, but not in all
        with contextlib.suppress(ValueError):
            vectorizer.fit(whole)
            blocks.append(
                of_kind
                * sum(
                    weight * vectorizer.transform(column)
                    for weight, column in zip(weights, columns)
                )
            )
    if not blocks:
        raise ValueError(
            f"texts must tell items apart, but the {len(whole)} non-empty ones ({len(set(whole))}"
            " distinct) share all of their words or none"
        )
    terms = sparse.hstack(blocks).tocsr()
    if min(terms.shape) > 1:
        reduced = TruncatedSVD(min(dim, *terms.shape), random_state=0).fit_transform(terms)
    else:  # one term or one text is one direction, and no case for the SVD
        reduced = np.asarray(terms.sum(axis=1))
    return normalize(reduced)


@contextlib.contextmanager
def _loading(encoder):
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text encoder {encoder!r} can't be loaded: {error}\nIt must be a local folder with a"
            " Hugging Face model (config.json, weights, tokenizer) or, with a network, a name on"
            " its hub. Without: run `hf download NAME --local-dir FOLDER` elsewhere, and give"
            " FOLDER as encoder"
        ) from error


def _pretrained(encoder: str):
    """What identifies the files of `encoder` in a cache key, and the function texts → float32 [n,
    d].
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    with _loading(encoder):
        config = cached_file(encoder, "config.json")
        modules = cached_file(encoder, "modules.json", _raise_exceptions_for_missing_entries=False)
        if config is None:
            raise OSError("the folder has no config.json")
    own_pooling = (
        modules is not None and importlib.util.find_spec("sentence_transformers") is not None
    )
    if modules is not None and not own_pooling:
        warnings.warn(
            f"mean pooling is used for text encoder {encoder!r}; its modules.json may ask for"
            " another pooling: install sentence-transformers to follow it",
            stacklevel=3,
        )
    files = [
        (str(path), path.stat())
        for path in sorted(pathlib.Path(config).parent.rglob("*"))
        if path.is_file()
    ]
    version = extract_commit_hash(config, None) or [
        (path, stat.st_size, stat.st_mtime_ns) for path, stat in files
    ]
    return [encoder, version, own_pooling, MAX_TOKENS], lambda texts: _encoded(
        texts, encoder, own_pooling
    )


def _encoded(texts, encoder, own_pooling):
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS,
    )

    if own_pooling:
        from sentence_transformers import SentenceTransformer

        with _loading(encoder):
            model = SentenceTransformer(encoder)
        return model.encode(texts, batch_size=BATCH)
    with _loading(encoder):
        config = AutoConfig.from_pretrained(encoder)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        # The classes of the T5 family read the encoder's weights only; other encoder-decoders are
        # read whole.
        auto = (
            AutoModelForTextEncoding
            if config.is_encoder_decoder and config.model_type in ENCODERS
            else AutoModel
        )
        model = auto.from_pretrained(encoder, dtype=torch.float32)
    model = (
        (model.get_encoder() if config.is_encoder_decoder else model)
        .eval()
        .to("cuda" if torch.cuda.is_available() else "cpu")
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    length = min(
        MAX_TOKENS,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None) or MAX_TOKENS,
    )
    # Similar lengths together: less padding
    order = np.argsort([len(text) for text in texts], kind="stable")
    rows = []
    for part in np.array_split(order, -(-len(order) // BATCH)):
        batch = tokenizer(
            [texts[i] for i in part],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids = batch["input_ids"].to(model.device)
        mask = batch["attention_mask"].to(model.device)
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # [b, tokens, d]
        # [b, d]
        rows.append(
            ((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)).cpu()
        )
    return torch.cat(rows).numpy()[np.argsort(order)]


def cache_folder() -> pathlib.Path:
    """$SIDLAB_CACHE, default ~/.cache/sidlab. It need not exist."""
    return pathlib.Path(os.environ.get("SIDLAB_CACHE") or pathlib.Path.home() / ".cache" / "sidlab")


def _cache_path(texts, settings):
    key = hashlib.sha256(json.dumps([settings, texts], sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"text-{key}.safetensors"


def _save(path, embeddings):
    try:
        write(path, save({"embeddings": embeddings}))
    except (OSError, SafetensorError) as error:  # a read-only home must not stop the work
        warnings.warn(f"text embeddings are not cached: {error}", stacklevel=3)
