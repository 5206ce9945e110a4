"""Hugging Face models: opening them, saving them, rebuilding them from their configuration.

This module, `hf_text` and `hf_library` are the only ones that know transformers. Every file is checked before
transformers sees it; no pickle is read and no code from a checkpoint is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from slimc.backends import gguf
from slimc.backends.checkpoints import (
    CONFIG,
    Checkpoint,
    check_repetitions,
    open_checkpoint,
    read_config,
    without_directives,
)
from slimc.backends.hf_library import explained, quiet, require, transformers
from slimc.backends.hf_text import can_generate, sample_calibration, tokenize_text
from slimc.errors import FormatError, InputError
from slimc.runtime.description import ModelRecord
from slimc.runtime.files import file_inside, json_bytes, write_file
from slimc.runtime.storage import NativeFolder

__all__ = [
    "can_generate",
    "guard_save_pretrained",
    "load_model",
    "load_tokenizer",
    "native_skeleton",
    "outline",
    "output_embedding_names",
    "sample_calibration",
    "saved_form",
    "skeleton",
    "tokenize_text",
]

GENERATION_CONFIG = "generation_config.json"

HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
"""What is fetched from the hub: nothing that can hold code."""

MAX_OWN_BUFFERS = 1 << 30
"""Bytes of tables that a model may make for itself (rotary frequencies, masks) without being suspicious."""

SPARE_ELEMENTS = 10_000_000
"""How many weights more than its checkpoint a model may have before it is refused unbuilt."""


# --------------------------------------------------------------------------------------------------- opening


def load_model(path_or_id: str | Path, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Open a dense model and its tokenizer (``None`` if it has none), on the CPU, in evaluation mode.

    Args:
        path_or_id: a folder that ``save_pretrained`` wrote, a ``.gguf`` file (dequantised while it is read),
            or the id of a model on the Hugging Face hub.
        dtype: of the weights. ``None`` is the checkpoint's own, bfloat16 for GGUF.

    Raises:
        InputError: no such model, not a dense safetensors model, or a package is missing.
        FormatError: a file is truncated, malformed or hostile, or lacks weights of the model.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _load_folder(open_checkpoint(path), dtype)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{path}: is neither a model folder nor a .gguf file; name the folder that holds it")
        return _load_gguf(path, dtype or torch.bfloat16)
    name = str(path_or_id)
    if looks_like_path(name):
        raise InputError(f"{name}: no such file or folder")
    return _load_folder(open_checkpoint(_fetch(name)), dtype)


def looks_like_path(name: str) -> bool:
    """Tell whether ``name`` can only be meant as a path, because no hub id is spelled like it."""
    return name.lower().endswith((".gguf", ".safetensors")) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)


def _fetch(name: str) -> Path:
    """Bring the files of a model on the hub here (or find them in the cache) and return their folder."""
    hub = require("huggingface_hub", "fetching a model")
    with quiet():
        try:
            return Path(hub.snapshot_download(name, allow_patterns=HUB_FILES))
        except hub.errors.GatedRepoError:
            raise InputError(
                f"{name}: its owner asks for an agreement; accept it on the hub and log in there"
            ) from None
        except hub.errors.RepositoryNotFoundError:
            raise InputError(f"{name}: neither a folder here nor a model on the Hugging Face hub") from None
        except Exception as error:
            raise InputError(
                f"{name}: no such folder, and the Hugging Face hub cannot be reached ({type(error).__name__}); "
                "name a local folder or .gguf file, or try again with a network"
            ) from error


def model_class(config: Mapping[str, Any], source: Path) -> Any:
    """Return the transformers class that ``config`` names.

    Raises:
        InputError: the class is not part of transformers; slimc does not run code from checkpoints.
        FormatError: the configuration names no class.
    """
    library = transformers()
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{source}: does not name the model's class (architectures)")
    found: Any = getattr(library, names[0], None) if re.fullmatch(r"[A-Za-z]\w*", names[0]) else None
    is_model = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
    if not is_model or getattr(found, "config_class", None) is None:
        raise InputError(
            f"{source}: needs the class {names[0][:100]!r}, which transformers {library.__version__} does not "
            "have; slimc runs no code from checkpoints, so build the model yourself and pass it to slimc.compile"
        )
    return found


def _load_folder(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    source = checkpoint.folder / CONFIG
    cls = model_class(checkpoint.config, source)
    config = without_directives(checkpoint.config)
    elements = sum(parameter.numel() for parameter in _build(cls, config, source, on_meta=True).parameters())
    if elements > 2 * checkpoint.elements + SPARE_ELEMENTS:
        raise FormatError(
            f"{source}: describes a model of {elements} weights, but the weight files hold {checkpoint.elements}"
        )
    with explained(checkpoint.folder):
        model, loaded = cls.from_pretrained(
            checkpoint.folder,
            config=cls.config_class.from_dict(config),
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    _refuse_gaps(checkpoint.folder, loaded)
    return model.eval(), load_tokenizer(checkpoint.folder)


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    gguf.read_header(path)
    require("accelerate", "reading a GGUF file")
    if (path.parent / "adapter_config.json").exists():
        raise InputError(f"{path.parent}: holds a PEFT adapter beside the GGUF file; move the file elsewhere")
    library = transformers()
    # From 5.23 on transformers keeps the weights packed unless told otherwise; before, it knew no other way.
    options = {}
    if hasattr(library, "GgufConfig"):
        options["quantization_config"] = library.GgufConfig(dequantize=True)
    place = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with explained(path):
        tokenizer = library.AutoTokenizer.from_pretrained(path.parent, **place)
        model, loaded = library.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype, output_loading_info=True, **options, **place
        )
    _refuse_gaps(path, loaded)
    # What is in memory is dense; a trace of the file's own quantisation would have later loaders unpack it again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer


def _refuse_gaps(source: Path, loaded: Mapping[str, Any]) -> None:
    """Raise a FormatError if transformers had to invent weights, which it does with no more than a warning."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in loaded.get(kind, ()))
        if names:
            raise FormatError(
                f"{source}: {kind.replace('_keys', '')} weights: {', '.join(names[:3])} ({len(names)} in all); the "
                "checkpoint is incomplete or for another class"
            )


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer in ``folder``, ``None`` if there is none.

    Raises:
        FormatError: its files cannot be read.
    """
    folder = Path(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    with explained(folder):
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


# ------------------------------------------------------------------------------------- rebuilding and saving


def _build(cls: Any, config: Mapping[str, Any], source: Path, *, on_meta: bool, attention: str | None = None) -> Any:
    """Build a model without weights: all of it on the meta device, or its non-persistent buffers for real."""
    accelerate = require("accelerate", "building a model without its weights")
    with explained(source):
        # from_dict hands the values of nested sections on as they are, so each build gets its own.
        built = cls.config_class.from_dict(json.loads(json.dumps(config)))
        options = {} if attention is None else {"attn_implementation": attention}
        with torch.device("meta") if on_meta else accelerate.init_empty_weights(include_buffers=False):
            return cls._from_config(built, **options)


def skeleton(
    config: Mapping[str, Any],
    *,
    source: Path = Path(CONFIG),
    attention: str | None = None,
    check: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Build the model of a ``config.json`` with parameters on the meta device and real non-persistent buffers.

    Args:
        config: the content of ``config.json``; its ``architectures`` names the class.
        source: the file, for messages.
        attention: the attention implementation, if not the default one.
        check: called first with a model that is wholly on the meta device; may refuse it by raising.

    Raises:
        InputError: the class is not part of transformers.
        FormatError: transformers cannot build it, or it would make absurdly large tables.
    """
    cls = model_class(config, source)
    config = without_directives(config)
    outline = _build(cls, config, source, on_meta=True, attention=attention)
    if check is not None:
        check(outline)
    persistent = outline.state_dict().keys()
    tables = sum(buffer.nbytes for name, buffer in outline.named_buffers() if name not in persistent)
    if tables > MAX_OWN_BUFFERS:
        raise FormatError(f"{source}: describes a model that would make tables of {tables} bytes for itself")
    model: nn.Module = _build(cls, config, source, on_meta=False, attention=attention)
    return model


