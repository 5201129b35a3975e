"""Finished runs: which of them can be measured, which share a pass, and their SAEs."""

from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.config.places import Recipe
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.evaluation.provenance import pinned
from endwise.formats import metadata_at
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.runs.several import resuming


def unfinished(path: Path, config: RunConfig) -> str | None:
    """A remark on a run whose SAE has not taken every training step of its recipe, or None."""
    metadata = metadata_at(path / "sae")
    own, context = metadata.get("endwise"), metadata.get("context_size")
    step = own.get("step") if isinstance(own, dict) else None
    if type(step) is not int or type(context) is not int or context < 1:
        return None
    steps = config.training.tokens // (config.training.batch * context)
    if step >= steps:
        return None
    return f"{path} is not finished: its numbers are those of step {step} of {steps}. Resume with: {resuming(path)}"


def named(config: Recipe) -> dict[str, Any]:
    return {
        "kind": config.objective_name,
        "site": config.place,
        "coefficient": config.objective.coefficient,
        "seed": config.seed if config.training.tokens else None,
    }


def sharing_groups(configs: dict[Path, RunConfig], tokens: int | None) -> list[list[Path]]:
    """Paths whose recipes agree in model, data and evaluation, so that one pass can measure them all."""
    groups: dict[str, list[Path]] = {}
    for path, config in configs.items():
        config = pinned(path, config)
        evaluation = config.evaluation if tokens is None else config.evaluation.model_copy(update={"tokens": tokens})
        key = "".join(part.model_dump_json() for part in (config.model, config.data, evaluation))
        groups.setdefault(f"{key}{config.training.tokens}", []).append(path)
    return list(groups.values())


def load_sae(path: Path, config: RunConfig, model: LanguageModel) -> SAE:
    """A run's SAE, on the model's device.

    Raises:
        FormatError: it cannot be read, is not what training wrote, or is not as wide as its site.
    """
    sae = SAE.load(path, model.device)
    for key, found, site in (("d_in", sae.d_in, config.site), ("d_out", sae.d_out, config.written)):
        if found != (width := model.width(site)):
            raise FormatError(
                f"The SAE in {path} has {key} {found}, but {site} of {model.name} has width {width}. "
                "Correct site or model.name in its config.yaml, or restore its sae/."
            )
    RunFolder(path).weights_digest()
    if config.data.leave_out_norms is not None and sae.norm_limit is None:
        raise FormatError(
            f"The SAE in {path} does not say above which norm it leaves positions out (metadata.endwise.norm_limit), "
            f"and data.leave_out_norms is {config.data.leave_out_norms:g}. Restore its sae/."
        )
    return sae
