"""Continuations of a prompt by the model as it is and with features edited, and how far its predictions move."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from endwise.common.axes import TokenMask, Tokens
from endwise.common.errors import ConfigError, ModelError
from endwise.common.files import expanded
from endwise.common.text import storable
from endwise.config.run import DataConfig
from endwise.dictionaries import SAE
from endwise.evaluation.adopting import Belonging, model_for
from endwise.evaluation.finished import load_sae
from endwise.evaluation.inspecting import belonging, inspect, text_for
from endwise.evaluation.provenance import model_of
from endwise.features.harvest.results import Harvest, open_harvest, read_harvest
from endwise.features.harvest.top_tokens import written_text
from endwise.features.intervening import Intervention, intervene
from endwise.models.language_model import LanguageModel
from endwise.models.positions import Positions, refuse_positions
from endwise.models.sites import Place, Site
from endwise.runs.folder import RunFolder
from endwise.tokens.encoding import text_ids


@dataclass(frozen=True)
class Opened:
    """A finished SAE, ready to be used in its model."""

    model: LanguageModel
    place: Place
    sae: SAE
    data: DataConfig
    """Settings by which sequences begin, as in training: with BOS or not, and whether position 0 counts."""
    harvest: Harvest | None = None


def opened(path: str | Path, *, model: str | LanguageModel | None = None, site: str | None = None) -> Opened:
    """Open a run, or an SAE in any format.

    Args:
        model: of an SAE that is no run; None: the one that its file names.
        site: of such an SAE its place; None: the one that its file names.

    Raises:
        ConfigError: a place or model is given for a run, or missing for another SAE.
        EndwiseError: it cannot be read, or its model cannot be loaded.
    """
    path = expanded(path)
    if not RunFolder(path).has_run():
        found = inspect(path)
        _, own = model_for(found, Belonging(model=model))
        place, stored = belonging(found, own, site)
        return Opened(own, place, SAE.of(stored, own.device), text_for(found, own, "embedded")[0])
    if isinstance(model, str) or site is not None:
        raise ConfigError(f"{path} is a run, whose recipe says its model and its site. Leave --model and --site out.")
    config = RunFolder.config_of_trained(path)
    own = model_of({path: config}, model)
    harvest = None if read_harvest(path) is None else open_harvest(path)
    return Opened(own, own.place(config.place), load_sae(path, config, own), config.data, harvest)


@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are drawn, one after the other.

    Raises:
        ConfigError: there are none to draw, or the temperature is no number from 0 up.
    """

    tokens: int = 40
    temperature: float | int = 0.0
    """0: the likeliest token each time."""
    seed: int = 0
    """Shared by both texts."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"A text is continued by 1 token or more; given {self.tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"A temperature is a number from 0 up; given {self.temperature}.")

    def generate(self, model: LanguageModel, prompt: Tokens) -> list[int]:
        """Return the tokens that follow a prompt, `[1 pos]`, up to EOS."""
        own: Any = model.model.generation_config
        drawn: dict[str, Any] = {"do_sample": self.temperature > 0, "repetition_penalty": 1.0}
        drawn |= {"temperature": float(self.temperature), "top_k": 0, "top_p": 1.0} if self.temperature > 0 else {}
        ends = own.eos_token_id
        pad = own.pad_token_id if own.pad_token_id is not None else ends[0] if isinstance(ends, list) else ends
        config = GenerationConfig(max_new_tokens=self.tokens, eos_token_id=ends, pad_token_id=pad or 0, **drawn)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            generate: Any = model.model.generate
            made = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        return made[0, prompt.shape[1] :].tolist()


@dataclass(frozen=True)
class Steered:
    """A prompt's continuations, and the KL divergence of what the model predicts next."""

    prompt: Sequence[str]
    """Token by token; joined, they are the text, BOS included."""
    clean: Sequence[str]
    """Continuation by the model as it is."""
    steered: Sequence[str]
    """Continuation with its features edited."""
    kls: Sequence[float] = field(repr=False)
    """KL(clean ‖ steered) of the next-token distributions in nats, after each token of the prompt and of the clean
    continuation but for its last: both models read that text."""

    @property
    def kl(self) -> float:
        """Mean over the predictions of the clean continuation's tokens, the first of which follows the prompt."""
        return math.fsum(self.kls[-len(self.clean) :]) / len(self.clean)

    @property
    def kl_in_prompt(self) -> float | None:
        """Mean over the predictions of the prompt's tokens, less its first; None: it has but one."""
        inside = self.kls[: -len(self.clean)]
        return math.fsum(inside) / len(inside) if inside else None

    def to_json(self) -> dict[str, Any]:
        texts = {name: "".join(getattr(self, name)) for name in ("prompt", "clean", "steered")}
        by_token = {f"{name}_tokens": list(getattr(self, name)) for name in texts}
        return {**texts, "kl": self.kl, "kl_in_prompt": self.kl_in_prompt, "kls": list(self.kls), **by_token}


