"""Tune a finished SAE: read and check it, measure it, train it briefly, measure it again, and give it back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from endwise.common.digests import of_file
from endwise.common.errors import ConfigError, FormatError, RunFolderError
from endwise.common.files import check_can_write, expanded, write_atomic, write_json
from endwise.config.run import DataConfig
from endwise.dictionaries import SAE
from endwise.evaluation.evaluate import write_evaluation
from endwise.evaluation.inspecting import Inspected, inspect, measured, text_for, verdict, written
from endwise.evaluation.measure import Evaluation
from endwise.finetuning.page import report_html
from endwise.finetuning.recipe import TuningSettings, agreed, recipe_of
from endwise.finetuning.result import Finetuned, Moved
from endwise.finetuning.texts import BeforeAfter, Both, Say, compared, on_others
from endwise.formats import FORMATS, NATIVE
from endwise.models.language_model import LanguageModel
from endwise.models.loading import load_model
from endwise.runs.folder import RunFolder
from endwise.tokens import check_readable, corpora_for
from endwise.training.targets import held_out_wanted
from endwise.training.train import train

RESULT, REPORT, GIVEN_BACK = "finetune.json", "finetune.html", "tuned"
"""Names in the run folder."""
CHECKED_ON = 16_384
"""Tokens for the check before, and of other text; `TuningSettings.measured_on`, if less."""
FAR_L0 = 0.03
"""Change of L0, as a share, up to which before and after are compared at equal L0."""


def finetune(
    path: str | Path,
    *,
    model: str | LanguageModel = "embedded",
    settings: TuningSettings = TuningSettings(),  # noqa: B008  frozen
    out: str | Path | None = None,
    site: str | None = None,
    check: Sequence[str] = (),
    say: Say = lambda _: None,
    display: bool = False,
) -> Finetuned:
    """Tune a finished SAE on what the model predicts with its reconstruction in place.

    Args:
        path: an SAE in any format that `SAE.load` reads.
        model: a loaded model, or the name of one.
        out: run folder; the same call resumes what was started there. None: a name made of the SAE's, under `runs`.
        site: its place, where its file says none.
        check: sources of text of other kinds, on which it is measured before and after too.
        say: called with each line of what is done.
        display: whether to show training's progress.

    Raises:
        FormatError: the file cannot be read, or what it holds is far from what it states.
        ConfigError: no place is known, a setting breaks a rule, or `out` holds another run.
        EndwiseError: see `train`.
    """
    found = _readable(path, settings.data, say)
    folder = expanded(out or Path("runs") / f"finetuned-{Path(found.name).stem}-{of_file(found.weights)[:8]}")
    check_can_write(folder)
    loaded = load_model(model) if isinstance(model, str) else model
    few = min(CHECKED_ON, settings.measured_on)
    data, first = _checked(found, loaded, settings, few, site, say)
    refused = _not_written(found)
    say(f"! {refused}" if refused else f"The tuned SAE will also be written as {found.format_name}.")
    name = model if isinstance(model, str) else model.name
    recipe = agreed(recipe_of(found, first.place, first["l0"], name, data, folder, settings), folder)
    tokens, evaluated = recipe.training.tokens, held_out_wanted(recipe, recipe.data.context or loaded.context)
    corpora = corpora_for(loaded, recipe.data, training_tokens=tokens, evaluation_tokens=evaluated)
    say(f"Tuning at {first.place} on {tokens:,} tokens: {folder}")
    run = train(recipe, model=loaded, corpora=corpora, resume="if_started", display=display)
    both: Both = {"before": (first.place, found.sae.to(loaded.device)), "after": (first.place, run.sae)}
    text = compared(loaded, both, corpora, recipe.evaluation)
    write_evaluation(RunFolder.open(folder), recipe, text.after)
    others = dict(on_others(loaded, both, recipe.data, check, few, say))
    result = Finetuned(
        sae=run.sae,
        config=recipe,
        folder=folder,
        source=found,
        given_back=None if refused else _given_back(run.sae, found, folder),
        refused=refused,
        text=text,
        others=others,
        moved=Moved.of(found.sae, run.sae, text.before.firings + text.after.firings > 0),
        remarks=_remarks(text, others, run.remarks),
    )
    write_json(folder / RESULT, result.to_json())
    write_atomic(folder / REPORT, report_html(result, RunFolder.open(folder).metrics()).encode())
    return result


def _readable(path: str | Path, text: str, say: Say) -> Inspected:
    """Read what is to be tuned, and say what it is; try the text that it is to be tuned on."""
    found = inspect(path)
    check_readable(DataConfig.build({"source": text}, "the options"))
    for line in found.lines():
        say(line)
    if found.stored.lacks_value_biases:
        raise ConfigError(
            f"{found.name} reads heads without their value biases. Make an SAE of it that reads the model as it is "
            "(endwise adopt), and tune that."
        )
    return found


def _checked(
    found: Inspected, model: LanguageModel, settings: TuningSettings, tokens: int, site: str | None, say: Say
) -> tuple[DataConfig, Evaluation]:
    """Choose the text, and measure on a little of it whether the SAE is what it states."""
    data, remark = text_for(found, model, settings.data, settings.context)
    data = data.model_copy(update={"context": data.context or model.context})
    evaluation = measured(found, model, data, tokens, site)
    for line in [*([remark] if remark else []), *verdict(found, evaluation)]:
        say(f"! {line}")
    return data, evaluation


def _target(found: Inspected, folder: Path) -> Path:
    """Return what to write in a folder: a file where the format is one of files."""
    return folder / found.weights.name if FORMATS[found.format_name].weights(folder) == folder else folder


def _not_written(found: Inspected) -> str | None:
    """Return why the SAE cannot be written in its own format; None: it can."""
    alone = "The tuned SAE will be written in SAELens's layout only."
    if not FORMATS[found.format_name].writes:
        return f"{found.format_name} can be read but not written. {alone}"
    with TemporaryDirectory(prefix="endwise-") as scratch:
        try:
            written(found.sae, _target(found, Path(scratch) / "sae"), found.stored.metadata, found.format_name)
        except (FormatError, RunFolderError) as error:
            return f"{error} {alone}"
    return None


def _given_back(sae: SAE, found: Inspected, folder: Path) -> Path:
    """Write the tuned SAE in the format that it came in; the run's own folder of it will do for SAELens's."""
    if found.format_name == NATIVE:
        return folder / "sae"
    target = _target(found, folder / GIVEN_BACK)
    written(sae, target, found.stored.metadata, found.format_name)
    return target


def _remarks(text: BeforeAfter, others: Mapping[str, BeforeAfter], of_run: Sequence[str]) -> list[str]:
    """List what must be known before the tuned SAE is used."""
    remarks = list(of_run)
    if text.ce_increase.high >= 1:
        remarks.append(
            "The CE increase is not shown to be smaller than before. Keep the SAE as it was, or tune it longer."
        )
    if abs(text.l0 - 1) > FAR_L0:
        remarks.append(f"L0 is {text.l0:.1%} of what it was, so before and after are not compared at equal L0.")
    remarks += [
        f"On {name} the KL is {each.ratio('kl').estimate:.0%} of what it was. Tune on such text too, if the SAE is to "
        "be used on it."
        for name, each in others.items()
        if each.ratio("kl").low > 1
    ]
    return list(dict.fromkeys(remarks))
