"""Runs a suite on a run of ours, in the suite's own interpreter, and keeps its numbers beside the run.

RUN/bench/<suite>.json      settings, versions, numbers: written at the end, whole
RUN/bench/<suite>.log       what the suite said
RUN/bench/<suite>/          what it wrote itself (`results/`), and the job that it was given
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from endwise import embedded
from endwise.common.errors import ConfigError, Interrupted, SuiteFailed
from endwise.common.files import held, read_json, write_json
from endwise.config.base import apply_overrides
from endwise.evaluation.measure import sequences_of
from endwise.evaluation.provenance import corpora_of_runs, model_of
from endwise.models.sites import Place
from endwise.runs.folder import RunFolder
from endwise.suites.base import SUITES, Suite

HELDOUT = "run"
"""Value of `data` that stands for the run's held-out text."""
BELOW = ("sae-lens", "transformer-lens", "torch", "numpy")
"""Packages that suites stand on, whose versions are kept as well."""
LAST_WORDS = 300
LARGEST_BATCH = 16
"""Sequences of held-out text at a time."""
_ASK = """
import importlib.util, importlib.metadata, json, sys
found = {}
for name in sys.argv[2:] if importlib.util.find_spec(sys.argv[1]) else []:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Bench:
    """Results of a suite."""

    file: Path
    numbers: Mapping[str, float]
    ours: Mapping[str, float]
    """Results of `endwise evaluate` on the same text, of numbers that both have."""


class Benching:
    """A suite that is about to run on a run; until `start` nothing is asked for or written.

    Args:
        run: a run folder.
        suite: a name among `SUITES`.
        python: the interpreter of the environment that has the suite; None: this one.
        model: a folder or a name on the hub, instead of the recipe's.
        data: `run` for the run's held-out text; a folder; None: the suite's own data sets.
        out: folder for the results; None: `bench/` in the run.
        overrides: `key=value` of the suite's settings.

    Raises:
        ConfigError: there is no such suite, setting or data, or the run is not what suites can measure.
        RunFolderError: it is no run, or holds no trained SAE.
    """

    def __init__(
        self,
        run: Path,
        suite: str,
        *,
        python: Path | None = None,
        model: str | None = None,
        data: str | None = None,
        out: Path | None = None,
        overrides: list[str] | None = None,
    ) -> None:
        kind = SUITES[suite]
        self._run, self._config = RunFolder(run), RunFolder.config_of_trained(run)
        place = Place.parse(self._config.site)
        if place.reads != place.writes:
            raise ConfigError(f"{suite} measures SAEs; {run} is a transcoder ({place.name}). Give a run of one site.")
        if data == HELDOUT and not kind.takes_heldout:
            raise ConfigError(f"{suite} takes no --data {HELDOUT}, as it needs texts with labels. Leave it out.")
        self._site, self._heldout = place.reads.name, data == HELDOUT
        self.suite: Suite[Any] = kind(
            kind.Settings.build(apply_overrides({}, overrides or []), f"a setting of {suite}"),
            None if data is None or self._heldout else _folder(data),
        )
        name = model or self._config.model.name
        self._model = str(embedded.folder()) if name == "embedded" else name
        if Path(self._model).is_dir():
            self._model = str(Path(self._model).absolute())
        self._python = sys.executable if python is None else str(python.absolute())
        self._out = (self._run.path / "bench" if out is None else out).absolute()

    def asks(self) -> list[str]:
        """List what the suite will ask the Hugging Face hub for; empty: nothing."""
        names = [] if self._heldout else [f"the data set {name}" for name in self.suite.data_sets()]
        return names if Path(self._model).is_dir() else [*names, f"the model {self._model}"]

    def start(self, say: Callable[[str], None]) -> Bench:
        """Run it. What the suite keeps of a run that was stopped is used again, if nothing else changed.

        Raises:
            ConfigError: the environment lacks the suite.
            SuiteFailed, Interrupted: it failed, or was stopped; the message names its log.
            RunFolderError: it runs already, or nothing can be written.
        """
        name, folder = self.suite.name, self._out / self.suite.name
        versions, log, file = self._versions(), self._out / f"{name}.log", self._out / f"{name}.json"
        with held(self._out / f".{name}.lock", f"{name} runs on {self._run.path} already. Wait for it to finish."):
            heldout = self._heldout_tokens() if self._heldout else None
            settings = self.suite.settings.model_dump(mode="json") | as_batches(heldout)
            made_of = {"weights": self._run.weights_digest(), "versions": versions}
            self._prepare(folder, settings, made_of, heldout)
            say(f"{name} runs; its progress is in {log}")
            self._carry_out(folder, log)
            numbers, measured = read_json(folder / "done.json"), self._run.measured() if self._heldout else None
            ours = self.suite.ours(measured) if measured else {}
            shutil.rmtree(folder / "cache", ignore_errors=True)
            data = HELDOUT if self._heldout else str(self.suite.local or "the suite's own")
            about = {"suite": name, "seed": self._config.seed, **made_of, "settings": settings, "data": data}
            write_json(file, {**about, "model": self._model, "numbers": numbers, "endwise": ours})
        return Bench(file, numbers, ours)

    def _versions(self) -> dict[str, str]:
        """Versions of the suite and of what it stands on, in its environment."""
        package = self.suite.package
        way = f"python -m venv ENV && ENV/bin/pip install {package}; then give --python ENV/bin/python"
        asked = [self._python, "-c", _ASK, self.suite.module, package, *BELOW]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, env=_environment(), check=True)
            found = json.loads(done.stdout)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            reason = " ".join(str(getattr(error, "stderr", "") or error).split())[-LAST_WORDS:]
            raise ConfigError(f"{self._python} cannot be checked for {package}: {reason}. Make one: {way}") from None
        if package not in found:
            raise ConfigError(f"{self._python} has no package {package}. Make an environment for it: {way}")
        return found

    def _prepare(
        self, folder: Path, settings: Mapping[str, Any], made_of: Mapping[str, Any], heldout: Tensor | None
    ) -> None:
        """Make the suite's folder, which keeps what it did before where that was made of the same."""
        kept, local = folder / "made_of.json", self.suite.local
        job = {
            "name": self._run.path.resolve().name,
            "sae": str(self._run.sae.absolute()),
            "model": self._model,
            "site": self._site,
            "settings": settings,
            "local": None if local is None else str(local.absolute()),
            "heldout": None if heldout is None else "heldout.parquet",
        }
        if not (kept.exists() and read_json(kept) == {**made_of, "job": job}):
            shutil.rmtree(folder, ignore_errors=True)
            write_json(kept, {**made_of, "job": job})
        write_json(folder / "job.json", job)
        (folder / "done.json").unlink(missing_ok=True)
        if heldout is not None:
            pq.write_table(pa.table({"tokens": heldout.tolist()}), folder / "heldout.parquet")

    def _heldout_tokens(self) -> Tensor:
        """The sequences that `endwise evaluate` measured the run on, or would: `[sequences context]`."""
        runs, wanted = {self._run.path: self._config}, self._config.evaluation
        if measured := self._run.measured():
            wanted = wanted.model_copy(update={"tokens": measured["asked_tokens"]})
        corpus = corpora_of_runs(runs, model_of(runs), evaluation_tokens=wanted.skip + wanted.tokens).heldout
        return corpus.batch(sequences_of(corpus, wanted)).tokens

    def _carry_out(self, folder: Path, log: Path) -> None:
        name, command = self.suite.name, [self._python, str(self.suite.program), "job.json"]
        way = f"Its log: {log}. The same command tries it again."
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=_environment())
            try:
                code = process.wait()
            except KeyboardInterrupt:
                raise Interrupted(f"{name} was stopped. {way}") from None
            finally:
                process.kill()
                process.wait()
        if code or not (folder / "done.json").exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            words = f": {lines[-1][:LAST_WORDS]}" if lines else ""
            raise SuiteFailed(f"{name} failed (exit code {code}){words}. {way}")


def as_batches(heldout: Tensor | None) -> dict[str, Any]:
    """Settings by which SAEBench's core evaluation takes every sequence once."""
    if heldout is None:
        return {}
    sequences, context = heldout.shape
    batch = max(size for size in range(1, LARGEST_BATCH + 1) if sequences % size == 0)
    batches = dict.fromkeys(("reconstruction_batches", "variance_batches"), sequences // batch)
    return {"dataset": HELDOUT, "context": context, "batch": batch, **batches}


def _folder(data: str) -> Path:
    path = Path(data)
    if not path.is_dir():
        raise ConfigError(f"--data must be {HELDOUT} or a folder; there is no folder {data!r:.200}. Give one.")
    return path


def _environment() -> dict[str, str]:
    """Ours, without the paths that lead this interpreter to its packages, and without checks of shapes and types: those
    of SAEBench 0.6.0 refuse its own probes under jaxtyping 0.3, and a model of TransformerLens's bridge.
    """
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**ours, "JAXTYPING_DISABLE": "1"}
