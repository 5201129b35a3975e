"""The recipe of one run: every setting a user can name, with its default, its rule and its meaning."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from endwise.config import Config

Kind = Literal["local", "e2e", "e2e_ds"]
Positive = Annotated[int, Field(gt=0, le=10**15)]
"""No corpus is as large as the bound, and every integer up to it is exact in all that reads it."""
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ModelConfig(Config):
    """Which language model, and how it is held in memory."""

    name: str = "embedded"
    """`embedded`, a local folder, or a Hugging Face hub id."""
    gguf_file: str | None = None
    """The file inside `name` to read, for models stored as GGUF."""
    revision: str | None = None
    """Hub commit, branch or tag."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Unset: float32, whatever the checkpoint is stored in; for mixed precision on a GPU, bfloat16."""
    device: str = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`, ..."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; unset: `sdpa` where the model has it, and for GPT-Neo, where endwise brings it."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Never on unless set here."""


class DictionaryConfig(Config):
    """The sparse autoencoder."""

    architecture: Literal["relu"] = "relu"
    size: Positive | None = None
    """Number of features `d_sae`; give this or `ratio`."""
    ratio: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Number of features as a multiple of the site's width."""

    @model_validator(mode="after")
    def _one_size(self) -> "DictionaryConfig":
        if (self.size is None) == (self.ratio is None):
            raise ValueError("give exactly one of size (features) and ratio (features per dimension of the site)")
        return self

    def features(self, width: int) -> int:
        """`d_sae` for a site of this width."""
        return self.size if self.size is not None else max(1, round((self.ratio or 0) * width))


class SparsityConfig(Config):
    coefficient: NonNegative
    """λ, the weight of the sparsity penalty."""
    p: Annotated[float, Field(gt=0)] = 1.0
    """The penalty is the mean over tokens of Σ|c|^p / d_model."""


PRESETS: dict[str, dict[str, float]] = {"local": {"local_mse": 1.0}, "e2e": {"kl": 1.0}, "e2e_ds": {"kl": 0.5}}
"""By kind, the weights of reconstruction terms that it sets. The others are 0, but for β of e2e_ds, which is required.
"""
TERMS: dict[Kind, set[str]] = {"local": {"local_mse"}, "e2e": {"kl"}, "e2e_ds": {"kl", "downstream_mse"}}
"""By kind, the reconstruction terms that it has."""


class ObjectiveConfig(Config):
    """What the SAE is trained for. `kind` is the paper's preset; the weights below override it term by term."""

    kind: Kind
    sparsity: SparsityConfig
    kl: NonNegative | None = None
    """Weight of KL(original ‖ spliced), nats per token. Preset: 0, 1, 0.5 for local, e2e, e2e_ds."""
    local_mse: NonNegative | None = None
    """Weight of the reconstruction's mean squared error at the site. Preset: 1, 0, 0."""
    downstream_mse: NonNegative | None = None
    """β, total weight of the later sites' mean squared error, shared equally among them. Preset: 0, 0, required."""
    downstream_sites: tuple[str, ...] | None = None
    """Unset: `hook_resid_pre` of every later block, as in the reference code."""

    @model_validator(mode="after")
    def _resolved(self) -> "ObjectiveConfig":
        if self.kind == "e2e_ds" and not self.downstream_mse:
            raise ValueError(
                "kind e2e_ds needs downstream_mse, the total weight of the later sites' errors (β), above 0"
            )
        sites = self.downstream_sites or ()
        if len(set(sites)) < len(sites):
            raise ValueError(f"downstream_sites names a site twice: {', '.join(sites)}; name each once")
        if not any(self.weights.values()):
            raise ValueError("every weight of the objective but sparsity is 0, so there is nothing to reconstruct")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reconstruction term after the preset is applied."""
        given = {"kl": self.kl, "local_mse": self.local_mse, "downstream_mse": self.downstream_mse}
        preset = PRESETS[self.kind]
        return {term: preset.get(term, 0.0) if value is None else value for term, value in given.items()}

    @property
    def method(self) -> dict[str, Any]:
        """What an SAE is trained for, all but the sparsity coefficient. Runs that differ in it are of two methods."""
        sites = None if self.downstream_sites is None else list(self.downstream_sites)
        return {**self.weights, "downstream_sites": sites, "p": self.sparsity.p}

    @property
    def method_kind(self) -> Kind:
        """The kind whose terms these weights keep, whatever `kind` says; `kind` where they are no preset's."""
        terms = {term for term, weight in self.weights.items() if weight}
        kinds: list[Kind] = [kind for kind, of in TERMS.items() if of == terms]
        return kinds[0] if kinds else self.kind


class DataConfig(Config):
    """Where tokens come from and how they are packed into sequences."""

    source: str = "embedded"
    """`embedded`, a `.txt`/`.jsonl`/`.parquet`/`.npy` file or a folder of them, or a Hugging Face dataset id."""
    column: str | None = None
    """Column holding text (or token ids); unset: `text`, `input_ids` or `tokens`, whichever is there."""
    dataset_config: str | None = None
    """Name of the configuration of a Hugging Face dataset on the hub."""
    revision: str | None = None
    """Commit, branch or tag of `source` on the Hugging Face hub; a commit keeps a recipe's text as it is."""
    split: str = "train"
    """Split of a dataset, or of a folder: of its files, those whose path holds the split as a word (`test-0.parquet`,
    `validation/a.txt`); a file that names none is of `train`."""
    streaming: bool = False
    context: Positive | None = None
    """Tokens per sequence; unset: the model's own context."""
    packing: Literal["stream", "document"] = "stream"
    """`stream`: documents joined by the separator and cut into full sequences, attending across the joints as in the
    paper. `document`: one document per sequence, cut at the context and padded on the right; padding is masked."""
    separator: str | None = None
    """Token between documents; unset: the tokenizer's EOS. Required where the tokenizer has none."""
    special_tokens: bool = False
    """Take special tokens that are written out in text, such as `<|endoftext|>`, for those tokens; a separator then
    ends a document. Unset, they are text as any other."""
    prepend_bos: bool = False
    """Start every sequence with the tokenizer's BOS (masked in losses and metrics)."""
    mask_first_position: bool = False
    """Leave position 0 out of every loss and metric."""
    epochs: Positive = 1
    """How often the training corpus may be passed over before it counts as too short."""
    seed: Seed = 0
    """Order of the training sequences; separate from the run's seed."""
    heldout: str | None = None
    """Source of the held-out text; unset: the embedded corpus's held-out split, or the last `heldout_share` of
    `source`'s documents, which are then never trained on."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    heldout_split: str | None = None
    """Split of `heldout` (or of `source`, if `heldout` is unset) to evaluate on."""
    cache: Path | None = None
    """Folder for tokenised text; unset: `$ENDWISE_CACHE` or `~/.cache/endwise`."""


class TrainingConfig(Config):
    """One optimiser: Adam with linear warm-up, then a cosine to a floor."""

    tokens: Positive
    """Training tokens in all."""
    batch: Positive = 16
    """Sequences per optimiser step."""
    accumulation: Positive = 1
    """Passes per optimiser step, each over batch/accumulation sequences. Bounds memory, leaves the numbers alone."""
    microbatch: Positive | None = None
    """Sequences at a time in the spliced pass; unset: about 1,024 tokens on a CPU, 16,384 on a GPU. Bounds memory; the
    SAE sees all of the pass's at once."""
    precision: Literal["exact", "mixed"] = "exact"
    """`exact`: everything in float32. `mixed`: the tail after the site in bfloat16, on a GPU the SAE's products too;
    the active features (on a CPU), all reductions, and the SAE's weights and optimiser stay in float32."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly from 0."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this share of the learning rate."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient of all SAE weights together."""
    alive_window: Positive = 500_000
    """A feature counts as alive if it fired within this many of the latest training tokens."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive | None = None
    """Steps between evaluations; unset: only at the end."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; unset: only at the end and on interruption."""
    keep_checkpoints: Positive = 2
    """The latest of them stay; more than one, in case that the last is damaged."""

    @model_validator(mode="after")
    def _passes_of_equal_size(self) -> "TrainingConfig":
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation ({self.accumulation}) must divide batch ({self.batch})")
        return self


class EvaluationConfig(Config):
    """How a finished SAE is measured on held-out text."""

    tokens: Positive = 500_000
    """Held-out tokens for every metric; alive features are counted over exactly these."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Held-out tokens to leave out before those. Measure the runs that a setting is chosen by with `skip` as large as
    `tokens` of the runs that are reported: then no text is used for both."""
    batch: Positive = 16
    bootstrap: Annotated[int, Field(gt=0, le=100_000)] = 1000
    """Bootstrap resamples over sequences."""
    during_training_tokens: Positive = 20_000
    """Held-out tokens of the short evaluations on schedule."""
    seed: Seed = 12345
    """Draws the bootstrap resamples; the held-out sequences are taken in their own order."""

    @property
    def needed(self) -> int:
        """Held-out tokens that must be there for all of its evaluations."""
        return self.skip + max(self.tokens, self.during_training_tokens)


class RunConfig(Config):
    """A recipe: one SAE at one site of one model."""

    model: ModelConfig = ModelConfig()
    site: str
    """TransformerLens name: blocks.K.hook_resid_pre, hook_resid_post, hook_attn_out or hook_mlp_out."""
    dictionary: DictionaryConfig
    objective: ObjectiveConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Seed = 0
    """Initialisation of the SAE."""
    init_from: Path | None = None
    """A run folder, or a folder in SAELens's layout: training starts from the SAE in it rather than from random
    weights. The optimiser and its schedule start from the beginning."""
    out: Path | None = None
    """Run folder; unset: runs/<a name made from the recipe>."""

    @property
    def seeds(self) -> dict[str, int]:
        """Every seed that the run's numbers depend on, by purpose."""
        return {"initialisation": self.seed, "data": self.data.seed, "evaluation": self.evaluation.seed}

    @model_validator(mode="after")
    def _exact_is_float32(self) -> "RunConfig":
        if self.training.precision == "exact" and self.model.dtype not in (None, "float32"):
            raise ValueError(
                f"training.precision exact needs model.dtype float32, given {self.model.dtype}; leave model.dtype "
                "unset, or set training.precision=mixed"
            )
        return self
