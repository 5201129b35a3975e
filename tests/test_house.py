"""What the plan of the house asks of the source as text."""

import re
from pathlib import Path

import endwise

SOURCE = Path(endwise.__file__).parent


def test_one_spliced_pass():
    """A replay leaves to its caller what a spliced pass must not forget: masked positions, microbatches, the tail."""
    calling = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"\.replay\b", path.read_text()) and "models" not in path.relative_to(SOURCE).parts[:1]
    ]
    assert not calling, f"Use models.splicing.SplicedPass in {', '.join(calling)}."


def test_the_size_of_a_microbatch_is_decided_once():
    assert [path.name for path in SOURCE.rglob("*.py") if "TAIL_TOKENS =" in path.read_text()] == ["splicing.py"]
