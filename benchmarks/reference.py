"""Worker: the training step of the paper's own code, `e2e-sae`. Started by `versus_reference.py`; see `harness.py`.

A step is what the training loop of `run_train_tlens_saes.py` does with a batch when nothing is due to be logged,
evaluated or saved: the clean pass (`forward_raw`), the spliced one (`forward`), `calc_loss`, backward, clipping, Adam,
the learning rate's schedule. What the loop does on top of that now and then (counting how often features fire) is left
out, in the reference's favour.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness import Side, serve
from shapes import LEARNING_RATE, OBJECTIVES, STEPS, Shape, model_config

PARAMETERS = {
    "encoder": "encoder.0.weight",
    "b_enc": "encoder.0.bias",
    "decoder": "decoder.weight",
    "b_dec": "decoder.bias",
}
"""Ours by the reference's; its decoder is held as `[d_model d_sae]`."""


def import_reference(source: str | None) -> None:
    """Makes `e2e_sae` importable, from a source tree if one is given.

    The wheel lacks a script that the package takes a type from, which only reading of its own checkpoints needs.
    """
    if source is not None:
        sys.path.insert(0, source)
    name = "e2e_sae.scripts.train_tlens.run_train_tlens"
    try:
        import_module(name)
    except ImportError:
        for part in (name.rpartition(".")[0], name):
            sys.modules[part] = types.ModuleType(part)
        sys.modules[name].HookedTransformerPreConfig = object  # type: ignore[pyrefly:missing-attribute]


def hooked_model(shape: Shape, folder: Path, device: str = "cpu") -> Any:
    """The same language model in TransformerLens, converted by its own converters; nothing is folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # type: ignore[pyrefly:missing-import]
    from transformer_lens.pretrained import weight_conversions  # type: ignore[pyrefly:missing-import]
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "n_layers": shape.layers,
        "d_model": shape.d_model,
        "n_ctx": shape.positions,
        "d_head": shape.d_model // shape.heads,
        "n_heads": shape.heads,
        "d_mlp": shape.d_mlp,
        "d_vocab": shape.vocab,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "eps": 1e-5,
        "device": device,
    }
    convert = weight_conversions.convert_gpt2_weights
    if shape.family == "gpt_neo":
        config: Any = model_config(shape)
        settings |= {"use_attn_scale": False, "use_local_attn": True, "window_size": config.window_size}
        settings |= {"attn_types": config.attention_layers}
        convert = weight_conversions.convert_neo_weights
    model = HookedTransformer(HookedTransformerConfig(**settings))
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original.to(device)
    with torch.no_grad():
        model.load_and_process_state_dict(
            convert(original, model.cfg),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    return model


def loss_configs(objective: str, later: list[str]) -> Any:
    """An objective in the reference's names: in_to_orig is downstream MSE, out_to_in local MSE."""
    from e2e_sae.losses import LossConfigs  # type: ignore[pyrefly:missing-import]

    chosen = OBJECTIVES[objective]
    downstream = {"total_coeff": chosen.get("downstream_mse"), "hook_positions": later}
    return LossConfigs(
        sparsity={"coeff": chosen["sparsity"]["coefficient"]},
        in_to_orig=downstream if later else None,
        out_to_orig=None,
        out_to_in={"coeff": chosen["local_mse"]} if "local_mse" in chosen else None,
        logits_kl={"coeff": chosen["kl"]} if "kl" in chosen else None,
    )


class CarefulKL(torch.autograd.Function):
    """The reference's KL of two sets of logits, with softmax, sums and gradient in float64, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(len(logits)).split(64):
            log_q, log_p = logits[part].double().log_softmax(-1), clean[part].double().log_softmax(-1)
            total += (log_p.exp() * (log_p - log_q)).sum()
            gradient[part] = ((log_q.exp() - log_p.exp()) / len(logits)).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return (total / len(logits)).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[pyrefly:bad-override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream), None


@contextmanager
def careful_kl() -> Iterator[None]:
    """Within it the reference's KL term is `CarefulKL`."""
    from e2e_sae.losses import LogitsKLLoss  # type: ignore[pyrefly:missing-import]

    def calc_loss(_self: Any, new_logits: torch.Tensor, orig_logits: torch.Tensor) -> Any:
        return CarefulKL.apply(new_logits.flatten(0, -2), orig_logits.flatten(0, -2))

    own = LogitsKLLoss.calc_loss
    LogitsKLLoss.calc_loss = calc_loss
    try:
        yield
    finally:
        LogitsKLLoss.calc_loss = own


