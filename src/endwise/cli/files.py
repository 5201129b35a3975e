"""Commands for files of SAEs, of whatever format."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from endwise.cli.adopted import MODEL
from endwise.cli.app import command, echo

NAMES = "a path (a run folder will do), hf://owner/name[@revision]/path, or release/sae_id of SAELens's registry"


@command
def inspect(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    model: Annotated[
        str | None, Option(help="Measure it on this model: embedded, a local folder, or a Hugging Face hub id.")
    ] = None,
    data: Annotated[str, Option(help="Text to measure it on, as data.source of a recipe.")] = "embedded",
    tokens: Annotated[int, Option(min=1, help="Held-out tokens to measure it on.")] = 16_384,
    context: Annotated[int | None, Option(min=1, help="Tokens per sequence; unset: as it was trained.")] = None,
    site: Annotated[str | None, Option(help="The place, where the file says none: blocks.3.hook_resid_pre")] = None,
) -> None:
    """Say what an SAE's file holds: format, kind, place, and the rule by which it is read; with --model, measure it.

    Exit code: 0 if it is read, 6 if it is not, or is far from what it states.
    """
    from endwise.evaluation.inspecting import inspect as look
    from endwise.evaluation.inspecting import measured, text_for, verdict

    found = look(path)
    for line in found.lines():
        echo(line)
    if model is None:
        return
    from endwise.models.loading import load_model

    loaded = load_model(model)
    text, remark = text_for(found, loaded, data, context)
    if remark is not None:
        echo(f"! {remark}")
    result = measured(found, loaded, text, tokens, site)
    bounds = result.baselines
    echo(
        f"measured on {result.tokens:,} tokens at {result.place} of {model}: L0 {result['l0']:.1f}, explained variance "
        f"{result['explained_variance.pooled']:.4f}, CE {bounds.clean:.4f} nats clean, {result['ce_spliced']:.4f} with "
        f"it ({result['ce_increase']:+.4f}), {bounds.mean_ablated:.4f} with the site at its mean"
    )
    for line in verdict(found, result):
        echo(f"! {line}")


@command
def adopt(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    out: Annotated[Path, Option(help="The run folder to make; nothing may be there yet.")],
    model: Annotated[str | None, Option(help=MODEL)] = None,
    data: Annotated[str | None, Option(help="Text to measure it on, as data.source of a recipe.")] = None,
    site: Annotated[str | None, Option(help="The place, where the file says none: blocks.3.hook_resid_pre")] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="Held-out tokens to measure it on; unset: 500,000 at most.")
    ] = None,
    context: Annotated[int | None, Option(min=1, help="Tokens per sequence; unset: as it was trained.")] = None,
    name: Annotated[str | None, Option(help="What tables and legends call it; unset: the end of its path.")] = None,
) -> None:
    """Make a run folder of a finished SAE of anybody's, which all commands read that read runs."""
    from endwise.evaluation.adopting import adopt as run

    run(path, model=model, data=data, site=site, out=out, context=context, tokens=tokens, name=name)
    echo(f"Next: endwise evaluate {shlex.quote(str(out))}")


@command
def convert(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    target: Annotated[Path, Argument(help="Folder or file to write; there must be no SAE yet.")],
    to: Annotated[str, Option("--to", metavar="FORMAT", help="saelens, sparsify, dictionary_learning, ...")],
) -> None:
    """Write an SAE in another format, read it back, and compare both."""
    from endwise.common.files import check_can_write
    from endwise.common.hub import shown
    from endwise.evaluation.inspecting import convert as run

    check_can_write(target.parent)
    apart = run(path, target, to)
    echo(f"{target}: {to}, latents and outputs within {apart:.1e} of those of {shown(path)}")
