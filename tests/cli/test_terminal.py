"""Tables on terminals of any width and in pipes: no number and no name is cut or left out. What titles call a model."""

import io
import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.live import Live

from endwise.analysis.comparable import Setting
from endwise.analysis.comparison.printed import print_evaluations, print_summary
from endwise.analysis.directions.page import print_directions
from endwise.analysis.directions.study import Directions
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.page import print_geometry
from endwise.analysis.importance.page import print_importance
from endwise.analysis.interpretability.page import print_interpretability
from endwise.analysis.pareto.curves import Pareto
from endwise.analysis.pareto.page import print_pareto
from endwise.common.counting import counting
from endwise.common.statistics import Interval
from endwise.common.terminal import Bars, Grid, show
from endwise.common.text import model_title, model_titles
from endwise.config.run import RunConfig
from endwise.sweeps.tables import print_rows
from endwise.sweeps.watching import Watch
from endwise.training.display import Display
from endwise.training.planning.plan import plan
from endwise.training.planning.printed import print_plan
from made_curves import compare, three_kinds
from made_explanations import study
from made_importance import made_study
from made_runs import LINE, evaluation
from small_gpt2 import SITE, recipe

RUNS = [Path(f"runs/a sweep/of-eight-runs/llama-{SITE}-e2e-{number}-seed{number}") for number in range(8)]


def shown(print_it, width=None):
    """As a terminal of that width gets it; None: in a pipe, which rich takes for 80 columns wide."""
    file = io.StringIO()
    print_it(Console(file=file, width=width or 80, force_terminal=width is not None, color_system=None))
    return file.getvalue()


def evaluations(console):
    configs = {path: recipe(path, seed=number) for number, path in enumerate(RUNS)}
    print_evaluations(configs, {path: evaluation(number) for number, path in enumerate(RUNS)}, console)


def pareto(console):
    summary = compare(three_kinds())
    print_pareto([Pareto(Setting.of(summary.runs[0]), summary.runs, summary)], console)


def geometry(console):
    runs = compare(three_kinds()).runs
    of = {"setting": Setting.of(runs[0]), "runs": runs, "within": {}, "similar": {}, "seeded": {}}
    print_geometry([holding(Geometry, **of)], console)


def directions(console):
    runs = compare(three_kinds()).runs
    norms = SimpleNamespace(ratio=Interval(0.8, 0.9, 0.85), cosine=Interval(0.7, 0.9, 0.81))
    of = {"setting": Setting.of(runs[0]), "runs": runs, "norms": {run.folder: norms for run in runs}, "follows": {}}
    print_directions([holding(Directions, **of, claims=())], console)


def holding(kind, **attributes):
    """One of that kind that holds no more than what is shown of it."""
    return object.__new__(type(kind.__name__, (kind,), attributes))


def a_plan(console):
    print_plan(the_plan(), console)


@cache
def the_plan():
    settings = {"site": SITE, "dictionary": {"size": 40}, "objective": {"kind": "e2e", "sparsity": {"coefficient": 1}}}
    return plan(RunConfig.build({**settings, "training": {"tokens": 100_000, "batch": 2}}))


def a_sweep(console):
    row = {
        "status": "finished",
        "site": SITE,
        "kind": "e2e",
        "method": "e2e",
        "target": "ce_increase=0.125",
        "target_miss": 0.07,
    }
    numbers = {"coefficient": 0.123, "l0": 35.25, "alive": 1234, "ce_increase": 0.123, "ce_increase.low": 0.121}
    rows = [
        {**row, **numbers, "ce_increase.high": 0.125, "seed": seed, "run": f"runs/llama-{0xABCDEF012 + seed:x}"}
        for seed in range(8)
    ]
    print_rows(rows, console)


def training(console):
    display = Display(steps=100, first=0, tokens_per_step=50, shown=False)
    display.timing = lambda done: {"seconds": 5.0, "tokens_per_second": 1234.0}
    for path in RUNS:
        display.show(path, recipe(path), LINE)
    live(display._table(20), console)


def watching(console):
    watch = Watch(False)
    watch.expect([recipe(path, seed=number) for number, path in enumerate(RUNS)])
    live(watch._table(), console)


def live(table, console):
    """As it stands when it is over."""
    if not console.is_terminal:
        show(table, console)
        return
    console.height = 500
    with Live(table, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False):
        pass


