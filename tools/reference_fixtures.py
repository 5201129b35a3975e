"""Writes tests/fixtures/reference: what the paper's own code computes, for tests/training/test_against_reference.py.

The paper's authors publish their code as `e2e-sae`. Here it trains for one step on a tiny random language model: its
`SAETransformer` runs the clean and the spliced pass, its `calc_loss` adds the terms, autograd gives the gradient of the
SAE's four weights. All weights are drawn in float32 and everything is computed from them in float64, so that what is
stored (in float32, the losses in float64) is as good as exact. The language model is stored as the state dict of a
Hugging Face GPT-2, converted from TransformerLens's parameters without folding anything.

This needs an environment of its own, since `e2e-sae` pulls in far more than it uses:

    python -m venv reference
    reference/bin/pip install torch==2.13.0 numpy safetensors einops pydantic jaxtyping python-dotenv tqdm pyyaml \\
        transformers==5.23.0 fancy_einsum beartype typeguard rich wandb pandas datasets accelerate better_abc
    reference/bin/pip install --no-deps e2e-sae==2.1.1 transformer-lens==3.9.0
    reference/bin/python tools/reference_fixtures.py

Run twice in one environment, it writes the same bytes.
"""

import json
import sys
import types
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

TARGET = Path(__file__).parents[1] / "tests" / "fixtures" / "reference"
SEED = 20240517
LAYERS, WIDTH, HEADS, MLP_WIDTH, VOCAB, CONTEXT, SEQUENCES = 4, 16, 2, 32, 31, 8, 2
FEATURES = 40
DEAD_FEATURE = 7
"""Never active, so that its encoder and decoder receive no gradient."""


@dataclass(frozen=True)
class Case:
    """One training step, in the words of an endwise recipe."""

    name: str
    kind: str
    site: str
    sparsity: float
    kl: float = 0.0
    local_mse: float = 0.0
    downstream_mse: float = 0.0
    downstream_sites: tuple[str, ...] = ()


LATER = ("blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre")
CASES = (
    Case("local", "local", "blocks.1.hook_resid_pre", sparsity=0.8, local_mse=1.0),
    Case("e2e", "e2e", "blocks.1.hook_resid_post", sparsity=0.2, kl=1.0),
    Case("e2e_ds", "e2e_ds", "blocks.1.hook_resid_pre", 0.3, kl=0.5, downstream_mse=0.04, downstream_sites=LATER),
    Case("e2e_attn_out", "e2e", "blocks.2.hook_attn_out", sparsity=0.2, kl=1.0),
    Case(
        "e2e_ds_mlp_out",
        "e2e_ds",
        "blocks.1.hook_mlp_out",
        sparsity=0.3,
        kl=0.5,
        downstream_mse=0.1,
        downstream_sites=("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.3.hook_resid_post"),
    ),
)


