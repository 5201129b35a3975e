"""The scripts of `benchmarks/` as modules."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

from places import BENCHMARKS


@contextmanager
def benchmark_modules(*names):
    """`benchmarks/` is no package and not installed; its scripts import each other by bare name, as here."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
                del sys.modules[name]