TABLES = {
    "evaluate": evaluations,
    "quickstart": lambda console: print_summary(compare(three_kinds()), console),
    "pareto": pareto,
    "geometry": geometry,
    "importance": lambda console: print_importance([made_study({"local": 8, "e2e": 5})], console),
    "interpretability": lambda console: print_interpretability([study(local=(0.7, 0.5), e2e_ds=(0.8, 0.5))], console),
    "directions": directions,
    "plan": a_plan,
    "sweep": a_sweep,
    "training": training,
    "watching a sweep": watching,
}


def numbers(text):
    return Counter(re.findall(r"\d[\d.,]*", text))


@pytest.fixture(scope="module")
def piped():
    return {name: shown(table) for name, table in TABLES.items()}


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_a_terminal_shows_every_number_that_a_pipe_gets(piped, name, width):
    text = shown(TABLES[name], width)
    assert numbers(piped[name]) and not numbers(piped[name]) - numbers(text)
    assert "…" not in text.replace(" …seed", "")


@pytest.mark.parametrize("width", [None, 40, 80, 200])
def test_runs_are_named_in_full(width):
    text = shown(evaluations, width)
    assert all(str(path) in text for path in RUNS)
    assert all(f"{0xABCDEF012 + seed:x}" in shown(a_sweep, width) for seed in range(8))


def test_a_pipe_gets_one_line_a_row_with_every_cell():
    long = [[f"run {'x' * 90}-{number}", f"{number / 7:.12f}", "a reason " * 30, ""] for number in range(3)]
    lines = shown(lambda console: show(Grid(("run", "l0", "why", "no"), long), console)).splitlines()
    for row in long:
        assert sum(all(cell.strip() in line for cell in row) for line in lines) == 1


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_gets_each_row_as_lines_of_its_own_that_break_between_cells(width):
    rows = [["runs/one", "0.123 [0.1, 0.2]", "", "3"], ["runs/two", "[bold]", "x" * 100, "4"]]
    grid = Grid(("run", "CE increase [95 %]", "path", "n"), rows, "Of [red]all[/red] runs that there are")
    lines = shown(lambda console: show(grid, console), width).splitlines()
    assert "Of [red]all[/red]" in lines[0]
    for cell in ("runs/one", "0.123 [0.1, 0.2]", "runs/two", "[bold]", "x" * 100, "n 4"):
        assert sum(cell in line for line in lines) == 1, cell
    assert all(len(line) <= width for line in lines if "xxx" not in line)
    assert sum("path" in line for line in lines) == 1  # an empty cell takes no room


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("embedded", "embedded"),
        ("roneneldan/TinyStories-1M", "roneneldan/TinyStories-1M"),
        ("/home/somebody/models/TinyLlama", "TinyLlama"),
        ("/home/somebody/models/TinyLlama/", "TinyLlama"),
        ("../tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        ("some/deep/tiny", "tiny"),
        ("/cache/hub/models--openai-community--gpt2/snapshots/607a30d783", "openai-community/gpt2"),
        ("", ""),
    ],
)
def test_titles_call_a_model_by_its_name(name, title):
    assert model_title(name) == title


def test_a_folder_that_reads_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_title("models/tiny") == "models/tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert model_title("models/tiny") == "tiny"


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_bars_name_is_never_cut(width):
    name, file = "Tokenising a folder/of many/parts/corpus-東京.jsonl", io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with Bars(console=console, auto_refresh=False) as bars:
        bars.add_task(name, total=10, completed=5)
        bars.refresh()
    assert name.replace(" ", "") in re.sub(r"\s|\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert width < 60 or "50%" in file.getvalue()


def test_a_line_of_a_log_is_one_line(capsys):
    name = "a pass of a name that is longer than what is left of eighty columns"
    with counting(name, 400, True, every=-1.0) as advance:
        advance(200)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_models_whose_folders_are_called_alike_are_told_apart():
    names = ["/x/pythia/step1", "/y/other/step1", "/z/other/step1", "org/step1", "/w/llama"]
    titles = model_titles(names)
    assert list(titles) == names and len(set(titles.values())) == len(names)
    assert titles["/x/pythia/step1"] == "pythia/step1" and titles["/y/other/step1"] == "y/other/step1"
    assert (titles["org/step1"], titles["/w/llama"]) == ("org/step1", "llama")


def test_a_title_takes_a_user_that_is_not_there_as_it_stands():
    assert model_title("~nobody-of-this-name/models/llama") == "llama"
