"""Loads language models: the embedded one, a local folder, a Hugging Face hub id, or a GGUF file."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from endwise import embedded
from endwise.common.digests import of_files, of_stored_model, of_text
from endwise.common.errors import ConfigError, ModelError
from endwise.common.extras import install_for
from endwise.common.files import at_home, there_is
from endwise.common.processes import ALONE, current, in_turn, local_rank
from endwise.common.remedies import number, remedy
from endwise.common.remedies import reason as system_reason
from endwise.models.adapters import ADAPTER_WEIGHTS, Adapter
from endwise.models.files import check_files, find_adapter, tokenizer_files, weight_files, within_reach
from endwise.models.gguf_files import commit_of, keep_weights, kept_weights, with_gguf_file
from endwise.models.gpt_neo_attention import use_sdpa
from endwise.models.language_model import LanguageModel
from endwise.models.plain_weights import (
    QUANTISERS,
    is_quantised,
    quantisation,
    quantiser_of,
    refuse_packed_files,
    refuse_quantised,
    refuse_unpacked,
)
from endwise.models.quiet import quiet_transformers
from endwise.models.sharding import Shard, lend_blocks, sharder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADING = Lock()
"""transformers makes a model under settings of the whole process (its default device and dtype, how weights are
initialised), so that one made by another thread at the time would stay without weights."""
DEVICE: ContextVar[str | None] = ContextVar("DEVICE", default=None)
"""Device that takes the place of a recipe's, where one is asked for."""


def load_model(
    name: str = "embedded",
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    sharded: bool = False,
    quantization: str | None = None,
) -> LanguageModel:
    """Load a causal language model and its tokenizer, frozen and ready to be spliced.

    Args:
        name: `embedded`, a local folder, or a hub id.
        gguf_file: the file to read inside `name`, for models stored as GGUF (needs the extra `gguf`).
        revision: hub commit, branch or tag.
        dtype: `float32` (where unset, also for checkpoints stored in another one), `bfloat16` or `float16`.
        device: `auto` takes CUDA if there is one, and of several processes on a machine each its own GPU.
        attention: implementation; unset: `sdpa`, or `eager` where the model has no other. GPT-Neo has none of
            transformers', and gets ours.
        trust_remote_code: run Python code that ships with the model.
        sharded: divide its blocks among the processes that train or evaluate together; alone, it is whole. On a machine
            one process after another reads the weights, so that its memory need hold them once.
        quantization: one of `QUANTISERS`, which packs the blocks' weights; `dtype` is what they compute in.

    Raises:
        ModelError: there is no such model, its weights are pickles, it is an adapter that cannot be merged or has one
            beside it, it is quantised and cannot be sharded, it cannot be quantised, or it is not one that endwise can
            splice.
        ConfigError: the device, the dtype or the quantiser does not exist, or is not installed.
    """
    name = at_home(name)
    if quantization is not None and quantization not in QUANTISERS:
        raise ConfigError(f"model.quantization is one of {', '.join(QUANTISERS)}; given {quantization!r}.")
    place = find_device(device)
    dtype = "float32" if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype is one of {', '.join(DTYPES)}; given {dtype!r}.")
    source, shared, adapter = based_on(name, gguf_file, revision, trust_remote_code)
    if quantization is not None and "gguf_file" in shared:
        raise ModelError(f"{name} is a GGUF file, which is unpacked as it is read. Unset model.quantization.")
    world = current() if sharded else ALONE
    with LOADING, quiet_transformers():
        shard = None if world.size == 1 else sharder(world, place)
        read = partial(_read, name, source, shared, adapter, attention, DTYPES[dtype], place, shard, quantization)
        model, tokenizer = read() if shard is None else in_turn(world, "reading the weights", read)
        if shard is not None:
            lend_blocks(model, world)
        loaded = _spliceable(model, tokenizer, name)
    commit = getattr(model.config, "_commit_hash", None) or commit_of(source, shared)
    loaded.commit = commit if adapter is None else None  # it would be the base's
    loaded.stored = _digesting(source, shared, commit, adapter)
    return loaded


