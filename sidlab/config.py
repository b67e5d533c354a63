"""What a training run depends on besides the data, and the presets."""

import dataclasses
import math
import typing

from sidlab.checks import integer, number, one_of, plain
from sidlab.map_loss import MapConfig
from sidlab.models import qwen_layout as sid_qwen
from sidlab.models import t5_layers as sid_t5
from sidlab.models.base import check_after_layer
from sidlab.pruning import PruningConfig
from sidlab.strategy import SCHEDULES, Strategy

# Hugging Face's names of those that need no further arguments
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on but the data; `preset` gives whole configurations."""

    # --- The model
    arch: str = "t5"  # "t5" (`SidT5`) or "qwen" (`SidQwen`, decoder-only)
    d_model: int = 128  # size of the hidden states
    d_kv: int = 64  # of a head's queries, keys and values
    num_heads: int = 6
    d_ff: int = 1024  # of the hidden layer of a feed-forward layer
    ffn_hidden_layers: int = 2  # T5: hidden layers of a feed-forward layer, two in RASTP's model
    # T5: "t5", or "published", as in RASTP's model: with biases, and dropout after the last hidden
    # layer alone and twice on the output
    ffn: str = "t5"
    num_layers: int = 4  # of the encoder, or all of a decoder-only model
    num_decoder_layers: int = 4  # T5
    num_kv_heads: int | None = None  # decoder-only: heads of keys and values; None: `num_heads`
    # Decoder-only: a pretrained Qwen3, whose sizes count instead (`SidQwen.from_checkpoint`)
    checkpoint: str | None = None
    prompt: str | None = None  # text in front of every history, for a `checkpoint`
    separators: bool = True  # one token after each item of a history
    max_items: int = 30  # of history; the newest count
    # Decoder-only: "bos_last" or "stream" (`SidQwenConfig`); None: as `targets` needs it
    layout: str | None = None
    # T5: "full" or "items" (`SidT5Config`); None: as `targets` needs it
    encoder_mask: str | None = None

    # --- Levers, off in both papers' models
    # T5: a learned bias of cross-attention by how many items back a token is
    cross_bias: bool = False
    # T5: queries and keys of each head are scaled to one size (Qwen3's always are)
    qk_norm: bool = False
    level_embeddings: bool = False  # a learned vector for each level is added to the token's
    embedding_norm: bool = False  # embeddings are scaled to a root mean square of 1
    # The output heads are slices of the embedding; False: weights of their own
    tie_embeddings: bool = True
    embedding_init: float = 0.05  # standard deviation of the initial token embeddings
    # T5: half of the heads start out looking 1, 2, 3, … tokens back, by a bias so strong
    position_init: float | None = None
    # The output projections of attention and feed-forward layers start at zero
    zero_init: bool = False

    # --- What keeps it from learning by heart
    dropout: float = 0.15  # T5: everywhere; decoder-only: of attention weights
    # Of embeddings and of what each attention and feed-forward layer adds; `dropout` is then that
    # inside the layers. None: T5 takes `dropout`, a decoder-only model none. (T5's heads that look
    # at one place suffer where dropout hides it.)
    residual_dropout: float | None = None
    label_smoothing: float = 0.0  # of the training loss, over the codes of a level
    weight_decay: float = 1e-4  # with `muon`, of the matrices alone
    # Decay is part of every parameter's gradient (Adam with L2, as published). AdamW keeps it apart
    # from the gradient, and spares norms and biases.
    coupled_decay: bool = False

    # --- Pruning and supervision
    pruning: PruningConfig | None = None
    strategy: Strategy | None = None  # how pruning changes while training (`adaptive`)
    map: MapConfig | None = None
    # What one pass teaches: 1, the item after a window; "all", every item of a stretch but its
    # first
    targets: int | str = 1

    # --- Batches. Every target weighs the same in an update.
    # "prefixes": an update is a sample of all lengths in proportion, cut by length into
    # `accumulation` batches (`batches.StratifiedBatches`). "contiguous": drawn as published
    # (`batches.UserBatches`), where `batch_tokens` means nothing.
    windows: str = "prefixes"
    # To the batch's longest; "fixed": to `padded_items`, the published way, in the same batches
    padding: str = "batch"
    # With padding="fixed", at least `max_items`; None: `max_items`. As published, one more: there
    # the target's item has a place, too.
    padded_items: int | None = None
    # Windows of similar length share a batch; False: any, then padded to the longest
    bucketing: bool = True
    batch_tokens: int = 1024  # history slots of a batch, on average
    # Batches of an update: the more the less padding, but each has its price. Several processes
    # share them, so it must be a multiple of their number.
    accumulation: int = 16

    # --- Optimiser
    learning_rate: float = 1e-3  # AdamW's peak
    # The peak rate of Muon, which then has the weight matrices inside the layers (`MuonAdamW`)
    muon: float | None = None
    beta2: float = 0.999  # AdamW's decay of the squared gradients
    # Gradients are scaled down to this norm over all parameters; 0: never
    max_grad_norm: float = 1.0
    warmup: float = 0.05  # share of all updates
    schedule: str = "cosine"  # one of `SCHEDULERS`, the same for both optimisers
    # Share of all updates, the last ones, whose weights are averaged (`torch.optim.swa_utils`).
    # From then on the average is evaluated, and it is what training returns; 0: no average.
    average_last: float = 0.0
    epochs: float = 100  # cut to `max_updates`, if given
    # May be raised for a run that goes on: its schedule is that of the new length from there on
    max_updates: int | None = None

    # --- Evaluation, on validation users
    eval_every: int = 100  # updates
    eval_users: int | None = None  # so many, the same ones every time; None: all
    patience: int = 10  # evaluations without a better recall@5 after which training stops
    beam: int = 10  # width of the search, on test users too

    # --- The machine
    # "fp32", "bf16" (mixed precision) or "auto": the faster of both, as `sidlab.fast.precision`
    # finds
    precision: str = "auto"
    stock_kernels: bool = (
        False  # the libraries' own attention and dropout in place of `fast`, to compare
    )
    seed: int = 0  # of weights, dropout and order

    def __post_init__(self):
        plain(self)
        for name, valid in (
            ("arch", ("t5", "qwen")),
            ("windows", ("prefixes", "contiguous")),
            ("padding", ("batch", "fixed")),
            ("precision", ("auto", "fp32", "bf16")),
            ("schedule", SCHEDULERS),
            ("ffn", sid_t5.FEED_FORWARDS),
        ):
            one_of(name, getattr(self, name), valid)
        self._check_targets()
        for name, part in PARTS.items():
            if not isinstance(getattr(self, name), part | None):
                raise TypeError(
                    f"{name} must be a {part.__name__} or None, got {getattr(self, name)!r}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = typing.get_args(field.type) or (field.type,)
            if value is None and type(None) in kinds:
                continue
            if int in kinds and str not in kinds:
                object.__setattr__(
                    self,
                    field.name,
                    integer(field.name, value, least=0 if field.name == "seed" else 1),
                )
            elif float in kinds:
                number(field.name, value)
        if not 0 < self.epochs < math.inf or not 0 <= self.warmup <= 1:
            raise ValueError(
                "epochs must be above 0 and finite, and warmup, a share of the updates, in [0, 1]; "
                f"got {self.epochs} and {self.warmup}"
            )
        below_one = ("dropout", "residual_dropout", "label_smoothing", "beta2", "average_last")
        limits = dict.fromkeys(below_one, 1) | dict.fromkeys(
            ("weight_decay", "learning_rate", "muon", "max_grad_norm"), math.inf
        )
        for name, below in limits.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < below:
                raise ValueError(f"{name} must be from 0 and below {below}, got {value}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.padded_items is not None and self.padded_items < self.max_items:
            raise ValueError(
                f"padded_items={self.padded_items} is less than max_items={self.max_items}; use as"
                " many or more, or None"
            )
        if (
            self.pruning is not None
            and self.pruning.mode == "reference"
            and self.padding != "fixed"
        ):
            raise ValueError(
                'pruning mode="reference" needs padding="fixed", as in the published code'
            )
        if self.strategy is not None:
            if self.pruning is None or self.pruning.mode == "reference":
                raise ValueError(
                    'strategy changes pruning, other than mode="reference"; got'
                    f" pruning={self.pruning}"
                )
            if self.pruning.reduce == "pool" and self.strategy.kind == "settled-layer":
                raise ValueError(
                    'strategy.kind="settled-layer" compares scores, and reduce="pool" has none'
                )
            if self.strategy.kind not in SCHEDULES and self.eval_every % self.strategy.every:
                raise ValueError(
                    f"eval_every={self.eval_every} must be a multiple of"
                    f" strategy.every={self.strategy.every}"
                )
        if self.checkpoint is not None and self.arch != "qwen":
            raise ValueError(
                f'checkpoint={self.checkpoint!r} needs arch="qwen", got arch={self.arch!r}'
            )
        if self.checkpoint is not None and (
            levers := [name for name in FRESH if getattr(self, name) != getattr(type(self), name)]
        ):
            raise ValueError(
                f"{levers[0]}={getattr(self, levers[0])!r} is for models that start from nothing,"
                f" and checkpoint={self.checkpoint!r} has its own weights; leave it out"
            )
        self._check_levers()
        if self.arch == "qwen" and self.checkpoint is None and self.d_kv % 2:
            raise ValueError(
                f'd_kv={self.d_kv} must be even with arch="qwen", which rotates pairs of numbers'
            )
        if self.prompt is not None and self.checkpoint is None:
            raise ValueError(f"prompt={self.prompt!r} needs a checkpoint, whose tokenizer reads it")
        # What does not fit a model is refused before anything is loaded
        if self.pruning is not None and self.checkpoint is None:
            (sid_qwen.check if self.arch == "qwen" else check_after_layer)(
                self.pruning, self.num_layers
            )

    def _check_levers(self):
        """What would change nothing is refused."""
        if self.arch == "qwen":
            for name in ("cross_bias", "qk_norm", "position_init", "ffn"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} belongs to arch='t5', got arch='qwen';"
                        " leave it out"
                    )
        if self.coupled_decay and self.muon is not None:
            raise ValueError(
                f"coupled_decay=True belongs to Adam, and muon={self.muon} has a decay of its own;"
                " leave one of them out"
            )
        if self.average_last and self.strategy is not None:
            raise ValueError(
                f"average_last={self.average_last} needs a model that stays the same, and"
                f" strategy={self.strategy} changes its pruning; leave one of them out"
            )

    def _check_targets(self):
        """`targets` and what has to fit it."""
        if self.targets not in (1, "all") or isinstance(self.targets, bool):
            raise ValueError(
                f'targets={self.targets!r} is unknown; use 1, the item after a window, or "all"'
                " items of a stretch"
            )
        dense = self.targets == "all"
        for arch, (name, valid, needed) in ROWS.items():
            given = getattr(self, name)
            if given is None:
                continue
            one_of(name, given, valid)
            if self.arch != arch:
                raise ValueError(
                    f"{name}={given!r} belongs to arch={arch!r}, got arch={self.arch!r}"
                )
            if dense and given != needed:
                raise ValueError(f'targets="all" needs {name}={needed!r}, got {given!r}')
        if dense and self.pruning is not None:
            raise ValueError(
                'targets="all" prunes nothing, for each target would keep other tokens: train'
                " unpruned, then continue from that model with pruning and targets=1 (start_from)"
            )
        if dense and (self.windows != "prefixes" or self.padding != "batch"):
            raise ValueError(
                'targets="all" reads whole stretches of histories: leave windows and padding out,'
                f" got windows={self.windows!r} and padding={self.padding!r}"
            )

    @classmethod
    def preset(cls, name: str, *, continued: bool = False, **overrides) -> "TrainConfig":
        """ "smoke" (seconds, only shows that everything runs), "quick" (a minute on one core),
        "long" (for real data, some ten minutes a run on one core), "gpu" (the paper's sizes) or
        "paper" (RASTP's configuration as far as it is published), with any field overridden; with
        `max_items` and without `padded_items`, histories are padded to that.

        "paper" differs from the published code in this: a group's 512 windows are drawn without
        replacement (there with, so that about 412 are distinct); every target of an update weighs
        the same (there the loss is the mean of its batches' means); token embeddings start as
        `embedding_init` says (there from N(0, 1)); the search walks valid SIDs alone. It pads and
        prunes as published with padding="fixed" and PruningConfig(mode="reference").

        All but "paper" differ by `arch` and by stage: with `targets="all"` batches hold whole
        stretches, `continued` is for going on from a model that was taught so
        (`train(start_from=…)`), gently and for few updates.
        """
        one_of("preset", name, PRESETS)
        arch = overrides.get("arch", "t5")
        fields = PRESETS[name] | OF_ARCH.get((name, arch), {})
        if "max_items" in overrides and "padded_items" not in overrides:
            fields |= dict(padded_items=None)
        if overrides.get("targets") == "all":
            fields |= DENSE.get(name, {})
        if overrides.get("checkpoint") is not None:
            fields = {field: value for field, value in fields.items() if field not in FRESH}
        if continued:
            fields |= dict(epochs=100, warmup=0.1) | CONTINUED.get(name, {})
            fields |= {
                rate: fields[rate] * SLOWER
                for rate in ("learning_rate", "muon")
                if fields.get(rate)
            }
        return cls(**fields | overrides)

    def completed(self, base: dict | None = None) -> "TrainConfig":
        """The same with `layout` (decoder-only) or `encoder_mask` (T5) filled in where it is None:
        as `base` has it, the `config.json` of the model that training starts from, or else as
        `targets` needs it.
        """
        name, valid, needed = ROWS[self.arch]
        if getattr(self, name) is not None:
            return self
        # One that was saved before there was a choice names none, and has the first
        if base is not None:
            return dataclasses.replace(self, **{name: base.get(name, valid[0])})
        return dataclasses.replace(self, **{name: needed if self.targets == "all" else valid[0]})

    def to_dict(self) -> dict:
        """JSON-ready; a callable scorer becomes "own:<name>"."""
        return dataclasses.asdict(self) | {"pruning": self.pruning and self.pruning.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict) -> "TrainConfig":
        """The inverse of `to_dict`."""
        return cls(
            **{k: PARTS[k](**v) if k in PARTS and v is not None else v for k, v in fields.items()}
        )


# By architecture: the field that says how a row is read, its values (the published one first), and
# what dense targets need.
ROWS = {
    "qwen": ("layout", sid_qwen.LAYOUTS, "stream"),
    "t5": ("encoder_mask", sid_t5.ENCODER_MASKS, "items"),
}
# How a model that starts from nothing is made, which a pretrained checkpoint is not.
FRESH = ("level_embeddings", "embedding_norm", "embedding_init", "tie_embeddings", "zero_init")
PARTS = {"pruning": PruningConfig, "strategy": Strategy, "map": MapConfig}

# Heads that look back from the start: under Adam a bias moves by no more than the learning rate a
# step, and from T5's initial 0.1 it would take thousands of steps to single out a neighbour.
# Planted, recall@10 on validation users: with random biases and one decoder layer .41 after 2,051
# updates (20,000 users, one seed), so .40 and .51 after 416 (2,000 users, two seeds).
# Zero-initialised output projections and heads apart from the embedding: planted, T5, dense
# targets, 160 updates, one seed, test recall@10: .46 with neither, .59 and .52 with the one and the
# other (Bayes .62). Muon: planted, T5, one seed, the same 260 updates in the same 38 s: validation
# recall@10 .52, with AdamW alone .32.
RECIPE = dict(
    num_layers=4,
    num_decoder_layers=2,
    ffn_hidden_layers=1,
    num_heads=4,
    tie_embeddings=False,
    zero_init=True,
    dropout=0.0,
    weight_decay=0.1,
    muon=0.01,
    learning_rate=2e-3,
    beta2=0.99,
    warmup=0.03,
    eval_users=2000,
    patience=20,
)
RECIPE_OF = {
    "t5": dict(position_init=8.0, cross_bias=True),
    "qwen": dict(
        level_embeddings=True, embedding_norm=True, embedding_init=0.02, residual_dropout=0.2
    ),
}
SMALL = RECIPE | dict(d_model=64, d_kv=16)
# By name and stage: of every run; with one target a window; with all targets of a stretch; going on
# from a trained model. A batch has its price on a CPU, and padding has one: planted, `quick`, a
# thread: 0.93 s per 1,000 windows with 8 batches an update, where 8 % of the slots are padding, 1.0
# with 10 (5 %), 1.2 with 16 (1 %).
PRESETS = {
    "smoke": (
        SMALL
        | dict(
            d_model=32,
            batch_tokens=256,
            accumulation=4,
            max_updates=20,
            eval_every=10,
            eval_users=50,
        )
    ),
    "quick": SMALL | dict(batch_tokens=512, accumulation=8, epochs=2.5, eval_every=100),
    # For real data: wider, since there are many more codes to tell apart, and without separators.
    "long": (
        RECIPE
        | dict(
            d_model=128,
            d_kv=32,
            separators=False,
            max_items=50,
            beam=20,
            batch_tokens=256,
            accumulation=16,
            epochs=6,
            eval_every=1000,
        )
    ),
    "gpu": (
        RECIPE
        | dict(
            d_kv=64,
            num_heads=6,
            num_decoder_layers=4,
            max_items=50,
            beam=20,
            batch_tokens=2048,
            accumulation=16,
            epochs=10,
            eval_every=385,
        )
    ),
    "paper": dict(
        max_items=29,
        padded_items=30,
        tie_embeddings=False,
        windows="contiguous",
        accumulation=16,
        coupled_decay=True,
        schedule="constant",
        warmup=0.0,
        eval_every=100,
        patience=10,
        precision="fp32",
    ),
}
OF_ARCH = {
    ("smoke", "t5"): RECIPE_OF["t5"] | dict(d_ff=64),
    ("smoke", "qwen"): RECIPE_OF["qwen"] | dict(d_ff=96),
    ("quick", "t5"): RECIPE_OF["t5"] | dict(d_ff=128, residual_dropout=0.05),
    ("quick", "qwen"): RECIPE_OF["qwen"] | dict(d_ff=192),
    ("long", "t5"): RECIPE_OF["t5"] | dict(d_ff=512, level_embeddings=True, residual_dropout=0.1),
    ("long", "qwen"): RECIPE_OF["qwen"] | dict(d_ff=384),
    ("gpu", "t5"): RECIPE_OF["t5"] | dict(d_ff=1024, level_embeddings=True, residual_dropout=0.1),
    ("gpu", "qwen"): RECIPE_OF["qwen"] | dict(d_ff=1024),
    ("paper", "t5"): dict(ffn="published"),
}
DENSE = {
    "smoke": dict(batch_tokens=1024, accumulation=1),
    "quick": dict(batch_tokens=2048, accumulation=1, epochs=8, eval_every=80),
    "long": dict(batch_tokens=4096, accumulation=1, epochs=20, eval_every=632),
    "gpu": dict(batch_tokens=16384, accumulation=1, epochs=40, eval_every=200),
}
# Going on from a trained model, gently, so that it does not forget. The fifteenth is a choice: on
# real data it was not compared with others here.
CONTINUED = {
    "quick": dict(max_updates=60, eval_every=20),
    "long": dict(max_updates=250, eval_every=50),
    "gpu": dict(max_updates=250, eval_every=50),
}
SLOWER = 1 / 15
