"""A frozen language model as endwise sees it: a clean pass that records, and a replay of the tail that splices.

Both run the model's own `forward` with hooks, so that masks, rotary tables, the final norm and everything else stay
the model's. Nothing is left behind in the model: hooks and overrides last for one call.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from endwise.common.axes import Activation, AnyWidth, Tokens
from endwise.common.digests import of_tensors
from endwise.common.errors import FormatError, ModelError, SiteError
from endwise.models.adapters import refuse_adapted
from endwise.models.blocks import find_blocks, first_input, with_first_input
from endwise.models.checks import refuse_no_gradients
from endwise.models.documents import positions, refuse_joined
from endwise.models.fused_gelu import fuse_gelu
from endwise.models.hooking import SiteHooks, Stop, needed, removed
from endwise.models.passes import Clean, Patch, Spliced
from endwise.models.plain_weights import is_quantised, keep_differentiable, refuse_copying, refuse_quantised
from endwise.models.probing import Known, probe
from endwise.models.readout import Readout
from endwise.models.sharding import shares
from endwise.models.shown_model import ShownModel
from endwise.models.sites import Part, Place, Site, SomeSites, each_of

PROBE_TOKENS = 8
SAME_BIAS = 1e-4
"""Difference of a bias among positions, as a share of its largest value, that is rounding."""


class LanguageModel(ShownModel):
    """A causal language model of Hugging Face's, frozen, with named sites.

    Args:
        model: any `PreTrainedModel` with a language-modelling head; it is put into `eval()` and its weights frozen.
        tokenizer: needed only to read text.
        name: what run folders call it.
        no_tokenizer: what completes "it has no tokenizer because", where it has none.

    Raises:
        ModelError: it holds an adapter; its weights are quantised, but not by a quantiser of transformers' that
            gradients go through; its blocks cannot be found, or are none; it looks ahead; a pass gives NaN or infinity;
            or its logits are not what its unembedding makes of its last hidden state, so that predictions could not be
            compared from hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        no_tokenizer: str = "LanguageModel was given none.",
    ) -> None:
        self.name = name or model.config.name_or_path or type(model).__name__
        refuse_adapted(model, self.name)
        refuse_quantised(model, self.name)
        keep_differentiable(model)
        self.model = model.eval().requires_grad_(False)
        fuse_gelu(self.model)
        self.tokenizer, self.no_tokenizer = tokenizer, no_tokenizer
        text_config: Any = model.config.get_text_config()
        unembedding = model.get_output_embeddings()
        if not isinstance(unembedding, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output embedding, so it is not a causal language model.")
        self._unembedding = unembedding
        self._blocks = find_blocks(model, getattr(text_config, "num_hidden_layers", None))
        self.vocab_size = int(unembedding.weight.shape[0])  # type: ignore[pyrefly:bad-index]
        self.context: int | None = getattr(text_config, "max_position_embeddings", None) or None
        """Most positions; None: the configuration names no bound."""
        self.readout = _readout(unembedding, text_config)
        self._known = Known()
        self._sites = SiteHooks(self._blocks, self._known.returns)
        self._separator: int | None = None
        length = min(PROBE_TOKENS, self.context or PROBE_TOKENS)
        tokens = (torch.arange(length, device=self.device) * 7919 % self.vocab_size)[None]
        probe(self, tokens, self._blocks, unembedding, self._known)
        if is_quantised(model):
            refuse_no_gradients(self, tokens)
        self.stored: Callable[[], str] | None = None
        """The digest of the files that its weights were loaded from; None: they were not, or not by `load_model`."""
        self.commit: str | None = None
        """Commit of a model from the hub."""
        self._loaded = self._changes()

    @property
    def n_layers(self) -> int:
        return len(self._blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._known.widths[Site(0, Part.RESID_PRE)]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def in_bfloat16(self) -> "LanguageModel":
        """A copy with weights in bf16, for the tail in mixed precision; the original stays as it is. A quantised model
        has none (`ModelError`).
        """
        refuse_copying(self.model, self.name)
        made = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer, id(self.stored): None})
        kept = made.model.state_dict().keys()
        for name, tensor in (*made.model.named_parameters(), *made.model.named_buffers()):
            if name in kept and tensor.is_floating_point():  # not rotary tables and their like, which stay in fp32
                tensor.data = tensor.data.to(torch.bfloat16)
        unembedding: Any = made.model.get_output_embeddings()
        made.readout = _readout(unembedding, made.model.config.get_text_config())
        made.commit, made._loaded = None, made._changes()  # noqa: SLF001  Its own.
        return made

    def attend_within(self, separator: int | None) -> None:
        """Have every later pass keep documents of one sequence apart: attention stops at the joints, and positions
        start at 0 there. Other passes of the Hugging Face model, as in `endwise.spliced`, are its own.

        Args:
            separator: id of the token that ends a document; None: attention goes across, as the model's own does.

        Raises:
            ModelError: the model cannot (a state space, say), which a short pass finds out.
        """
        if separator == self._separator:
            return
        before, self._separator = self._separator, separator
        try:
            if separator is not None:
                refuse_joined(self, separator, 3 * PROBE_TOKENS)
        except ModelError:
            self._separator = before
            raise

    def weights_digest(self, like: object = None) -> str:
        """Digest the weights, after a word for what it was made of: `files` for a model as it was
        loaded, otherwise `tensors`, with their type. Only digests of one word can be compared.

        Args:
            like: an earlier digest, whose word is taken if it is `tensors` of this model's type.

        Raises:
            ModelError: the files are not there any more.
        """
        parts = shares(self.model)  # one process has no more than its own
        word = f"tensors-{self.dtype}:" if parts == 1 else f"tensors-{self.dtype}-first-of-{parts}:"
        if self.stored is None or (isinstance(like, str) and like.startswith(word)):
            return word + of_tensors(self.model.state_dict())
        if self._changes() != self._loaded:
            return f"files:changed since, {of_tensors(self.model.state_dict())}"
        try:
            return f"files:{self.stored()}"
        except (OSError, FormatError) as error:
            raise ModelError(f"The files that {self.name} was loaded from cannot be read again: {error}") from None

    def _changes(self) -> list[int]:
        """Count how often each weight was written to in place."""
        weights = (parameter for parameter in self.model.parameters() if not parameter.is_inference())
        return [weight._version for weight in weights]  # noqa: SLF001  Autograd's own counter.

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def unspliceable(self) -> dict[Site, str]:
        """Sites that have a value but cannot be spliced at, each with the reason (docs/sites.md)."""
        return self._known.unspliceable

    def sites(self) -> list[Site]:
        """Every site that an SAE can be spliced in at, in the order of computation."""
        return sorted(self._known.widths.keys() - self.unspliceable.keys())

    def site(self, name: str | Site) -> Site:
        """
        Raises:
            SiteError: the model has no such site, or no SAE can be spliced in there; the message lists those it has.
        """
        site = self.readable(name)
        if site in self.unspliceable:
            raise SiteError(
                f"{self.name} cannot be spliced at {site.name}: {self.unspliceable[site]} Sites that can: "
                f"{', '.join(each.name for each in self.sites()[:4])}, ... (endwise sites {self.name})."
            )
        return site

    def readable(self, name: str | Site) -> Site:
        """A site whose value can be recorded, which is more than those of `sites` where the model's blocks share more
        than the residual stream.

        Raises:
            SiteError: the model has no such site; the message lists those it has.
        """
        site = Site.parse(name) if isinstance(name, str) else name
        if site not in self._known.widths:
            parts = sorted({s.part for s in self._known.widths if s.layer == min(site.layer, self.n_layers - 1)})
            why = f": {self._known.absent[site]}" if site in self._known.absent else "."
            raise SiteError(
                f"{self.name} has no site {site.name}{why} It has blocks.0 to blocks.{self.n_layers - 1}, each with "
                f"{', '.join(parts)}. List them with: endwise sites {self.name}"
            )
        return site

    def place(self, name: str | Site | Place) -> Place:
        """Return the place of that name, or an SAE's at the site.

        Raises:
            SiteError: the model has no such site, cannot be spliced where the place writes, or computes that before
                what the place reads.
        """
        place = Place.parse(name) if isinstance(name, str) else Place.of(name)
        self.site(place.writes)
        self.readable(place.reads)
        return place

    def width(self, site: str | Site) -> int:
        return self._known.widths[self.readable(site)]

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """The model's own logits, `[batch pos vocab]`."""
        return self.model(**self._inputs(tokens)).logits

    @torch.no_grad()
    def value_bias(self, layer: int) -> Float[Tensor, " width"]:
        """Return what a block's value biases add to its heads' results, as `attn.hook_z` has them (a bias that several
        heads share is repeated): what these are where attention reads zeros, since each head's weights add up to 1.

        Raises:
            ModelError: the heads' results differ among positions then, so that they are no bias.
        """
        attention, site = self._blocks[layer].attention, self.readable(Site(layer, Part.ATTN_Z))
        assert attention is not None

        def reading_zeros(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_first_input(args, kwargs, torch.zeros_like(first_input(args, kwargs)))

        with removed(attention.compute.register_forward_pre_hook(reading_zeros, with_kwargs=True)):
            tokens = torch.arange(min(PROBE_TOKENS, self.context or PROBE_TOKENS), device=self.device)[None]
            found = self.clean(tokens % self.vocab_size, [site]).activations[site][0].float()
        bias = found[0]
        if float((found - bias).abs().max()) > SAME_BIAS * float(bias.abs().max()):
            raise ModelError(f"{self.name}: the heads of block {layer} have no value bias that is the same everywhere.")
        return bias

    @torch.no_grad()
    def clean(self, tokens: Tokens, record: SomeSites = (), final: bool = False) -> Clean:
        """Run the original model as far as needed: to the last recorded site, or, with `final`, to the unembedding."""
        wanted = {self.readable(site) for site in each_of(record)}
        wanted = wanted.union(*map(needed, wanted))
        with ExitStack() as hooks:
            activations, final_state = self._recording(hooks, wanted, final)
            self._forward(tokens)
        return Clean(tokens, activations, final_state.get("final"))

    def replay(self, clean: Clean, patch: Mapping[Any, Patch], record: SomeSites = (), final: bool = True) -> Spliced:
        """Run the tail of the model from the first patched site on, with the patches in place.

        Args:
            clean: the clean pass of the same tokens, which recorded the first patched site; it may be that of the same
                model in another dtype.
            patch: by site, or its name, the value to put there, or a function of the value found there; the first
                site's function is applied to the clean activation.
            record: later sites whose spliced activations to keep.
            final: whether to continue to the hidden state that enters the unembedding.

        The blocks before the first site do not run, nor the part of its block that came before it. Gradients flow to
        the patches and to nothing else.
        """
        patch = {self.site(at): change for at, change in patch.items()}
        wanted = {self.readable(at) for at in each_of(record)}
        first = min(patch)
        missing = ({first} | needed(first)) - clean.activations.keys()
        if missing:
            raise ModelError(f"A replay from {first} needs a clean pass that recorded it: clean(tokens, [{first}]).")
        skipped = [site.name for site in sorted(wanted) if site < first]
        if skipped:
            raise ModelError(
                f"A replay from {first} does not compute {', '.join(skipped)}; read them from the clean pass."
            )
        value = patch[first]
        original = clean.activations[first]
        start = (value if isinstance(value, Tensor) else value(original)).to(self.dtype)
        with ExitStack() as hooks:
            self._sites.enter_at(hooks, first, start, clean.activations, self.dtype)
            for site, change in patch.items():
                if site != first:
                    self._sites.patch(hooks, site, change)
            later = wanted - {first}
            activations, final_state = self._recording(hooks, later, final)
            if later or final:
                self._forward(clean.tokens)
        kept = {first: start} if first in wanted else {}
        return Spliced(kept | activations, final_state.get("final"))

    @contextmanager
    def patched(self, patch: Mapping[Any, Patch]) -> Iterator[None]:
        """Context in which every forward pass of the model itself runs with the patches in place."""
        with ExitStack() as hooks:
            for site, change in patch.items():
                self._sites.patch(hooks, self.site(site), change)
            yield

    def _inputs(self, tokens: Tokens) -> dict[str, Any]:
        own = {} if self._separator is None else {"position_ids": positions(tokens, self._separator)}
        return {"input_ids": tokens, "use_cache": False, **own}

    def _forward(self, tokens: Tokens) -> None:
        with self._sites.running():
            self.model(**self._inputs(tokens))

    def _recording(
        self, hooks: ExitStack, sites: set[Site], final: bool
    ) -> tuple[dict[Site, AnyWidth], dict[str, Activation]]:
        """Install the hooks that fill the two records, and that end the pass when they are full."""
        activations: dict[Site, AnyWidth] = {}
        final_state: dict[str, Activation] = {}

        def keep(site: Site, value: Tensor) -> None:
            activations[site] = value
            if len(activations) == len(sites) and not final:
                raise Stop

        def keep_final(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            final_state["final"] = arguments[0]
            raise Stop

        for site in sites:
            self._sites.on(hooks, site, partial(keep, site))
        hooks.enter_context(removed(self._unembedding.register_forward_pre_hook(keep_final)))
        return activations, final_state


def _readout(unembedding: nn.Module, config: Any) -> Readout:
    """Scale and soft-cap as the families that have them name them: Cohere, Granite, Gemma, RecurrentGemma."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    weight: Any = unembedding.weight
    bias: Any = getattr(unembedding, "bias", None)
    return Readout(weight, bias, scale, None if softcap is None else float(softcap))