class Reference(Side):
    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            spec: as of `ours.Ours.build`, and `source`: a source tree of the reference, or None.
        """
        torch.set_num_threads(spec["threads"])
        import_reference(spec.get("source"))
        from e2e_sae import SAETransformer  # type: ignore[pyrefly:missing-import]
        from e2e_sae.losses import calc_loss  # type: ignore[pyrefly:missing-import]
        from e2e_sae.utils import get_cosine_schedule_with_warmup  # type: ignore[pyrefly:missing-import]

        shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
        self.calc_loss, self.site, self.local = calc_loss, shape.site, spec["objective"] == "local"
        self.layer, self.final_layer = shape.layer, shape.layer + 1 if self.local else None
        later = range(shape.layer + 1, shape.layers) if spec["objective"] == "e2e_ds" else range(0)
        self.later = [f"blocks.{layer}.hook_resid_pre" for layer in later]
        self.losses = loss_configs(spec["objective"], self.later)
        device = spec.get("device", "cpu")
        inputs = load_file(folder / "inputs.safetensors", device=device)
        self.tokens = inputs["tokens"]
        hooked = hooked_model(shape, folder / "model", device)
        ratio = (shape.d_sae + 0.5) / shape.d_model  # it is multiplied back and rounded down
        self.model = SAETransformer(hooked, [shape.site], ratio, init_decoder_orthogonal=False)
        self.model.saes.to(device).train()
        self.sae = self.model.saes[shape.site.replace(".", "-")]
        state = {theirs: inputs[ours] for ours, theirs in PARAMETERS.items()}
        state["decoder.weight"] = state["decoder.weight"].T
        self.sae.load_state_dict(state)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("saes."))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 0, STEPS, min_lr_factor=1.0)
        return {"versions": versions("e2e-sae", "transformer-lens", "torch"), "source": spec.get("source")}

    def step(self) -> None:
        self._gradient()
        self._update()

    def _gradient(self, path: str | None = None) -> dict[str, float]:
        """The passes, the loss, backward and clipping. With `path`, writes the gradient as the optimiser gets it and
        returns the terms, L0 and the gradient's norm.
        """
        clean_logits, clean = self.model.forward_raw(
            tokens=self.tokens,
            run_entire_model=not self.local,
            final_layer=self.final_layer,
            cache_positions=self.later or None,
        )
        logits, spliced = self.model.forward(
            tokens=self.tokens,
            sae_positions=[self.site],
            cache_positions=self.later or None,
            orig_acts=clean if self.local else None,
        )
        loss, terms = self.calc_loss(
            orig_acts=clean,
            new_acts=spliced,
            orig_logits=None if logits is None else clean_logits.detach().clone(),
            new_logits=logits,
            loss_configs=self.losses,
            is_log_step=False,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.saes.parameters(), 1.0).item()
        if path is None:
            return {}
        gradients = {name: self.sae.get_parameter(theirs).grad for name, theirs in PARAMETERS.items()}
        gradients["decoder"] = gradients["decoder"].T
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, path)
        return {"gradient_norm": norm, **self._named(terms), "l0": self._l0(spliced[self.site].c)}

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def checked_step(self, plain: str, careful: str) -> dict[str, dict[str, float]]:
        """A step whose gradient and terms are kept: as they are, and where there is a KL once more with `CarefulKL`.

        torch's log_softmax in fp32 sums a vocabulary of 50,257 with an error of about 1e-5, so that beyond that the
        plain step is no measure of ours.
        """
        reports = {"plain": self._gradient(plain)}
        if not self.local:
            self.optimizer.zero_grad()
            with careful_kl():
                reports["careful"] = self._gradient(careful)
        self._update()
        return reports

    def _named(self, terms: dict[str, Any]) -> dict[str, float]:
        """Terms by our names; several sites' downstream errors are averaged, as they are weighted."""
        groups: dict[str, list[float]] = {}
        kinds = {
            "logits_kl": "kl",
            "in_to_orig": "downstream_mse",
            "out_to_in": "local_mse",
            "sparsity": "sparsity",
        }
        for name, value in terms.items():
            groups.setdefault(kinds[name.split("/")[2]], []).append(float(value))
        return {name: sum(values) / len(values) for name, values in groups.items()}

    @staticmethod
    def _l0(latents: torch.Tensor) -> float:
        return float(latents.detach().count_nonzero()) / latents[..., 0].numel()

    @torch.no_grad()
    def l0(self) -> float:
        """On the batch, with the weights as they are."""
        _, clean = self.model.forward_raw(self.tokens, run_entire_model=False, final_layer=self.layer + 1)
        return self._l0(self.sae(clean[self.site])[1])


def versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


if __name__ == "__main__":
    serve(Reference())
