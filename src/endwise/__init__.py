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

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the one list of what is where: checkers of types follow it, and `_homes` reads it
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

__all__ = ["KL", "SAE", "Corpora", "Corpus", "DataConfig", "Directions", "DownstreamMSE", "EndwiseError"]
__all__ += ["Evaluation", "EvaluationConfig", "FeatureImportance", "Geometry", "Harvest", "ImportanceStudy"]
__all__ += ["LanguageModel", "Latents", "LocalMSE", "Objective", "Pareto", "ReluSAE", "Reproduced", "Run"]
__all__ += ["RunConfig", "Site", "SomeFailed", "Sparsity", "Sweep", "SweepConfig", "corpora_for", "directions"]
__all__ += ["evaluate", "geometry", "harvest", "importance", "load_corpora", "load_model", "measure", "pareto"]
__all__ += ["read_harvest", "read_importance", "reproduce", "spliced", "sweep", "train", "train_together"]


@cache
def _homes() -> dict[str, str]:
    """Each public name's module, as the imports above have it."""
    nodes = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    return {each.name: str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'endwise' has no attribute {name!r}")
    return getattr(import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return __all__
