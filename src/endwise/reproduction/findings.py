"""What a study's runs show: read from their folders, joined into tables, the same however often it was interrupted."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endwise.analysis.comparison import Summary, runs_at_similar, similar_by_seed, summarise
from endwise.analysis.run_summary import RunSummary
from endwise.errors import FormatError
from endwise.features.norms import Norms, norms
from endwise.reproduction.experiments import inner, middle
from endwise.reproduction.mitigations import WAYS, CostPoint, Mitigations, Variant, Way, mitigations, total_cost
from endwise.reproduction.runs import StudyRuns
from endwise.run_config import EvaluationConfig, Kind, RunConfig
from endwise.run_evaluation import load_sae
from endwise.run_folder import RunFolder
from endwise.standing import check_texts, model_of, pinned
from endwise.sweeps.tasks import Loaded, folder_of


@dataclass(frozen=True)
class Measured:
    """A finished run: its recipe, and what it measured."""

    config: RunConfig
    summary: RunSummary


@dataclass(frozen=True)
class Findings:
    made: StudyRuns
    sites: Mapping[str, Summary]
    """By site, the comparison of its kinds."""
    similar_l0: Mapping[str, tuple[RunSummary, ...]]
    """By site, the run of each kind whose L0s are closest to each other."""
    norms: Mapping[str, Norms]
    """By run folder, of the runs of each seed at similar CE increase."""
    experiments: Mapping[str, tuple[Measured, ...]]
    mitigations: Mitigations | None
    settings: EvaluationConfig
    """How its runs were measured, and how intervals are drawn."""

    def summaries(self, experiment: str) -> list[RunSummary]:
        return [run.summary for run in self.experiments[experiment]]

    def middle_coefficient(self, kind: Kind) -> float:
        """Of the kind's curve at the first site."""
        study = self.made.experiments.study
        return middle(study.kind(kind, study.site).coefficients)

    def is_base(self, point: CostPoint) -> bool:
        """Whether a variant is the study's own training."""
        curves = {run.folder for run in (*self.summaries("curves"), *self.summaries("seeds"))}
        return all(run.folder in curves for run in point.variant.runs)

    @property
    def similar_ce(self) -> dict[str, tuple[RunSummary, ...]]:
        return {site: summary.similar for site, summary in self.sites.items()}


def find(made: StudyRuns, out: Path) -> Findings:
    """Reads a study's finished runs and compares them; measures what needs the model once more, and keeps it."""
    read = {
        name: tuple(Measured(config, RunSummary.read(folder_of(config))) for config in made.finished(name))
        for name in made.plan.experiments
    }
    study = made.experiments.study
    measured = [run for name in ("curves", "seeds") for run in read.get(name, ())]
    curves = [run.summary for run in measured]
    settings = EvaluationConfig.build(study.recipe.get("evaluation", {}), "recipe.evaluation")
    sites = {
        site: _summary(runs, settings) for site in study.sites if (runs := [run for run in curves if run.site == site])
    }
    similar_l0 = {site: runs_at_similar(summary.runs, "l0") for site, summary in sites.items()}
    similar = [runs for each in sites.values() for runs in similar_by_seed(each.runs, "ce_increase").values()]
    folders = {run.folder for runs in similar for run in runs}
    return Findings(
        made=made,
        sites=sites,
        similar_l0=similar_l0,
        norms=_norms([run for run in measured if run.summary.folder in folders], out),
        experiments={name: read.get(name, ()) for name in (*read, *_ABSENT)},
        mitigations=mitigations(_variants(made, read), settings.bootstrap, settings.seed),
        settings=settings,
    )


_ABSENT = ("learning_rates", "curves", "starts", "seeds", "sizes", "lengths")


def _summary(runs: Sequence[RunSummary], settings: EvaluationConfig) -> Summary:
    baselines = (RunFolder(Path(runs[0].folder)).evaluation() or {})["baselines"]
    return summarise(
        runs,
        clean_ce=baselines["clean"],
        mean_ablated_ce=baselines["mean_ablated"],
        zero_ablated_ce=baselines["zero_ablated"],
        resamples=settings.bootstrap,
        seed=settings.seed,
    )


def _norms(runs: Sequence[Measured], out: Path) -> dict[str, Norms]:
    """Of each run, measured once and kept in the study's folder."""
    loaded, result = Loaded(), {}
    for run in runs:
        config, folder = run.config, folder_of(run.config)
        file = out / "norms" / f"{folder.name}.json"
        try:
            result[run.summary.folder] = Norms.read(file)
        except (FileNotFoundError, FormatError):  # the latter as an older version wrote it, or damaged
            first = pinned(folder, config)
            model, corpora = model_of({folder: config}, loaded.model(first)), loaded.corpora(first)
            check_texts({folder: config}, corpora, ["heldout"])
            sae, settings = load_sae(folder, config, model), config.evaluation
            measured = norms(
                model, sae, model.site(config.site), corpora.heldout, tokens=settings.tokens, batch=settings.batch
            )
            measured.write(file)
            result[run.summary.folder] = measured
    return result


