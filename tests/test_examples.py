"""The examples run: both scripts and both notebooks, each in miniature, one on what the other made."""

import json
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def notebook(name: str, **parameters: object) -> None:
    """Run its code cells in turn, with `parameters` in place of those that its first one sets."""
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"] == {"tags": ["parameters"]} and not any(cell["outputs"] for cell in code)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
        if number == 0:
            assert parameters.keys() <= names.keys()
            names.update(parameters)


def script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    notebook("own_model.ipynb", TOKENS=2_048, HELDOUT=512)
    notebook("see_features.ipynb", TOKENS=512)
    told = capsys.readouterr().out
    assert "L0 3" in told and "KL 0." in told and "likelier without it" in told

    script("own_model.py", "--tokens", "2_048", "--heldout", "512", "--out", "runs/script")
    (tmp_path / "runs" / "script" / "sae").rename(tmp_path / "elsewhere")  # as an SAE that somebody else gives away
    script("see_features.py", "elsewhere", "--model", "embedded", "--text", "embedded", "--tokens", "512")
    told = capsys.readouterr().out
    assert (tmp_path / "runs" / "script" / "dashboard" / "index.html").is_file()
    assert told.count("feature ") == 10 and "importance" in told
