"""Several SAEs in one pass over several processes, one of which fails at one of them: `... FOLDER TOKENS METHOD`."""

import os
import sys
from pathlib import Path

import torch

from endwise import SomeFailed, train_together
from endwise.training.trainee import Trainee
from small_gpt2 import recipe, small_corpora, small_model

KINDS = ("local", "e2e", "e2e_ds")
FAILING_STEP = 3


def configs(folder):
    settings = {"tokens": 160, "batch": 4, "log_every": 1, "evaluate_every": 2}
    return [recipe(folder / kind, kind, seed, **settings) for seed, kind in enumerate(KINDS)]


def fails_at_one(method):
    """In the second process alone, of the e2e SAE alone."""
    plain = getattr(Trainee, method)

    def failing(self, *arguments, **named):
        names = [term.name for term in self.objective.terms]
        if os.environ.get("RANK") == "1" and self.step == FAILING_STEP and names == ["kl", "sparsity"]:
            raise ArithmeticError("only here")
        return plain(self, *arguments, **named)

    setattr(Trainee, method, failing)


if __name__ == "__main__":
    folder, tokens, method = sys.argv[1:]
    torch.set_num_threads(1)
    fails_at_one(method)
    try:
        train_together(configs(Path(folder)), model=small_model(), corpora=small_corpora(Path(tokens)), display=False)
    except SomeFailed as error:
        sys.exit(f"rank {os.environ['RANK']}: {error}")
