"""A frozen language model as endwise sees it: a clean pass that records, and a replay of the tail that splices.

Both run the model's own `forward` with hooks, so that masks, rotary tables, the final norm and everything else stay
the model's. Nothing is left behind in the model: hooks and overrides last for one call.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from endwise.adapters import refuse_adapted
from endwise.axes import Activation, Tokens
from endwise.digests import of_tensors
from endwise.errors import FormatError, ModelError, SiteError
from endwise.fused_gelu import fuse_gelu
from endwise.model_checks import find_unspliceable, refuse_lookahead, refuse_no_blocks, refuse_not_finite
from endwise.module_tree import Block, Branch, find_blocks, first_input, first_tensor, with_first
from endwise.plain_weights import refuse_quantised
from endwise.readout import Readout
from endwise.sites import Part, Site

PROBE_TOKENS = 8
Patch = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clean:
    """What the original model's pass recorded."""

    tokens: Tokens
    activations: dict[Site, Activation]
    """The sites asked for, and what a replay from them needs besides."""
    final: Activation | None
    """The hidden state that enters the unembedding."""

    def rows(self, rows: slice) -> "Clean":
        """The same for some of the sequences; nothing is copied."""
        activations = {site: value[rows] for site, value in self.activations.items()}
        return Clean(self.tokens[rows], activations, None if self.final is None else self.final[rows])


@dataclass(frozen=True)
class Spliced:
    """What a pass with reconstructions in place recorded."""

    activations: dict[Site, Activation]
    final: Activation | None


class _Stop(Exception):
    pass