def _read(
    name: str,
    source: str,
    shared: dict[str, Any],
    adapter: Adapter | None,
    attention: str | None,
    dtype: torch.dtype,
    place: torch.device,
    shard: Shard | None,
    quantization: str | None,
) -> tuple[Any, PreTrainedTokenizerBase | str]:
    """The model on its device, and its tokenizer or why there is none.

    Args:
        shard: puts on the device what this process has of the blocks; None: all of them.
    """
    asked = name if adapter is None else adapter.base
    read, given = kept_weights(source, shared)
    unpacks = "gguf_file" in given
    stored = torch.float32 if unpacks else dtype
    model, info = _weighted(read, asked, given, attention, stored, None if shard is not None else place, quantization)
    if quantization is not None:
        refuse_unpacked(model, quantization, name)
    refuse_quantised(model, name)
    if info["missing_keys"]:
        absent = sorted(map(str, info["missing_keys"]))
        raise ModelError(
            f"{name} lacks {len(absent)} of the weights of a {type(model).__name__} ({', '.join(absent[:3])}, "
            "...), which would stay random. Is it a causal language model, and complete?"
        )
    tokenizer = _tokenizer(read, given)
    if unpacks:
        keep_weights(source, shared, model, tokenizer)
    if not is_quantised(model):  # which is on its device already, in its own types
        for parameter in model.parameters():  # not buffers: transformers keeps the rotary frequencies in fp32
            parameter.data = parameter.data.to(dtype)
        model = model if shard is not None else model.to(place)
    if adapter is not None:
        model, tokenizer = _merged(adapter, model, tokenizer, shared["trust_remote_code"])
    if shard is not None:
        shard(model)
    return model, tokenizer


def based_on(
    name: str, gguf_file: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any], Adapter | None]:
    """Return what `arguments_for` does and, where that is an adapter, it, with what its base is read from.

    Raises:
        ModelError: see `find_adapter`; or an adapter is based on another.
    """
    asked = name
    try:
        source, shared = arguments_for(name, gguf_file, revision, trust_remote_code)
        adapter = find_adapter(source, name, shared["revision"])
        if adapter is not None:
            asked = adapter.base
            source, shared = arguments_for(at_home(adapter.base), None, adapter.revision, trust_remote_code)
            if find_adapter(source, adapter.base, shared["revision"]) is not None:
                raise ModelError(f"{name} is an adapter of an adapter, {adapter.base}. Merge that one first.")
    except (ModelError, ConfigError):
        raise
    except Exception as error:
        raise ModelError(explained(asked, error)) from error
    return source, shared, adapter


@dataclass(frozen=True)
class TokenizerAlone:
    """The parts of a language model that reading text for it needs."""

    tokenizer: PreTrainedTokenizerBase | None
    no_tokenizer: str
    context: int | None
    vocab_size: int


def read_tokenizer(
    name: str, *, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False, **_: Any
) -> TokenizerAlone | None:
    """Load as much of a model as reading text needs, from its configuration and its tokenizer alone.

    Args:
        name, gguf_file, revision, trust_remote_code: see `load_model`, whose other arguments are ignored.

    Returns: None where its weights decide (an adapter, a configuration without a size of the vocabulary).

    Raises:
        ModelError: see `load_model`.
    """
    name = at_home(name)
    source, shared, adapter = based_on(name, gguf_file, revision, trust_remote_code)
    if adapter is not None:
        return None
    with LOADING, quiet_transformers():
        source, shared = kept_weights(source, shared)
        try:
            config: Any = AutoConfig.from_pretrained(source, **shared).get_text_config()
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            raise ModelError(explained(name, error)) from error
        tokenizer = _tokenizer(source, shared)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    failed = isinstance(tokenizer, str)
    context = getattr(config, "max_position_embeddings", None) or None
    return TokenizerAlone(None if failed else tokenizer, tokenizer if failed else "", context, vocabulary)


