"""Commands for files of SAEs, of whatever format."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from endwise.cli.adopted import MODEL
from endwise.cli.app import Json, Overrides, Quiet, command, echo, print_json, report, status
from endwise.cli.overriding import on_device
from endwise.common.text import minus

NAMES = "a path (or a run folder), hf://owner/name[@revision]/path, or release/sae_id of SAELens's registry"


@command
@on_device
def inspect(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    model: Annotated[
        str | None, Option(help="Measure it on this model: embedded, a local folder, or a Hugging Face hub id.")
    ] = None,
    data: Annotated[str, Option(help="Text to measure it on, as data.source of a recipe.")] = "embedded",
    tokens: Annotated[int, Option(min=1, help="Held-out tokens to measure it on.")] = 16_384,
    context: Annotated[int | None, Option(min=1, help="Tokens per sequence; unset: as it was trained.")] = None,
    site: Annotated[str | None, Option(help="The place, where the file names none: blocks.3.hook_resid_pre")] = None,
    json: Json = False,
) -> None:
    """Say what an SAE's file holds: format, kind, place, and the rule by which it is read; with --model, measure it.

    Exit code: 0 if it is read, 6 if it is not, or is far from what it states.
    """
    from endwise.evaluation.inspecting import inspect as look
    from endwise.evaluation.inspecting import measured, text_for, verdict

    found = look(path)
    if json and model is None:
        print_json(found.to_json())
    if not json:
        for line in found.lines():
            echo(line)
    if model is None:
        return
    from endwise.config.run import DataConfig
    from endwise.models.loading import load_model
    from endwise.tokens import check_readable

    check_readable(DataConfig.build({"source": data}, "the options"))
    loaded = load_model(model)
    text, remark = text_for(found, loaded, data, context)
    if remark is not None and not json:
        echo(f"! {remark}")
    result = measured(found, loaded, text, tokens, site)
    if json:
        warnings = [*([remark] if remark else []), *verdict(found, result)]
        print_json({**found.to_json(), "measured": result.to_json(), "verdict": warnings})
        return
    bounds = result.baselines
    numbers = (
        f"L0 {result['l0']:.1f}, explained variance {result['explained_variance.pooled']:.4f}, CE {bounds.clean:.4f} "
        f"nats clean, {result['ce_spliced']:.4f} with it ({result['ce_increase']:+.4f}), {bounds.mean_ablated:.4f} "
        "with the site at its mean"
    )
    echo(f"measured on {result.tokens:,} tokens at {result.place} of {model}: {minus(numbers)}")
    for line in verdict(found, result):
        echo(f"! {line}")


@command
@on_device
def adopt(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    out: Annotated[Path, Option(help="The run folder to make; it must not exist yet.")],
    model: Annotated[str | None, Option(help=MODEL)] = None,
    data: Annotated[str | None, Option(help="Text to measure it on, as data.source of a recipe.")] = None,
    site: Annotated[str | None, Option(help="The place, where the file names none: blocks.3.hook_resid_pre")] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="Held-out tokens to measure it on; unset: 500,000 at most.")
    ] = None,
    context: Annotated[int | None, Option(min=1, help="Tokens per sequence; unset: as it was trained.")] = None,
    name: Annotated[str | None, Option(help="What tables and legends call it; unset: the end of its path.")] = None,
    json: Json = False,
) -> None:
    """Make a run folder from any finished SAE; every command that reads runs reads it."""
    from endwise.evaluation.adopting import adopt as run

    run(path, model=model, data=data, site=site, out=out, context=context, tokens=tokens, name=name)
    report(json, {"run": out}, f"Next: endwise evaluate {shlex.quote(str(out))}")


@command
def convert(
    path: Annotated[Path, Argument(help=f"An SAE of any format: {NAMES}.")],
    target: Annotated[Path, Argument(help="Folder or file to write; there must be no SAE yet.")],
    to: Annotated[str, Option("--to", metavar="FORMAT", help="saelens, sparsify, dictionary_learning, ...")],
    json: Json = False,
) -> None:
    """Write an SAE in another format, read it back, and compare both."""
    from endwise.common.files import check_can_write
    from endwise.common.hub import shown
    from endwise.evaluation.inspecting import convert as run

    check_can_write(target.parent)
    apart = run(path, target, to)
    line = f"{target}: {to}, latents and outputs within {apart:.1e} of those of {shown(path)}"
    report(json, {"path": target, "format": to, "apart": apart}, line)


@command
@on_device
def finetune(
    path: Annotated[Path, Argument(metavar="SAE", help="A folder or file with an SAE, of any format.")],
    overrides: Overrides = None,
    model: Annotated[str, Option(help="embedded, a local folder, or a Hugging Face hub id.")] = "embedded",
    data: Annotated[str, Option(help="Text to tune on, as data.source of a recipe.")] = "embedded",
    tokens: Annotated[int, Option(min=1, help="Tokens to train on.")] = 1_000_000,
    out: Annotated[Path | None, Option(help="Run folder; the same command resumes there. Unset: in runs/.")] = None,
    site: Annotated[str | None, Option(help="The place, where the file names none: blocks.3.hook_resid_pre")] = None,
    check: Annotated[list[str] | None, Option(help="Text of another kind to measure it on as well.")] = None,
    measure_on: Annotated[int, Option(min=1, help="Held-out tokens to measure it on.")] = 100_000,
    context: Annotated[int | None, Option(min=1, help="Tokens per sequence; unset: as it was trained.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Tune a finished SAE on what the model predicts with it, and write it in its format, with a report.

    Exit code: 0 if it was tuned, 6 if it cannot be read or is far from what it states, 7 if training stopped.
    """
    from endwise.common.terminal import Grid, note, show
    from endwise.finetuning import TuningSettings
    from endwise.finetuning import finetune as run
    from endwise.finetuning.finetune import REPORT

    say = status if json else echo
    settings = TuningSettings(data, tokens, measure_on, context, overrides or ())
    made = run(path, model=model, settings=settings, out=out, site=site, check=check or (), say=say, display=not quiet)
    if json:
        print_json(made.to_json())
        return
    for name, each in {"text like that it was tuned on": made.text, **made.others}.items():
        show(Grid((f"on {name}", "before", "after"), list(each.rows())))
    ratio = made.text.ce_increase
    echo(f"CE increase: {ratio.estimate:.1%} of what it was, 95 % [{ratio.low:.1%}, {ratio.high:.1%}] over text")
    moved = made.moved.quantiles(made.moved.decoder)
    echo(f"Decoder directions moved to cosine {moved[0.5]:.3f} with their start (median; 5 %: {moved[0.05]:.3f})")
    for remark in made.remarks:
        note(f"! {remark}")
    echo(f"The tuned SAE: {made.folder / 'sae'}" + (f", and {made.given_back}" if made.given_back else ""))
    echo(f"The report: {made.folder / REPORT}")
