"""An SAE before and after, on the text that it was tuned on and on text of other kinds."""

import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from endwise.common.errors import EndwiseError
from endwise.common.files import write_atomic
from endwise.common.statistics import Interval, bootstrap_ratio
from endwise.config.run import DataConfig, EvaluationConfig
from endwise.dictionaries import SAE
from endwise.evaluation.measure import Evaluation, measure
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place
from endwise.tokens import Corpora, corpora_for

RESAMPLES = 1000
CODE = "code"
"""Text of another kind that is always there: Python's standard library."""
CHARACTERS = 12
"""Characters of it for every token that is measured."""
SHOWN = (
    ("CE increase, nats per token", "ce_increase", "+.4f"),
    ("KL, nats per token", "kl", ".4f"),
    ("L0", "l0", ".1f"),
    ("explained variance", "explained_variance.pooled", ".4f"),
)
"""Metrics that are shown: in words, by name, and in which form."""
Say = Callable[[str], None]
Both = Mapping[str, tuple[Place, SAE]]
"""`before` and `after`, each with its place."""


@dataclass(frozen=True)
class BeforeAfter:
    """One text, before and after."""

    before: Evaluation
    after: Evaluation

    def ratio(self, name: str) -> Interval:
        """Return CE increase or KL, after over before, paired by sequence: text alone is in the interval."""
        return bootstrap_ratio(self.after.sums[name], self.before.sums[name], resamples=RESAMPLES, seed=0)

    @property
    def ce_increase(self) -> Interval:
        return self.ratio("ce_increase")

    @property
    def l0(self) -> float:
        """L0 after over before."""
        return self.after["l0"] / self.before["l0"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield what was measured, in words: of what, before, after."""
        for words, name, form in SHOWN:
            yield words, *(f"{each[name]:{form}}" for each in (self.before, self.after))
        later = [name for name in self.before.metrics if name.startswith("downstream_mse.")]
        if later:
            means = (sum(each[name] for name in later) / len(later) for each in (self.before, self.after))
            yield "later sites' squared error, mean", *(f"{mean:.4g}" for mean in means)
        dead = (f"{each.d_sae - each.alive:,} of {each.d_sae:,}" for each in (self.before, self.after))
        yield f"features silent on these {self.after.tokens:,} tokens", *dead

    def to_json(self) -> dict[str, Any]:
        ratio = self.ce_increase
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "ce_increase_ratio": [ratio.estimate, ratio.low, ratio.high],
            "l0_ratio": self.l0,
        }


def compared(model: LanguageModel, both: Both, corpora: Corpora, config: EvaluationConfig) -> BeforeAfter:
    found = measure(model, both, corpora.heldout, config)
    return BeforeAfter(found["before"], found["after"])


def on_others(
    model: LanguageModel, both: Both, data: DataConfig, sources: Sequence[str], tokens: int, say: Say
) -> Iterator[tuple[str, BeforeAfter]]:
    """Measure on text of other kinds, as far as it can be read: what `sources` name, and code.

    Args:
        data: of the text that was tuned on.
    """
    with TemporaryDirectory(prefix="endwise-") as scratch:
        file = Path(scratch) / f"{CODE}.jsonl"
        write_atomic(file, _code(CHARACTERS * tokens).encode())
        for name, source in {**{each: each for each in sources}, CODE: str(file)}.items():
            plain = DataConfig(source=source, context=data.context, prepend_bos=data.prepend_bos, heldout_share=0.9)
            try:
                corpora = corpora_for(model, plain, training_tokens=1, evaluation_tokens=tokens)
            except EndwiseError as error:
                say(f"! Not measured on {name}: {error}")
                continue
            yield name, compared(model, both, corpora, EvaluationConfig(tokens=tokens, during_training_tokens=1))


def _code(characters: int) -> str:
    """Modules of Python's standard library, in the order of their names, as lines of JSON."""
    lines, count = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        lines.append(json.dumps({"text": text}))
        count += len(text)
        if count >= characters:
            break
    return "\n".join(lines) + "\n"
