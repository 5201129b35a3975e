"""Worker: a training step of transcoders at all MLPs of a model. Started by `joint_step.py`; see `harness.py`."""

from importlib.metadata import version
from typing import Any

import torch

import endwise
from endwise.config.places import PlacesConfig
from endwise.models.language_model import LanguageModel
from endwise.tokens import TokenBatch
from endwise.training.joint import AnyTrainee
from endwise.training.making import new_joint_trainee, new_trainee
from endwise.training.step import take_step
from harness import Side, serve
from ours import CALIBRATION_ROWS, bias_shift
from shapes import LEARNING_RATE, OBJECTIVES, STEPS, Shape, random_model


class Transcoders(Side):
    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            spec: `how` (`joint`, `apart` in one pass, or `single`: each in a pass of its own, one after another),
                `threads`, `seed`, `shape` (None: the embedded model), `objective`, `ratio`, `l0`, `batch`, `context`.
        """
        torch.set_num_threads(spec["threads"])
        shape = None if spec["shape"] is None else Shape(**spec["shape"])
        self.model = endwise.load_model("embedded") if shape is None else LanguageModel(random_model(shape))
        generator = torch.Generator().manual_seed(spec["seed"])
        size = (spec["batch"], spec["context"])
        tokens = torch.randint(self.model.model.config.vocab_size, size, generator=generator)
        self.batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        config = recipe(spec, self.model.n_layers)
        if spec["how"] == "joint":
            self.trainees: list[AnyTrainee] = [new_joint_trainee(config, self.model, STEPS)]
        else:
            self.trainees = [new_trainee(each, self.model, STEPS) for each in config.recipes]
        self._calibrate(spec["l0"])
        self.in_one_pass = [self.trainees] if spec["how"] != "single" else [[each] for each in self.trainees]
        return {name: version(name) for name in ("endwise", "torch", "transformers")}

    @torch.no_grad()
    def _calibrate(self, l0: float) -> None:
        """Lowers the encoders' biases until `l0` features are active on average in the clean pass."""
        parts = [part for each in self.trainees for part in each.parts]
        clean = self.model.clean(self.batch.tokens, record={part.place.reads for part in parts})
        for part in parts:
            rows = clean.activations[part.place.reads].flatten(0, 1)[:CALIBRATION_ROWS]
            part.sae.b_enc.sub_(bias_shift(rows, part.sae.W_enc.T, part.sae.b_enc, l0))

    def step(self) -> None:
        for trainees in self.in_one_pass:
            take_step(self.model, trainees, self.batch)

    def l0(self) -> float:
        """L0 of the last step, mean over the places."""
        parts = [part for each in self.trainees for part in each.parts]
        return sum(part.values()["l0"] for part in parts) / len(parts)


def recipe(spec: dict[str, Any], layers: int) -> PlacesConfig:
    """A transcoder at every MLP."""
    tokens = spec["batch"] * spec["context"]
    places = [{"site": f"blocks.{n}.mlp_in", "writes": f"blocks.{n}.hook_mlp_out"} for n in range(layers)]
    training = {"tokens": STEPS * tokens, "batch": spec["batch"], "learning_rate": LEARNING_RATE, "warmup": 0}
    return PlacesConfig.build(
        {
            "places": places,
            "joint": spec["how"] == "joint",
            "dictionary": {"ratio": spec["ratio"]},
            "objective": OBJECTIVES[spec["objective"]],
            "training": {**training, "floor": 1},
        },
        "the benchmark",
    )


if __name__ == "__main__":
    serve(Transcoders())
