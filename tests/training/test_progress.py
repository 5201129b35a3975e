"""Display for the user while training runs."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from endwise.common.counting import LOG_SECONDS, counting
from endwise.config.run import RunConfig
from endwise.training import display as progress
from endwise.training.display import Display
from made_runs import LINE
from small_gpt2 import recipe

FOLDER = Path("runs/one")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def rendered(display, done):
    console = Console(width=160, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(display._table(done))
    return capture.get()


def logged(display, clock, capsys, done):
    clock[0] += display._log.every
    display.advance(done)
    return capsys.readouterr().err.splitlines()


def test_the_table_has_speed_time_left_terms_and_the_last_evaluation(clock):
    display = Display(steps=100, first=0, tokens_per_step=50, shown=False)
    config = recipe(Path("unused"))
    display.show(FOLDER, config, {**LINE, "heldout": {"ce_increase": 0.125}})
    display.show(FOLDER, config, LINE)
    clock[0] = 110.0
    text = rendered(display, 20)
    for part in ("step 20/100", "100 tokens/s", "0.7 min left", "kl 0.25", "sparsity 1.5", "12.3", "1,234", "+0.125"):
        assert part in text, part
    assert str(FOLDER) not in text


def test_a_log_gets_a_line_now_and_then_and_nothing_when_quiet(clock, capsys):
    for shown, expected in ((True, 2), (False, 0)):
        with Display(steps=100, first=0, tokens_per_step=50, shown=shown) as display:
            display.show(FOLDER, recipe(Path("unused")), LINE)
            for step in range(1, 71):
                clock[0] += LOG_SECONDS / 30
                display.advance(step)
            display.fail(FOLDER, "it failed")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == expected + shown, lines
        assert all("tokens/s" in line for line in lines[:expected])


def test_a_log_says_how_training_goes(clock, capsys):
    display = Display(steps=100, first=0, tokens_per_step=50, shown=True)
    config = recipe(Path("unused"))
    display.show(FOLDER, config, LINE)
    (line,) = logged(display, clock, capsys, 20)
    assert line.endswith("min left · loss 0.7123 · L0 12.3")
    display.show(FOLDER, config, {**LINE, "heldout": {"ce_increase": 0.125}})
    display.show(FOLDER, config, {**LINE, "l0": 11.0})
    (line,) = logged(display, clock, capsys, 40)
    assert line.startswith("step 40/100 · ") and line.endswith("loss 0.7123 · L0 11.0 · CE increase +0.125")
    (line,) = logged(display, clock, capsys, 60)  # nothing new was measured, so nothing is said a second time
    assert line.startswith("step 60/100 · ") and line.endswith("min left")


def test_a_log_of_several_has_a_line_for_each_and_marks_the_failed(clock, capsys):
    display = Display(steps=100, first=0, tokens_per_step=50, shown=True)
    for kind in ("local", "e2e"):
        display.show(Path("runs") / kind, recipe(Path("unused"), kind), LINE)
    display.fail(Path("runs/local"), "runs/local: [no] good")
    assert capsys.readouterr().err.splitlines() == ["failed: runs/local: [no] good"]
    heading, local, e2e = logged(display, clock, capsys, 20)
    assert "tokens/s" in heading
    assert local.strip() == "local λ 0.3 blocks.1.hook_resid_pre seed 0 (failed): loss 0.7123 · L0 12.3"
    assert e2e.strip() == "e2e λ 0.3 blocks.1.hook_resid_pre seed 0: loss 0.7123 · L0 12.3"


def test_runs_that_differ_in_their_rate_only_have_rows_of_their_own(clock, capsys):
    display = Display(steps=100, first=0, tokens_per_step=50, shown=True)
    for rate, l0 in ((1e-3, 11.5), (1e-2, 22.5)):
        display.show(Path("runs") / f"{rate:g}", recipe(Path("unused"), learning_rate=rate), {**LINE, "l0": l0})
    text = rendered(display, 20)
    for part in ("11.5", "22.5", "in runs/0.001", "in runs/0.01"):
        assert part in text, part
    _, first, second = logged(display, clock, capsys, 20)
    assert "runs/0.001" in first and "11.5" in first and "runs/0.01" in second and "22.5" in second


def test_counting_says_in_a_log_how_much_is_done_and_what_is_left(clock, capsys):
    for shown in (True, False):
        with counting("harvest", 400, shown) as advance:
            for _ in range(10):
                clock[0] += LOG_SECONDS / 4
                advance(20)
        lines = capsys.readouterr().err.splitlines()
        assert lines == (
            [
                "harvest: 100 of 400 sequences · 3.8 min left",  # 75 s for a quarter
                "harvest: 200 of 400 sequences · 2.5 min left",
            ]
            if shown
            else []
        )


def jupyter(put):
    """IPython, as a kernel of Jupyter has it."""

    def display(told, raw, display_id):
        assert raw and display_id
        put(told["text/plain"])
        return SimpleNamespace(update=lambda told, raw: put(told["text/plain"], again=True))

    kernel = SimpleNamespace(kernel=object())
    return {
        "IPython": SimpleNamespace(get_ipython=lambda: kernel),
        "IPython.display": SimpleNamespace(display=display),
    }


def marimo(put):
    output = SimpleNamespace(replace=put)
    return {"marimo": SimpleNamespace(running_in_notebook=lambda: True, output=output, plain_text=str)}


@pytest.mark.parametrize("notebook", [jupyter, marimo])
def test_in_a_notebook_one_line_takes_the_place_of_the_last(notebook, clock, capsys, monkeypatch):
    cell, displays = [], []

    def put(text, again=notebook is marimo):
        displays.extend([] if again else [text])
        cell[:] = [text]

    for name, module in notebook(put).items():
        monkeypatch.setitem(sys.modules, name, module)
    display = Display(steps=100, first=0, tokens_per_step=50, shown=True)
    display.show(FOLDER, recipe(Path("unused")), LINE)
    for done in range(10, 60, 10):
        clock[0] += 2.0
        display.advance(done)
        assert len(cell) == 1 and f"step {done}/100" in cell[0]
    with counting("harvest", 400, True) as advance:
        for done in range(1, 5):
            clock[0] += 2.0
            advance(20)
            assert cell == [f"harvest: {20 * done} of 400 sequences · {2 * (20 - done) / 60:.1f} min left"]
    assert len(displays) == (2 if notebook is jupyter else 0)
    with counting("harvest", 400, False) as advance:
        clock[0] += 2.0
        advance(400)
    assert "80 of" in cell[0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [30, 60, 80, 200])
def test_a_bar_gives_way_and_never_its_name(columns):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=columns)
    with counting("features that carry most", 4, True, console=console) as advance:
        advance(1)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "features that carry most" in said and "…" not in said
    assert columns < 60 or "25%" in said


def test_a_run_of_several_phases_names_the_one_it_is_in(clock, capsys):
    values = recipe(Path("unused")).model_dump(exclude_unset=True) | {"phases": "staged"}
    values["objective"] = {"sparsity": {"coefficient": 0.3}}
    line = {"phase": 2, "loss": 0.7, "downstream_mse": 0.25, "sparsity": 1.5, "l0": 12.3, "alive": 1234}
    display = Display(steps=100, first=0, tokens_per_step=50, shown=True)
    display.show(FOLDER, RunConfig.build(values), line)
    text = rendered(display, 20)
    assert "phase 2 of 3, horizon1  downstream_mse 0.25  sparsity 1.5" in text
    assert "local-then-horizon1-then-e2e_ds" in text.replace("\n", "")
    assert "phase 2 of 3, horizon1 · loss 0.7" in logged(display, clock, capsys, 30)[0]
