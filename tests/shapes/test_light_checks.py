"""Tests of this folder run under type checks: of axes, and of everything else. They walk every public
procedure once; the others run without, which takes half the time.
"""

from collections.abc import Callable

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from endwise.common.statistics import Interval, bootstrap_ratio
from endwise.kernels.screen import Screen
from endwise.models.splicing import spliced
from light_checks import names_axes

Rows = Float[Tensor, "*rows"]


@pytest.fixture
def checked(request):
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("without --jaxtyping-packages=endwise,beartype.beartype (make test) nothing is checked")


@pytest.mark.usefixtures("checked")
def test_axes_are_compared():
    Screen(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(TypeCheckError, match="d_sae"):
        Screen(torch.ones(3, 2), torch.ones(4))


@pytest.mark.usefixtures("checked")
def test_what_names_no_axes_is_checked_as_well():
    with pytest.raises(BeartypeCallHintViolation, match="wrong"):
        Interval("wrong", 1.0, 0.5)  # a dataclass
    with pytest.raises(BeartypeCallHintViolation, match="wrong"):
        bootstrap_ratio([1.0], [1.0], "wrong", 0)  # a function
    with pytest.raises(TypeCheckError, match="wrong"):
        spliced("wrong", {}).__enter__()  # a generator


@pytest.mark.parametrize("annotation", [Rows, Rows | None, dict[str, Rows], Callable[[Rows], None], "Rows"], ids=str)
def test_axes_are_seen_wherever_they_stand(annotation):
    assert names_axes(annotation)


@pytest.mark.parametrize(
    "annotation", [None, int, str | None, Tensor, dict[str, Tensor], Callable[[int], str]], ids=str
)
def test_nothing_else_is_taken_for_axes(annotation):
    assert not names_axes(annotation)
