"""Remarks that a reader of measured numbers needs before believing them, each with its remedy.

Every remark is computed here, from the record that was measured (`evaluation.json`, or as much of it as there is), and
shown wherever its numbers are: on the terminal, in tables, in JSON and on every page.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console

from endwise.common.terminal import show
from endwise.common.text import printable

ROUNDING = 1e-3
"""Nats per token that are no difference."""
FAR_BELOW = -1.0
"""An explained variance under this: the error is more than twice what the site's mean would leave."""
FAR = 1.5
"""Factor between a measured and a stated L0 that is reported. On other text than it was trained on, the L0 of an SAE
that is read rightly changes by less."""
ENOUGH = 0.95
"""Share of the held-out tokens asked for: whole sequences and masked first positions leave out less than the rest."""
DIVERGED = 2.0
"""Multiple of its first loss that a run may end with."""
SPARSER = "objective.sparsity.coefficient (a dictionary.k: the other way)"
"""Setting that makes fewer features active, the more of it there is."""
MANY_LEFT_OUT = 0.05
"""Share of the tokens that count otherwise: more than attention sinks are."""
FEWER_LEFT_OUT = (
    "Attention sinks are few; so many positions mean that norms at this site are spread out. Raise "
    "data.leave_out_norms, or unset it."
)

Record = Mapping[str, Any]


def remarks_on(record: Record) -> list[str]:
    """List what in a record cannot be, or is not what was asked for; empty where nothing is known against it.

    Args:
        record: as `evaluation.json`; what it lacks (an older one has fewer keys) is not judged.
    """
    return [remark for rule in _RULES if (remark := rule(record)) is not None]


def gathered(remarks: Mapping[str, Iterable[str]]) -> list[str]:
    """List each of several runs' remarks once, with the names of its runs in front."""
    names: dict[str, list[str]] = {}
    for name, own in remarks.items():
        for remark in own:
            names.setdefault(remark, []).append(name)
    return [f"{', '.join(runs)}: {remark}" for remark, runs in names.items()]


def _number(record: Record, *keys: str) -> float:
    """NaN where there is none, which is neither above nor below anything."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _remedy(record: Record, training: str) -> str:
    """Advise on an SAE by how it could be trained; on one that was trained elsewhere, by where it may belong."""
    return "Check that it belongs to this model, place and text." if "adopted" in record else training


def _foreign_text(record: Record) -> str | None:
    clean, mean, zero = (_number(record, "baselines", name) for name in ("clean", "mean_ablated", "zero_ablated"))
    vocabulary = _number(record, "vocabulary")
    guess = math.log(vocabulary) if vocabulary > 0 else math.nan
    remedy = (
        "The text is not this model's, so that no number here means anything: give text, or ids that this model's "
        "own tokenizer made (data.source), and check model.name."
    )
    if clean > guess + ROUNDING:
        return (
            f"The model's own CE is {clean:.3f} nats per token, above ln V = {guess:.3f}, which guessing among its "
            f"{vocabulary:,.0f} tokens gives. {remedy}"
        )
    ablated = min((value for value in (mean, zero) if not math.isnan(value)), default=math.nan)
    if clean > ablated + ROUNDING:
        where = "its mean" if ablated == mean else "zero"
        found = f"The model's own CE is {clean:.3f} nats per token, but {ablated:.3f} with the site at {where}."
        return f"{found} {remedy}"
    return None


def _left_out_bos(record: Record) -> str | None:
    token = record.get("bos_left_out")
    if not isinstance(token, str):
        return None
    return (
        f"The model's tokenizer begins every text with {printable(token)}, and these sequences do not begin with it: "
        "the model was most likely trained with it. Set data.prepend_bos=true and train again; "
        "if that raises its CE, it knows the token only before whole documents: set data.packing=document as well."
    )


def _few_tokens(record: Record) -> str | None:
    tokens, asked = _number(record, "tokens"), _number(record, "asked_tokens")
    if not tokens < ENOUGH * asked:
        return None
    return (
        f"Measured on {tokens:,.0f} held-out tokens of the {asked:,.0f} asked for: padding and masked positions do not "
        f"count. Set evaluation.tokens to {math.ceil(asked * asked / max(tokens, 1)):,}, or data.packing=stream."
    )


def _many_left_out(record: Record) -> str | None:
    share = _number(record, "left_out")
    if not share > MANY_LEFT_OUT:
        return None
    return f"{share:.1%} of the held-out tokens are left out for their norm. {FEWER_LEFT_OUT}"


def _alive(record: Record) -> str | None:
    alive, features, tokens = (_number(record, name) for name in ("alive", "d_sae", "tokens"))
    if alive == 0 or _number(record, "l0") == 0:
        return "No feature fires: the SAE gives one constant, whatever it reads. " + _remedy(
            record, f"Train again with a lower training.learning_rate or {SPARSER}."
        )
    if alive == features:
        return (
            f"All {features:,.0f} features fired within {tokens:,.0f} tokens: the dictionary may be too small, or "
            f"hardly trained. {_remedy(record, f'Raise dictionary.size or training.tokens, or {SPARSER}.')}"
        )
    return None


def _far_off(record: Record) -> str | None:
    explained = _number(record, "explained_variance", "per_token")
    if not explained < FAR_BELOW:
        return None
    return (
        f"The explained variance is {explained:.3g}, far below 0: the site's mean is nearer to the activations than "
        "the reconstructions are. If that is not meant (end-to-end terms alone do not ask for it), lower "
        "training.learning_rate, train longer, or check that the SAE belongs to this model and site."
    )


def _worse_than_nothing(record: Record) -> str | None:
    spliced, mean = _number(record, "ce_spliced"), _number(record, "baselines", "mean_ablated")
    if not spliced > mean + ROUNDING:
        return None
    return (
        f"With the SAE the model's CE is {spliced:.3f} nats per token, above the {mean:.3f} with the site at its mean: "
        "it keeps nothing that the model uses. "
        + _remedy(record, f"Lower training.learning_rate or {SPARSER}, or train longer.")
    )


def not_as_stated(record: Record) -> str | None:
    """The remark on an SAE whose L0 is far from what its file states."""
    l0, stated = _number(record, "l0"), _number(record, "adopted", "stated_l0")
    if not stated > 0 or math.isnan(l0) or 1 / FAR < l0 / stated < FAR:
        return None
    return f"L0 is {l0:.1f} where {stated:g} is stated: the text or the reading may differ."


def _on_adoption(record: Record) -> str | None:
    adopted = record.get("adopted")
    remarks = adopted.get("remarks") if isinstance(adopted, Mapping) else None
    return " ".join(map(str, remarks)) if isinstance(remarks, list) and remarks else None


def diverged(record: Record) -> str | None:
    """The remark on a training that ended with a higher loss than it began with."""
    first, last = _number(record, "loss", "first"), _number(record, "loss", "last")
    if not last > DIVERGED * first:
        return None
    return (
        f"Training diverged: its loss ended at {last:.4g}, after starting at {first:.4g}. Train again with a lower "
        "training.learning_rate or training.gradient_clip."
    )


_RULES: tuple[Callable[[Record], str | None], ...] = (
    _on_adoption,
    _foreign_text,
    _left_out_bos,
    _few_tokens,
    _many_left_out,
    diverged,
    not_as_stated,
    _worse_than_nothing,
    _alive,
    _far_off,
)


def show_remarks(remarks: Iterable[str], console: Console | None = None) -> None:
    for remark in remarks:
        show(f"! {remark}", console)
