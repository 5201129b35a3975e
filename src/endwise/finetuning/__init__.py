"""A finished SAE of anybody's, tuned on what the model predicts with it in place."""

from endwise.finetuning.finetune import finetune
from endwise.finetuning.recipe import TuningSettings
from endwise.finetuning.result import Finetuned

__all__ = ["Finetuned", "TuningSettings", "finetune"]
