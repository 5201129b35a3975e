"""Commands that compare runs."""

from pathlib import Path
from typing import Annotated

from typer import Option

from endwise.cli.adopted import taking_saes
from endwise.cli.app import (
    Again,
    Json,
    Measured,
    Quiet,
    Tokens,
    command,
    present,
    results_beside,
    results_folder,
    status,
)
from endwise.cli.overriding import on_device


@command
@taking_saes
def pareto(
    runs: Measured,
    out: Annotated[Path | None, results_folder("pareto")] = None,
    json: Json = False,
) -> None:
    """Compare kinds by their curves: CE increase and KL against features, fronts, bands, and ratios with intervals."""
    from endwise.analysis.pareto.curves import pareto as compare
    from endwise.analysis.pareto.page import print_pareto, write_pareto

    out = out or results_beside(runs, "pareto")
    found = compare(runs)
    present(json, lambda: print_pareto(found), lambda: write_pareto(found, out))


@command
@taking_saes
def geometry(
    runs: Measured,
    pair: Annotated[
        list[str] | None, Option(metavar="RUN,RUN", help="Also compare these two; may be given several times.")
    ] = None,
    threshold: Annotated[
        float, Option(min=0, max=1, help="The cosine at which a feature counts as found again.")
    ] = 0.7,
    umap: Annotated[bool, Option("--umap", help="Also draw a map of the features (needs the extra umap).")] = False,
    memory: Annotated[
        str, Option(metavar="SIZE", help="Memory of the search, beside the dictionaries themselves.")
    ] = "512MiB",
    out: Annotated[Path | None, results_folder("geometry")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare dictionaries by the cosines of their features: within each, across seeds, and across kinds."""
    from endwise.analysis.geometry.feature_map import feature_maps
    from endwise.analysis.geometry.geometry import geometry as compare
    from endwise.analysis.geometry.page import print_geometry, write_geometry
    from endwise.common.errors import ConfigError
    from endwise.common.extras import check_extra
    from endwise.common.machine import parse_size

    if umap:
        check_extra("umap")
    out = out or results_beside(runs, "geometry")
    pairs = [tuple(text.split(",")) for text in pair or ()]
    for each in pairs:
        if len(each) != 2:
            raise ConfigError(f"A pair is two run folders with a comma between them; given {','.join(each)!r:.200}.")
    progress = None if quiet else status
    found = compare(runs, pairs=[(a, b) for a, b in pairs], memory=parse_size(memory), say=progress)

    def write() -> Path:
        maps = feature_maps(found, say=progress) if umap else None
        return write_geometry(found, out, threshold=threshold, maps=maps)

    present(json, lambda: print_geometry(found), write)


@command
@taking_saes
@on_device
def importance(
    runs: Measured,
    tokens: Tokens = None,
    ablate: Annotated[int, Option(min=0, help="Features of each run to ablate one by one.")] = 100,
    kl: Annotated[bool, Option("--kl", help="Attribute the KL as well as the CE, at about twice the cost.")] = False,
    again: Again = False,
    out: Annotated[Path | None, results_folder("importance")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure what every feature does for the predictions, and how few features carry them, kind by kind."""
    from endwise.analysis.importance.page import print_importance, write_importance
    from endwise.analysis.importance.study import importance as measure

    out = out or results_beside(runs, "importance")
    found = measure(runs, tokens=tokens, ablate=ablate, kl=kl, again=again, display=not quiet)
    present(json, lambda: print_importance(found), lambda: write_importance(found, out))


@command
@taking_saes
@on_device
def directions(
    runs: Measured,
    tokens: Tokens = None,
    directions: Annotated[
        int | None,
        Option(
            min=1, help="Ablate this many principal directions and as many of the others; unset: all at a narrow site."
        ),
    ] = None,
    with_starts: Annotated[
        bool, Option("--with-starts", help="Directions of all tokens, including position 0 and document starts.")
    ] = False,
    out: Annotated[Path | None, results_folder("directions")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare what SAEs keep: lengths, principal directions and their use by the model, later layers."""
    from endwise.analysis.directions.page import print_directions, write_directions
    from endwise.analysis.directions.study import directions as compare

    out = out or results_beside(runs, "directions")
    found = compare(runs, tokens=tokens, directions=directions, with_starts=with_starts, display=not quiet)
    present(json, lambda: print_directions(found), lambda: write_directions(found, out))