def native_skeleton(folder: NativeFolder) -> nn.Module:
    """Build the model of a native folder, checked against the folder's tensors before anything is allocated.

    Raises:
        InputError: its class is not part of transformers.
        FormatError: the configuration is malformed or does not fit the tensors.
    """
    source = file_inside(folder.path, CONFIG)
    config = read_config(source)
    check_repetitions(config, len(folder.entries), source)
    attention = folder.description.model.attention
    model: Any = skeleton(config, source=source, attention=attention, check=folder.check_fits)
    if (folder.path / GENERATION_CONFIG).exists():
        place = file_inside(folder.path, GENERATION_CONFIG)
        settings = read_config(place)
        with explained(place):
            model.generation_config = transformers().GenerationConfig.from_dict(settings)
    return model  # type: ignore[no-any-return]


def outline(model: Any) -> nn.Module:
    """Return a model of transformers as its configuration has it: dense, on the meta device.

    Raises:
        FormatError: transformers cannot build it.
    """
    cls: Any = type(model)
    built: nn.Module = _build(cls, _config_of(model), Path(CONFIG), on_meta=True)
    return built


def saved_form(
    model: nn.Module, tokenizer: Any = None, *, keys: Mapping[str, Any] | None = None
) -> tuple[ModelRecord, Callable[[Path], None]]:
    """Return how ``model`` is recorded in ``slimc.json``, and a function that writes its files into a folder.

    A model whose class is not part of transformers is recorded as a plain module. ``keys`` take the
    place of those of the model's ``config.json``. Does not import transformers.
    """
    # torch.compile's wrapper has another class; what it wraps is the model.
    model = getattr(model, "_orig_mod", model)
    cls = type(model)
    known = cls.__module__.startswith("transformers.models.")
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None) if known else None
    record = ModelRecord(
        kind="huggingface" if known else "module",
        architecture=cls.__name__,
        attention=attention if attention in ("eager", "sdpa") else None,
    )
    return record, partial(_write_files, model if known else None, tokenizer, keys or {})


