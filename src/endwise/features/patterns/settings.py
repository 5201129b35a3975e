"""Settings of pattern explanations, checked before anything is read."""

from dataclasses import asdict, dataclass
from typing import Any

from endwise.common.errors import ConfigError

LARGEST = 10_000


@dataclass(frozen=True)
class PatternSettings:
    kept: float = 0.5
    """Share of an activation that a suffix, or a substitution in it, must keep."""
    contexts: int = 16
    """Firings of a feature that patterns are made of, drawn at random from those of the first half."""
    longest: int = 6
    """Tokens of a suffix, at most."""
    substitutes: int = 8
    """Tokens, drawn by how often they occur, that are tried in the place of each token; and as many of those nearest to
    it by the model's input embeddings."""
    any_token: float = 0.75
    """Share of the substitutes drawn that must keep the activation for a token to become a wildcard."""
    least: int = 10
    """Firings in each half below which a feature is not scored."""
    explained: float = 0.5
    """F1 from which on a feature counts as explained."""
    random: int = 100
    """Control: random directions, each with a threshold at which it fires as often as some feature."""
    seed: int = 0
    """Seed of contexts, substitutes, and controls."""

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a setting is out of its range.
        """
        for name in ("kept", "any_token", "explained"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1; given {getattr(self, name):g}. Change it.")
        for name, low in {"contexts": 1, "longest": 1, "substitutes": 1, "least": 1, "random": 0, "seed": 0}.items():
            value, high = getattr(self, name), 2**63 - 1 if name == "seed" else LARGEST
            if not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high:,}; given {value}. Change it.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