def _variants(made: StudyRuns, read: Mapping[str, Sequence[Measured]]) -> list[Variant]:
    """The study's own curves, and each of their variants, at the first site."""
    study, variants = made.experiments.study, []
    for kind in study.kinds:
        coefficients = inner(study.kind(kind, study.site).coefficients)
        own = [
            run
            for run in (*read.get("curves", ()), *read.get("seeds", ()))
            if run.summary.kind == kind and run.summary.site == study.site and run.summary.coefficient in coefficients
        ]
        of_kind = {name: [run for run in runs if run.summary.kind == kind] for name, runs in read.items()}
        ways: dict[Way, list[Measured]] = {
            "tokens": [*own, *of_kind.get("lengths", [])],
            "dictionary": [*own, *of_kind.get("sizes", [])],
            "start": [*own, *of_kind.get("starts", [])],
        }
        for way, runs in ways.items():
            if len(runs) > len(own) or (way == "start" and kind == "local" and read.get("starts")):
                variants += _grouped(made, kind, way, runs)
    return variants


def _grouped(made: StudyRuns, kind: Kind, way: Way, runs: Sequence[Measured]) -> list[Variant]:
    """A variant for every length, size and start among the runs."""

    def key(run: Measured) -> tuple[int, float, bool]:
        config = run.config
        return config.training.tokens, config.dictionary.ratio or 0.0, config.init_from is not None

    variants = []
    for _, group in itertools.groupby(sorted(runs, key=key), key):
        members = list(group)
        costs = [total_cost(run.config, made.costs) for run in members]
        variants.append(
            Variant(
                kind=kind,
                way=way,
                label=label(members[0].config, made, way),
                runs=tuple(run.summary for run in members),
                started=members[0].config.init_from is not None,
                tokens=costs[0][0],
                seconds=float(np.mean([seconds for _, seconds in costs])),
            )
        )
    return variants


def label(config: RunConfig, made: StudyRuns, way: Way) -> str:
    """What tells a variant from the others."""
    factor = config.training.tokens / made.experiments.tokens
    if way == "dictionary":
        ratio, size = config.dictionary.ratio, config.dictionary.size
        return f"{size:,} features" if ratio is None else f"{ratio:g} features per dimension"
    if config.init_from is not None:
        return f"from local, then {factor:.3g} × tokens"
    return f"{factor:.3g} × tokens" if way == "tokens" else "from random weights"


def run_rows(found: Findings) -> list[dict[str, Any]]:
    """One row a run, of every experiment; no wall-clock."""
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in found.experiments.items():
        for run in runs:
            config, summary = run.config, run.summary
            row = rows.setdefault(summary.folder, {"run": Path(summary.folder).name, "experiments": name})
            if name not in row["experiments"].split(" "):
                row["experiments"] += f" {name}"
            row |= {
                "kind": summary.kind,
                "site": summary.site,
                "coefficient": summary.coefficient,
                "seed": summary.seed,
                "learning_rate": config.training.learning_rate,
                "d_sae": summary.d_sae,
                "training_tokens": summary.tokens,
                "start": None if config.init_from is None else config.init_from.name,
                "l0": summary.l0,
                "alive": summary.alive,
                "ce_increase": summary.ce_increase,
                "kl": summary.kl,
            }
            row |= {"remarks": " ".join(summary.remarks)} if summary.remarks else {}
            row |= {f"explained_variance.{form}": value for form, value in summary.explained_variances.items()}
            row |= {f"downstream_mse.{site}": value for site, value in summary.downstream_mse.items()}
            for metric, (low, high) in summary.intervals.items():
                if metric in row:
                    row |= {f"{metric}.low": low, f"{metric}.high": high}
    return list(rows.values())


def ratio_rows(found: Findings) -> list[dict[str, Any]]:
    """Each kind relative to local at every site."""
    return [
        {"site": site, "measure": measure, "kind": kind, **ratio.to_row()}
        for site, summary in found.sites.items()
        for measure, by_kind in summary.ratios.items()
        for kind, ratio in by_kind.items()
    ]


def variant_rows(found: Findings) -> list[dict[str, Any]]:
    """The CE increase of each variant relative to its kind's own training, and to local's, at one L0."""
    points = [] if found.mitigations is None else found.mitigations.points
    bases = {(p.variant.kind, p.variant.way): p for p in points if found.is_base(p)}
    rows = []
    for point in points:
        kind, way = point.variant.kind, point.variant.way
        for other in dict.fromkeys((kind, "local")):
            base = bases.get((other, way))
            if base is not None and base is not point:
                row = {"kind": kind, "way": WAYS[way], "variant": point.variant.label, "relative_to": other}
                rows.append(row | point.relative_to(base).to_row())
    return rows


def norm_rows(found: Findings) -> list[dict[str, Any]]:
    """One row a run, of each seed those at similar CE increase."""
    return [
        {"site": site, "kind": run.kind, "seed": run.seed, "run": Path(run.folder).name}
        | found.norms[run.folder].to_row()
        for site, summary in found.sites.items()
        for run in summary.runs
        if run.folder in found.norms
    ]
