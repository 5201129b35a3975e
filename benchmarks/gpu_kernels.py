"""Kernels of the device against the eager ones and their definitions in float64, for `gpu.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from card import NUMBERS, tf32
from endwise.dictionaries.latents import SparseLatents, decode_sparse
from endwise.kernels import Found, Kernels, Pairs, Unembedding, kernels_for
from endwise.kernels.eager import EagerKernels
from gpu_job import TINY_L0, Job, Row, apart
from ours import CALIBRATION_ROWS, bias_shift
from roofline import DECODER, DECODER_L0, dictionary_forward, kl_kernels, seconds, sparse_decoder
from shapes import LOGIT_SPREAD, Shape

ROWS_CHECKED = 256
"""Rows on which a kernel is compared with its definition."""
PRECISION_OF = {"bf16": "mixed", "tf32": "exact, TF32", "fp32": "exact"}


def kernels(job: Job) -> list[Row]:
    """KL and cross-entropy, the encoder's two searches, and the sparse decoder with its gradients."""
    shape = job.shape("gpt2-small")
    decoder = replace(shape, d_sae=128) if job.tiny else DECODER
    vocabulary = [
        (f"{name} {numbers}", partial(_compared, job, numbers, partial(of, job, shape, numbers)))
        for numbers in ("bf16", "fp32", "tf32")
        for name, of in (("kl", _kl), ("cross-entropy", _cross_entropy))
    ]
    encoders = [
        (name, partial(_compared, job, "fp32", partial(_encoder, job, shape, top))) for name, top in _ENCODERS.items()
    ]
    decoders = [
        (f"decoder {numbers}", partial(_decoder, job, decoder, numbers)) for numbers in ("bf16", "fp32", "tf32")
    ]
    return [*vocabulary[:1], *decoders, *vocabulary[1:], *encoders]


_ENCODERS = {"active": False, "largest": True}
Result = dict[str, Tensor]


@dataclass
class Problem:
    """An operation at all rows, and at few, with its definition there."""

    run: Callable[[Kernels, int], Result]
    """Takes kernels and a number of rows."""
    definition: Callable[[int], Result]
    paper: float | None = None
    """Least seconds, by the roofline."""


def _compared(job: Job, numbers: str, of: Callable[[], Problem]) -> dict[str, Any]:
    """Errors of both kernels against the definition in float64, and the time of both, where there are two."""
    problem, rows = of(), job.shape("gpt2-small").tokens
    few, own, eager = min(rows, ROWS_CHECKED), kernels_for(job.host.device), EagerKernels()
    both = {"eager": eager} if type(own) is EagerKernels else {"ours": own, "eager": eager}
    found: dict[str, Any] = {"rows": rows, "kernels": type(own).__name__, "errors": {}, "seconds": {}}
    with tf32(numbers == "tf32"):
        truth = problem.definition(few)
        for name, each in both.items():
            found["errors"][name] = _errors(problem.run(each, few), truth)
            found["seconds"][name] = job.host.timed(partial(problem.run, each, rows), job.seconds).seconds
            job.host.free()
    if "ours" in both:
        found["times_as_fast"] = found["seconds"]["eager"] / found["seconds"]["ours"]
        if problem.paper is not None:
            found["share_of_roofline"] = problem.paper / found["seconds"]["ours"]
    return found


def _errors(found: Result, truth: Result) -> dict[str, float]:
    """Return relative errors, in the Frobenius norm."""
    return {name: apart(found[name].double(), value) for name, value in truth.items()}


