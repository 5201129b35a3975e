"""Silence of transformers while it loads: its own bars and warnings are left out unless they are asked for."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import modeling_gguf_pytorch_utils as of_gguf
from transformers.utils import logging

ASKED, SILENT = "TRANSFORMERS_VERBOSITY", "error"
"""Environment variable that asks for what transformers says, and its value that asks for nothing."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Leave out what transformers shows within it, unless `TRANSFORMERS_VERBOSITY` asks for it; downloads keep their
    bars on a terminal.
    """
    with ExitStack() as restored:
        if os.environ.get(ASKED, SILENT) == SILENT:
            restored.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            _hide_bars(restored)
        yield


def _hide_bars(restored: ExitStack) -> None:
    downloads = not are_progress_bars_disabled() and sys.stderr.isatty()
    if logging.is_progress_bar_enabled():
        restored.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    shown = vars(of_gguf)["tqdm"]  # plain tqdm, which transformers' own setting does not reach
    restored.callback(setattr, of_gguf, "tqdm", shown)
    setattr(of_gguf, "tqdm", partial(shown, disable=True))  # noqa: B010  A module's attribute is typed as its class.
