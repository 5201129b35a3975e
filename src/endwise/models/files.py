"""The files of a language model: which there are, and what is to be refused before transformers reads any of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from endwise.common.errors import ConfigError, FormatError, ModelError
from endwise.common.files import read_json, stays_inside, there_is
from endwise.common.hub import SECONDS, answers
from endwise.models.adapters import ADAPTER_WEIGHTS, MERGING, Adapter

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
TOKENIZERS += ("spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json")
MOST_LAYERS = 10_000


def within_reach(source: str, revision: str) -> str:
    """Return what a model is read from: its folder, its name on the hub or, where the hub does not answer, its snapshot
    in the cache.

    Raises:
        ConnectionError: the hub does not answer, and the cache has no snapshot.
    """
    ask = partial(HfApi().model_info, source, revision=revision, timeout=SECONDS)
    if constants.HF_HUB_OFFLINE or there_is(Path(source)) or answers(ask):
        return source
    try:
        return snapshot_download(source, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise ConnectionError("The hub does not answer.") from None


def find_adapter(source: str, name: str, revision: str) -> Adapter | None:
    """Find out if a folder, or the hub's repository, is an adapter. transformers reads one that lies beside a model's
    weights, or leaves it, depending on whether peft is installed: never here.

    Raises:
        ModelError: it holds one beside a model's weights, which does not say what it is based on, or is a pickle.
    """
    found = find_adapter_config_file(source, revision=revision)
    if found is None:
        return None
    try:
        config = read_json(Path(found))
    except FormatError:
        config = {}
    base, its_revision = config.get("base_model_name_or_path"), config.get("revision")
    of = f" of {base!r:.100}" if isinstance(base, str) and base else ""
    if hub_file(source, "config.json", revision) is not None:
        raise ModelError(
            f"{name} holds an adapter{of} (adapter_config.json) beside a model's own config.json; with and without it, "
            "the model differs. For the model alone, give a folder without the adapter's files; for both, "
            f"merge them, and give that folder: {MERGING.format('.save_pretrained(FOLDER)')}"
        )
    if not of:
        raise ModelError(
            f"{name} is an adapter (adapter_config.json), not a model, and does not say of which "
            "(base_model_name_or_path). Merge it into its base model first, and give that folder: "
            f"{MERGING.format('.save_pretrained(FOLDER)')}"
        )
    weights = hub_file(source, ADAPTER_WEIGHTS, revision)
    if weights is None:
        raise ModelError(
            f"{name} is an adapter{of} that has no {ADAPTER_WEIGHTS}; pickles can run any code when read. Save it "
            "again with save_pretrained(FOLDER)."
        )
    return Adapter(name, str(base), its_revision if isinstance(its_revision, str) else None, weights.parent)


def weight_files(source: str, revision: str, config: Any) -> list[Path]:
    """The safetensors files that transformers takes the weights from, in a folder or, downloaded, from the hub."""
    named = getattr(config, "transformers_weights", None)
    whole = hub_file(source, named if isinstance(named, str) else SAFE_WEIGHTS_NAME, revision)
    if whole is not None:
        return [whole] if whole.suffix == ".safetensors" else []
    index = hub_file(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        return []
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for shard in shards if (path := hub_file(source, shard, revision)) is not None]


def tokenizer_files(source: str, revision: str) -> list[Path]:
    return [path for name in TOKENIZERS if (path := hub_file(source, name, revision)) is not None]


def hub_file(source: str, name: str, revision: str) -> Path | None:
    """Find a file of a model, in its folder or, downloaded, from the hub; None: it has none of that name."""
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def check_files(source: str, gguf_file: str | None) -> None:
    """Refuse what must not be read before transformers reads any of it."""
    if gguf_file is not None and not stays_inside(gguf_file):
        raise ConfigError(f"model.gguf_file must name a file inside {source}, not {gguf_file!r:.200}. Name it alone.")
    folder = Path(source)
    if there_is(folder) and not folder.is_dir():
        raise ModelError(f"{source} is a file, and a model is a folder, or a .gguf file. Give the folder it lies in.")
    if there_is(folder) and folder.is_dir():
        if (folder / "sae").is_dir() and not (folder / "config.json").exists():
            raise ModelError(
                f"{source} is the folder of a run, not of a model. Give the model: model.name in {source}/config.yaml."
            )
        if not (folder / "adapter_config.json").is_file():  # which is refused with its own reason
            _refuse_pickles(folder, gguf_file)
        _check_config(folder)


def _refuse_pickles(folder: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            found = ", ".join(path.name for path in sorted(folder.glob("*.gguf"))) or "none"
            raise ModelError(f"{folder} holds no file {gguf_file}; its GGUF files: {found}.")
    elif not list(folder.glob("*.safetensors")):
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise ModelError(
                f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run any code when read. "
                "Convert it to safetensors first: model.save_pretrained(folder)."
            )
        found = next(iter(sorted(folder.glob("*.gguf"))), None)
        remedy = f"Name the GGUF file in it: {found}." if found else "Save them: model.save_pretrained(folder)."
        raise ModelError(f"{folder} holds no *.safetensors weights. {remedy}")
    for index in folder.glob("*.safetensors.index.json"):
        _check_shards(index)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FormatError as error:
        raise ModelError(f"{file.parent} cannot be loaded as a causal language model: {error}") from None


def _check_shards(index: Path) -> None:
    """Transformers joins these names to the folder as they are."""
    shards = _read(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{index} must map the weights' names to files (weight_map). Restore it.")
    for shard in shards.values():
        if not isinstance(shard, str) or not stays_inside(shard):
            raise ModelError(f"{index} must name files inside its folder, not {shard!r:.200}. Restore it.")


def _check_config(folder: Path) -> None:
    """Refuse what transformers would believe unchecked: it makes as many blocks as the configuration says."""
    file = folder / "config.json"
    if not there_is(file):
        return
    config = _read(file)
    for section in (config, config.get("text_config")):
        for key in ("num_hidden_layers", "num_layers", "n_layer"):
            layers = section.get(key) if isinstance(section, dict) else None
            if layers is not None and (type(layers) is not int or not 1 <= layers <= MOST_LAYERS):
                raise ModelError(
                    f"{file}: {key} must be a whole number from 1 to {MOST_LAYERS:,}, not {layers!r:.80}. Restore it."
                )
