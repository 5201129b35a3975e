"""Findings of `gpu.py`: tables to be pasted into RESULTS.md, figures, the goals, and one line that sums up."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from roofline import H200, PAPER_TOKENS, Goal, goals

GIB = 1 << 30
All = dict[str, Any]
Cells = Sequence[str]


def rows_of(results: All, part: str) -> All:
    """Rows of a part that were made."""
    rows = results["parts"].get(part, {}).get("rows", {})
    return {name: row for name, row in rows.items() if "failed" not in row}


def measured(results: All) -> dict[str, float]:
    """Figures by the goal that they are of."""
    steps, kernels = rows_of(results, "steps gpt2-small mixed"), rows_of(results, "kernels")
    gemma = rows_of(results, "steps gemma-2-2b mixed")
    found = {name: steps[name]["tokens_per_second"] for name in ("e2e", "local") if name in steps}
    if "e2e" in found:
        found["minutes"] = PAPER_TOKENS / found["e2e"] / 60
        if "e2e_ds" in steps:
            found["ds"] = found["e2e"] / steps["e2e_ds"]["tokens_per_second"]
    named = {"kl": "kl bf16", "decoder, mixed": "decoder bf16", "decoder, exact": "decoder fp32"}
    for goal, kernel in named.items():
        if "times_as_fast" in kernels.get(kernel, {}):
            found[goal] = kernels[kernel]["times_as_fast"]
    if "e2e" in gemma:
        found["gemma"] = gemma["e2e"]["reserved_bytes"] / GIB
    return found


def is_judged(results: All) -> bool:
    """Return whether goals mean anything: they are for an H200, at full size."""
    return H200.name in rows_of(results, "card").get("device", {}).get("gpu", "") and not results["made_with"]["tiny"]


def verdict(goal: Goal, found: dict[str, float]) -> str:
    if goal.key not in found:
        return "not measured"
    return "met" if goal.met_by(found[goal.key]) else "**missed**"


def table(head: Cells, rows: Iterable[Cells]) -> Iterator[str]:
    rows = list(rows)
    if rows:
        yield f"| {' | '.join(head)} |"
        yield f"|{'---|' * len(head)}"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def _steps(results: All) -> Iterator[Cells]:
    plans = rows_of(results, "plan")
    for part in results["parts"]:
        if not part.startswith("steps "):
            continue
        _, shape, precision = part.split(" ", 2)
        for kind, row in rows_of(results, part).items():
            plan = plans.get(f"{shape} {precision} {kind}")
            yield (
                *(shape, precision, kind, f"{row['tokens_per_second']:,.0f}", f"{1e3 * row['seconds']:.2f}"),
                *(f"{100 * row['mfu']:.0f} %", f"{100 * row['share_of_roofline']:.0f} %"),
                *(f"{row['l0']:.0f}", f"{row['tensors_bytes'] / GIB:.2f}"),
                f"{plan['ratio']:.2f}" if plan else "",
            )


def _kernels(results: All) -> Iterator[Cells]:
    for name, row in rows_of(results, "kernels").items():
        taken, worst = row["seconds"], {side: max(found.values()) for side, found in row["errors"].items()}
        own, other = ("ours", "dense") if "dense" in taken else ("ours", "eager")
        yield (
            *(name, row["kernels"], other),
            *(f"{1e3 * taken[side]:.3f}" if side in taken else "" for side in (own, other)),
            f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else "",
            f"{100 * row['share_of_roofline']:.0f} %" if "share_of_roofline" in row else "",
            *(f"{worst[side]:.1e}" if side in worst else "" for side in (own, other)),
        )


def _waits(results: All) -> Iterator[Cells]:
    for kind, row in rows_of(results, "waits").items():
        counts = (", ".join(f"{name} {count}" for name, count in row[of].items()) for of in ("events", "places"))
        yield (kind, f"{row['waits_per_step']:g}", *counts)


def _compiled(results: All) -> Iterator[Cells]:
    for shape, row in rows_of(results, "compiled").items():
        taken = (f"{1e3 * side['seconds']:.2f}" for side in (row, row["plain"]))
        yield (shape, *taken, f"{row['times_as_fast']:.2f}", f"{row['loss_difference']:.1e}")


def _runs(results: All) -> Iterator[str]:
    runs, resumes = rows_of(results, "long run"), rows_of(results, "resume")
    if "whole" in runs:
        row = runs["whole"]
        falls = "falls" if row["falls"] else "**does not fall**"
        yield f"- Long run: {row['tokens']:,} tokens, {row['epochs']} epochs, in {row['seconds']:.0f} s"
        yield f"  ({row['tokens_per_second']:,.0f} tokens a second with all that a run writes). The loss {falls},"
        yield f"  {row['first_loss']:.4f} to {row['last_loss']:.4f}, with the CE increase on held-out text,"
        yield f"  {row['held_out'][0]:.3f} to {row['held_out'][-1]:.3f}."
    for name, row in {**runs, **resumes}.items():
        if "agrees" in row:
            largest = row.get("largest_difference", row.get("loss_difference"))
            bits = {True: ", the same bits", False: ", not the same bits", None: ""}[row.get("same_bits")]
            agrees = "agrees" if row["agrees"] else "**does not agree**"
            yield f"- {name[0].upper()}{name[1:]} ({row['steps']} steps): {agrees}, loss within {largest:.1e}{bits}."
    yield ""


def _others(results: All) -> Iterator[Cells]:
    for part in results["parts"]:
        if part.startswith("peer ") or part == "paper's step":
            for side, row in rows_of(results, part).items():
                memory = f"{row['tensors_bytes'] / GIB:.2f}"
                yield (part, side, f"{row['tokens_per_second']:,.0f}", f"{1e3 * row['seconds']:.2f}", memory)


def markdown(results: All) -> str:
    """A section for RESULTS.md."""
    card, calls = rows_of(results, "card"), results["calls"]
    device = card.get("device", {"name": "an unknown device", "versions": {}})
    versions = ", ".join(f"{name} {found}" for name, found in device["versions"].items())
    rates = ", ".join(
        f"{row['flops_per_second'] / 1e12:,.3g} in {n}" for n, row in card.items() if "flops_per_second" in row
    )
    memory = card.get("memory", {}).get("bytes_per_second", float("nan")) / 1e12
    lines = [
        f"## {device['name']} — {calls[-1]['date']}",
        "",
        f"{versions}; Python {device.get('python', '')}. Random weights.",
    ]
    lines += [f"Products, Tflop a second: {rates}. Memory: {memory:.3g} TB/s.", ""]
    if results["made_with"]["device"] == "cpu":
        caveat = "Tried on a processor: kernels are the eager ones, and no time says anything of a card."
        lines += [f"{caveat}{' Shapes are tiny.' if results['made_with']['tiny'] else ''}", ""]
    head = (
        "shape",
        "precision",
        "kind",
        "tokens/s",
        "ms",
        "MFU",
        "of the roofline",
        "L0",
        "peak GiB",
        "planned : peak",
    )
    lines += table(head, _steps(results))
    head = (
        "kernel",
        "ours",
        "against",
        "ours, ms",
        "theirs, ms",
        "times as fast",
        "of the roofline",
        "error",
        "theirs",
    )
    lines += table(head, _kernels(results))
    lines += table(("kind", "host waits a step", "events in all", "places"), _waits(results))
    head = ("e2e, mixed, blocks compiled", "ms", "as they are, ms", "times as fast", "difference of losses")
    lines += table(head, _compiled(results))
    lines += _runs(results)
    lines += table(("", "side", "tokens/s", "ms", "peak GiB"), _others(results))
    found, judged = measured(results), is_judged(results)
    goal_rows = (
        (
            *(goal.text, goal.aim, goal.form.format(goal.paper)),
            goal.form.format(found[goal.key]) if goal.key in found else "",
            verdict(goal, found) if judged else "not judged",
        )
        for goal in goals()
    )
    lines += table(("goal", "aim", "H200 on paper", "measured", ""), goal_rows)
    for name, part in results["parts"].items():
        if part["status"] != "done":
            lines.append(f"- {name}: {part['status']}{'; ' + part['reason'] if 'reason' in part else ''}")
    lines += ["", "```sh", *dict.fromkeys(call["command"] for call in calls), "```", ""]
    return "\n".join(lines)


def charts(results: All) -> list[Any]:
    """Charts of what is there: tokens a second beside the roofline, and curves of losses."""
    from endwise.config.method import PRESET_METHODS
    from endwise.figures.charts import Axis, Chart, Mark, Panel, Series

    where = rows_of(results, "card").get("device", {}).get("name", "an unknown device")
    by_precision: dict[str, dict[str, All]] = {}
    for part in results["parts"]:
        if part.startswith("steps ") and (rows := rows_of(results, part)):
            _, shape, precision = part.split(" ", 2)
            by_precision.setdefault(precision, {})[shape] = rows
    shapes = tuple(dict.fromkeys(shape for found in by_precision.values() for shape in found))
    panels = []
    for precision, found in by_precision.items():
        series = []
        for kind, method in PRESET_METHODS.items():
            at = [(shapes.index(shape), rows[kind]) for shape, rows in found.items() if kind in rows]
            reached = tuple(Mark(x, row["tokens_per_second"]) for x, row in at)
            allowed = tuple(Mark(x, row["tokens_per_second"] / row["share_of_roofline"]) for x, row in at)
            series += [Series(method, reached, joined=False), Series(method, allowed, "roofline", joined=False, rank=1)]
        y = Axis("tokens a second", log=True)
        panels.append(Panel(precision, Axis("shape", categories=shapes), y, tuple(s for s in series if s.marks)))
    drawn = [Chart("steps", "A training step", f"Random weights, on {where}.", tuple(panels))] if panels else []
    runs, method = rows_of(results, "long run"), PRESET_METHODS["e2e_ds"]
    curves = []
    tokens, loss = Axis("training tokens"), Axis("loss")
    if "whole" in runs:
        marks = tuple(Mark(x, y) for x, y in runs["whole"]["curve"])
        curves.append(Panel("the whole run", tokens, loss, (Series(method, marks, marked=False),)))
    if (first := runs.get("first steps, as on a processor")) is not None:
        both = zip(("on a processor", "on the device"), first["curves"], strict=True)
        series = (Series(method, tuple(Mark(*at) for at in curve), of, rank=n) for n, (of, curve) in enumerate(both))
        curves.append(Panel("its first steps", tokens, loss, tuple(series)))
    if curves:
        drawn.append(Chart("long_run", "A long run", f"Embedded model and corpus, on {where}.", tuple(curves)))
    return drawn


def write_report(results: All, out: Path) -> None:
    """`NAME.md` beside the results, and figures in `NAME-figures`."""
    text, folder = markdown(results), out.with_name(f"{out.stem}-figures")
    try:
        from endwise.figures.print import save

        folder.mkdir(exist_ok=True)
        for chart in charts(results):
            save(chart, folder)
    except Exception as error:  # noqa: BLE001 - the figures are not worth the tables
        text += f"\nNo figures: {type(error).__name__}: {error}\n"
    page = out.with_suffix(".md")
    draft = page.with_name(page.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(page)


def summary(results: All, out: Path) -> str:
    """One line."""
    parts = results["parts"]
    count = Counter(part["status"] for part in parts.values())
    words = [f"{count[status]} {status}" for status in ("done", "skipped", "failed", "left") if count[status]]
    if failed := [name for name, part in parts.items() if part["status"] == "failed"]:
        words.append(f"look at {', '.join(failed)}")
    if is_judged(results):
        found = measured(results)
        met = sum(verdict(goal, found) == "met" for goal in goals())
        words.append(f"{met} of {len(goals())} goals met, {sum(g.key not in found for g in goals())} not measured")
    return f"{out}: parts {', '.join(words)}"