def guard_save_pretrained(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` raise an InputError that names ``slimc.save``; other models are left alone.

    What it would write for a compressed model, stock loaders open without an error and with random layers.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = _refuse_save_pretrained


def _refuse_save_pretrained(*_: Any, **__: Any) -> NoReturn:
    """Stand in for the method of one instance; a plain function, so that copies of the model share it."""
    raise InputError(
        "a compressed model cannot be saved as a stock checkpoint, which would be loaded with random layers; use "
        "slimc.save(model, path)"
    )


def _write_files(model: Any, tokenizer: Any, keys: Mapping[str, Any], folder: Path) -> None:
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            raise InputError(f"the tokenizer cannot be saved: {error}") from error
    if model is None:
        return
    write_file(folder / CONFIG, json_bytes(_config_of(model) | dict(keys)))
    if getattr(model, "generation_config", None) is not None:
        write_file(folder / GENERATION_CONFIG, json_bytes(json.loads(model.generation_config.to_json_string())))


def _config_of(model: Any) -> dict[str, Any]:
    """Return the configuration of a model as it is now."""
    config = without_directives(json.loads(model.config.to_json_string()))
    config["architectures"] = [type(model).__name__]
    if config.get("tie_word_embeddings") and not _embeddings_are_tied(model):
        config["tie_word_embeddings"] = False
    return config


def _embeddings_are_tied(model: Any) -> bool:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [None if module is None else module._parameters.get("weight") for module in modules]
    return weights[0] is not None and weights[0] is weights[1]


def output_embedding_names(model: nn.Module) -> set[str]:
    """Return all names of the parameters of what ``get_output_embeddings()`` returns, none if there is nothing."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        return set()
    chosen = {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in chosen}


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many logits a token a language model gives, ``None`` for a model without output embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else None
