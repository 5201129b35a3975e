"""sparsify's folder of one hook point: `cfg.json` and `sae.safetensors` (eai-sparsify, EleutherAI).

Latents are the k largest of ReLU((x − b_dec)·encoder.weightᵀ + encoder.bias), and the output is latents·W_dec + b_dec
(+ x·W_skipᵀ). `b_dec` is subtracted unless the file says `transcode: true`; transcoders made before there was that
setting subtract it as well, and are recognised by their skip connection. A hook point is a module, the folder's name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endwise.common.errors import FormatError
from endwise.common.files import read_json, there_is, write_json
from endwise.common.tensor_files import write_tensors
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, config_at, known, meta, safetensors_at, site_of_module, taken, whole, yes

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


@added
class Sparsify(Format):
    """The folder of a hook point."""

    name = "sparsify"
    files = (WEIGHTS_FILE, CFG_FILE)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, cfg = path / CFG_FILE, config_at(path / CFG_FILE)
        known(file, cfg, "activation", ("topk",), "topk")
        known(file, cfg, "signed", (False,), False)
        d_in = whole(file, cfg, "d_in")
        d_sae = (
            whole(file, cfg, "num_latents") if cfg.get("num_latents") else d_in * whole(file, cfg, "expansion_factor")
        )
        skips, transcodes = yes(file, cfg, "skip_connection", False), yes(file, cfg, "transcode", False)
        weights = path / WEIGHTS_FILE
        tensors = taken(weights, safetensors_at(weights), _NAMES | ({"W_skip": "W_skip"} if skips else {}))
        config = {"d_in": d_in, "d_sae": d_sae, "k": whole(file, cfg, "k", d_sae)}
        return assembled(
            *(weights, "topk", tensors, layouts),
            config=config,
            metadata=self.metadata(path),
            subtracts_b_dec=not transcodes,
            transcodes=transcodes or skips,
            origin=CFG_FILE,
        )

    def write(self, path: Path, stored: Stored) -> None:
        if stored.architecture != "topk" or stored.norm is not None:
            what = f"{stored.architecture}{' with a norm of each token' if stored.norm is not None else ''}"
            raise FormatError(f"sparsify has topk alone, and no {what:.80}. Write {path} in another format.")
        d_in, d_sae = stored.config["d_in"], stored.config["d_sae"]
        if stored.config.get("d_out", d_in) != d_in:
            raise FormatError("sparsify's transcoders write as wide as they read; this one does not.")
        tensors = stored.under(not stored.transcodes)
        written = {"encoder.weight": tensors["W_enc"].mT, "encoder.bias": tensors["b_enc"]}
        written |= {name: tensors[name] for name in ("W_dec", "b_dec", "W_skip") if name in tensors}
        write_tensors(path / WEIGHTS_FILE, written, {})
        cfg = {
            "activation": "topk",
            "expansion_factor": max(1, d_sae // d_in),
            "normalize_decoder": bool(((tensors["W_dec"].norm(dim=-1) - 1).abs() < 1e-4).all()),
            "num_latents": d_sae,
            "k": stored.config["k"],
            "multi_topk": False,
            "skip_connection": "W_skip" in tensors,
            "transcode": stored.transcodes,
            "d_in": d_in,
        }
        write_json(path / CFG_FILE, cfg)

    def metadata(self, path: Path) -> Mapping[str, Any]:
        """Read the place from the folder's name, and the model from the `config.json` beside the folders."""
        cfg, run = config_at(path / CFG_FILE), {}
        if there_is(path.parent / "config.json"):
            run = read_json(path.parent / "config.json")
        model = run.get("model") if isinstance(run.get("model"), str) else None
        site, module = site_of_module(path.resolve().name, model or ""), path.resolve().name
        reads = site
        if cfg.get("transcode") is True or cfg.get("skip_connection") is True:
            reads = site_of_module(f"{module}.input", model or "")
        out = None if reads == site else site
        return meta(hook_name=reads, hook_name_out=out, model_name=model, hf_hook_name=module)
