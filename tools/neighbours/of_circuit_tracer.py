"""circuit-tracer opens a set of transcoders of ours, and computes the same latents and outputs."""

import torch
import yaml
from circuit_tracer.transcoder import single_layer_transcoder  # type: ignore[pyrefly:missing-import]
from safetensors.torch import load_file

from meeting import compared, given


def main() -> None:
    case = given()
    folder, tensors = case.folder / "transcoders", load_file(case.folder / "transcoders.safetensors")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(list(folder.glob("layer_*"))))}
    hooks = config["feature_input_hook"], config["feature_output_hook"]
    found = single_layer_transcoder.load_transcoder_set(
        paths, config.get("scan", config["model_name"]), *hooks, device=torch.device("cpu")
    )
    print(f"a set of {len(paths)} layers, reading {hooks[0]}, writing {hooks[1]}")
    for layer in paths:
        x = tensors[f"{layer}.x"]
        with torch.no_grad():
            latents = found[layer].encode(x)
            compared(f"layer {layer}, latents", latents, tensors[f"{layer}.latents"])
            compared(f"layer {layer}, outputs", found[layer].decode(latents, x), tensors[f"{layer}.outputs"])


if __name__ == "__main__":
    main()
