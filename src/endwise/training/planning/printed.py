"""A plan as tables on a terminal."""

from rich.console import Console

from endwise.common.machine import size_text
from endwise.common.terminal import Grid, show
from endwise.common.text import model_title
from endwise.training.planning.plan import TrainingPlan

LABELS = {
    "clean_prefix": "clean pass, up to the site",
    "clean_tail": "clean pass, after the site",
    "clean_readout": "unembedding of the clean pass",
    "sae_forward": "SAE forward",
    "sae_backward": "SAE backward",
    "sae_own": "SAE's own terms",
    "tail_forward": "spliced tail forward",
    "tail_backward": "spliced tail backward",
    "readout_forward": "unembedding of the spliced pass",
    "readout_backward": "its gradient",
    "optimiser": "optimiser",
}


def print_plan(plan: TrainingPlan, console: Console | None = None) -> None:
    """Parameters, memory by part and stage, operations, and what does not fit; 80 columns are enough."""
    console = console or Console()
    for line in _heading(plan):
        show(line, console)
    phases = [_phases(plan)] if plan.phases else []
    for table in (*phases, _parameters(plan), _memory(plan), _flops(plan), _needs(plan)):
        show(table, console)
    for need in plan.needs:
        if need.advice:
            show(f"• {need.what}: {need.advice}", console)
    show("Everything fits." if plan.fits else "It does not fit.", console)


def print_needs(plan: TrainingPlan, console: Console | None = None) -> None:
    """Print what the run is, and what it takes of this machine."""
    console = console or Console()
    for line in _heading(plan):
        show(line, console)
    show(_needs(plan), console)


def _heading(plan: TrainingPlan) -> tuple[str, ...]:
    passes = f" in {plan.accumulation} passes" if plan.accumulation > 1 else ""
    shared = f", in each of {plan.processes} processes" if plan.processes > 1 else ""
    tail = f", {plan.microbatch} at a time in the spliced pass" if plan.splices else ""
    split = f", {plan.d_sae // plan.shards:,} in each process" if plan.shards > 1 else ""
    return (
        f"{plan.kind} at {plan.site} of {model_title(plan.model)} ({plan.dtype})",
        f"{plan.d_sae:,} features of width {plan.d_model:,}{split}",
        f"{plan.steps:,} steps of {plan.sequences} × {plan.context:,} tokens{passes}{shared}{tail}; {plan.device}",
    )


def _phases(plan: TrainingPlan) -> Grid:
    rows = [
        (
            f"{number} {each.kind}",
            f"{100 * each.share:g} %",
            f"{each.learning_rate:g}",
            f"{each.flops_per_token / 1e6:,.2f}",
        )
        for number, each in enumerate(plan.phases, 1)
    ]
    return Grid(("phase", "of the tokens", "learning rate", "Mflop per token"), rows)


def _parameters(plan: TrainingPlan) -> Grid:
    own = plan.parameters
    rows = [
        ("language model", f"{own.model:,}"),
        ("  before the site", f"{own.before_site:,}"),
        ("  after the site", f"{own.after_site:,}"),
        ("  unembedding", f"{own.unembedding:,}"),
        ("SAE", f"{own.dictionary:,}"),
    ]
    return Grid(("parameters", ""), rows)


def _memory(plan: TrainingPlan) -> Grid:
    """Parts by stage, each stage at its own peak."""
    rows = []
    for part in dict.fromkeys(part for stage in plan.stages for part in stage.parts):
        sizes = [stage.parts.get(part, 0) for stage in plan.stages]
        rows.append([part, *(size_text(size) if size else "–" for size in sizes)])
    rows.append(["together", *(size_text(stage.bytes) for stage in plan.stages)])
    rows.append(["reached in", *(stage.during for stage in plan.stages)])
    return Grid(("memory at the peak of", *(stage.name for stage in plan.stages)), rows)


def _flops(plan: TrainingPlan) -> Grid:
    rows = [(LABELS[name], f"{value / 1e6:,.2f}") for name, value in vars(plan.flops).items() if value]
    rows.append(("together", f"{plan.flops.per_token / 1e6:,.2f}"))
    if plan.sparse_flops is not None:
        rows.append(("once latents are sparse, at most", f"{plan.sparse_flops / 1e6:,.2f}"))
    units = ((1e15, "Pflop"), (1e12, "Tflop"), (1e9, "Gflop"))
    size, unit = next((each for each in units if plan.total_flops >= each[0]), units[-1])
    rows.append((f"the run, in {unit}", f"{plan.total_flops / size:,.3g}"))
    return Grid(("operations per token", "Mflop"), rows)


def _needs(plan: TrainingPlan) -> Grid:
    rows = []
    for need in plan.needs:
        available = "?" if need.available is None else size_text(need.available)
        fits = "?" if need.available is None else "yes" if need.fits else "NO"
        rows.append((need.what, size_text(need.bytes), available, fits))
    rows.append(("  one checkpoint", size_text(plan.checkpoint_bytes), "", ""))
    rows.append(("  the saved SAE", size_text(plan.sae_bytes), "", ""))
    return Grid(("takes", "needed", "available", "fits"), rows)
