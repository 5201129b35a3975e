"""Loads language models: the embedded one, a local folder, a Hugging Face hub id, or a GGUF file."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from endwise import embedded
from endwise.distributed import local_rank
from endwise.errors import ConfigError, FormatError, ModelError
from endwise.gpt_neo_attention import use_sdpa
from endwise.language_model import LanguageModel
from endwise.memory_trace import MemoryTrace
from endwise.reading import read_json, stays_inside, there_is
from endwise.run_config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
MOST_LAYERS = 10_000


def load_model(
    name: str = "embedded",
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a causal language model and its tokenizer, frozen and ready to be spliced.

    Args:
        name: `embedded`, a local folder, or a hub id.
        gguf_file: the file to read inside `name`, for models stored as GGUF (needs the extra `gguf`).
        revision: hub commit, branch or tag.
        dtype: `float32` (where unset, also for checkpoints stored in another one), `bfloat16` or `float16`.
        device: `auto` takes CUDA if there is one, and of several processes on a machine each its own GPU.
        attention: implementation; unset: `sdpa`, or `eager` where the model has no other. GPT-Neo has none of
            transformers', and gets ours.
        trust_remote_code: run Python code that ships with the model.

    Raises:
        ModelError: there is no such model, its weights are pickles, or it is not one that endwise can splice.
        ConfigError: the device or the dtype does not exist.
    """
    place = find_device(device)
    dtype = "float32" if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype is one of {', '.join(DTYPES)}; given {dtype!r}.")
    source, shared = _where(name, gguf_file, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **shared)
        weights: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True, **shared}
        if gguf_file is None:
            weights |= {"config": config, "use_safetensors": True}
        model, info = _from_pretrained(source, attention, weights)
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise ModelError(_explained(name, error)) from error
    if info["missing_keys"]:
        absent = sorted(map(str, info["missing_keys"]))
        raise ModelError(
            f"{name} lacks {len(absent)} of the weights of a {type(model).__name__} ({', '.join(absent[:3])}, ...), "
            "which would stay random. Is it a causal language model, and complete?"
        )
    for parameter in model.parameters():  # not buffers: transformers keeps the rotary frequencies in fp32
        parameter.data = parameter.data.to(DTYPES[dtype])  # GGUF weights come in the file's own type, whatever is asked
    return _spliceable(model.to(place), _tokenizer(source, shared), name)


def _spliceable(model: Any, tokenizer: PreTrainedTokenizerBase | None, name: str) -> LanguageModel:
    try:
        return LanguageModel(model, tokenizer, name)
    except ModelError:
        raise
    except Exception as error:  # its first pass fails of whatever its configuration and its weights disagree in
        raise ModelError(f"{name} is loaded, but a pass fails: {_one_line(error)} Is its config.json right?") from error


def outline_model(settings: ModelConfig, dtype: torch.dtype, trace: MemoryTrace) -> LanguageModel:
    """The model that `load_model` would give, without its weights: its tensors have shapes and no values.

    Args:
        settings: a recipe's; its device is not looked at.
        trace: within which the model is made and can be run.

    Raises:
        ModelError: there is no such model, or it cannot be followed without values.
    """
    source, shared = _where(settings.name, settings.gguf_file, settings.revision, settings.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **shared)
        make = partial(
            AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=shared["trust_remote_code"]
        )
        with trace:
            try:
                model = make(attn_implementation=settings.attention or "sdpa")
            except ValueError as error:
                if settings.attention not in (None, "sdpa") or "scaled_dot_product_attention" not in str(error):
                    raise
                model = make(attn_implementation="eager")
        if settings.attention in (None, "sdpa"):
            use_sdpa(model)
        with trace:
            return LanguageModel(model, None, settings.name)
    except Exception as error:
        raise ModelError(_explained(settings.name, error)) from error


def _where(
    name: str, gguf_file: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """What transformers reads a model from, and with which arguments."""
    source = str(embedded.folder()) if name == "embedded" else name
    _check_files(source, gguf_file)
    shared: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        shared["gguf_file"] = gguf_file
    return source, shared


def _from_pretrained(source: str, attention: str | None, weights: dict[str, Any]) -> Any:
    """The model and what transformers says of its weights."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention or "sdpa", **weights)
    except ValueError as error:
        if attention not in (None, "sdpa") or "scaled_dot_product_attention" not in str(error):
            raise
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", **weights)
        if not use_sdpa(loaded[0]) and attention == "sdpa":
            raise
        return loaded


def _tokenizer(source: str, shared: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; none is fine as long as only token ids are read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None
    except Exception as error:  # what the tokenizers library says of a file that is damaged
        raise ModelError(f"The tokenizer of {source} cannot be read: {_one_line(error)} Restore its files.") from error
    # Where there are no files, transformers makes up a tokenizer that knows nothing but its special tokens.
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return None if tokenizer.get_vocab().keys() <= special else tokenizer


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # which "meta" has not
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(f"model.device {name!r} cannot be used ({reason}). Use auto, cpu, cuda or cuda:N.") from None
    return device


def _check_files(source: str, gguf_file: str | None) -> None:
    """What is to be refused before transformers reads any of it."""
    if gguf_file is not None and not stays_inside(gguf_file):
        raise ConfigError(f"model.gguf_file must name a file inside {source}, not {gguf_file!r:.200}. Name it alone.")
    folder = Path(source)
    if there_is(folder) and folder.is_dir():
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
        raise ModelError(f"{folder} holds no *.safetensors weights. For a GGUF file, name it with gguf_file.")
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
    """What transformers would take at its word: it makes as many blocks as the configuration says."""
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explained(name: str, error: Exception) -> str:
    reason = _one_line(error)
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed ({reason}). Install it first."
    if "trust_remote_code" in str(error):
        return f"{name} ships Python code of its own, which is not run unless model.trust_remote_code is true."
    if isinstance(error, OSError) and not there_is(Path(name)):
        return (
            f"{name!r} is neither 'embedded', nor a local folder, nor a model the Hugging Face hub gave us. "
            f"Check the spelling and the connection. ({reason})"
        )
    return f"{name} cannot be loaded as a causal language model: {reason}"
