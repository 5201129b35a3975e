"""Runs whose dictionaries are split over the processes that torchrun starts: `... FOLDER TOKENS RUN:SHARDS:STEP...`.

Step 0 starts a run; a later one resumes that in `FOLDER/RUN` from its checkpoint. Runs after `IN_SLOTS` hold pairs so.
"""

import atexit
import json
import os
import sys
from pathlib import Path

import torch

from endwise import RunConfig, train
from endwise.common.processes import joined
from endwise.kernels import register
from endwise.training.trainee import Trainee
from own_kernels import HeldKernels, TightRooms
from small_gpt2 import data, recipe, small_model

TOPK = {"architecture": "topk", "k": 7, "decoder_norm": "free", "aux": 0.5, "dead_window": 40, "revive": 0.1}
TRANSCODER = {"skip": True, "normalize": "scalar", "revive": 0.01, "dead_window": 40}
RUNS = {
    "relu": ("e2e_ds", {}, {"training": {"save_at": "log"}}),
    "steered": (
        "local",
        {"decoder_norm": "free"},
        {"init_from": "relu", "objective": {"sparsity": {"target_l0": 12.0}}},
    ),
    "transcoder": (
        "local",
        TRANSCODER,
        {
            "writes": "blocks.2.hook_resid_pre",
            "objective": {"sparsity": {"coefficient": 0.3, "p_end": 0.5}},
            "data": {"leave_out_norms": 1.3},
        },
    ),
    "jumprelu": ("e2e", {"architecture": "jumprelu", "threshold_init": 0.5}, {}),
    "means": ("local", {"architecture": "jumprelu", "penalty": "tanh_quadratic"}, {}),
    "topk": ("e2e", TOPK, {}),
    "batchtopk": ("e2e", {"architecture": "batchtopk", "k": 7, "k_start": 10}, {}),
}


def config(name: str, folder: Path, tokens: Path, shards: int = 1) -> RunConfig:
    kind, dictionary, others = RUNS[name.partition("-")[0]]
    settings = {"batch": 5, "tokens": 320, "evaluate_every": 4, "checkpoint_every": 4, "log_every": 1}
    values = recipe(folder / name, kind, shards=shards, **settings).model_dump(mode="json")
    values["dictionary"] = {"architecture": "standard", "size": 40} | dictionary
    values["evaluation"] |= {"batch": 3, "during_training_tokens": 104}  # batches of 3 fall unevenly to replicas
    values["data"] = data(tokens).model_dump() | {"mask_first_position": True}
    for key, value in others.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    if "k" in dictionary:
        del values["objective"]["sparsity"]
    if values["init_from"]:
        values["init_from"] = str(folder / values["init_from"])
    return RunConfig.build(values)


def run(folder: Path, tokens: Path, name: str, shards: int = 1, step: int = 0) -> None:
    resumed = {"resume": True, "from_step": step} if step else {}
    train(config(name, folder, tokens, shards), model=small_model(), display=False, **resumed)


def fails_as_second_process(step: int) -> None:
    plain = Trainee.accumulate

    def failing(self, *arguments, **named):
        if os.environ["RANK"] == "1" and self.step == step:
            raise ArithmeticError("only here")
        return plain(self, *arguments, **named)

    Trainee.accumulate = failing


def holds_in_slots(folder: Path) -> None:
    """As on a GPU, whatever their number, with little room; what was missing when is in `missing-RANK.json`."""
    register("cpu", HeldKernels())
    plain, rooms = Trainee.__init__, list[TightRooms]()

    def made(self, sae, *given):
        plain(self, sae, *given)
        sae.sparse_below = getattr(sae, "part", sae).sparse_below = 1.0
        self.rooms = TightRooms()
        rooms.append(self.rooms)

    def written():
        missing = json.dumps([each.missing for each in rooms])
        (folder / f"missing-{os.environ['RANK']}.json").write_text(missing)

    Trainee.__init__ = made
    atexit.register(written)


if __name__ == "__main__":
    if "FAIL_AT" in os.environ:
        fails_as_second_process(int(os.environ["FAIL_AT"]))
    folder, tokens, *wanted = sys.argv[1:]
    torch.set_num_threads(1)
    with joined():
        for each in wanted:
            if each == "IN_SLOTS":
                holds_in_slots(Path(folder))
                continue
            name, shards, step = each.split(":")
            run(Path(folder), Path(tokens), name, int(shards), int(step))
