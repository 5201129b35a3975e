"""Worker: endwise's training step. Started by `versus_reference.py` and `many_in_one_pass.py`; see `harness.py`."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import endwise
from endwise.config.run import RunConfig
from endwise.models.language_model import LanguageModel
from endwise.models.readout import Readout
from endwise.tokens import TokenBatch
from endwise.training.making import new_trainee
from endwise.training.step import tail_model, take_step
from endwise.training.trainee import Trainee
from harness import Side, serve
from shapes import LEARNING_RATE, OBJECTIVES, STEPS, Shape, random_model

WEIGHTS = ("encoder", "b_enc", "decoder", "b_dec")
MARGIN = 1e-4
"""No pre-activation may lie closer to 0 than half of this, in standard deviations of its feature's."""
NEIGHBOURS = 12
"""Values on either side of 0 between which `off_the_kink` looks for room."""
FEATURES_AT_ONCE = 1024
CALIBRATION_ROWS = 512
"""Tokens on which the encoder's bias is set: 512 × 46,080 pre-activations are 94 MB."""


class Ours(Side):
    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            spec: `threads`, `shape`, `objective`, `folder` (written by `prepare`), and `precision`, `microbatch`,
                `saes` (how many to train in one pass), `device`, which may be absent.
        """
        torch.set_num_threads(spec["threads"])
        shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
        self.shape = shape
        device = spec.get("device", "cpu")
        self.model = endwise.load_model(str(folder / "model"), device=device)
        inputs = load_file(folder / "inputs.safetensors", device=device)
        self.batch = TokenBatch(inputs["tokens"], torch.ones_like(inputs["tokens"], dtype=torch.bool))
        weights = {name: inputs[name] for name in WEIGHTS}
        self.tail = tail_model(self.model, run_config(spec, OBJECTIVES[spec["objective"]]).training)
        self.trainees = []
        for number in range(spec.get("saes", 1)):
            objective = OBJECTIVES[spec["objective"]]
            sparsity = {"coefficient": objective["sparsity"]["coefficient"] * (1 + number / 10)}
            trainee = new_trainee(run_config(spec, objective | {"sparsity": sparsity}), self.model, STEPS)
            trainee.sae.load_state_dict(weights)
            self.trainees.append(trainee)
        versions = {name: version(name) for name in ("endwise", "torch", "transformers")}
        return {"versions": versions, "attention": self.model.model.config._attn_implementation}  # noqa: SLF001

    def step(self) -> None:
        take_step(self.model, self.trainees, self.batch, tail=self.tail)

    def report(self) -> dict[str, float]:
        """The last step's terms, L0 and gradient norm, of the first SAE."""
        return {name: float(value) for name, value in self.trainees[0].report().items()}

    def l0(self) -> float:
        """L0 of the last step."""
        return self.report()["l0"]

    def write_gradients(self, path: str) -> None:
        """The gradient that the last step's optimiser got, clipped."""
        parameters = dict(self.trainees[0].sae.named_parameters())
        gradients = {name: parameters[name].grad for name in WEIGHTS}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            raise RuntimeError(f"the step left no gradient of {', '.join(missing)}")
        save_file({name: gradient.contiguous() for name, gradient in gradients.items() if gradient is not None}, path)

    def gemm_rate(self, seconds: float = 1.0) -> float:
        """Operations per second of a product in fp32 of the encoder's shape, median."""
        rows = min(1024, self.shape.tokens)
        return gemm_rate(rows, self.shape.d_model, self.shape.d_sae, seconds)

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median seconds of each part of a step, in steps that count for nothing else."""
        found: list[dict[str, float]] = []
        for _ in range(steps):
            with measured(self.trainees[0]) as clock:
                start = time.perf_counter()
                self.step()
                total = time.perf_counter() - start
            found.append({**clock.spent, "other": total - sum(clock.spent.values()), "total": total})
        parts = {part for one in found for part in one}
        return {part: statistics.median(one.get(part, 0.0) for one in found) for part in sorted(parts)}

    def prepare(self, spec: dict[str, Any]) -> dict[str, float]:
        """Writes what both sides read: the model, a batch of tokens, the SAE's weights.

        The weights are a new SAE's, its encoder's bias lowered until some tokens of the batch have `l0` active
        features on average (None: left alone), and then nudged by `off_the_kink`.
        """
        torch.set_num_threads(spec["threads"])
        shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
        random_model(shape, spec["seed"]).save_pretrained(folder / "model")
        model = endwise.load_model(str(folder / "model"), device="cpu")
        generator = torch.Generator().manual_seed(spec["seed"])
        tokens = torch.randint(shape.vocab, (shape.batch, shape.context), generator=generator)
        trainee = new_trainee(run_config(spec, OBJECTIVES["local"]), model, STEPS)
        weights = {name: tensor.detach() for name, tensor in trainee.sae.state_dict().items() if name in WEIGHTS}
        rows = model.clean(tokens, record=[trainee.site]).activations[trainee.site].flatten(0, 1)
        if spec["l0"] is not None:
            chosen = rows[torch.randperm(len(rows), generator=generator)[:CALIBRATION_ROWS]]
            weights["b_enc"] = weights["b_enc"] - bias_shift(chosen, weights["encoder"], weights["b_enc"], spec["l0"])
        weights["b_enc"] = weights["b_enc"] - off_the_kink(rows, weights["encoder"], weights["b_enc"])
        tensors = {"tokens": tokens, **{name: weights[name].contiguous() for name in WEIGHTS}}
        save_file(tensors, folder / "inputs.safetensors")
        return {"parameters": float(sum(parameter.numel() for parameter in model.model.parameters()))}


def run_config(spec: dict[str, Any], objective: dict[str, Any]) -> RunConfig:
    shape = Shape(**spec["shape"])
    training = {
        "tokens": STEPS * shape.tokens,
        "batch": shape.batch,
        "microbatch": spec.get("microbatch"),
        "precision": spec.get("precision", "exact"),
        "learning_rate": LEARNING_RATE,
        "warmup": 0,
        "floor": 1,
        "gradient_clip": 1.0,
    }
    dictionary = {"size": shape.d_sae, **spec.get("dictionary", {})}
    return RunConfig.build(
        {"site": shape.site, "dictionary": dictionary, "objective": objective, "training": training}, "the benchmark"
    )


def gpt2_of_width(shape: Shape, device: torch.device) -> LanguageModel:
    """A model that only lends its sites to an SAE, in memory."""
    return LanguageModel(random_model(shape).to(device))  # type: ignore[pyrefly:bad-argument-type]


def bias_shift(rows: Tensor, encoder: Tensor, bias: Tensor, l0: float) -> float:
    """Amount by which to lower a bias so that the rows have `l0` positive pre-activations on average."""
    values = torch.addmm(bias, rows, encoder.T).flatten()
    count = round(l0 * len(rows))
    if not 0 < count < len(values):
        raise ValueError(f"l0 must lie between 0 and the number of features ({len(bias)}); given {l0:g}")
    return float(values.topk(count + 1, sorted=False).values.min())


def off_the_kink(rows: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    """By how much to lower each feature's bias for 0 to lie in a gap of `MARGIN` between its pre-activations.

    At 0 the gradient jumps, and rounding decides on which side a value within 1e-6 of it falls. Of 10^8 values some
    do; then two right programs differ by a latent, and by more than 1e-5 in the gradient. The gap nearest to 0 is
    taken and 0 moved into it no further than needed, so that nearly all features keep their active tokens. Errors much
    larger than fp32's rounding, as of bf16, still change the active features and show.
    """
    return torch.cat(
        [
            _nudge(torch.addmm(bias[part], rows, encoder[part].T))
            for part in torch.arange(len(bias)).split(FEATURES_AT_ONCE)
        ]
    )


def _nudge(values: Tensor) -> Tensor:
    count = min(NEIGHBOURS, len(values))
    infinity = torch.tensor(torch.inf)
    above = torch.where(values > 0, values, infinity).topk(count, dim=0, largest=False).values
    below = torch.where(values <= 0, values, -infinity).topk(count, dim=0).values
    # From 0 outwards: the gap around 0, then by turns one above and one below
    nearest = [(below[0], above[0])]
    for rank in range(1, count):
        nearest += [(above[rank - 1], above[rank]), (below[rank], below[rank - 1])]
    nudge = torch.zeros(values.shape[1])
    found = torch.zeros(values.shape[1], dtype=torch.bool)
    half = MARGIN / 2 * values.std(0)
    for low, high in nearest:
        wide = (high - low >= 2 * half) & ~found  # inf − inf is not
        inside = torch.minimum(high - half, (low + half).clamp(min=0))  # as near to 0 as the gap allows
        nudge = torch.where(wide, inside, nudge)
        found |= wide
    return nudge


def gemm_rate(rows: int, inner: int, columns: int, seconds: float) -> float:
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    out = torch.empty(rows, columns)
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        start = time.perf_counter()
        torch.mm(left, right.T, out=out)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / statistics.median(times[1:])


class Clock:
    """Seconds by part; a part that another one calls is not counted in its caller."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open: list[list[float]] = []
        self._in_tail = False

    def time(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            name = self._named(part)
            inner = [0.0]
            self._open.append(inner)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wall = time.perf_counter() - start
                self._open.pop()
                self.spent[name] = self.spent.get(name, 0.0) + wall - inner[0]
                if self._open:
                    self._open[-1][0] += wall

        return timed

    def _named(self, part: str) -> str:
        """A backward pass belongs to the tail if the tail ran since the last one, else to the SAE."""
        if part == "backward":
            name = "tail backward" if self._in_tail else "SAE backward"
            self._in_tail = False
            return name
        if part == "tail forward":
            if not torch.is_grad_enabled():  # mixed precision: the clean pass's own tail
                return "clean pass"
            self._in_tail = True
        return part


@contextmanager
def measured(trainee: Trainee) -> Iterator[Clock]:
    """Within it, the functions that make up a step are timed. What a version of endwise does not have is left out."""
    clock = Clock()
    places: list[tuple[Any, str, str]] = [
        (LanguageModel, "clean", "clean pass"),
        (LanguageModel, "replay", "tail forward"),
        (type(trainee.sae), "encode", "SAE encode"),
        (type(trainee.sae), "decode", "SAE decode"),
        (Readout, "kl", "KL"),
        (Trainee, "finish_step", "optimiser"),
        (torch.autograd, "backward", "backward"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            own = vars(owner).get(name)
            function = getattr(owner, name, None)
            if function is None:
                continue
            setattr(owner, name, clock.time(part, function))
            if own is None:  # inherited
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, own)
        yield clock


if __name__ == "__main__":
    serve(Ours())
