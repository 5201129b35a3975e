"""Findings of a study's runs: read from their folders, joined into tables, the same after any interruption."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endwise.analysis.comparison.comparison import Summary, runs_at_similar, similar_by_seed, summarise_folders
from endwise.analysis.directions.norms import Norms, norms
from endwise.common.errors import FormatError
from endwise.config.objective import Kind
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.evaluation.finished import load_sae
from endwise.evaluation.provenance import check_texts, model_of, pinned
from endwise.evaluation.summary import RunSummary
from endwise.paper.experiments import inner, middle
from endwise.paper.mitigations import WAYS, CostPoint, Mitigations, Variant, Way, mitigations, total_cost
from endwise.paper.runs import StudyRuns
from endwise.sweeps.tasks import ModelCache, folder_of


@dataclass(frozen=True)
class MeasuredStudy:
    """A finished run: its recipe, and what it measured."""

    config: RunConfig
    summary: RunSummary


@dataclass(frozen=True)
class Findings:
    made: StudyRuns
    sites: Mapping[str, Summary]
    """Comparison of the kinds, by site."""
    similar_l0: Mapping[str, tuple[RunSummary, ...]]
    """Runs of the kinds whose L0s are closest to each other, by site."""
    norms: Mapping[str, Norms]
    """Norms by run folder, of the runs of each seed at similar CE increase."""
    experiments: Mapping[str, tuple[MeasuredStudy, ...]]
    mitigations: Mitigations | None
    settings: EvaluationConfig
    """Settings by which its runs were measured, and intervals are drawn."""

    def summaries(self, experiment: str) -> list[RunSummary]:
        return [run.summary for run in self.experiments[experiment]]

    def middle_coefficient(self, kind: Kind) -> float:
        """Return the middle one of the kind's curve at the first site."""
        study = self.made.experiments.study
        return middle(study.kind(kind, study.site).coefficients)

    def is_base(self, point: CostPoint) -> bool:
        """Return whether a variant is the study's own training."""
        curves = {run.folder for run in (*self.summaries("curves"), *self.summaries("seeds"))}
        return all(run.folder in curves for run in point.variant.runs)

    @property
    def with_norms(self) -> list[tuple[str, RunSummary]]:
        """The runs of which norms were measured, with their sites."""
        return [(site, run) for site, of in self.sites.items() for run in of.runs if run.folder in self.norms]

    @property
    def points(self) -> tuple[CostPoint, ...]:
        """Every variant, at the common L0."""
        return () if self.mitigations is None else self.mitigations.points

    @property
    def similar_ce(self) -> dict[str, tuple[RunSummary, ...]]:
        return {site: summary.similar for site, summary in self.sites.items()}


def find(made: StudyRuns, out: Path) -> Findings:
    """Read a study's finished runs and compare them; measure what needs the model once more, and keep it."""
    read = {
        name: tuple(MeasuredStudy(config, RunSummary.read(folder_of(config))) for config in made.finished(name))
        for name in made.plan.experiments
    }
    study = made.experiments.study
    measured = [run for name in ("curves", "seeds") for run in read.get(name, ())]
    curves = [run.summary for run in measured]
    settings = EvaluationConfig.build(study.recipe.get("evaluation", {}), "recipe.evaluation")
    drawn = {"resamples": settings.bootstrap, "seed": settings.seed}
    by_site = {site: [run for run in curves if run.site == site] for site in study.sites}
    sites = {site: summarise_folders(runs, **drawn) for site, runs in by_site.items() if runs}
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


def _norms(runs: Sequence[MeasuredStudy], out: Path) -> dict[str, Norms]:
    """Read each run's lengths, measured once and kept in the study's folder."""
    loaded, result = ModelCache(), {}
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
                model, sae, model.place(config.place), corpora.heldout, tokens=settings.tokens, batch=settings.batch
            )
            measured.write(file)
            result[run.summary.folder] = measured
    return result


def _variants(made: StudyRuns, read: Mapping[str, Sequence[MeasuredStudy]]) -> list[Variant]:
    """The study's own curves, and each of their variants, at the first site."""
    study, variants = made.experiments.study, []
    experiments: dict[Way, str] = {"tokens": "lengths", "dictionary": "sizes", "start": "starts"}
    for kind in study.kinds:
        coefficients = inner(study.kind(kind, study.site).coefficients)
        of_kind = {name: [run for run in runs if run.summary.kind == kind] for name, runs in read.items()}
        own = [
            run
            for run in (*of_kind.get("curves", ()), *of_kind.get("seeds", ()))
            if run.summary.site == study.site and run.summary.coefficient in coefficients
        ]
        for way, experiment in experiments.items():
            further = of_kind.get(experiment, [])
            if further or (way == "start" and kind == "local" and read.get("starts")):
                variants += _grouped(made, kind, way, [*own, *further])
    return variants


def _grouped(made: StudyRuns, kind: Kind, way: Way, runs: Sequence[MeasuredStudy]) -> list[Variant]:
    """A variant for every length, size and start among the runs."""

    def key(run: MeasuredStudy) -> tuple[int, float, bool]:
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
    """Name what tells a variant from the others."""
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
            row |= {name: getattr(summary, name) for name in ("kind", "site", "coefficient", "seed")}
            row |= {"learning_rate": config.training.learning_rate, "d_sae": summary.d_sae}
            row |= {"training_tokens": summary.tokens}
            row |= {"start": None if config.init_from is None else config.init_from.name}
            row |= {name: getattr(summary, name) for name in ("l0", "alive", "ce_increase", "kl")}
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
    bases = {(p.variant.kind, p.variant.way): p for p in found.points if found.is_base(p)}
    rows = []
    for point in found.points:
        kind, way = point.variant.kind, point.variant.way
        for other in dict.fromkeys((kind, "local")):
            base = bases.get((other, way))  # pyrefly: ignore[bad-argument-type]
            if base is not None and base is not point:
                row = {"kind": kind, "way": WAYS[way], "variant": point.variant.label, "relative_to": other}
                rows.append(row | point.relative_to(base).to_row())
    return rows


def norm_rows(found: Findings) -> list[dict[str, Any]]:
    """One row a run, of each seed those at similar CE increase."""
    return [
        {"site": site, "kind": run.kind, "seed": run.seed, "run": Path(run.folder).name}
        | found.norms[run.folder].to_row()
        for site, run in found.with_norms
    ]