def _merged(
    adapter: Adapter, model: Any, tokenizer: PreTrainedTokenizerBase | str, trust_remote_code: bool
) -> tuple[Any, PreTrainedTokenizerBase | str]:
    """The base with the adapter in its weights, and the tokenizer of the two: the adapter's, where it has one."""
    if is_quantised(model):
        raise ModelError(
            f"{adapter.name} is an adapter of a quantised model, {adapter.base}, whose weights it cannot be merged "
            "into. Set base_model_name_or_path in its adapter_config.json to the checkpoint that was quantised."
        )
    folder, own = str(adapter.folder), None
    if tokenizer_files(folder, "main"):
        tokenizer = own = _tokenizer(folder, {"revision": "main", "trust_remote_code": trust_remote_code})
    return adapter.merged(model, None if isinstance(own, str) else own), tokenizer


def _digesting(
    source: str, shared: dict[str, Any], commit: str | None, adapter: Adapter | None
) -> Callable[[], str] | None:
    """Return what digests the files that a model was loaded from; None: they are not to be found."""
    gguf_file, with_code = shared.get("gguf_file"), shared["trust_remote_code"]
    folder = _folder_of(source, gguf_file, commit or shared["revision"])
    if folder is None:
        return None
    stored = partial(of_stored_model, folder, gguf_file, with_code=with_code)
    if adapter is None:
        return stored
    files = [adapter.folder / name for name in (ADAPTER_WEIGHTS, "adapter_config.json")]
    return lambda: of_text(stored(), of_files(files, adapter.folder))


def _folder_of(source: str, gguf_file: str | None, revision: str) -> Path | None:
    """Find the files of a model that was loaded: the folder given, or the hub's snapshot of it."""
    if Path(source).is_dir():
        return Path(source)
    try:
        found = try_to_load_from_cache(source, gguf_file or "config.json", revision=revision)
    except ValueError:  # a name that the hub does not have
        return None
    return Path(found).parents[(gguf_file or "").count("/")] if isinstance(found, str) else None


