"""Draw what each method of the price study costs and saves: `python tools/price_figure.py`.

Reads docs/results/price/price.csv, writes docs/images/price.png: operations against the L0 that a method needs, both
relative to local training, one panel a site. A bar spans the curve, from where features are many to where they are few;
a dot is the mean over it, with none where the method's curve crosses local's.
"""

import csv
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DOCS = Path(__file__).parent.parent / "docs"
FAMILIES = {"batchtopk": "#D55E00", "jumprelu": "#CC79A7", "staged": "#009E73", "finetune": "#8C6D31", "": "#0072B2"}
"""Colour of a method by how its name starts."""
LEFT_OUT = "million", "against", "e2e, "
"""Runs that are relative to another reference, and single points."""
APART = 1.03
"""Least ratio between the places of two bars."""


def draw(axes: Axes, title: str, rows: Sequence[dict[str, str]]) -> None:
    axes.set(xscale="log", yscale="log", xlim=(0.9, 16), ylim=(0.3, 2.8))
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("operations of the training, relative to local")
    for axis, ticks in ((axes.xaxis, (1, 1.5, 2, 3, 5, 8, 12)), (axes.yaxis, (0.35, 0.5, 0.7, 1, 1.4, 2, 2.8))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.grid(color="#e1e0dc", linewidth=0.6)
    axes.axhline(1, color="#1c2127", linewidth=0.8)
    numbers, place = count(1), 0.0
    for row in sorted(rows, key=lambda each: float(each["operations"])):
        number, name = next(numbers), row["method"]
        place = max(float(row["operations"]), APART * place)
        values = [float(row[f"ratio_at_ends.{end}"]) for end in ("low", "high")]
        colour = next(colour for start, colour in FAMILIES.items() if name.startswith(start))
        if row["ratio"] and not row["crossings"]:
            values.append(float(row["ratio"]))
            axes.plot(place, values[-1], "o", color=colour, markersize=4)
        bar = [min(values), max(values)]
        axes.plot([place, place], bar, color=colour, linewidth=1.6, alpha=0.55, label=f"{number}  {name}")
        above = bar[1] if number % 2 else bar[0]
        axes.annotate(
            str(number), (place, above), (0, 5 if number % 2 else -6), textcoords="offset points", fontsize=7,
            color=colour, ha="center", va="center",
        )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=7, frameon=False)


def main() -> None:
    with (DOCS / "results" / "price" / "price.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio_at_ends.low"]]
    rows = [row for row in rows if not any(part in row["method"] for part in LEFT_OUT)]
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure, panels = plt.subplots(1, len(sites), figsize=(10, 6), sharey=True, layout="constrained")
    for axes, site in zip(panels, sites, strict=True):
        draw(axes, site, [row for row in rows if row["site"] == site])
    panels[0].set_ylabel("L0 needed at equal CE increase, relative to local")
    figure.savefig(DOCS / "images" / "price.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
