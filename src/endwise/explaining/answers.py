"""Reading what a language model answered: strictly first, then what it can only have meant; nothing is guessed."""

import json
import re
from typing import Any

from endwise.common.text import storable

LONGEST = 2000
"""Characters of an explanation that are kept."""

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_LABELLED = re.compile(r"^\W*explanation\W*:\W*\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_LIST = re.compile(r"\[\s*[01](?:\s*,\s*[01])*\s*,?\s*\]")


def read_explanation(answer: str) -> str | None:
    """The explanation in an answer: `{"explanation": …}`, else what follows `explanation:` in a line, else a text of
    one paragraph without braces as it stands. None where there is none, as in JSON that was cut off.
    """
    answer = _THOUGHT.sub("", answer).strip()
    value = _json(answer)
    if isinstance(value, dict):
        found = value.get("explanation")
        return _shortened(found) if isinstance(found, str) else None
    if "{" in answer or "```" in answer:
        return None
    if labelled := _LABELLED.findall(answer):
        return _shortened(labelled[-1])
    return _shortened(answer) if answer and "\n\n" not in answer and "<think" not in answer else None


def read_choices(answer: str, count: int) -> list[bool] | None:
    """One choice for each of `count` items: `{"answers": [1, 0, …]}` or a bare list, else the last list of 0 and 1 in
    the answer. None where there is none of that length.
    """
    answer = _THOUGHT.sub("", answer).strip()
    value = _json(answer)
    if isinstance(value, dict):
        value = value.get("answers")
    if value is None and (lists := _LIST.findall(answer)):
        value = [int(digit) for digit in re.findall(r"[01]", lists[-1])]
    if not isinstance(value, list) or len(value) != count:
        return None
    choices = all(isinstance(each, int) and each in (0, 1) for each in value)  # true and false are numbers as well
    return [bool(each) for each in value] if choices else None


def _json(answer: str) -> Any:
    """Parse an answer as JSON, alone or fenced; None where it is none."""
    fenced = _FENCED.findall(answer)
    for text in (answer, *reversed(fenced)):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    return None


def _shortened(text: str) -> str | None:
    """One line, without halves of surrogate pairs, which no file takes; None if nothing is left."""
    text = " ".join(storable(text).split())[:LONGEST]
    return text or None
