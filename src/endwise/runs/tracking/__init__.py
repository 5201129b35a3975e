"""Trackers that ship: each mirrors the run folder to a place that people look at."""

from endwise.runs.tracking import to_mlflow, to_tensorboard, to_trackio, to_wandb

__all__ = ["to_mlflow", "to_tensorboard", "to_trackio", "to_wandb"]
