"""The paper's experiments from one command: the runs, then everything that they show."""

import shlex
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from endwise.common.files import expanded
from endwise.common.showing import Shown
from endwise.evaluation.summary import RunSummary, remarks_of
from endwise.paper.report import write
from endwise.paper.runs import StudyRuns, make_runs
from endwise.paper.study_claims import Claim
from endwise.paper.study_config import StudyConfig, find_study
from endwise.sweeps.engines import engine_of
from endwise.sweeps.tasks import folder_of


@dataclass(frozen=True, repr=False)
class Reproduced(Shown):
    claims: list[Claim]
    runs: StudyRuns
    report: Path
    """The page; `tables/` and `figures/` lie beside it."""

    def shown_facts(self) -> dict[str, object]:
        return {"claims": len(self.claims), "failed runs": len(self.runs.failures), "report": self.report}

    @property
    def remarks(self) -> list[str]:
        """Remarks on the runs' numbers (`endwise.common.remarks`)."""
        folders = (folder_of(each) for name in self.runs.plan.experiments for each in self.runs.finished(name))
        return remarks_of(map(RunSummary.read, dict.fromkeys(folders)))


def reproduce(
    study: StudyConfig | str | Path = "embedded",
    out: Path | str | None = None,
    *,
    budget: str | None = None,
    display: bool = True,
) -> Reproduced:
    """Carry out a study's experiments and write `report.html`, `tables/` and `figures/`.

    Started again with the same `out` it does nothing twice, and ends with the same tables.

    Args:
        study: one that ships (embedded, gpt2-small, tinystories-1m), the path of a file like theirs, or an object.
        out: unset: `runs/paper-<study>`.
        budget: 90s, 30m or 2h: makes the runs as long as fits. Unset: as long as the study says.

    Raises:
        ConfigError: the study breaks a rule, or `out` holds another one.
        Interrupted: the user asked to stop; what runs is saved.
    """
    config = study if isinstance(study, StudyConfig) else find_study(str(study))
    name = "study" if isinstance(study, StudyConfig) else Path(study).stem
    folder = Path("runs") / f"paper-{name}" if out is None else expanded(out)
    with closing(engine_of(config, folder)) as used:
        runs = make_runs(config, folder, budget, used, display)
    command = shlex.join(["endwise", *sys.argv[1:]])
    return Reproduced(write(runs, folder, command), runs, folder / "report.html")
