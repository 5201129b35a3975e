"""Formats of SAE files, one a file; importing one here registers it."""

from endwise.formats.base import CENTRED, FORMATS, NATIVE, PROCESSING, Format, Layout, Stored
from endwise.formats.circuit_tracer import CircuitTracer
from endwise.formats.dictionary_learning import DictionaryLearning
from endwise.formats.e2e_sae import E2eSae
from endwise.formats.finding import format_at, located, metadata_at, processing_remark, stored_at, weights_file
from endwise.formats.gemma_scope import GemmaScope
from endwise.formats.gemma_scope_2 import GemmaScope2
from endwise.formats.goodfire import Goodfire
from endwise.formats.llama_scope import LlamaScope
from endwise.formats.llamascopium import Llamascopium
from endwise.formats.naming import at_commit, here, on_hub
from endwise.formats.openai import OpenAI
from endwise.formats.qwen_scope import QwenScope
from endwise.formats.saelens import SAELens
from endwise.formats.sparsify import Sparsify

__all__ = [
    "CENTRED",
    "FORMATS",
    "NATIVE",
    "PROCESSING",
    "CircuitTracer",
    "DictionaryLearning",
    "E2eSae",
    "Format",
    "GemmaScope",
    "GemmaScope2",
    "Goodfire",
    "Layout",
    "LlamaScope",
    "Llamascopium",
    "OpenAI",
    "QwenScope",
    "SAELens",
    "Sparsify",
    "Stored",
    "at_commit",
    "format_at",
    "here",
    "located",
    "metadata_at",
    "on_hub",
    "processing_remark",
    "stored_at",
    "weights_file",
]
