"""Formats of SAE files, one a file; importing one here registers it."""

from endwise.formats.base import (
    FORMATS,
    NATIVE,
    Format,
    Layout,
    Stored,
    format_at,
    metadata_at,
    stored_at,
    weights_file,
)
from endwise.formats.circuit_tracer import CircuitTracer
from endwise.formats.saelens import SAELens

__all__ = [
    "FORMATS",
    "NATIVE",
    "CircuitTracer",
    "Format",
    "Layout",
    "SAELens",
    "Stored",
    "format_at",
    "metadata_at",
    "stored_at",
    "weights_file",
]