def _weighted(
    source: str,
    name: str,
    shared: dict[str, Any],
    attention: str | None,
    dtype: torch.dtype,
    place: torch.device | None,
    quantization: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, and what transformers says of them.

    Args:
        place: of a model that is quantised; None: it is to be sharded, which such a one cannot be.

    Raises:
        ModelError: there is none, it cannot be sharded, or what would be loaded is not what its files hold.
    """
    weights: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **shared}
    try:
        config = AutoConfig.from_pretrained(source, **shared)
        if quantization is not None:
            weights["quantization_config"] = quantisation(quantization, config, dtype, name)
        if "gguf_file" in shared:
            if hasattr(transformers, "GgufConfig"):  # else it may leave weights packed, for kernels of its own
                weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
        else:
            weights |= {"config": config, "use_safetensors": True}
            method = quantiser_of(config)
            if method is None:
                refuse_packed_files(weight_files(source, shared["revision"], config), name)
                method = None if quantization is None else f" by {quantization} (model.quantization)"
            if method is not None and place is None:
                raise ModelError(
                    f"{name} is quantised{method}, and packed weights cannot be sharded. Unset model.sharded, so that "
                    "each process holds all of them; or give the checkpoint that it was made from."
                )
            if method is not None:
                weights["device_map"] = {"": place}
        return _from_pretrained(reader_of(config), source, attention, weights)
    except (ModelError, ConfigError):
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise ModelError(explained(name, error)) from error


def _spliceable(model: Any, tokenizer: PreTrainedTokenizerBase | str, name: str) -> LanguageModel:
    """
    Args:
        tokenizer: or why there is none.
    """
    try:
        none = isinstance(tokenizer, str)
        return LanguageModel(model, None if none else tokenizer, name, tokenizer if none else "")
    except ModelError:
        raise
    except Exception as error:  # its first pass fails of whatever its configuration and its weights disagree in
        raise ModelError(f"{name} is loaded, but a pass fails: {_one_line(error)} Is its config.json right?") from error


def arguments_for(
    name: str, gguf_file: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Return what transformers reads a model from, and with which arguments.

    Raises:
        ConnectionError: see `within_reach`.
    """
    source, gguf_file = (str(embedded.folder()), gguf_file) if name == "embedded" else with_gguf_file(name, gguf_file)
    source = within_reach(source, revision or "main")
    check_files(source, gguf_file)
    shared: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        shared["gguf_file"] = gguf_file
    return source, shared


def reader_of(config: Any) -> Any:
    """Return the class of transformers' that makes a model of this configuration: of one that reads images too, and is
    no causal model in its list, the class for both, whose text part is spliced.
    """
    kind = type(config)
    with_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def _from_pretrained(reader: Any, source: str, attention: str | None, weights: dict[str, Any]) -> Any:
    """The model and what transformers says of its weights."""
    try:
        return reader.from_pretrained(source, attn_implementation=attention or "sdpa", **weights)
    except ValueError as error:
        if attention not in (None, "sdpa") or "scaled_dot_product_attention" not in str(error):
            raise
        loaded = reader.from_pretrained(source, attn_implementation="eager", **weights)
        if not use_sdpa(loaded[0]) and attention == "sdpa":
            raise
        return loaded


def _tokenizer(source: str, shared: dict[str, Any]) -> PreTrainedTokenizerBase | str:
    """The model's tokenizer, or why there is none, which is fine as long as only token ids are read."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **shared)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        return _no_tokenizer(source, shared, error)
    except Exception as error:  # what the tokenizers library says of a file that is damaged
        raise ModelError(f"The tokenizer of {source} cannot be read: {_one_line(error)} Restore its files.") from error
    # Where there are no files, transformers makes up a tokenizer that knows nothing but its special tokens.
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if tokenizer.get_vocab().keys() <= special:
        return f"{source} names only its special tokens, and no vocabulary. Save its tokenizer there."
    return tokenizer


def _no_tokenizer(source: str, shared: dict[str, Any], error: Exception) -> str:
    """Find the cause why no tokenizer could be read."""
    text = _one_line(error)
    if "gguf_file" not in shared and not tokenizer_files(source, shared["revision"]):
        return f"{source} holds no file of one. Save its tokenizer there: tokenizer.save_pretrained(FOLDER)."
    if "trust_remote_code" in str(error):
        return f"{source} ships it as Python code, which is not run unless model.trust_remote_code is true."
    if isinstance(error, ImportError) or "is required to read" in text or "pip install" in text:
        return f"reading that of {source} needs a package that is not installed ({text}). {install_for(error, text)}"
    return f"that of {source} cannot be read ({type(error).__name__}: {text}). Restore its files."


def find_device(name: str) -> torch.device:
    """Return the device of a name, or the one that takes its place.

    Raises:
        ConfigError: there is none.
    """
    name = DEVICE.get() or name
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # which "meta" has not
    except (RuntimeError, AssertionError) as error:
        kind = torch.accelerator.current_accelerator()
        there = ["cpu", *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]
        why = f" ({_one_line(error)[:200]})" if name in (*there, str(kind)) else ""
        alone = ", with a build of torch for the CPU alone" if kind is None else ""
        raise ConfigError(
            f"model.device {name!r} cannot be used{why}. This machine has {', '.join(there)}{alone}. Give one of "
            "these, or auto."
        ) from None
    return device


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def explained(name: str, error: Exception) -> str:
    reason = _one_line(error)
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed ({reason}). {install_for(error, reason)}"
    if "trust_remote_code" in str(error):
        return f"{name} ships Python code of its own, which is not run unless model.trust_remote_code is true."
    lost = isinstance(error, FileNotFoundError) or number(error) is None
    if not lost and (isinstance(error, OSError) or there_is(Path(name))):
        return f"{name} cannot be read ({system_reason(error)}). {remedy(error)}"
    if isinstance(error, OSError) and not there_is(Path(name)):
        return (
            f"{name!r} is neither 'embedded', nor a local folder, nor a model found on the Hugging Face hub. "
            f"Check the spelling and the connection. ({reason})"
        )
    return f"{name} cannot be loaded as a causal language model: {reason}"