class LanguageModel:
    """A causal language model of Hugging Face's, frozen, with named sites.

    Args:
        model: any `PreTrainedModel` with a language-modelling head; it is put into `eval()` and its weights frozen.
        tokenizer: needed only to read text.
        name: what run folders call it.
        no_tokenizer: what goes on from "it has no tokenizer because", where it has none.

    Raises:
        ModelError: it holds an adapter; its weights are quantised; its blocks cannot be found, or are none; it looks
            ahead; a pass gives NaN or infinity; or its logits are not what its unembedding makes of its last hidden
            state, so that predictions could not be compared from hidden states.
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
        self.model = model.eval().requires_grad_(False)
        fuse_gelu(self.model)
        self.tokenizer, self.no_tokenizer = tokenizer, no_tokenizer
        text_config: Any = model.config.get_text_config()
        unembedding = model.get_output_embeddings()
        if not isinstance(unembedding, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output embedding, so it is not a causal language model.")
        self._unembedding = unembedding
        self._blocks = find_blocks(model, getattr(text_config, "num_hidden_layers", None))
        self.vocab_size = int(unembedding.weight.shape[0])  # pyright: ignore[reportArgumentType, reportIndexIssue, reportAttributeAccessIssue]
        self.context: int | None = getattr(text_config, "max_position_embeddings", None) or None
        """Most positions; None: the configuration names no bound."""
        self.readout = _readout(unembedding, text_config)
        self._returns_tuple: dict[nn.Module, int | None] = {}
        self._widths: dict[Site, int] = {}
        self.unspliceable: dict[Site, str] = {}
        """Sites that have a value but cannot be spliced at, each with the reason (docs/sites.md)."""
        self._probe()
        self.stored: Callable[[], str] | None = None
        """The digest of the files that its weights were loaded from; None: they were not, or not by `load_model`."""
        self.commit: str | None = None
        """Of a model from the hub."""
        self._loaded = self._changes()

    @property
    def n_layers(self) -> int:
        return len(self._blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._widths[Site(0, Part.RESID_PRE)]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def in_bfloat16(self) -> "LanguageModel":
        """A copy with weights in bf16, for the tail in mixed precision; the original stays as it is."""
        copied = copy.deepcopy(self.model)
        stored = copied.state_dict().keys()
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            if name in stored and tensor.is_floating_point():  # not rotary tables and their like, which stay in fp32
                tensor.data = tensor.data.to(torch.bfloat16)
        return LanguageModel(copied, self.tokenizer, self.name, self.no_tokenizer)

    def weights_digest(self, like: object = None) -> str:
        """What tells the weights from others, after a word for what it was made of: `files` for a model as it was
        loaded, otherwise `tensors`, with their type. Only digests of one word can be compared.

        Args:
            like: an earlier digest, whose word is taken if it is `tensors` of this model's type.

        Raises:
            ModelError: the files are not there any more.
        """
        word = f"tensors-{self.dtype}:"
        if self.stored is None or (isinstance(like, str) and like.startswith(word)):
            return word + of_tensors(self.model.state_dict())
        if self._changes() != self._loaded:
            return f"files:changed since, {of_tensors(self.model.state_dict())}"
        try:
            return f"files:{self.stored()}"
        except (OSError, FormatError) as error:
            raise ModelError(f"The files that {self.name} was loaded from cannot be read again: {error}") from None

    def _changes(self) -> list[int]:
        """How often each weight was written to in place."""
        weights = (parameter for parameter in self.model.parameters() if not parameter.is_inference())
        return [weight._version for weight in weights]  # noqa: SLF001  Autograd's own counter.

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def sites(self) -> list[Site]:
        """Every site that an SAE can be spliced in at, in the order of computation."""
        return sorted(self._widths.keys() - self.unspliceable.keys())

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
        if site not in self._widths:
            parts = sorted({s.part for s in self._widths if s.layer == min(site.layer, self.n_layers - 1)})
            raise SiteError(
                f"{self.name} has no site {site.name}. It has blocks.0 to blocks.{self.n_layers - 1}, each with "
                f"{', '.join(parts)}. List them with: endwise sites {self.name}"
            )
        return site

    def width(self, site: str | Site) -> int:
        return self._widths[self.readable(site)]

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """The model's own logits, `[batch pos vocab]`."""
        return self.model(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def clean(self, tokens: Tokens, record: Collection[Site] = (), final: bool = False) -> Clean:
        """Runs the original model as far as needed: to the last recorded site, or, with `final`, to the unembedding."""
        wanted = {self.readable(site) for site in record}
        for site in record:
            wanted |= self._replay_needs(site)
        with ExitStack() as hooks:
            activations, final_state = self._recording(hooks, wanted, final)
            self._forward(tokens)
        return Clean(tokens, activations, final_state.get("final"))

    def replay(
        self, clean: Clean, patch: Mapping[Site, Patch], record: Collection[Site] = (), final: bool = True
    ) -> Spliced:
        """Runs the tail of the model from the first patched site on, with the patches in place.

        Args:
            clean: the clean pass of the same tokens, which recorded the first patched site; it may be that of the same
                model in another dtype.
            patch: the value to put at a site, or a function of the value found there; the first site's function is
                applied to the clean activation.
            record: later sites whose spliced activations to keep.
            final: whether to go on to the hidden state that enters the unembedding.

        The blocks before the first site do not run, nor the part of its block that came before it. Gradients flow to
        the patches and to nothing else.
        """
        first = min(self.site(site) for site in patch)
        missing = ({first} | self._replay_needs(first)) - clean.activations.keys()
        if missing:
            raise ModelError(f"A replay from {first} needs a clean pass that recorded it: clean(tokens, [{first}]).")
        skipped = [site.name for site in record if self.readable(site) < first]
        if skipped:
            raise ModelError(
                f"A replay from {first} does not compute {', '.join(skipped)}; read them from the clean pass."
            )
        value = patch[first]
        original = clean.activations[first]
        start = (value if isinstance(value, Tensor) else value(original)).to(self.dtype)
        with ExitStack() as hooks:
            self._enter_at(hooks, first, start, clean)
            for site, change in patch.items():
                if site != first:
                    self._patch(hooks, site, change)
            later = set(record) - {first}
            activations, final_state = self._recording(hooks, later, final)
            if later or final:
                self._forward(clean.tokens)
        kept = {first: start} if first in record else {}
        return Spliced(kept | activations, final_state.get("final"))

    @contextmanager
    def patched(self, patch: Mapping[Site, Patch]) -> Iterator[None]:
        """Within it, every forward pass of the model itself runs with the patches in place."""
        with ExitStack() as hooks:
            for site, change in patch.items():
                self._patch(hooks, self.site(site), change)
            yield

    def _forward(self, tokens: Tokens) -> None:
        try:
            self.model(input_ids=tokens, use_cache=False)
        except _Stop:
            return

    def _recording(
        self, hooks: ExitStack, sites: set[Site], final: bool
    ) -> tuple[dict[Site, Activation], dict[str, Activation]]:
        """Installs the hooks that fill the two records, and that end the pass when they are full."""
        activations: dict[Site, Activation] = {}
        final_state: dict[str, Activation] = {}

        for site in sites:
            self._on(hooks, site, partial(_keep, activations, site, None if final else len(sites)))
        at_unembedding = partial(_keep_final, final_state)
        hooks.enter_context(_removed(self._unembedding.register_forward_pre_hook(at_unembedding)))
        return activations, final_state

    def _on(self, hooks: ExitStack, site: Site, act: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `act` with the value at a site whenever a pass gets there; what it returns takes the value's place."""
        block = self._blocks[site.layer]
        if site.part is Part.RESID_PRE:
            handle = block.module.register_forward_pre_hook(partial(_before, act), with_kwargs=True)
        else:
            handle = self._source(site).register_forward_hook(partial(_after, act))
        hooks.enter_context(_removed(handle))

    def _source(self, site: Site) -> nn.Module:
        """The module whose output is the site's value."""
        block = self._blocks[site.layer]
        branch = {Part.ATTN_OUT: block.attention, Part.MLP_OUT: block.mlp}.get(site.part)
        return block.module if branch is None else branch.write

    def _patch(self, hooks: ExitStack, site: Site, change: Patch) -> None:
        self._on(hooks, site, partial(_changed, change))

    def _replay_needs(self, site: Site) -> set[Site]:
        """What besides its own value a replay from a site needs: what its block had computed before it."""
        needs = {
            Part.ATTN_OUT: (Part.RESID_PRE,),
            Part.MLP_OUT: (Part.RESID_PRE, Part.ATTN_OUT),
        }.get(site.part, ())
        return {Site(site.layer, part) for part in needs}

    def _enter_at(self, hooks: ExitStack, site: Site, value: Tensor, clean: Clean) -> None:
        skipped = site.layer + (site.part is Part.RESID_POST)
        entering = (
            value
            if site.part in (Part.RESID_PRE, Part.RESID_POST)
            else clean.activations[Site(site.layer, Part.RESID_PRE)].to(self.dtype)
        )
        if skipped == self.n_layers:  # nothing is left but the final norm
            skipped_blocks, last = self._blocks[:-1], self._blocks[-1]
            self._answer(hooks, last.module, entering)
        else:
            skipped_blocks = self._blocks[:skipped]
            self._on(hooks, Site(skipped, Part.RESID_PRE), lambda _: entering)
        for block in skipped_blocks:
            self._answer(hooks, block.module, None)
        block = self._blocks[site.layer]
        if site.part is Part.ATTN_OUT and block.attention is not None:
            self._answer_branch(hooks, block.attention, value)
        if site.part is Part.MLP_OUT and block.attention is not None and block.mlp is not None:
            attention = clean.activations[Site(site.layer, Part.ATTN_OUT)].to(self.dtype)
            self._answer_branch(hooks, block.attention, attention)
            self._answer_branch(hooks, block.mlp, value)

    def _answer_branch(self, hooks: ExitStack, branch: Branch, value: Tensor) -> None:
        for module in {branch.compute, branch.write}:
            self._answer(hooks, module, value)

    def _answer(self, hooks: ExitStack, module: nn.Module, value: Tensor | None) -> None:
        """For this call the module does not compute: it returns `value`, or its input, as its caller expects it."""
        own = module.__dict__.get("forward")  # accelerate, for one, puts a forward on the instance
        module.forward = partial(_answer_with, value, self._returns_tuple[module])
        if own is None:
            hooks.callback(module.__dict__.pop, "forward")
        else:
            hooks.callback(setattr, module, "forward", own)

    @torch.no_grad()
    def _probe(self) -> None:
        """A few short passes that check what `model_checks` asks for and the readout, and learn the sites, their widths
        and the modules' return types.
        """
        length = min(PROBE_TOKENS, self.context or PROBE_TOKENS)
        tokens = (torch.arange(length, device=self.device) * 7919 % self.vocab_size)[None]
        activations, final = self._learn(tokens)
        logits = self.logits(tokens)
        refuse_not_finite(self, activations, final, logits)
        self._check_readout(final, logits)
        for layer in range(self.n_layers):
            at = {part: activations.get(Site(layer, part)) for part in Part}
            parts = [Part.RESID_PRE, Part.RESID_POST]
            if _adds_up(at):
                parts += [Part.ATTN_OUT, Part.MLP_OUT]
            self._widths |= {Site(layer, part): int(at[part].shape[-1]) for part in parts if at[part] is not None}  # pyright: ignore[reportOptionalMemberAccess]
        if type(final) is not Tensor:  # it has a shape and no values: nothing to compare
            return
        refuse_lookahead(self, tokens, self.vocab_size)
        other = (tokens + 1) % self.vocab_size
        self.unspliceable = find_unspliceable(self, other, sorted(self._widths), Clean(tokens, activations, final))

    def _learn(self, tokens: Tokens) -> tuple[dict[Site, Activation], Activation]:
        """Every site's value in one pass, and the final state."""
        candidates = {Site(layer, part) for layer in range(self.n_layers) for part in self._parts(self._blocks[layer])}
        runs: Counter[nn.Module] = Counter()
        with ExitStack() as hooks:
            for block in self._blocks:
                for module in {
                    block.module,
                    *(m for branch in block.branches() for m in (branch.compute, branch.write)),
                }:
                    hooks.enter_context(_removed(module.register_forward_hook(partial(self._learn_return, runs))))
            activations, final_state = self._recording(hooks, candidates, True)
            self._forward(tokens)
        if "final" not in final_state or len(activations) < len(candidates):
            raise ModelError(f"{self.name}: a pass does not go through its blocks and its unembedding as expected.")
        kind, most = type(self._blocks[0].module).__name__, max(runs[block.module] for block in self._blocks)
        refuse_no_blocks(self, kind, most, tokens, activations)
        for layer, block in enumerate(self._blocks):
            if any(runs[module] != 1 for branch in block.branches() for module in (branch.compute, branch.write)):
                activations.pop(Site(layer, Part.ATTN_OUT), None)  # of several blocks, or several times in one
        return activations, final_state["final"]

    @staticmethod
    def _parts(block: Block) -> Iterator[Part]:
        yield from (Part.RESID_PRE, Part.RESID_POST)
        if block.attention is not None and block.mlp is not None:
            yield from (Part.ATTN_OUT, Part.MLP_OUT)

    def _learn_return(self, runs: Counter[nn.Module], module: nn.Module, _args: Any, output: Any) -> None:
        runs[module] += 1
        self._returns_tuple[module] = len(output) if isinstance(output, tuple) else None

    def _check_readout(self, final: Activation, logits: Tensor) -> None:
        ours, theirs = self.readout.logits(final), logits.float()
        tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
        if ours.shape != theirs.shape or not torch.allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
        ):
            raise ModelError(
                f"{self.name}: its logits are not the unembedding (with bias, scale and soft-cap of its config) of its "
                "last hidden state, so endwise cannot compare predictions from hidden states and refuses the model."
            )


def _adds_up(at: Mapping[Part, Tensor | None]) -> bool:
    """Whether resid_pre + attn_out + mlp_out = resid_post, to rounding."""
    pre, attention, mlp, post = (at[part] for part in (Part.RESID_PRE, Part.ATTN_OUT, Part.MLP_OUT, Part.RESID_POST))
    if pre is None or attention is None or mlp is None or post is None or not pre.shape == attention.shape == mlp.shape:
        return False
    gap = (pre.double() + attention.double() + mlp.double() - post.double()).abs().max()
    return bool(gap <= (1e-4 if post.dtype == torch.float32 else 3e-2) * post.double().abs().max())


def _readout(unembedding: nn.Module, config: Any) -> Readout:
    """Scale and soft-cap as the families that have them name them: Cohere, Granite, Gemma."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    weight: Any = unembedding.weight
    bias: Any = getattr(unembedding, "bias", None)
    return Readout(weight, bias, scale, None if softcap is None else float(softcap))


# Hooks are partials of functions, not closures: the tests' type checker decorates a closure again each time it is made.


def _keep(activations: dict[Site, Tensor], site: Site, enough: int | None, value: Tensor) -> None:
    """Records the value, and ends the pass when `enough` are recorded."""
    activations[site] = value
    if len(activations) == enough:
        raise _Stop


def _keep_final(final_state: dict[str, Activation], _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    final_state["final"] = arguments[0]
    raise _Stop


def _before(
    act: Callable[[Tensor], Tensor | None], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    changed = act(first_input(args, kwargs))
    if changed is None:
        return None
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


def _after(act: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: Any, output: Any) -> Any:
    changed = act(first_tensor(output))
    return None if changed is None else with_first(output, changed)


def _changed(change: Patch, value: Tensor) -> Tensor:
    """An SAE is fp32 whatever the model runs in; the model gets its own dtype back."""
    return (change if isinstance(change, Tensor) else change(value)).to(value.dtype)


def _answer_with(value: Tensor | None, size: int | None, *args: Any, **kwargs: Any) -> Any:
    result = value if value is not None else first_input(args, kwargs)
    return result if size is None else (result, *[None] * (size - 1))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
