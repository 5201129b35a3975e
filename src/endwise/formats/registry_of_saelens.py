"""SAELens's registry of published SAEs: repository and path of every `release/sae_id`, and what their files leave open.

A table is part of the package (`tools/saelens_registry.py` makes it); releases that it lacks are looked up in an
installed sae-lens, whose file of them is read and none of its code run.
"""

import json
import lzma
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

TABLE_FILE = Path(__file__).parent / "saelens_registry.json.xz"
_SITE = re.compile(r"blocks\.[0-9]{1,4}\.(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out|attn\.hook_z)")
_UNREAD = {
    "temporal": "a temporal SAE, whose latents depend on the tokens before",
    "mntss_clt_layer_transcoder": "a layer of a cross-layer transcoder, which writes to all later layers",
    "connor_rob_hook_z": "a pickle with settings in a file of its own, in no format that endwise knows",
    "deepseek_r1": "a pickle without settings, in no format that endwise knows",
}
"""Loaders of SAELens for what endwise does not read, and what each is."""

Release = Mapping[str, Any]
"""`repo`, `model`, perhaps `loader` and `overrides` (SAELens's words), and `saes`: path and stated L0 by the id."""


def table_of(registry: Mapping[str, Any]) -> dict[str, Release]:
    """Return what is needed of SAELens's `pretrained_saes.yaml`."""
    return {
        release: {
            "repo": of["repo_id"],
            "model": of["model"],
            **({"loader": of["conversion_func"]} if of.get("conversion_func") else {}),
            **({"overrides": of["config_overrides"]} if of.get("config_overrides") else {}),
            "saes": {each["id"]: [str(each["path"]), each.get("l0")] for each in of["saes"]},
        }
        for release, of in registry.items()
    }


def written(table: Mapping[str, Release]) -> bytes:
    """Return the table as it is kept."""
    return lzma.compress(json.dumps(table, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)


@cache
def shipped() -> Mapping[str, Release]:
    """Read the table that is part of the package."""
    return json.loads(lzma.decompress(TABLE_FILE.read_bytes()))


@cache
def installed() -> Mapping[str, Release]:
    """Read the registry of the sae-lens that is installed here, if one is."""
    spec = find_spec("sae_lens")
    file = Path(next(iter(spec.submodule_search_locations or [""]), "")) / "pretrained_saes.yaml" if spec else None
    if file is None or not file.is_file():
        return {}
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return table_of(yaml.load(file.read_bytes(), loader))


def is_unread(release: Release, path: str) -> str | None:
    """Say what an SAE is that endwise does not read; None: its files decide."""
    if release.get("loader") == "gemma_3" and "clt" in path.partition("/")[0]:
        return _UNREAD["mntss_clt_layer_transcoder"]
    return _UNREAD.get(release.get("loader", ""))


def facts(release: Release, sae_id: str) -> dict[str, Any]:
    """Return what the registry adds to the file, by SAELens's names: model, place and stated L0."""
    _, l0 = release["saes"][sae_id]
    place = _SITE.match(sae_id)
    return {
        "model_name": release["model"],
        **({"hook_name": place[0]} if place else {}),
        **({"stated_l0": float(l0)} if l0 else {}),
    }
