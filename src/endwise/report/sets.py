"""What every page and table of runs has in common, set by set: what they are called, and what is claimed of them."""

from collections.abc import Collection, Iterable

from rich.console import Console

from endwise.analysis.claims import Claim
from endwise.analysis.pareto import Setting
from endwise.analysis.run_summary import RunSummary, remarks_of
from endwise.printable import model_title, model_titles
from endwise.report.shell import escape
from endwise.terminal import show


def title_of(setting: Setting) -> str:
    """`<site> of <model>: <what else the runs have in common>`."""
    return f"{setting.site} of {model_title(setting.model)}: {setting}"


def models_of(settings: Iterable[Setting]) -> str:
    """For the line above a page's title, as HTML."""
    return escape(", ".join(model_titles(setting.model for setting in settings).values()))


def counted(runs: int, sets: int) -> str:
    """`3 sparse autoencoders in 1 set`."""
    return f"{runs} sparse autoencoder{'' if runs == 1 else 's'} in {sets} set{'' if sets == 1 else 's'}"


MARKED = ("!",)
"""The heading of a column that says which runs there is something to be told of."""


def mark_of(remarks: Collection[str], marked: Collection[str] = MARKED) -> list[str]:
    """The cells of a run under `marked`: how many remarks there are on it."""
    return [f"{len(remarks)} below" if remarks else ""] * len(marked)


def show_remarks(remarks: Iterable[str], console: Console) -> None:
    for remark in remarks:
        show(f"! {remark}", console)


def remark_list(runs: Iterable[RunSummary]) -> str:
    """The remarks on runs, as HTML; empty where there are none."""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks_of(runs))
    return f'<ul class="remarks" role="note">{items}</ul>' if items else ""


def show_claims(claims: Iterable[Claim], console: Console) -> None:
    for claim in claims:
        show(f"• {claim.verdict}: {claim.claim} ({claim.ours})", console)