def _states(job: Job, shape: Shape, numbers: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of two passes, and an unembedding."""
    dtype, size = NUMBERS[numbers], (shape.tokens, shape.d_model)
    clean = job.noise(*size, seed=1)
    spliced = clean + job.noise(*size, scale=0.3, seed=2)
    weight = job.noise(shape.vocab, shape.d_model, scale=LOGIT_SPREAD / shape.d_model**0.5, seed=3, dtype=dtype)
    return clean.to(dtype), spliced.to(dtype), weight


def _kl(job: Job, shape: Shape, numbers: str) -> Problem:
    clean, spliced, weight = _states(job, shape, numbers)
    keep = torch.ones(len(clean), dtype=torch.bool, device=clean.device)

    def run(own: Kernels, rows: int) -> Result:
        return own.kl(clean[:rows], spliced[:rows], keep[:rows], Unembedding(weight))._asdict()

    def definition(rows: int) -> Result:
        logs = [(each[:rows].double() @ weight.double().T).log_softmax(-1) for each in (clean, spliced)]
        p, q = (each.exp() for each in logs)
        return {"total": (p * (logs[0] - logs[1])).sum(), "gradient": (q - p) @ weight.double()}

    return Problem(run, definition, seconds(kl_kernels(shape, PRECISION_OF[numbers]), job.machine))


def _cross_entropy(job: Job, shape: Shape, numbers: str) -> Problem:
    _, hidden, weight = _states(job, shape, numbers)
    keep = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    targets = torch.arange(len(hidden), device=hidden.device) * 7919 % shape.vocab

    def run(own: Kernels, rows: int) -> Result:
        given = hidden[:rows], targets[:rows], keep[:rows], Unembedding(weight)
        found = own.cross_entropy(*given, with_gradient=True)
        assert found.gradient is not None
        return {"losses": found.losses, "gradient": found.gradient}

    def definition(rows: int) -> Result:
        logs = (hidden[:rows].double() @ weight.double().T).log_softmax(-1)
        of_target = torch.nn.functional.one_hot(targets[:rows], shape.vocab).double()
        return {"losses": -(logs * of_target).sum(-1), "gradient": (logs.exp() - of_target) @ weight.double()}

    return Problem(run, definition)


def _encoder(job: Job, shape: Shape, top: bool) -> Problem:
    """Find what is active: what is positive at a lowered bias, or the k largest."""
    x = job.noise(shape.tokens, shape.d_model, seed=1)
    weight = job.noise(shape.d_sae, shape.d_model, scale=shape.d_model**-0.5, seed=2)
    bias, k = torch.zeros(shape.d_sae, device=x.device), round(job.l0)
    if not top:
        bias -= bias_shift(x[:CALIBRATION_ROWS], weight, bias, job.l0)

    def run(own: Kernels, rows: int) -> Result:
        limit = rows * shape.d_sae // 4
        some = x[:rows], weight, bias
        found = own.largest(*some, k, limit) if top else own.active(*some, limit)
        assert found is not None
        return {"latents": _dense(found)} if rows <= ROWS_CHECKED else {}

    def definition(rows: int) -> Result:
        latents = torch.relu(x[:rows].double() @ weight.double().T + bias.double())
        if top:
            least = latents.topk(k).values[:, -1:]
            latents = latents.where(latents >= least, 0.0)
        return {"latents": latents}

    found = dictionary_forward(shape, "exact", job.l0)[-2]
    return Problem(run, definition, found.seconds(job.machine))


def _dense(found: Found) -> Tensor:
    pairs = found.pairs
    matrix = found.values.new_zeros(pairs.n_rows, pairs.n_features)
    return matrix.index_put((pairs.rows, pairs.features), found.values)


def _decoder(job: Job, shape: Shape, numbers: str) -> dict[str, Any]:
    """Decode by pairs and densely, forward and backward; both against float64, and against each other in time."""
    k, dtype, rows = TINY_L0 if job.tiny else DECODER_L0, NUMBERS[numbers], shape.tokens
    weight = job.noise(shape.d_sae, shape.d_model, scale=shape.d_model**-0.5, seed=1, dtype=dtype).requires_grad_()
    values = job.noise(rows, k, seed=2).abs().to(dtype)
    upstream = job.noise(rows, shape.d_model, seed=3, dtype=dtype)
    part = shape.d_sae // k  # a feature in each of k stretches: ascending, and none twice
    generator = torch.Generator(weight.device).manual_seed(4)
    within = torch.randint(part, (rows, k), generator=generator, device=weight.device)
    features = within + part * torch.arange(k, device=weight.device)

    def dense_latents(count: int, of: torch.dtype) -> Tensor:
        empty = torch.zeros(count, shape.d_sae, dtype=of, device=weight.device)
        return empty.scatter_(1, features[:count], values[:count].to(of)).requires_grad_()

    def sparse(count: int) -> Result:
        own = values[:count].reshape(-1).clone().requires_grad_()
        row = torch.arange(count, device=weight.device)
        pairs = Pairs(row.repeat_interleave(k), features[:count].reshape(-1), row * k, shape.d_sae)
        decoded = decode_sparse(SparseLatents(own, pairs, (count,)), weight)
        d_own, d_weight = torch.autograd.grad(decoded, (own, weight), upstream[:count])
        return {"decoded": decoded, "values' gradient": d_own.view(count, k), "weight's gradient": d_weight}

    def dense(latents: Tensor, of: Tensor, count: int) -> Result:
        decoded = latents @ of
        d_latents, d_weight = torch.autograd.grad(decoded, (latents, of), upstream[:count].to(of.dtype))
        chosen = d_latents.gather(1, features[:count])
        return {"decoded": decoded, "values' gradient": chosen, "weight's gradient": d_weight}

    few = min(rows, ROWS_CHECKED)
    with tf32(numbers == "tf32"):
        truth = dense(dense_latents(few, torch.float64), weight.detach().double().requires_grad_(), few)
        own, other = sparse(few), dense(dense_latents(few, dtype), weight, few)
        errors = {"ours": _errors(own, truth), "dense": _errors(other, truth)}
        taken = {"ours": job.host.timed(lambda: sparse(rows), job.seconds).seconds}
        latents = dense_latents(rows, dtype)
        taken["dense"] = job.host.timed(lambda: dense(latents, weight, rows), job.seconds).seconds
    paper = seconds(sparse_decoder(shape, PRECISION_OF[numbers], k), job.machine)
    return {
        "rows": rows,
        "k": k,
        "features": shape.d_sae,
        "kernels": type(kernels_for(job.host.device)).__name__,
        "errors": errors,
        "seconds": taken,
        "times_as_fast": taken["dense"] / taken["ours"],
        "share_of_roofline": paper / taken["ours"],
    }
