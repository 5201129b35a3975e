"""endwise: sparse autoencoders trained on what a language model does, not only on what one layer contains.

    import endwise

    run = endwise.train("embedded-layer3-e2e")                   # one SAE, end to end
    endwise.evaluate(run.folder)                                 # L0, alive features, CE increase, ...
    sae = endwise.SAE.load(run.folder)                           # SAELens's layout
    model = endwise.load_model("embedded")
    with endwise.spliced(model, {"blocks.3.hook_resid_pre": sae}):
        ...                                                      # the model runs on its reconstruction

Names are imported on first use, so that `import endwise` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endwise.analysis.directions.study import Directions, directions
    from endwise.analysis.geometry.geometry import Geometry, geometry
    from endwise.analysis.importance.study import ImportanceStudy, importance
    from endwise.analysis.pareto.curves import Pareto, pareto
    from endwise.common.errors import EndwiseError
    from endwise.config.run import DataConfig, EvaluationConfig, RunConfig
    from endwise.dictionaries import SAE, Latents, ReluSAE
    from endwise.evaluation.evaluate import evaluate
    from endwise.evaluation.measure import Evaluation, measure
    from endwise.features.harvest.results import Harvest, read_harvest
    from endwise.features.harvest.run import harvest
    from endwise.features.importance_table import FeatureImportance, read_importance
    from endwise.models.language_model import LanguageModel
    from endwise.models.loading import load_model
    from endwise.models.sites import Site
    from endwise.models.splicing import spliced
    from endwise.paper import Reproduced, reproduce
    from endwise.sweeps import Sweep, SweepConfig, sweep
    from endwise.tokens import Corpora, Corpus, corpora_for, load_corpora
    from endwise.training.members import Run, SomeFailed
    from endwise.training.objectives import KL, DownstreamMSE, LocalMSE, Objective, Sparsity
    from endwise.training.train import train, train_together

__version__ = "0.2.0.dev0"

_HOMES = {
    "Directions": "analysis.directions.study",
    "directions": "analysis.directions.study",
    "Geometry": "analysis.geometry.geometry",
    "geometry": "analysis.geometry.geometry",
    "ImportanceStudy": "analysis.importance.study",
    "importance": "analysis.importance.study",
    "Pareto": "analysis.pareto.curves",
    "pareto": "analysis.pareto.curves",
    "EndwiseError": "common.errors",
    "DataConfig": "config.run",
    "EvaluationConfig": "config.run",
    "RunConfig": "config.run",
    "Latents": "dictionaries",
    "ReluSAE": "dictionaries",
    "SAE": "dictionaries",
    "evaluate": "evaluation.evaluate",
    "Evaluation": "evaluation.measure",
    "measure": "evaluation.measure",
    "Harvest": "features.harvest.results",
    "read_harvest": "features.harvest.results",
    "harvest": "features.harvest.run",
    "FeatureImportance": "features.importance_table",
    "read_importance": "features.importance_table",
    "LanguageModel": "models.language_model",
    "load_model": "models.loading",
    "Site": "models.sites",
    "spliced": "models.splicing",
    "Reproduced": "paper",
    "reproduce": "paper",
    "Sweep": "sweeps",
    "SweepConfig": "sweeps",
    "sweep": "sweeps",
    "Corpora": "tokens",
    "Corpus": "tokens",
    "corpora_for": "tokens",
    "load_corpora": "tokens",
    "Run": "training.members",
    "SomeFailed": "training.members",
    "DownstreamMSE": "training.objectives",
    "KL": "training.objectives",
    "LocalMSE": "training.objectives",
    "Objective": "training.objectives",
    "Sparsity": "training.objectives",
    "train": "training.train",
    "train_together": "training.train",
}

__all__ = [
    "KL",
    "SAE",
    "Corpora",
    "Corpus",
    "DataConfig",
    "Directions",
    "DownstreamMSE",
    "EndwiseError",
    "Evaluation",
    "EvaluationConfig",
    "FeatureImportance",
    "Geometry",
    "Harvest",
    "ImportanceStudy",
    "LanguageModel",
    "Latents",
    "LocalMSE",
    "Objective",
    "Pareto",
    "ReluSAE",
    "Reproduced",
    "Run",
    "RunConfig",
    "Site",
    "SomeFailed",
    "Sparsity",
    "Sweep",
    "SweepConfig",
    "corpora_for",
    "directions",
    "evaluate",
    "geometry",
    "harvest",
    "importance",
    "load_corpora",
    "load_model",
    "measure",
    "pareto",
    "read_harvest",
    "read_importance",
    "reproduce",
    "spliced",
    "sweep",
    "train",
    "train_together",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'endwise' has no attribute {name!r}")
    return getattr(import_module(f"endwise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
