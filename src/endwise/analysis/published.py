"""The paper's published numbers (Braun et al. 2024, GPT2-small), which ours are put beside."""

from dataclasses import dataclass

from endwise.config.objective import Kind


@dataclass(frozen=True)
class Published:
    """A row of table 2 or 3."""

    layer: int
    kind: Kind
    coefficient: float
    l0: float
    alive: int
    ce_increase: float


SIMILAR_CE = (
    Published(2, "local", 0.8, 73.5, 41_000, 0.016),
    Published(2, "e2e", 0.5, 33.4, 22_000, 0.020),
    Published(2, "e2e_ds", 10.0, 36.2, 18_000, 0.015),
    Published(6, "local", 4.0, 69.4, 26_000, 0.144),
    Published(6, "e2e", 3.0, 27.5, 22_000, 0.145),
    Published(6, "e2e_ds", 50.0, 36.8, 15_000, 0.124),
    Published(10, "local", 6.0, 162.7, 33_000, 0.122),
    Published(10, "e2e", 1.5, 62.3, 25_000, 0.131),
    Published(10, "e2e_ds", 1.75, 70.2, 25_000, 0.144),
)
"""Table 2: runs with a similar CE increase."""

SIMILAR_L0 = (
    Published(2, "local", 4.0, 18.4, 18_000, 0.101),
    Published(2, "e2e", 1.5, 18.6, 20_000, 0.043),
    Published(2, "e2e_ds", 35.0, 17.9, 15_000, 0.039),
    Published(6, "local", 6.0, 42.8, 21_000, 0.228),
    Published(6, "e2e", 1.5, 39.7, 25_000, 0.099),
    Published(6, "e2e_ds", 50.0, 36.8, 15_000, 0.124),
    Published(10, "local", 10.0, 74.9, 28_000, 0.202),
    Published(10, "e2e", 1.5, 62.3, 25_000, 0.131),
    Published(10, "e2e_ds", 1.75, 70.2, 25_000, 0.144),
)
"""Table 3: runs with a similar L0."""

LAYERS = (2, 6, 10)
"""Layers, of 12; the order of the tuples below."""

NORM_RATIO: dict[Kind, tuple[float, ...]] = {
    "local": (0.98, 0.92, 0.91),
    "e2e": (0.67, 0.31, 0.15),
    "e2e_ds": (0.74, 0.56, 0.32),
}
"""Table 5: mean of ‖â‖ / ‖a‖ at positions above 0."""

TRAINING_HOURS: dict[Kind, tuple[float, ...]] = {
    "local": (3.75, 4.75, 5 + 19 / 60),
    "e2e": (12.4, 11 + 20 / 60, 10.2),
    "e2e_ds": (12.5, 11.4, 10 + 20 / 60),
}
"""Table 6: on an A100 of 80 GB."""


def relative_to_local(rows: tuple[Published, ...], kind: Kind, metric: str) -> list[float]:
    """Divide the kind's number by local's, layer by layer."""
    by_layer = {(row.layer, row.kind): float(getattr(row, metric)) for row in rows}
    return [by_layer[layer, kind] / by_layer[layer, "local"] for layer in LAYERS]


def cost_relative_to_local(kind: Kind) -> list[float]:
    """Training time divided by local's, of each layer."""
    pairs = zip(TRAINING_HOURS[kind], TRAINING_HOURS["local"], strict=True)
    return [hours / local for hours, local in pairs]
