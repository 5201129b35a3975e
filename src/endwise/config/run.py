"""The recipe of one run: every setting a user can name, with its default, its rule and its meaning.

A field says what is computed unless `EXECUTION` marks it (`config.fields`). What is marked changes no number that is
written, or only its rounding: where a sum is made in another order, by another kernel, or on another device.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, SerializeAsAny, model_validator

from endwise.common.errors import ConfigError
from endwise.common.hub import shown
from endwise.config.base import Config, Positive, SiteName
from endwise.config.dictionary import DictionaryConfig, of_architecture, with_room_for
from endwise.config.fields import EXECUTION, SHARED
from endwise.config.objective import ObjectiveConfig
from endwise.config.phases import (
    PhaseConfig,
    given_values,
    refuse_shares,
    refuse_two_units,
    spelled_out,
    with_objective,
)

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Start = Annotated[Path, PlainSerializer(shown, return_type=str, when_used="json")]
"""Path or name of an SAE."""
Beta = Annotated[float, Field(ge=0, lt=1)]
FITTED = ("tokens", "during_training_tokens")
"""Keys of `evaluation` whose defaults are lowered to what is held out."""


class ModelConfig(Config):
    """Language model, and how it is held in memory."""

    name: str = "embedded"
    """`embedded`, a local folder, or a Hugging Face hub id."""
    gguf_file: str | None = None
    """The file inside `name` to read, for models stored as GGUF."""
    revision: str | None = None
    """Hub commit, branch or tag."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Unset: float32, whatever the checkpoint is stored in; for mixed precision on a GPU, bfloat16."""
    device: Annotated[str, EXECUTION] = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`, ..."""
    # One function, whichever kernel computes it; a run that is resumed elsewhere may have to do without one of them.
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"] | None, EXECUTION] = None
    """Attention implementation; unset: `sdpa` where the model has it, and for GPT-Neo, where endwise brings it."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless set here."""
    quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-8bit"] | None = None
    """Pack the weights of the model's blocks in 8 or 4 bits as they are loaded, by a quantiser of transformers' (extras
    `bitsandbytes` and `torchao`); `dtype` is what is computed in. Unset: as the checkpoint has them."""
    sharded: Annotated[bool, EXECUTION] = False
    """Divide the model's blocks among the processes of `torchrun` (FSDP2), each of which gathers a block for as long as
    it computes. For a model too large for one GPU; see docs/scaling.md."""


class DataConfig(Config):
    """Source of tokens, and how they are packed into sequences."""

    source: str = "embedded"
    """`embedded`, a `.txt`, `.jsonl`, `.json` (one list), `.csv` (all four also `.gz` or `.zst`), `.parquet` or `.npy`
    file, a folder of them or of `save_to_disk`, or a Hugging Face dataset id."""
    column: str | None = None
    """Column holding text, token ids or conversations; unset: `text`, `input_ids`, `tokens` or `messages`, whichever is
    there."""
    dataset_config: str | None = None
    """Name of the configuration of a Hugging Face dataset on the hub."""
    revision: str | None = None
    """Commit, branch or tag of `source` on the Hugging Face hub; a commit keeps a recipe's text as it is."""
    split: str = "train"
    """Split of a dataset, or of a folder: of its files, those whose path holds the split as a word (`test-0.parquet`,
    `validation/a.txt`); a file that names none is of `train`."""
    streaming: bool = False  # It decides which documents are held out, and how far the corpus goes.
    context: Positive | None = None
    """Tokens per sequence; unset: the model's own context."""
    packing: Literal["stream", "document"] = "stream"
    """`stream`: documents joined by the separator and cut into full sequences, attending across the joints as in the
    paper. `document`: one document per sequence, cut at the context and padded on the right; padding is masked."""
    document_attention: bool = False
    """Keep the documents of a sequence apart: attention stops at the separator, and positions start at 0 after it, in
    every pass, clean and spliced. Refused where the model's attention cannot (state spaces, ALiBi)."""
    separator: str | None = None
    """Token between documents; unset: the tokenizer's EOS. Required where the tokenizer has none."""
    special_tokens: bool = False
    """Take special tokens that are written out in text, such as `<|endoftext|>`, for those tokens; a separator then
    ends a document. Unset, they are ordinary text."""
    prepend_bos: bool = False
    """Start every sequence with the tokenizer's BOS (masked in losses and metrics)."""
    mask_first_position: bool = False
    """Leave position 0 out of every loss and metric."""
    leave_out_special: bool = False
    """Leave the tokenizer's special tokens out of every loss and metric, as padding is."""
    leave_out_tokens: tuple[tuple[str, Annotated[int, Field(ge=0, le=1000)]], ...] = ()
    """Tokens to leave out besides, each with how many after it in its sequence: of `[["<|im_start|>", 2]]` the head of
    every turn of a chat, the token, the role and the new line."""
    leave_out_roles: tuple[Literal["system", "developer", "user", "assistant", "tool", "template"], ...] = ()
    """Roles whose tokens to leave out of conversations (a column of `messages`, written by the model's chat template);
    `template` stands for tokens that are in no message's content: `[system, user, template]` keeps what the assistant
    says."""
    leave_out_norms: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Leave out positions (attention sinks) at which the norm of what the dictionary reads is more than so many times
    the median, which is measured once, before the first step; 10 is usual. Unset: none are for their norm."""
    epochs: Positive = 1
    """Times that the training corpus may be passed over before it counts as too short."""
    seed: Seed = 0
    """Order of the training sequences; separate from the run's seed."""
    heldout: str | None = None
    """Source of the held-out text; unset: the embedded corpus's held-out split, or the last `heldout_share` of
    `source`'s documents, which are then never trained on."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    heldout_split: str | None = None
    """Split of `heldout` (or of `source`, if `heldout` is unset) to evaluate on."""
    cache: Annotated[Path | None, EXECUTION] = None
    """Folder for tokenised text; unset: `$ENDWISE_CACHE` or `~/.cache/endwise`."""
    activations: Annotated[Path | None, EXECUTION] = None
    """Folder in which clean activations of training sequences are kept, for steps that read no spliced pass: a second
    epoch, or another run at that site, then does not run the model. Unset: nowhere."""


class TrainingConfig(Config):
    """One optimiser: Adam with linear warm-up, then a cosine (or what `schedule` says) to a floor."""

    tokens: Annotated[Positive, SHARED]
    """Training tokens in all."""
    batch: Annotated[Positive, SHARED] = 16
    """Sequences per optimiser step."""
    # Sums over a batch are added up in another order, and nothing else. An architecture that chooses among all tokens
    # of a pass would change with it, and must refuse more than one.
    accumulation: Annotated[Positive, SHARED, EXECUTION] = 1
    """Passes per optimiser step, each over batch/accumulation sequences. Bounds memory, does not change the numbers."""
    microbatch: Annotated[Positive | None, EXECUTION] = None
    """Sequences at a time in the spliced pass; unset: about 1,024 tokens on a CPU, 16,384 on a GPU. Bounds memory; the
    SAE sees all of the pass's at once."""
    shards: Annotated[Positive, SHARED, EXECUTION] = 1
    """Processes among which the features of one dictionary are shared out (tensor parallelism along d_sae). So many
    read the same sequences; it divides the number that torchrun starts, and the groups share each batch."""
    precision: Annotated[Literal["exact", "mixed"], SHARED] = "exact"
    """`exact`: everything in float32. `mixed`: the tail after the site in bfloat16, on a GPU the SAE's products too;
    the active features (on a CPU), all reductions, and the SAE's weights and optimiser stay in float32."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Way in which the rate falls to the floor after the warm-up; `constant`: not at all."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps, the last, over which the rate falls; before them it is constant. Unset: all after the
    warm-up."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The rate ends at this share of `learning_rate`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the moving averages of the gradient and of its square."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient of all SAE weights together."""
    alive_window: Positive = 500_000
    """A feature counts as alive if it fired within this many of the latest training tokens."""
    # Which lines there are is execution. What one holds is not: `alive_window`, `evaluation.during_training_tokens`.
    log_every: Annotated[Positive, EXECUTION] = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Annotated[Positive | None, EXECUTION] = None
    """Steps between evaluations; unset: only at the end."""
    checkpoint_every: Annotated[Positive | None, EXECUTION] = None
    """Steps between checkpoints; unset: only at the end and on interruption."""
    keep_checkpoints: Annotated[Positive, EXECUTION] = 2
    """Latest checkpoints that are kept; more than one, in case the last is damaged."""
    save_at: Annotated[tuple[Positive, ...] | Literal["log"], EXECUTION] = ()
    """Training tokens after which the SAE, as it is then, is saved in the run's folder `saes`; `log`: after 1, 2, 4, 8,
    … steps."""

    def saves_after(self, step: int, tokens: int) -> bool:
        """Return whether the SAE is saved after so many steps, each of so many tokens."""
        if self.save_at == "log":
            return step & (step - 1) == 0
        return any((step - 1) * tokens < each <= step * tokens for each in self.save_at)

    @model_validator(mode="after")
    def _passes_of_equal_size(self) -> "TrainingConfig":
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation ({self.accumulation}) must divide batch ({self.batch})")
        return self

    @model_validator(mode="after")
    def _decay_has_a_place(self) -> "TrainingConfig":
        if self.decay is None:
            return self
        if self.schedule == "constant":
            raise ValueError(f"decay is {self.decay:g}, but schedule constant has none; unset it, or choose linear")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup ({self.warmup:g}) and decay ({self.decay:g}) are more than all steps; lower one")
        return self


class EvaluationConfig(Config):
    """Measurement of a finished SAE on held-out text."""

    tokens: Positive = 500_000
    """Held-out tokens for every metric; alive features are counted over exactly these. Where less text
    is held out than the default, all of it is taken."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Held-out tokens to leave out before those. Measure the runs that a setting is chosen by with `skip` as large as
    `tokens` of the runs that are reported: then no text is used for both."""
    batch: Annotated[Positive, EXECUTION] = 16
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

    @property
    def least(self) -> int:
        """The same, where less text is held out than the default number of tokens (see `within`)."""
        return self.skip + max(self._given().values(), default=1)

    def within(self, held_out: int) -> "EvaluationConfig":
        """Return the same for so many held-out tokens, those that are skipped included: a number that is the default is
        lowered to them, any other stays.
        """
        room, given = held_out - self.skip, self._given()
        fitting = {name: room for name in FITTED if name not in given and getattr(self, name) > room}
        return self.model_copy(update=fitting) if fitting and room > 0 else self

    def _given(self) -> dict[str, int]:
        fields, values = type(self).model_fields, {name: getattr(self, name) for name in FITTED}
        return {name: value for name, value in values.items() if value != fields[name].default}


class RunConfig(Config):
    """A recipe: one SAE at one site of one model."""

    model: Annotated[ModelConfig, SHARED] = ModelConfig()
    site: SiteName
    """blocks.K.hook_resid_pre, attn.hook_z, hook_attn_out, hook_resid_mid, mlp_in, hook_mlp_out or hook_resid_post."""
    writes: SiteName | None = None
    """The site whose activation is reconstructed; unset: `site`, which is read. A transcoder writes a later one."""
    dictionary: Annotated[SerializeAsAny[DictionaryConfig], BeforeValidator(of_architecture)]
    objective: ObjectiveConfig
    """Unset, but for `sparsity` and `errors`, where phases have terms: that of the last."""
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(spelled_out)] = ()
    """Stretches of the training that differ in objective or learning rate, or a word for a list of them: `staged`
    (local, horizon, e2e+ds), `finetune` (local, then ½·(MSE + α·KL)), `horizon`. Unset: one, of `objective`."""
    data: Annotated[DataConfig, SHARED] = DataConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Seed = 0
    """Initialisation of the SAE."""
    init_from: Start | None = None
    """An SAE, by its path (a run folder will do), `hf://owner/name[@revision]/path` on the Hugging Face hub, or
    `release/sae_id` of SAELens's registry: training starts from it rather than from random weights. The optimiser and
    its schedule start from the beginning."""
    trackers: Annotated[tuple[str, ...], EXECUTION] = ()
    """Trackers that mirror the run folder: `wandb`, `tensorboard`, `trackio`, `mlflow`, or others that are
    installed. One that fails or hangs does not end the run."""
    out: Annotated[Path | None, EXECUTION] = None
    """Run folder; unset: runs/<a name made from the recipe>."""

    @classmethod
    def changed(cls, values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a recipe's values with each dotted key set; where that chooses another architecture, without the
        keys of the old one; where it says the dictionary's size in one way, without the other.
        """
        return super().changed(with_room_for(values, changes), changes)

    @property
    def place(self) -> str:
        """The site, or `<site> -> <writes>` where they are two."""
        return self.site if self.written == self.site else f"{self.site} -> {self.written}"

    @property
    def written(self) -> str:
        """The site that the reconstruction stands for."""
        return self.site if self.writes is None else self.writes

    @property
    def recipes(self) -> "list[RunConfig]":
        """Itself, as a recipe for several places has one for each."""
        return [self]

    @property
    def seeds(self) -> dict[str, int]:
        """Every seed that the run's numbers depend on, by purpose."""
        return {"initialisation": self.seed, "data": self.data.seed, "evaluation": self.evaluation.seed}

    @property
    def in_phases(self) -> "list[RunConfig]":
        """Each phase as a recipe of its own, with its objective and learning rate; of a training of one, itself."""
        if not self.phases:
            return [self]
        values, base = self.model_dump(exclude={"phases"}), given_values(self.objective)
        found: list[RunConfig] = []
        for phase in self.phases:
            rate = {"learning_rate": phase.learning_rate or self.training.learning_rate}
            own = {"objective": phase.objective_over(base), "training": values["training"] | rate}
            found.append(type(self).build({**values, **own}, "the recipe"))
        return found

    @property
    def objective_name(self) -> str:
        """Name of the objective, or of those of the phases in their order."""
        return "-then-".join(phase.objective.name for phase in self.in_phases)

    @model_validator(mode="before")
    @classmethod
    def _of_the_last_phase(cls, values: Any) -> Any:
        return with_objective(values)

    @model_validator(mode="after")
    def _penalty_as_needed(self) -> "RunConfig":
        """Leave out a coefficient that the dictionary cannot use, and ask for one that it needs."""
        architecture, sparsity = self.dictionary.architecture, self.objective.sparsity
        if self.dictionary.penalised and sparsity is None:
            raise ValueError(
                f"objective.sparsity.coefficient: a {architecture} dictionary needs it, λ of its penalty. Set it, or "
                "the L0 to steer it to: objective.sparsity.target_l0=20"
            )
        fixed = [name for name in self.dictionary.knobs if getattr(self.dictionary, name) is not None]
        if sparsity is not None and sparsity.target is not None and fixed:
            raise ValueError(
                f"objective.sparsity.{sparsity.target[0]} is {sparsity.target[1]:g} and dictionary.{fixed[0]} is "
                f"{getattr(self.dictionary, fixed[0]):g}, which sets how many features are active already: give one"
            )
        powerless = self.dictionary.penalised and not self.dictionary.powers
        if sparsity is not None and powerless and (sparsity.p != 1 or sparsity.p_end is not None):
            warnings.warn(
                "objective.sparsity.p and p_end are left out: the penalty of a "
                f"{architecture} dictionary is of its own kind.",
                stacklevel=2,
            )
            plain = self.objective.model_copy(
                update={"sparsity": sparsity.model_copy(update={"p": 1.0, "p_end": None})}
            )
            object.__setattr__(self, "objective", plain)
        if sparsity is not None and not self.dictionary.penalised:
            warnings.warn(
                f"objective.sparsity is left out: how many features of a {architecture} dictionary are active is set "
                "by the dictionary itself.",
                stacklevel=2,
            )
            object.__setattr__(self, "objective", self.objective.model_copy(update={"sparsity": None}))
        return self

    @model_validator(mode="after")
    def _no_copying(self) -> "RunConfig":
        if getattr(self.dictionary, "skip", False) and self.written == self.site:
            raise ValueError(
                f"dictionary.skip is true, but what is read is what is written, {self.site}: a linear path would copy "
                "it, and leave nothing to the features. Set writes to a later site, or dictionary.skip=false"
            )
        return self

    @model_validator(mode="after")
    def _norm_undone(self) -> "RunConfig":
        norm = getattr(self.dictionary, "normalize", "none")
        if norm in ("layer_norm", "constant_norm_rescale", "centred") and self.written != self.site:
            raise ValueError(
                f"dictionary.normalize is {norm}, which is undone at what is read, {self.site}, but {self.written} is "
                "written. Set dictionary.normalize to scalar or whitening, which fit both, or to none"
            )
        return self

    @model_validator(mode="after")
    def _one_pass(self) -> "RunConfig":
        if self.dictionary.batchwise and self.training.accumulation > 1:
            raise ValueError(
                f"training.accumulation is {self.training.accumulation}, but a {self.dictionary.architecture} "
                "dictionary chooses among all tokens of a step: set it to 1, and training.microbatch to bound memory"
            )
        return self

    @model_validator(mode="after")
    def _balanced_in_one_pass(self) -> "RunConfig":
        balance = self.objective.balance
        if balance is not None and self.training.accumulation > 1:
            raise ValueError(
                f"training.accumulation is {self.training.accumulation}, but objective.balance weighs terms by all "
                "tokens of a step: set it to 1, and training.microbatch to bound memory"
            )
        if balance is not None and getattr(self.dictionary, "resample_at", ()):
            raise ValueError(
                f"objective.balance is {balance}, whose weights are of whole steps, and dictionary.resample_at asks "
                "for the loss of each token. Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _exact_is_float32(self) -> "RunConfig":
        if self.training.precision == "exact" and self.model.dtype not in (None, "float32"):
            raise ValueError(
                f"training.precision exact needs model.dtype float32, given {self.model.dtype}; leave model.dtype "
                "unset, or set training.precision=mixed"
            )
        return self

    @model_validator(mode="after")
    def _each_phase_is_a_recipe(self) -> "RunConfig":
        refuse_shares(self.phases)
        try:
            refuse_two_units([phase.objective for phase in self.in_phases])
        except ConfigError as error:
            raise ValueError(f"in a phase: {' '.join(str(error).split())}") from None
        return self
