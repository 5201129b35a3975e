"""Commands that say what there is."""

from typing import Annotated

import typer
from typer import Argument, Option

from endwise.cli.app import command, echo, status


@command
def sites(
    model: Annotated[str, Argument(help="embedded, a local folder, or a Hugging Face hub id.")] = "embedded",
    gguf_file: Annotated[str | None, Option(help="GGUF file inside the folder or repository.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run code the model ships with.")] = False,
) -> None:
    """List the sites of a model, where an SAE can be spliced in, with their widths; on stderr, those where none can."""
    from endwise.models.loading import load_model

    loaded = load_model(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    for site in loaded.sites():
        echo(f"{site.name:<34}{loaded.width(site):>8}")
    for site, reason in sorted(loaded.unspliceable.items()):
        status(f"{site.name}: not offered: {reason}")


@command
def version() -> None:
    """Print the version."""
    from endwise import __version__

    typer.echo(__version__)
