"""What a user sees while training runs."""

from pathlib import Path

from rich.console import Console

from endwise import progress
from endwise.progress import Display
from small_gpt2 import recipe

LINE = {"kl": 0.25, "sparsity": 1.5, "l0": 12.3, "alive": 1234}


def rendered(display, done):
    console = Console(width=120, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(display._table(done))
    return capture.get()


def test_the_table_has_speed_time_left_terms_and_the_last_evaluation(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = Display(steps=100, first=0, tokens_per_step=50, shown=False)
    config = recipe(Path("unused"))
    display.show(config, {**LINE, "heldout": {"ce_increase": 0.125}})
    display.show(config, LINE)
    clock[0] = 110.0
    text = rendered(display, 20)
    for part in ("step 20/100", "100 tokens/s", "0.7 min left", "kl 0.25", "sparsity 1.5", "12.3", "1,234", "+0.125"):
        assert part in text, part


def test_a_log_gets_a_line_now_and_then_and_nothing_when_quiet(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for shown, expected in ((True, 2), (False, 0)):
        with Display(steps=100, first=0, tokens_per_step=50, shown=shown) as display:
            for step in range(1, 71):
                clock[0] += 1.0
                display.advance(step)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == expected, lines
        assert all("tokens/s" in line for line in lines)
