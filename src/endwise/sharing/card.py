"""The card of a repository with SAEs: what they are, their numbers with intervals, and how to load them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from endwise.analysis.pareto.curves import AXES, Pareto, front
from endwise.analysis.pareto.page import pareto_chart
from endwise.analysis.sets import measured, title_of
from endwise.common.text import printable
from endwise.config.places import PlacesConfig
from endwise.evaluation.summary import RunSummary
from endwise.figures.print import save
from endwise.runs.folder import RunFolder
from endwise.runs.several import PLACES

CARD = "README.md"
BEGIN, END = "<!-- endwise: from here -->", "<!-- endwise: to here -->"
"""Between them stands what is written again at every push; what a user writes around them stays."""
_FIGURES = "figures"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MARKS = re.compile(r"[|*`\[\]\\#~$]|(?<!\w)_|_(?!\w)")
"""Characters that Markdown reads as markup; an underscore within a word is one."""
_AXES = {"l0": "L0", "alive": "alive features", "ce_increase": "CE increase", "kl": "KL"}
_NUMBERS = (
    ("L0", measured("l0", ".1f")),
    ("CE increase, nats per token", measured("ce_increase", ".3f")),
    ("KL, nats per token", measured("kl", ".3f")),
    ("explained variance", measured("explained_variance.pooled", ".3f")),
)


def plain(text: object) -> str:
    """Return text that stands in Markdown as it is, in one line."""
    escaped = escape(" ".join(printable(text).split()), quote=False)
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", escaped)


def write_card(found: Sequence[Pareto], folder: Path, repo: str, before: str | None, licence: str | None) -> None:
    """Write the card over the runs of a repository, and their figures.

    Args:
        found: all of the repository's runs, compared; they lie in run folders called as those of the repository.
        before: the card that is there, whose own words and metadata are kept; None: there is none.
        licence: identifier of the hub, e.g. `mit`; None: as before, or not said.
    """
    header, own = _split(before or "")
    recipes = [RunFolder(Path(run.folder)).recipe() for one in found for run in one.runs]
    models = [name for name in dict.fromkeys(recipe.model.name for recipe in recipes) if _on_hub(name)]
    texts = [name for name in dict.fromkeys(recipe.data.source for recipe in recipes) if _on_hub(name)]
    fields: dict[str, Any] = {"library_name": "saelens", "tags": ["endwise", "sae", "sparse-autoencoder"]}
    fields |= {key: each for key, each in (("base_model", models), ("datasets", texts), ("license", licence)) if each}
    tags = {"tags": list(dict.fromkeys([*fields["tags"], *header.get("tags", [])]))}
    written = yaml.safe_dump({**header, **fields, **tags}, sort_keys=False, allow_unicode=True)
    body = f"{BEGIN}\n{_body(found, folder, repo)}\n{END}"
    text = f"# {repo.partition('/')[2]}\n\n{body}\n" if own is None else own.replace(f"{BEGIN}{END}", body)
    (folder / CARD).write_text(f"---\n{written}---\n{text}", encoding="utf-8")


def _split(before: str) -> tuple[Mapping[str, Any], str | None]:
    """Return a card's metadata, and its text with our part taken out; None: it has no text."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", before, re.DOTALL)
    header, text = (match[1], match[2]) if match else ("", before)
    try:
        metadata = yaml.safe_load(header) if header else {}
    except yaml.YAMLError:
        metadata = {}
    metadata = metadata if isinstance(metadata, dict) else {}
    if BEGIN not in text:
        return metadata, f"{text.rstrip()}\n\n{BEGIN}{END}\n" if text.strip() else None
    start, _, rest = text.partition(BEGIN)
    return metadata, f"{start}{BEGIN}{END}{rest.partition(END)[2]}"


def _on_hub(name: str) -> bool:
    """Return whether a model or text may be the hub's: what lies here has lost its folder by now, or differs by it."""
    return name != "embedded" and _HUB_NAME.fullmatch(name) is not None and "/" in name


def _body(found: Sequence[Pareto], folder: Path, repo: str) -> str:
    lead = (
        "Sparse dictionaries of language models, trained with endwise: each was judged by what the model predicts with "
        "the reconstruction spliced into its forward pass."
    )
    parts = [lead]
    for number, one in enumerate(found, 1):
        parts += [f"## {plain(title_of(one.setting))}", *_figure(one, number, folder), _table(one)]
        parts += [f"- {plain(remark)}" for remark in dict.fromkeys(each for run in one.runs for each in run.remarks)]
    saes = [name for one in found for run in one.runs for name in sae_names(run)]
    return "\n\n".join([*parts, _loading(repo, list(dict.fromkeys(saes)))])


def _figure(one: Pareto, number: int, folder: Path) -> Iterable[str]:
    if len(one.runs) < 2:
        return
    chart = pareto_chart(one.runs, one.setting.site, f"pareto-{number}")
    (drawn,) = save(chart, folder / _FIGURES, ["png"])
    yield f"![{plain(chart.title)}]({_FIGURES}/{drawn.name})"
    yield plain(chart.caption)


def _table(one: Pareto) -> str:
    fronts = {f"{_AXES[y]} over {_AXES[x]}": front(one.runs, x, y) for x, y in AXES}
    heads = ["run", "kind", "setting", "seed", *(name for name, _ in _NUMBERS), "alive features", "on the front of"]
    rows = []
    for run in one.runs:
        on = ", ".join(name for name, members in fronts.items() if run.folder in members) if len(one.runs) > 1 else ""
        numbers = [cell(run) for _, cell in _NUMBERS]
        alive = f"{run.alive:,} of {run.d_sae:,}"
        cells = [plain(each) for each in (called(run), run.method.label, run.knob, run.seed)]
        rows.append([*cells, *numbers, alive, on or "–"])
    lines = [heads, ["---"] * len(heads), *rows]
    tokens = ", ".join(dict.fromkeys(f"{run.alive_tokens:,}" for run in one.runs))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\nMeasured on {tokens} held-out tokens. In brackets: 95 % intervals, bootstrap over its sequences. A front "
        "holds the runs that no other run here is at least as good as in both numbers and better in one."
    )


def called(run: RunSummary) -> str:
    """Return a run's name in the repository."""
    folder = Path(run.folder)
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == PLACES else folder.name


def sae_names(run: RunSummary) -> list[str]:
    """List the folders of a run's SAEs in the repository."""
    recipe = RunFolder(Path(run.folder)).recipe()
    return [] if isinstance(recipe, PlacesConfig) else [called(run)]


def _loading(repo: str, saes: Sequence[str]) -> str:
    first = saes[0]
    return f"""## Loading

In endwise, with everything else that reads an SAE (`init_from` of a recipe, `endwise inspect`, `endwise convert`):

```python
import endwise

sae = endwise.SAE.load("hf://{repo}/{first}")
```

In SAELens, of version 6 and newer, where it has the architecture:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "{first}")
```

`endwise pull {repo}` makes run folders of it again, which `endwise evaluate` and `endwise pareto` read. The SAEs:
{", ".join(f"`{name}`" for name in saes)}."""
