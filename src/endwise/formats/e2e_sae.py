"""The reference's checkpoint (e2e_sae): `samples_<n>.pt`, a state dict of SAEs by site, beside `final_config.yaml`.

Names are the site with `-` for `.`, then `encoder.0.weight [F d]`, `encoder.0.bias`, `decoder.weight [d F]`,
`decoder.bias`. Directions are normalised where they are used; nothing is subtracted from the input. The models were
TransformerLens's, with centred writing weights. Of a checkpoint of several sites a path names one by its site's name:
`samples_100.pt/blocks.6.hook_resid_pre`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn.functional import normalize

from endwise.common.errors import FormatError
from endwise.common.files import there_is
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, checked, meta, names_in, pickle_at, taken, yaml_at

CONFIG_FILE = "final_config.yaml"
ENCODER = ".encoder.0.weight"
_NAMES = {
    "encoder.0.weight": "W_enc.T",
    "encoder.0.bias": "b_enc",
    "decoder.weight": "W_dec.T",
    "decoder.bias": "b_dec",
}


@added
class E2eSae(Format):
    """A checkpoint, or one site of it."""

    name = "e2e_sae"

    def detects(self, path: Path) -> bool:
        return bool(_sites(path)) or path.name in _sites(path.parent)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file = self.weights(path)
        sites, about = _sites(file), self.metadata(path)
        if "hook_name" not in about:
            raise FormatError(f"{file} holds SAEs of several sites. Name one: {file / min(sites)}. There are: {sites}.")
        start, found = f"{about['hook_name'].replace('.', '-')}.", pickle_at(file)
        others = tuple(f"{site.replace('.', '-')}." for site in sites if site != about["hook_name"])
        own = {name.removeprefix(start): each for name, each in found.items() if not name.startswith(others)}
        tensors = checked(file, taken(file, own, _NAMES))
        tensors["W_dec"] = normalize(tensors["W_dec"], dim=-1)
        return assembled(file, "standard", tensors, layouts, metadata=about)

    def weights(self, path: Path) -> Path:
        return path if _sites(path) else path.parent

    def metadata(self, path: Path) -> Mapping[str, Any]:
        file, sites = self.weights(path), _sites(self.weights(path))
        site = sites[0] if len(sites) == 1 else path.name if path.name in sites else None
        run = yaml_at(file.parent / CONFIG_FILE) if there_is(file.parent / CONFIG_FILE) else {}
        model = run.get("tlens_model_name")
        about = meta(hook_name=site, model_name=model if isinstance(model, str) else None)
        return {**about, "model_from_pretrained_kwargs": {"center_writing_weights": True}}


def _sites(path: Path) -> list[str]:
    """Return the sites of the SAEs in a file, in the order of their names."""
    return sorted(name.removesuffix(ENCODER).replace("-", ".") for name in names_in(path) if name.endswith(ENCODER))
