"""SAELens: its training SAEs driven by its own trainer, and the files that it writes for inference."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rival_packages import making
from rival_packages.making import BETAS, FEATURES, LEARNING_RATE, ROWS, STEPS, WIDTH, Stored, under

GROUPS = [6, 12, FEATURES]
TOP = {"k": 4, "aux_loss_coefficient": 0.5}


@dataclass(frozen=True)
class Case:
    """One training SAE: its settings, and what is recorded beyond the plain step and the plain run."""

    name: str
    architecture: str
    settings: Mapping[str, Any]
    dead: bool = False
    """Also the losses and gradients with a given mask of dead features."""
    few: bool = False
    """Also latents where biases leave fewer positive pre-activations than k."""
    window: int = 1000
    """`dead_feature_window`: passes without firing after which the trainer calls a feature dead."""
    low: float = 1.0
    """Factor on the common thresholds."""


def jumprelu(mode: str, to_input: bool) -> Case:
    """The three penalties, with the straight-through gradient to thresholds alone or to pre-activations as well."""
    settings = {"jumprelu_bandwidth": 0.4, "jumprelu_init_threshold": 0.3, "l0_coefficient": 0.15}
    settings |= {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": to_input}
    settings |= {"pre_act_loss_coefficient": 0.02} | ({"target_l0": 5.0} if mode == "quadratic" else {})
    return Case(f"jumprelu_{mode}{'_to_input' if to_input else ''}", "jumprelu", settings, dead=True)


def top(name: str, architecture: str, rescale: bool, **more: Any) -> Case:
    """The top-k family, with selection by the pre-activation or by it times the decoder's norm."""
    return Case(name, architecture, TOP | {"rescale_acts_by_decoder_norm": rescale} | more, dead=True, few=True)


CASES = (
    Case("standard", "standard", {"l1_coefficient": 0.3}),
    Case("standard_p", "standard", {"l1_coefficient": 0.01, "lp_norm": 0.5}),
    Case("standard_no_b_dec", "standard", {"l1_coefficient": 0.3, "apply_b_dec_to_input": False}),
    Case("standard_layer_norm", "standard", {"l1_coefficient": 0.3, "normalize_activations": "layer_norm"}),
    Case("gated", "gated", {"l1_coefficient": 0.3}),
    top("topk", "topk", rescale=False),
    top("topk_rescaled", "topk", rescale=True),
    Case("topk_window", "topk", TOP | {"rescale_acts_by_decoder_norm": False}, window=2),
    top("batchtopk", "batchtopk", rescale=False),
    top("batchtopk_rescaled", "batchtopk", rescale=True),
    top("matryoshka", "matryoshka_batchtopk", rescale=False, matryoshka_widths=GROUPS),
    top("matryoshka_rescaled", "matryoshka_batchtopk", rescale=True, matryoshka_widths=GROUPS),
    top("matryoshka_aux", "matryoshka_batchtopk", False, matryoshka_widths=GROUPS, use_matryoshka_aux_loss=True),
    *(jumprelu(mode, to_input) for mode in ("step", "tanh", "quadratic") for to_input in (False, True)),
    Case("jumprelu_low", "jumprelu", {"jumprelu_bandwidth": 0.4, "l0_coefficient": 0.0}, low=0.01),
)


def training_sae(case: Case, start: bool = True) -> Any:
    """The rival's training SAE: from the common weights, or with its own initialisation."""
    from sae_lens.registry import get_sae_training_class  # type: ignore[pyrefly:missing-import]

    cls, config = get_sae_training_class(case.architecture)
    settings = {key: list(value) if isinstance(value, list) else value for key, value in case.settings.items()}
    torch.manual_seed(making.SEED)
    sae = cls(config(d_in=WIDTH, d_sae=FEATURES, **settings))
    if start:
        common = making.weights()
        common["threshold"] *= case.low
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(common[name])
    return sae


def forward(sae: Any, x: Tensor, mask: Tensor | None = None) -> Any:
    """The rival's forward pass of training, at the full coefficients."""
    from sae_lens.saes.sae import TrainStepInput  # type: ignore[pyrefly:missing-import]

    coefficients = {name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()}
    return sae.training_forward_pass(TrainStepInput(x, coefficients, mask, 0, False))


