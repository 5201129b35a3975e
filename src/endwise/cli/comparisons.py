"""Commands that compare runs."""

from pathlib import Path
from typing import Annotated

import typer

from endwise.cli.door import app, aside, plainly, say


@app.command()
@plainly
def pareto(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables, figures and pareto.html; unset: pareto/ in the first, or beside it if it is a run."
        ),
    ] = None,
) -> None:
    """Compare kinds by their curves: CE increase and KL against features, fronts, bands, and ratios with intervals."""
    from endwise.analysis.pareto import pareto as compare
    from endwise.report import print_pareto, write_pareto
    from endwise.run_folder import RunFolder

    found = compare(runs)
    print_pareto(found)
    beside = runs[0].parent if RunFolder(runs[0]).has_run() else runs[0]
    say(f"The page, figures and tables: {write_pareto(found, out or beside / 'pareto')}")


@app.command()
@plainly
def geometry(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN,RUN", help="Also compare these two; may be given several times."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="The cosine at which a feature counts as found again.")
    ] = 0.7,
    umap: Annotated[
        bool, typer.Option("--umap", help="Also lay the features out on a map (needs the extra umap).")
    ] = False,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What a search may hold beside the dictionaries themselves.")
    ] = "512MiB",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and geometry.html; unset: geometry/ beside the first run."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Compare dictionaries by the cosines of their features: within each, across seeds, and across kinds."""
    from endwise.analysis.feature_map import feature_maps
    from endwise.analysis.geometry import geometry as compare
    from endwise.errors import ConfigError
    from endwise.machine import parse_size
    from endwise.report import print_geometry, write_geometry
    from endwise.run_folder import RunFolder

    pairs = [tuple(text.split(",")) for text in pair or ()]
    for each in pairs:
        if len(each) != 2:
            raise ConfigError(f"A pair is two run folders with a comma between them; given {','.join(each)!r:.200}.")
    telling = None if quiet else aside
    found = compare(runs, pairs=[(a, b) for a, b in pairs], memory=parse_size(memory), say=telling)
    print_geometry(found)
    maps = feature_maps(found, say=telling) if umap else None
    beside = runs[0].parent if RunFolder(runs[0]).has_run() else runs[0]
    path = write_geometry(found, out or beside / "geometry", threshold=threshold, maps=maps)
    say(f"The page, figures and tables: {path}")


@app.command()
@plainly
def importance(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens, instead of each recipe's.")] = None,
    ablate: Annotated[int, typer.Option(min=0, help="Features of each run to ablate one by one.")] = 100,
    kl: Annotated[bool, typer.Option("--kl", help="Attribute the KL besides the CE, at about twice the cost.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was measured before.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and importance.html; unset: importance/ beside the first."),
    ] = None,
) -> None:
    """Measure what every feature does for the predictions, and on how few features they rest, kind by kind."""
    from endwise.analysis.importance import importance as measure
    from endwise.files import check_can_write
    from endwise.report import print_importance, write_importance

    out = out or runs[0].parent / "importance"
    check_can_write(out)
    found = measure(runs, tokens=tokens, ablate=ablate, kl=kl, again=again, display=True)
    print_importance(found)
    say(f"The page, figures and tables: {write_importance(found, out)}")


@app.command()
@plainly
def directions(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens, instead of each recipe's.")] = None,
    directions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ablate this many principal directions and as many of the others; unset: all at a narrow site."
        ),
    ] = None,
    with_starts: Annotated[
        bool, typer.Option("--with-starts", help="Directions of all tokens, position 0 and document starts among them.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and directions.html; unset: directions/ beside the first."),
    ] = None,
) -> None:
    """Compare what SAEs keep: lengths, principal directions against what the model does with them, later layers."""
    from endwise.analysis.directions import directions as compare
    from endwise.files import check_can_write
    from endwise.report import print_directions, write_directions

    out = out or runs[0].parent / "directions"
    check_can_write(out)
    found = compare(runs, tokens=tokens, directions=directions, with_starts=with_starts)
    print_directions(found)
    say(f"The page, figures and tables: {write_directions(found, out)}")
