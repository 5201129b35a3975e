"""The learning rate over a run."""

import math

from endwise.run_config import TrainingConfig


def rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up to 1, then a cosine down to the floor."""
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2