def import_reference() -> None:
    """The wheel of e2e-sae 2.1.1 lacks a script that `e2e_sae.loader` takes a type from, unused here."""
    for name in ("e2e_sae.scripts.train_tlens", "e2e_sae.scripts.train_tlens.run_train_tlens"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[name].HookedTransformerPreConfig = object  # type: ignore[pyrefly:missing-attribute]


def language_model(generator: torch.Generator) -> Any:
    """A GPT-2 in TransformerLens with random weights, biases and norms, none of them small enough to hide a mistake."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # type: ignore[pyrefly:missing-import]

    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=WIDTH,
        n_ctx=CONTEXT,
        d_head=WIDTH // HEADS,
        n_heads=HEADS,
        d_mlp=MLP_WIDTH,
        d_vocab=VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        dtype=torch.float64,
        device="cpu",
    )
    model = HookedTransformer(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            offset = 1.0 if name.endswith(("ln1.w", "ln2.w", "ln_final.w")) else 0.0
            scale = 0.0 if name == "unembed.b_U" else 0.4  # GPT-2's unembedding has no bias
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


def gpt2_state(model: Any) -> dict[str, Tensor]:
    """The same model as the state dict of a GPT2LMHeadModel whose unembedding is not tied."""
    state = {
        "transformer.wte.weight": model.embed.W_E,
        "transformer.wpe.weight": model.pos_embed.W_pos,
        "transformer.ln_f.weight": model.ln_final.w,
        "transformer.ln_f.bias": model.ln_final.b,
        "lm_head.weight": model.unembed.W_U.T,
    }
    for layer, block in enumerate(model.blocks):
        attention, mlp = block.attn, block.mlp
        inward = [W.permute(1, 0, 2).reshape(WIDTH, WIDTH) for W in (attention.W_Q, attention.W_K, attention.W_V)]
        state |= {
            f"transformer.h.{layer}.{name}": tensor
            for name, tensor in {
                "ln_1.weight": block.ln1.w,
                "ln_1.bias": block.ln1.b,
                "attn.c_attn.weight": torch.cat(inward, dim=1),
                "attn.c_attn.bias": torch.cat([b.flatten() for b in (attention.b_Q, attention.b_K, attention.b_V)]),
                "attn.c_proj.weight": attention.W_O.reshape(WIDTH, WIDTH),
                "attn.c_proj.bias": attention.b_O,
                "ln_2.weight": block.ln2.w,
                "ln_2.bias": block.ln2.b,
                "mlp.c_fc.weight": mlp.W_in,
                "mlp.c_fc.bias": mlp.b_in,
                "mlp.c_proj.weight": mlp.W_out,
                "mlp.c_proj.bias": mlp.b_out,
            }.items()
        }
    return state


def sae_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """The reference's own initial SAE, its decoder columns scaled apart and one feature put to sleep."""
    from e2e_sae.models.sparsifiers import SAE  # type: ignore[pyrefly:missing-import]

    weights = {name: tensor.clone() for name, tensor in SAE(WIDTH, FEATURES).state_dict().items()}
    weights["decoder.weight"] *= torch.exp(0.5 * torch.randn(FEATURES, generator=generator))
    weights["decoder.bias"] += 0.3 * torch.randn(WIDTH, generator=generator)
    weights["encoder.0.bias"][DEAD_FEATURE] = -50.0
    return weights


def loss_configs(case: Case) -> Any:
    """The reference's own configuration of a case. Its names: in_to_orig is downstream MSE, out_to_in local MSE."""
    from e2e_sae.losses import LossConfigs  # type: ignore[pyrefly:missing-import]

    downstream = {"total_coeff": case.downstream_mse, "hook_positions": list(case.downstream_sites)}
    return LossConfigs(
        sparsity={"coeff": case.sparsity},
        in_to_orig=downstream if case.downstream_sites else None,
        out_to_orig=None,
        out_to_in={"coeff": case.local_mse} if case.local_mse else None,
        logits_kl={"coeff": case.kl} if case.kl else None,
    )


def training_step(case: Case, model: Any, weights: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Run the reference's training loop on one batch, up to its optimiser: activations, losses, gradients."""
    from e2e_sae import SAETransformer  # type: ignore[pyrefly:missing-import]
    from e2e_sae.losses import calc_loss  # type: ignore[pyrefly:missing-import]

    transformer = SAETransformer(model, [case.site], FEATURES / WIDTH)
    sae = transformer.saes[case.site.replace(".", "-")]
    sae.load_state_dict(weights)
    sae.double()
    end_to_end = case.kind != "local"
    later = list(case.downstream_sites)
    clean_logits, clean = transformer.forward_raw(
        tokens,
        run_entire_model=end_to_end,
        final_layer=None if end_to_end else int(case.site.split(".")[1]) + 1,
        cache_positions=later,
    )
    logits, spliced = transformer(tokens, [case.site], later, orig_acts=None if end_to_end else clean)
    loss, terms = calc_loss(
        orig_acts=clean,
        new_acts=spliced,
        orig_logits=clean_logits.detach() if end_to_end else None,
        new_logits=logits,
        loss_configs=loss_configs(case),
    )
    loss.backward()
    result = {"loss": loss.squeeze(), "latents": spliced[case.site].c, "reconstruction": spliced[case.site].output}
    result |= {f"term.{name.removeprefix('loss/train/').replace('/', '.')}": value for name, value in terms.items()}
    result |= {f"clean.{site}": value for site, value in clean.items()}
    result |= {f"spliced.{site}": spliced[site].input for site in later}
    result |= {f"gradient.{name}": parameter.grad for name, parameter in sae.named_parameters()}
    if end_to_end:
        result |= {"clean.logits": clean_logits, "spliced.logits": logits}
    return result


def write(path: Path, tensors: dict[str, Tensor], **about: Any) -> None:
    """Scalars stay in float64, everything else goes to float32; whole numbers are left alone.

    One metadata entry, in JSON: safetensors writes several in any order.
    """
    versions = {name: version(name) for name in ("e2e-sae", "transformer-lens", "torch")}
    kept = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        kept[name] = (tensor.float() if tensor.ndim and tensor.is_floating_point() else tensor).contiguous().clone()
    path.write_bytes(save(kept, {"about": json.dumps({"versions": versions, "seed": SEED, **about})}))


def main() -> None:
    import_reference()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = language_model(generator)
    weights = sae_weights(generator)
    tokens = torch.randint(VOCAB, (SEQUENCES, CONTEXT), generator=generator)
    config = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_inner": MLP_WIDTH}
    config |= {"vocab_size": VOCAB, "n_positions": CONTEXT, "tie_word_embeddings": False}
    inputs = {f"model.{name}": tensor for name, tensor in gpt2_state(model).items()}
    inputs |= {f"sae.{name}": tensor for name, tensor in weights.items()}
    TARGET.mkdir(parents=True, exist_ok=True)
    write(TARGET / "inputs.safetensors", {"tokens": tokens, **inputs}, gpt2=config, dead_feature=DEAD_FEATURE)
    for case in CASES:
        path = TARGET / f"{case.name}.safetensors"
        write(path, training_step(case, model, weights, tokens), case=asdict(case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
