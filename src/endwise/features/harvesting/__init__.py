"""What fills a run's `harvest/`: one pass over the text, in parts that can be interrupted, resumed and merged."""

from endwise.features.harvesting.run import harvest

__all__ = ["harvest"]
