"""SAEBench's sparse probing: how well a few features tell classes of texts apart, against activations themselves."""

from pathlib import Path

from endwise.common.errors import ConfigError
from endwise.config.base import Config, Positive
from endwise.suites.base import INSIDE, SUITES, Suite

BIOS, REVIEWS = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
SPLITS = ("train.jsonl", "test.jsonl")


class ProbingSettings(Config):
    """Settings of the published results."""

    data_sets: tuple[str, ...] = (
        *(f"{BIOS}_class_set{number}" for number in (1, 2, 3)),
        REVIEWS,
        f"{REVIEWS}_sentiment",
        "codeparrot/github-code",
        "fancyzhx/ag_news",
        "Helsinki-NLP/europarl",
    )
    context: Positive = 128
    """Tokens of each text that are read."""
    train: Positive = 4000
    test: Positive = 1000
    """Texts of each probe, half of them of the class."""
    k: tuple[Positive, ...] = (1, 2, 5)
    """Features of a probe."""
    batch: Positive = 32
    """Texts at a time."""
    seed: int = 42


@SUITES.add("saebench-sparse-probing")
class SaebenchSparseProbing(Suite[ProbingSettings]):
    """Local data are folders with `train.jsonl` and `test.jsonl`, each line with a `text` and a `label`; all of them
    are probed instead of its own.
    """

    name, package, module = "saebench-sparse-probing", "sae-bench", "sae_bench"
    program = INSIDE / "on_saebench_sparse_probing.py"
    Settings = ProbingSettings

    def __init__(self, settings: ProbingSettings, local: Path | None = None) -> None:
        if local is not None:
            files = sorted(local.glob(f"*/{SPLITS[0]}"))
            names = [file.parent.name for file in files if (file.parent / SPLITS[1]).exists()]
            if not names:
                raise ConfigError(
                    f"--data must hold folders with {' and '.join(SPLITS)}, a text and a label on each line; none is "
                    f"in {local}. Give another, or leave it out for the suite's own data sets."
                )
            settings = settings.model_copy(update={"data_sets": tuple(names)})
        super().__init__(settings, local)

    def data_sets(self) -> list[str]:
        names = [] if self.local else self.settings.data_sets
        return list(dict.fromkeys(name.partition("_class_set")[0].removesuffix("_sentiment") for name in names))
