"""The command that steers a model by features."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from endwise.cli.adopted import MODEL
from endwise.cli.app import Json, command, echo, print_json, status
from endwise.cli.files import NAMES
from endwise.cli.overriding import on_device

if TYPE_CHECKING:
    from endwise.features.harvest.results import Harvest
    from endwise.features.intervening import Intervention
    from endwise.features.steering import Opened
    from endwise.models.positions import Positions

WIDE = 100
"""Columns of an output that no terminal stands behind."""


@command
@on_device
def steer(
    run: Annotated[Path, Argument(help=f"A run folder, or an SAE of any format: {NAMES}.")],
    prompt: Annotated[str, Option(help="Text to continue.")],
    feature: Annotated[list[int] | None, Option(help="Feature to steer by; repeat it for several.")] = None,
    by: Annotated[
        list[float] | None, Option(help="Activation to add to it: one for all of these, or one for each.")
    ] = None,
    clamp: Annotated[list[str] | None, Option(metavar="FEATURE=VALUE", help="Set a feature's activation.")] = None,
    ablate: Annotated[str | None, Option(metavar="FEATURES", help="Set features to 0: 7 or 7,9,30.")] = None,
    keep: Annotated[str | None, Option(metavar="FEATURES", help="Set all other features to 0.")] = None,
    of_max: Annotated[
        bool, Option("--of-max", help="Numbers are multiples of the feature's greatest harvested activation.")
    ] = False,
    positions: Annotated[str, Option(help="Positions: all, prompt, last (of it), generated, or START:STOP.")] = "all",
    error: Annotated[str, Option(help="Reconstruction error: keep or drop.")] = "keep",
    tokens: Annotated[int, Option(min=1, help="Tokens to continue by.")] = 40,
    temperature: Annotated[float, Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Seed of sampling, the same for both texts.")] = 0,
    model: Annotated[str | None, Option(help=f"For an SAE that is not a run. {MODEL}")] = None,
    site: Annotated[str | None, Option(help="For an SAE that is not a run: its place, if its file has none.")] = None,
    json: Json = False,
) -> None:
    """Continue a prompt with features steered, clamped, ablated or kept, beside the model's own text, with their KL.

    If several are given, --keep comes first, then --ablate, --clamp and --feature.
    """
    from endwise.features.intervening import refuse_error
    from endwise.features.steering import Sampling, opened
    from endwise.features.steering import steer as continue_twice

    refuse_error(error)
    where, sampling = _positions(positions), Sampling(tokens, temperature, seed)
    asked = _asked(keep, ablate, clamp, feature, by)
    found = opened(run, model=model, site=site)
    edits = _edits(run, found, asked, of_max, error)
    options: dict[str, Any] = {"data": found.data, "error": error, "positions": where, "sampling": sampling}
    made = continue_twice(found.model, {found.place: found.sae}, edits, prompt, **options)
    if json:
        print_json({"place": found.place.name, **made.to_json()})
        return
    echo(f"prompt: {''.join(made.prompt)}")
    _show("".join(made.clean), "".join(made.steered))
    inside = "" if made.kl_in_prompt is None else f"; {made.kl_in_prompt:.4g} over those of the prompt's"
    echo(
        f"KL(clean ‖ steered) of the next token, both given the clean text: {made.kl:.4g} nats, mean over the "
        f"predictions of its {len(made.clean)} new {'token' if len(made.clean) == 1 else 'tokens'}{inside}."
    )


def _asked(
    keep: str | None,
    ablate: str | None,
    clamp: Sequence[str] | None,
    feature: Sequence[int] | None,
    by: Sequence[float] | None,
) -> list[tuple[str, list[int], float | None]]:
    """Read each edit: its name, the features, and a number, if it takes one.

    Raises:
        ConfigError: an option is not of its form, or --feature and --by do not go together.
    """
    from endwise.common.errors import ConfigError

    found: list[tuple[str, list[int], float | None]] = []
    for name, listed in (("keep", keep), ("ablate", ablate)):
        if listed is not None:
            numbers = [each.strip() for each in listed.split(",")]
            if not all(each.isdecimal() for each in numbers):
                raise ConfigError(f"--{name} takes numbers of features, as 7 or 7,9,30; given {listed!r:.80}.")
            found.append((name, [int(each) for each in numbers], None))
    for text in clamp or ():
        match = re.fullmatch(r"(\d+)=(.+)", text)
        try:
            found.append(("clamp", [int(match[1])], float(match[2])))  # type: ignore[pyrefly:unsupported-operation]
        except (TypeError, ValueError):
            raise ConfigError(f"--clamp takes FEATURE=VALUE, as 141=8; given {text!r:.80}.") from None
    features, amounts = list(feature or ()), list(by or ())
    if len(amounts) == 1:
        amounts *= len(features) or 1
    if len(features) != len(amounts):
        raise ConfigError(
            f"--by takes one activation for all --feature, or one for each; given {len(amounts)} for {len(features)}."
        )
    return [*found, *(("steer", [number], amount) for number, amount in zip(features, amounts, strict=True))]


def _edits(
    run: Path, found: "Opened", asked: Sequence[tuple[str, list[int], float | None]], of_max: bool, error: str
) -> "list[Intervention]":
    """Make the interventions, and say of features that never fired.

    Raises:
        ConfigError: there are none, or they are relative to a harvest that there is not.
    """
    from endwise.common.errors import ConfigError
    from endwise.features.intervening import Ablate, Clamp, Keep, Steer

    if not asked and error == "keep":
        raise ConfigError("Nothing to change. Name features: --feature 141 --by 8, --clamp, --ablate or --keep.")
    if of_max and found.harvest is None:
        raise ConfigError(f"--of-max needs the features' greatest activations: endwise harvest {shlex.quote(str(run))}")
    for feature in _silent(found.harvest, asked):
        status(f"! Feature {feature} never fired on the text that was harvested.")
    relative = found.harvest if of_max else None
    with_number = {"steer": Steer, "clamp": Clamp}
    without = {"keep": Keep, "ablate": Ablate}
    return [
        without[name](features) if number is None else with_number[name](features, number, relative_to=relative)
        for name, features, number in asked
    ]


def _silent(harvest: "Harvest | None", asked: Sequence[tuple[str, list[int], float | None]]) -> list[int]:
    named = sorted({feature for _, features, _ in asked for feature in features})
    return [] if harvest is None else [each for each in named if each < harvest.d_sae and not harvest.firings[each]]


def _positions(text: str) -> "Positions":
    """
    Raises:
        ConfigError: these are no positions.
    """
    from endwise.models.positions import refuse_positions

    match = re.fullmatch(r"(-?\d*):(-?\d*)", text)
    ends = [] if match is None else [int(end) if end.strip("-") else None for end in match.groups()]
    positions: Any = slice(*ends) if ends else text
    refuse_positions(positions)
    return positions


def _show(clean: str, steered: str) -> None:
    """Print the two texts beside each other."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from endwise.common.text import printable

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
    for heading in ("clean", "steered"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_row(*(Text(printable(each)) for each in (clean, steered)))
    console.print(table)
