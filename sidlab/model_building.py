"""From a configuration to a model: built anew, continued from a folder, loaded."""

import hashlib
import pathlib

import torch
from safetensors.torch import load_file
from transformers import (
    set_seed,
)

from sidlab.checks import one_of
from sidlab.config import FRESH, TrainConfig
from sidlab.fast import cpu_layers
from sidlab.fast.precision import kept_random_state
from sidlab.files import read_json, reading
from sidlab.models.qwen import SidQwen, SidQwenConfig
from sidlab.models.t5 import SidT5, SidT5Config
from sidlab.sids.table import SidTable


def build_model(config: TrainConfig, table: SidTable) -> SidT5 | SidQwen:
    """A fresh model; weights depend on `config.seed` alone, whatever is pruned or predicted
    besides. Random numbers that the caller draws stay as they were.
    """
    config = config.completed()
    fields = config.to_dict()
    with kept_random_state():
        set_seed(config.seed)
        model = MODELS[config.arch](config, table, {name: fields[name] for name in SHARED})
    # A custom scorer, by name or as it is: of the model's own configuration it would not be
    # imported.
    if config.pruning is not None:
        model.set_scorer(config.pruning.scorer)
    if config.stock_kernels:
        model.set_attn_implementation("eager")
        cpu_layers.replace_dropout(model, torch.nn.Dropout)
    return model


def start_model(model, config, base, table):
    """Loads the weights of the model in the folder `base` into `model`, whose MAP head alone may be
    missing there. ValueError where the two differ in anything but what may change: how they prune,
    MAP, dropout and how histories are cut.
    """
    kind = read_json(base / "config.json", "model_type")["model_type"]
    if kind != model.config.model_type:
        raise ValueError(
            f"start_from={str(base)!r} holds a {kind!r} model, arch={config.arch!r} makes a"
            f" {model.config.model_type!r}"
        )
    # With the defaults of what an older model does not name
    theirs = type(model.config).from_pretrained(base)
    for name in MUST_MATCH:
        if hasattr(theirs, name) and getattr(theirs, name) != getattr(model.config, name):
            raise ValueError(
                f"start_from={str(base)!r} has {name}={getattr(theirs, name)!r}, this configuration"
                f" {getattr(model.config, name)!r}: a model that goes on keeps its architecture;"
                " give TrainConfig the same"
            )
    steps = [config and config["steps"] for config in (theirs.map, model.config.map)]
    if None not in steps and steps[0] != steps[1]:
        raise ValueError(
            f"start_from={str(base)!r} has a MAP head of map.steps={steps[0]}, this configuration"
            f" of {steps[1]}; use the same, or save that model with drop_map=True"
        )
    other = SidTable.load(base)
    with reading(base / "model.safetensors"):
        weights = load_file(base / "model.safetensors")
    if other.fingerprint() != table.fingerprint():
        raise ValueError(
            f"start_from={str(base)!r} speaks other SIDs ({other.fingerprint()}) than table"
            f" ({table.fingerprint()}): continue with SidTable.load of that folder"
        )
    if model.map_head is None:
        weights = {
            name: weight for name, weight in weights.items() if not name.startswith("map_head.")
        }
    found = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    missing = [
        key for key in found.missing_keys if key not in tied and not key.startswith("map_head.")
    ]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"start_from={str(base)!r} does not fit: missing {missing[:3]}, unexpected"
            f" {found.unexpected_keys[:3]}"
        )


def load_model(folder) -> SidT5 | SidQwen:
    """The model saved in `folder`, in evaluation mode. ValueError where there is none of ours."""
    kind = read_json(pathlib.Path(folder) / "config.json", "model_type")["model_type"]
    kinds = {of.config_class.model_type: of for of in (SidT5, SidQwen)}
    one_of("model_type", kind, kinds)
    return kinds[kind].from_pretrained(folder).eval()


def weights_digest(folder) -> str:
    """12 hex digits of SHA-256 of the weights in a model's folder."""
    with reading(folder):
        return hashlib.sha256(
            (pathlib.Path(folder) / "model.safetensors").read_bytes()
        ).hexdigest()[:12]


# Fields of a model's configuration, T5's and Qwen3's, that a model which goes on keeps.
MUST_MATCH = (
    "widths",
    "text_vocab",
    "separators",
    "level_embeddings",
    "embedding_norm",
    "cross_bias",
    "qk_norm",
    "tie_embeddings",
    "tie_word_embeddings",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "ffn_hidden_layers",
    "ffn",
    "hidden_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
)
SHARED = (
    "separators",
    "max_items",
    "pruning",
    "map",
    "level_embeddings",
    "embedding_norm",
    "zero_init",
    "label_smoothing",
)


def _t5(config, table, shared):
    return SidT5(
        SidT5Config(
            widths=table.widths,
            d_model=config.d_model,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            d_ff=config.d_ff,
            ffn_hidden_layers=config.ffn_hidden_layers,
            ffn=config.ffn,
            padded_items=config.padded_items,
            num_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers,
            dropout_rate=config.dropout,
            embedding_init=config.embedding_init,
            position_init=config.position_init,
            encoder_mask=config.encoder_mask,
            cross_bias=config.cross_bias,
            qk_norm=config.qk_norm,
            residual_dropout=config.residual_dropout,
            tie_embeddings=config.tie_embeddings,
            **shared,
        ),
        table,
    )


def _qwen(config, table, shared):
    if config.checkpoint is not None:
        shared = {name: value for name, value in shared.items() if name not in FRESH}
        model = SidQwen.from_checkpoint(
            config.checkpoint,
            table,
            config.prompt,
            attention_dropout=config.dropout,
            layout=config.layout,
            residual_dropout=config.residual_dropout or 0.0,
            **shared,
        )
        return model.float()  # in bfloat16 most updates would be rounded away
    return SidQwen(
        SidQwenConfig(
            widths=table.widths,
            hidden_size=config.d_model,
            head_dim=config.d_kv,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            attention_dropout=config.dropout,
            embedding_init=config.embedding_init,
            residual_dropout=config.residual_dropout or 0.0,
            tie_word_embeddings=config.tie_embeddings,
            layout=config.layout,
            **shared,
        ),
        table,
    )


MODELS = {"t5": _t5, "qwen": _qwen}
