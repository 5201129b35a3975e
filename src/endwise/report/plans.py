"""A plan as tables on a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from endwise.machine import size_text
from endwise.planning import Plan

LABELS = {
    "clean_prefix": "clean pass, up to the site",
    "clean_tail": "clean pass, after the site",
    "clean_readout": "unembedding of the clean pass",
    "sae_forward": "SAE forward",
    "sae_backward": "SAE backward",
    "tail_forward": "spliced tail forward",
    "tail_backward": "spliced tail backward",
    "readout_forward": "unembedding of the spliced pass",
    "readout_backward": "its gradient",
    "optimiser": "optimiser",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Parameters, memory by part and stage, operations, and what does not fit; 80 columns are enough."""
    console = console or Console()
    console.print(Text(_heading(plan)))
    for table in (_parameters(plan), _memory(plan), _flops(plan), _needs(plan)):
        console.print(table)
    for need in plan.needs:
        if need.advice:
            console.print(f"• {need.what}: {need.advice}", markup=False, highlight=False)
    console.print("Everything fits." if plan.fits else "It does not fit.", highlight=False)


def _heading(plan: Plan) -> str:
    passes = f" in {plan.accumulation} passes" if plan.accumulation > 1 else ""
    shared = f", in each of {plan.processes} processes" if plan.processes > 1 else ""
    tail = "" if plan.kind == "local" else f", {plan.microbatch} at a time in the spliced pass"
    return (
        f"{plan.kind} at {plan.site} of {plan.model} ({plan.dtype})\n"
        f"{plan.d_sae:,} features of width {plan.d_model:,}\n"
        f"{plan.steps:,} steps of {plan.sequences} × {plan.context:,} tokens{passes}{shared}{tail}; {plan.device}"
    )


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    return table


def _parameters(plan: Plan) -> Table:
    table, own = _table("parameters", ""), plan.parameters
    table.add_row("language model", f"{own.model:,}")
    table.add_row("  before the site", f"{own.before_site:,}")
    table.add_row("  after the site", f"{own.after_site:,}")
    table.add_row("  unembedding", f"{own.unembedding:,}")
    table.add_row("SAE", f"{own.dictionary:,}")
    return table


def _memory(plan: Plan) -> Table:
    """Parts by stage, each stage at its own peak."""
    table = _table("memory at the peak of", *(stage.name for stage in plan.stages))
    for part in dict.fromkeys(part for stage in plan.stages for part in stage.parts):
        sizes = [stage.parts.get(part, 0) for stage in plan.stages]
        table.add_row(part, *(size_text(size) if size else "–" for size in sizes))
    table.add_row("together", *(size_text(stage.bytes) for stage in plan.stages))
    table.add_row("reached in", *(stage.during for stage in plan.stages))
    return table


def _flops(plan: Plan) -> Table:
    table = _table("operations per token", "Mflop")
    for name, value in vars(plan.flops).items():
        if value:
            table.add_row(LABELS[name], f"{value / 1e6:,.2f}")
    table.add_row("together", f"{plan.flops.per_token / 1e6:,.2f}")
    if plan.sparse_flops is not None:
        table.add_row("once latents are sparse, at most", f"{plan.sparse_flops / 1e6:,.2f}")
    table.add_row("the run, in Pflop", f"{plan.total_flops / 1e15:,.3g}")
    return table


def _needs(plan: Plan) -> Table:
    table = _table("takes", "needed", "available", "fits")
    for need in plan.needs:
        available = "?" if need.available is None else size_text(need.available)
        fits = "?" if need.available is None else "yes" if need.fits else "NO"
        table.add_row(Text(need.what), size_text(need.bytes), available, fits)
    table.add_row("  one checkpoint", size_text(plan.checkpoint_bytes), "", "")
    table.add_row("  the saved SAE", size_text(plan.sae_bytes), "", "")
    return table
