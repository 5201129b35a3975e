"""Commands that a new user begins with: a recipe for a model, and settings found for it."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from endwise.cli.app import Again, Json, Model, Overrides, Quiet, command, echo, print_json, saying, status
from endwise.cli.overriding import taking_keys
from endwise.cli.runs import RECIPE
from endwise.common.errors import ConfigError
from endwise.common.files import check_can_write, there_is, write_atomic


def _check_new(out: Path, again: bool) -> None:
    """Refuse a recipe that is there already, or cannot be written there."""
    check_can_write(out.parent)
    if there_is(out) and not again:
        raise ConfigError(f"{out} is there already. Write it again with --again, or choose another with --out.")


@command
def init(
    model: Model = "embedded",
    data: Annotated[
        str | None,
        Option(help="Text: embedded, a file or folder, or a Hugging Face dataset id; unset: of the hub, or embedded."),
    ] = None,
    column: Annotated[str | None, Option(help="Column of the text, as data.column of a recipe; unset: text.")] = None,
    tokens: Annotated[int | None, Option(min=1, help="Training tokens; unset: about an hour's.")] = None,
    l0: Annotated[int | None, Option("--l0", min=1, help="Active features per token to aim at.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, Option(min=0, help="Seed of the SAE's first weights.")] = 0,
    file: Annotated[Path | None, Option("--out", help="The recipe to write; unset: MODEL.yaml here.")] = None,
    again: Again = False,
    json: Json = False,
) -> None:
    """Write a commented recipe for a model, with site, size, tokens and sparsity chosen for it and this machine."""
    import re

    from endwise.common.text import model_title
    from endwise.training.planning.printed import print_needs
    from endwise.training.planning.proposal import ProposalSettings, propose

    given = {"model": model, "data": data, "column": column, "tokens": tokens, "l0": l0, "device": device, "seed": seed}
    settings = ProposalSettings.build(given, "the command line")
    name = re.sub(r"[^\w.-]+", "-", model_title(model)).strip("-.") or "recipe"
    out = file or Path(f"{name}.yaml")
    _check_new(out, again)
    made = propose(settings)
    write_atomic(out, made.text.encode())
    if json:
        print_json({"recipe": out, "minutes": made.minutes, "remarks": made.remarks, "plan": made.plan.to_json()})
        return
    print_needs(made.plan)
    for remark in made.remarks:
        echo(f"! {remark}")
    takes = "less than a minute" if made.minutes < 1 else f"roughly {made.minutes:.0f} min"
    status(f"Training will take {takes} here, if the machine is otherwise idle.")
    echo(f"A recipe for {model_title(model)}, {made.config.training.tokens:,} tokens at {made.config.site}: {out}")
    echo(f"Next: endwise train {shlex.quote(str(out))}")


@command
@taking_keys("model", "data", "seed", "device")
def tune(
    recipe: Annotated[str, RECIPE],
    overrides: Overrides = None,
    l0: Annotated[float | None, Option("--l0", help="Active features per token to reach.")] = None,
    ce_increase: Annotated[float | None, Option("--ce-increase", help="CE increase to reach, nats per token.")] = None,
    budget: Annotated[
        int | None,
        Option(min=1, metavar="TOKENS", help="Tokens to read in all; unset: half of training.tokens or more."),
    ] = None,
    file: Annotated[
        Path | None, Option("--out", help="The recipe to write; unset: beside RECIPE, ...-tuned.yaml.")
    ] = None,
    again: Again = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find a recipe's learning rate and first λ for a target of L0 or CE increase, by short runs that share a pass."""
    from endwise.config.recipes import find_recipe
    from endwise.sweeps.tables import print_trials
    from endwise.sweeps.tuning import tune as find

    if (l0 is None) == (ce_increase is None):
        raise ConfigError("Give one target: --l0 N (active features per token) or --ce-increase X (nats per token).")
    path = find_recipe(recipe)
    shipped = str(path) != str(Path(recipe).expanduser())
    out = file or (Path() if shipped else path.parent) / f"{path.stem}-tuned.yaml"
    _check_new(out, again)
    wanted = {"target": {"l0": l0, "ce_increase": ce_increase}, "tokens": budget}
    made = find(path, wanted, overrides=overrides or (), say=saying(quiet), display=not quiet)
    write_atomic(out, made.text.encode())
    if json:
        print_json({"recipe": out, **made.to_json()})
        return
    print_trials(made.trials)
    for remark in made.remarks:
        echo(f"• {remark}")
    found = "" if made.coefficient is None else f", λ from {made.coefficient:g}"
    echo(f"Learning rate {made.learning_rate:g}{found}: {out}")
    echo(f"Next: endwise train {shlex.quote(str(out))}")
