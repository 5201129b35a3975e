"""Conditions of every test: no network, folders of its own, few threads, and the same examples each time.

The environment is set before anything imports the libraries that read it.
"""

import gc
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakSet

gc.disable()  # until all is collected: of what is imported nothing is garbage

_scratch = tempfile.TemporaryDirectory(prefix="endwise-tests-", ignore_cleanup_errors=True)
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, min(4, (os.cpu_count() or 1) // _workers))
# Workers inherit the environment of the process that starts them, which is one and so takes more threads.
_asked = os.environ.setdefault("ENDWISE_TESTS_ASKED_THREADS", os.environ.get("OMP_NUM_THREADS", ""))

# Nothing here cuts the power, and what a process that was killed had written, the system still has.
os.fsync = lambda _descriptor: None

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(Path(_scratch.name) / "huggingface"),
    "ENDWISE_CACHE": str(Path(_scratch.name) / "endwise"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": _asked or str(_threads),
}

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from hypothesis.internal.conjecture import providers  # noqa: E402

import light_checks  # noqa: E402
import warm  # noqa: E402

light_checks.install()
if warm.SHARED not in os.environ:
    warm.shared(Path(_scratch.name))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A model's first forward pass can take longer than Hypothesis grants an example; the same examples on every machine,
# which constants of modules that happen to be imported would change (to parse these takes a second).
providers.is_local_module_file = lambda _path: False
settings.register_profile("endwise", deadline=None, derandomize=True)
settings.load_profile("endwise")


SLOWEST_FIRST = (
    *("reproduction_whole", "engines", "planning", "docs", "faults", "distributed", "checkpoints", "sweeps"),
    *("downstream", "product", "quickstart"),
)
"""Test files that take the longest, which pytest-xdist should not be left with at the end (see `PYTEST_ARGS`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of garbage collection, and collect less often."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what looks for leaks as the interpreter ends would report all that is frozen


class NetworkBlocked(RuntimeError):
    """Not an OSError, so that no library takes it for an ordinary failure and continues without saying so."""


def _refuse_remote(address: Any) -> None:
    host = address[0] if isinstance(address, tuple) else None
    if host is not None and host not in ("localhost", "127.0.0.1", "::1"):
        raise NetworkBlocked(f"A test tried to reach {host}. Tests run offline: use a file, or a server on localhost.")


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            original = getattr(socket.socket, name)

            def guarded(self: socket.socket, address: Any, _original: Any = original) -> Any:
                _refuse_remote(address)
                return _original(self, address)

            patch.setattr(socket.socket, name, guarded)
        resolve = socket.getaddrinfo

        def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
            if host is not None:
                _refuse_remote((host,))
            return resolve(host, *args, **kwargs)

        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield


@pytest.fixture(autouse=True)
def _same_randomness():
    """A test that draws without a generator of its own still draws the same numbers, alone or among others."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed also formats the stack, where CUDA has not begun
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


# What many modules train. Imported within: what is imported up here escapes the type checker that tests run under.


@pytest.fixture(scope="module")
def model():
    from small_gpt2 import small_model

    return small_model()


@pytest.fixture(scope="module")
def token_files(tmp_path_factory):
    from small_gpt2 import write_tokens

    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def corpora(token_files):
    from small_gpt2 import small_corpora

    return small_corpora(token_files)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the model and its tokens, for processes of their own."""
    from small_gpt2 import small_model, write_tokens

    folder = tmp_path_factory.mktemp("made")
    small_model().model.save_pretrained(folder / "model")
    return write_tokens(folder)


@pytest.fixture(autouse=True, scope="module")
def coarsely_drawn():
    """Figures for print have few dots, outlines in place of subsets of typefaces and no layout, and of their forms the
    first alone is drawn: these take most of the time, and are looked at in `tests/figures`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    save, drawn = Figure.savefig, WeakSet()

    def coarse(self: Figure, path: Any, **settings: Any) -> None:
        if self in drawn:
            Path(path).write_bytes(b"the same figure")
            return
        drawn.add(self)
        self.set_layout_engine(None)  # with any other, all is drawn twice
        with mpl.rc_context({"pdf.fonttype": 3}):
            save(self, path, **(settings | ({"dpi": 50} if "dpi" in settings else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", coarse)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Figures for print are empty files: drawing takes longest, and is looked at by other tests."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("endwise.figures.print.draw", lambda chart: Figure())
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="module")
def fitted_on_little(request):
    """Thresholds, scales of errors and norms are fitted to 2,048 tokens, or a module's `FITTED_ON`: more take longer
    than a short training.
    """
    from endwise.dictionaries import normed
    from endwise.dictionaries.batchtopk import BatchTopKSAE
    from endwise.dictionaries.jumprelu import JumpReLUSAE
    from endwise.training import fitting

    tokens = getattr(request.module, "FITTED_ON", 2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MEASURED_ON", tokens)
        patch.setattr(normed, "FITTED_ON", tokens)
        patch.setattr(BatchTopKSAE, "last_tokens", tokens)
        patch.setattr(JumpReLUSAE, "first_tokens", tokens)
        yield


@pytest.fixture(scope="module")
def models_outlined_once():
    """Keep the model outlines that every sweep begins with, for modules whose sweeps are all of one model."""
    from functools import cache

    import endwise.sweeps.survey as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_outlined", cache(module._outlined))
        yield


@pytest.fixture(scope="module")
def loaded_once():
    """A model that many commands of a module name is read and probed for the first of them alone, until it changes."""
    from functools import cache

    import endwise.models.loading as module

    read, found = module._read, {}

    def read_once(*given: Any) -> Any:
        files = sorted(Path(given[1]).glob("*"))
        key = str((*given, [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]))
        if key not in found:
            found[key] = read(*given)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read", read_once)
        patch.setattr(module, "_spliceable", cache(module._spliceable))
        yield