@torch.no_grad()
def steer(
    model: LanguageModel,
    saes: Mapping[str | Site | Place, SAE],
    interventions: Sequence[Intervention],
    prompt: str,
    *,
    data: DataConfig | None = None,
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "all",
    sampling: Sampling | None = None,
) -> Steered:
    """Continue a prompt twice, with and without interventions (`intervene`).

    Args:
        data: settings by which sequences begin; what training left out (BOS, position 0 or special tokens on request)
            is not changed, unless a slice of positions names it.

    Raises:
        ConfigError: see `intervene`; or the prompt is empty, or too long for the model.
        ModelError: see `intervene`; or the edited model predicts NaN.
    """
    data, sampling = data or DataConfig(), sampling or Sampling()
    refuse_positions(positions)
    most = None if model.context is None else model.context - sampling.tokens
    tokens, counts = typed_tokens(model, prompt, data, most)
    where = _absolute(positions, tokens.shape[1], int(not counts[0, 0]))
    own = sampling.generate(model, tokens)
    text = torch.cat([tokens, torch.tensor([own], device=tokens.device)], 1)
    clean = model.clean(text, final=True).final
    specials = data.leave_out_special
    with intervene(model, saes, interventions, error=error, positions=where, skip_special_tokens=specials):
        moved = model.clean(text, final=True).final
        changed = sampling.generate(model, tokens)
    assert clean is not None and moved is not None
    kls = model.readout.compare(clean, [moved], text, torch.ones_like(text, dtype=torch.bool))[0].kl[0, :-1]
    if not kls.isfinite().all():
        raise ModelError("The edited model predicts NaN: the change is too large for it. Give less.")
    prompt_texts, clean_texts, steered_texts = (
        written_text(model, each) for each in (tokens[0].tolist(), own, changed)
    )
    return Steered(prompt_texts, clean_texts, steered_texts, kls.tolist())


def typed_tokens(
    model: LanguageModel, text: str, data: DataConfig, most: int | None = None
) -> tuple[Tokens, TokenMask]:
    """Return a text that someone typed as one sequence, begun as in training, and what of it counts.

    Args:
        most: tokens that it may have, BOS included; None: any number.

    Raises:
        ConfigError: it has no token or too many, or the model has no tokenizer.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"This model cannot read text: it has no tokenizer because {model.no_tokenizer}")
    (ids,) = text_ids(tokenizer, [storable(text)], data.special_tokens)
    if not ids:
        raise ConfigError("The text is empty. Type a word or more.")
    bos = [tokenizer.bos_token_id] if data.prepend_bos else []
    if most is not None and len(ids) > most - len(bos):
        raise ConfigError(f"The text has {len(ids):,} tokens, more than {max(0, most - len(bos)):,}. Shorten it.")
    tokens = torch.tensor([[*bos, *ids]], device=model.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, : len(bos)] = False
    if data.mask_first_position:
        mask[:, 0] = False
    return tokens, mask


def _absolute(positions: Positions, prompt: int, first: int) -> slice:
    """Return the same positions of a text that begins with a prompt, whichever pass it comes in.

    Args:
        first: the first position that counts.
    """
    if isinstance(positions, slice):
        start, stop = (
            end if end is None or end >= 0 else max(0, end + prompt) for end in (positions.start, positions.stop)
        )
        return slice(start, stop, positions.step)
    return {
        "all": slice(first, None),
        "prompt": slice(first, prompt),
        "last": slice(prompt - 1, prompt),
        "generated": slice(prompt, None),
    }[positions]
