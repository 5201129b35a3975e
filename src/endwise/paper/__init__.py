"""The paper's quantitative experiments on any model, from one command: what is run, what it shows, one report."""

from endwise.paper.reproduce import Reproduced, reproduce
from endwise.paper.study_config import StudyConfig

__all__ = ["Reproduced", "StudyConfig", "reproduce"]