def one_pass(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Latents, reconstruction, losses and gradients on the first batch, before any step."""
    sae = training_sae(case)
    parameters = dict(sae.named_parameters())
    tensors = {"x": x} | under("start", sae.state_dict())
    if case.name == case.architecture or case.name == "jumprelu_step":
        tensors |= under("init", training_sae(case, start=False).state_dict())
    result = forward(sae, x)
    tensors |= {"pre": result.hidden_pre, "latents": result.feature_acts, "out": result.sae_out}
    tensors |= under("loss", {**result.losses, "total": result.loss})
    tensors |= under("grad", making.gradients(result.loss, parameters))
    for term, value in result.losses.items():
        if term != "mse_loss":  # it is what the others leave of the total
            by_name = making.gradients(value, parameters)
            tensors |= under(f"grad_of.{term}", {name: grad for name, grad in by_name.items() if grad.any()})
    if case.dead:
        sae, mask = training_sae(case), making.dead_mask()
        result = forward(sae, x, mask)
        tensors |= {"dead.mask": mask} | under("dead.loss", {**result.losses, "total": result.loss})
        tensors |= under("dead.grad", making.gradients(result.loss, dict(sae.named_parameters())))
    if case.few:
        sae = training_sae(case)
        with torch.no_grad():
            sae.b_enc -= 1.0
        result = forward(sae, x)
        tensors |= {"few.b_enc": sae.b_enc, "few.latents": result.feature_acts, "few.out": result.sae_out}
        if hasattr(sae, "topk_threshold"):
            tensors |= {"few.topk_threshold": sae.topk_threshold}
    return tensors


def run(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """Trains from the common weights with the rival's own trainer, one batch a step."""
    from sae_lens.config import SAETrainerConfig  # type: ignore[pyrefly:missing-import]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[pyrefly:missing-import]

    sae = training_sae(case)
    config = SAETrainerConfig(
        total_training_samples=STEPS * ROWS,
        train_batch_size_samples=ROWS,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        dead_feature_window=case.window,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(making.batches()))

    def step(batch: Tensor) -> dict[str, Tensor | float]:
        dead = trainer.dead_neurons.float().sum()
        result = trainer.step(batch)
        trainer.n_training_steps += 1
        numbers = {**result.losses, "total": result.loss, "dead": dead}
        return numbers | ({"topk_threshold": sae.topk_threshold} if hasattr(sae, "topk_threshold") else {})

    return sae, making.trained(step, sae.state_dict)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the metadata, whose versions and details say nothing here."""
    return {key: value for key, value in values.items() if key != "metadata"}


def training_files(stored: Stored) -> dict[str, Any]:
    """One file a case; returns the trained SAEs."""
    after = {}
    for case in CASES:
        tensors = one_pass(case, making.batches()[0])
        sae, numbers = run(case)
        after[case.name] = sae
        settings = {"architecture": case.architecture, "config": plain(asdict(training_sae(case).cfg))}
        settings |= {"optimiser": "torch Adam", "learning_rate": LEARNING_RATE, "betas": list(BETAS)}
        settings |= {"clip_grad_norm": 1.0, "dead_feature_window": case.window}
        stored.add(case.name, settings, tensors | numbers)
    return after


def folding_files(stored: Stored) -> None:
    """Norms of the input that SAELens folds into the weights when training ends."""
    from sae_lens.training.activation_scaler import ActivationScaler  # type: ignore[pyrefly:missing-import]

    batches = making.batches()
    cases = {case.name: case for case in CASES}
    for name in ("standard", "standard_no_b_dec", "gated", "topk_rescaled", "batchtopk", "batchtopk_rescaled"):
        for norm in ("scale", "whitening"):
            scaler = ActivationScaler()
            estimate = scaler.estimate_scaling_factor if norm == "scale" else scaler.estimate_whitening
            estimate(WIDTH, iter(batches), STEPS)
            sae = training_sae(cases[name])
            forward(sae, scaler(batches[0]))
            tensors = under("before", sae.state_dict()) | {"x": batches[0], "x_normed": scaler(batches[0])}
            if scaler.whitening is None:
                tensors["scale"] = torch.tensor(scaler.scaling_factor)
                sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            else:
                whitening = scaler.whitening
                tensors |= {"mean": whitening.mean, "matrix": whitening.matrix, "inverse": whitening.inverse_matrix}
                sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
            settings = {"architecture": cases[name].architecture, "config": plain(asdict(cases[name]))["settings"]}
            stored.add(f"folded_{norm}/{name}", settings, tensors | under("after", sae.state_dict()))


def metadata(**more: Any) -> Any:
    from sae_lens.saes.sae import SAEMetadata  # type: ignore[pyrefly:missing-import]

    plain = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "context_size": 16, "prepend_bos": True}
    return SAEMetadata(**plain | {"model_class_name": "HookedTransformer", "dataset_path": "made-up"} | more)


INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard_no_b_dec": ("standard", {"apply_b_dec_to_input": False}),
    "standard_expected_average": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard_constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard_hook_z": ("standard", {"reshape_activations": "hook_z"}),
    "gated": ("gated", {}),
    "gated_layer_norm": ("gated", {"normalize_activations": "layer_norm"}),
    "topk": ("topk", {"k": 4}),
    "topk_rescaled": ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "topk_layer_norm": ("topk", {"k": 4, "normalize_activations": "layer_norm"}),
    "topk_constant_norm": ("topk", {"k": 4, "normalize_activations": "constant_norm_rescale"}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu_layer_norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
    "jumprelu_constant_norm": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    "transcoder": ("transcoder", {}),
    "skip_transcoder": ("skip_transcoder", {}),
    "jumprelu_transcoder": ("jumprelu_transcoder", {}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {}),
}
"""Inference files: architecture, and what its config says beyond the defaults."""


def expected(stored: Stored, name: str, x: Tensor) -> None:
    """Writes beside the folder what SAELens gives for it, once it has opened the folder again."""
    from sae_lens import SAE  # type: ignore[pyrefly:missing-import]

    folder = stored.folder / "inference" / name
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True) + "\n")
    opened = SAE.load_from_disk(folder)
    with torch.no_grad():
        tensors = {"inputs": x, "latents": opened.encode(x), "outputs": opened(x)}
    settings = {"architecture": opened.cfg.architecture(), "config": plain(opened.cfg.to_dict())}
    stored.add(f"inference/{name}", settings, tensors)


def inference_files(stored: Stored, after: Mapping[str, Any]) -> None:
    """Folders as SAELens writes them, and what it computes from them."""
    from sae_lens.registry import get_sae_class  # type: ignore[pyrefly:missing-import]

    x, common = making.batches()[0], making.weights()
    for name, (architecture, given) in INFERENCE.items():
        cls, config = get_sae_class(architecture)
        more = {}
        if "transcoder" in architecture:
            given = given | {"d_out": WIDTH, "apply_b_dec_to_input": False}
            more = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
        hook_z = name == "standard_hook_z"
        more |= {"hook_name": "blocks.1.attn.hook_z"} if hook_z else {}
        sae = cls(config(d_in=WIDTH, d_sae=FEATURES, metadata=metadata(**more), **given))
        with torch.no_grad():
            for key, parameter in sae.named_parameters():
                parameter.copy_(common[key])
        sae.save_model(stored.folder / "inference" / name)
        expected(stored, name, x.reshape(ROWS, 2, WIDTH // 2) if hook_z else x)
    for name in ("standard", "gated", "topk", "topk_rescaled", "batchtopk", "batchtopk_rescaled", "matryoshka"):
        sae = after[name]
        sae.cfg.metadata = metadata()
        folder = stored.folder / "inference" / f"trained_{name}"
        sae.save_inference_model(folder)
        expected(stored, folder.name, x)
    sparsity = torch.linspace(-10, 0, FEATURES)
    save_file({"sparsity": sparsity}, stored.folder / "inference" / "standard" / "sparsity.safetensors")


def write() -> None:
    """Writes all fixtures of SAELens."""
    warnings.simplefilter("ignore")
    stored = Stored("sae-lens")
    after = training_files(stored)
    folding_files(stored)
    inference_files(stored, after)
    stored.close()
