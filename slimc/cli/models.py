"""Opening what the user calls a model: a dense one, or a folder that slimc wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimc.errors import InputError, closest

if TYPE_CHECKING:
    from torch import nn

    from slimc.backends.onnx.session import OnnxDecoder


def open_model(model: str, *, dtype: str | None = None, device: str | None = None) -> tuple[nn.Module, Any]:
    """Return the model, ready to run, and its tokenizer (``None`` if it has none).

    Raises:
        InputError: There is no such model, or ``device`` is not to be had.
        FormatError: Its files are damaged.
    """
    import torch

    import slimc
    from slimc.backends import hf
    from slimc.runtime.devices import default_device, usable_device
    from slimc.runtime.files import recover
    from slimc.runtime.storage import is_native_folder

    place = default_device() if device is None else usable_device(device)
    if not Path(model).exists():
        recover(Path(model))
    if is_native_folder(Path(model)):
        if dtype is not None:
            raise InputError(f"{model} is compressed already; its values keep their dtype: drop --dtype")
        return slimc.load(model, device=str(place)), hf.load_tokenizer(Path(model))
    dense, tokenizer = hf.load_model(model, dtype=None if dtype is None else getattr(torch, dtype))
    return dense.to(place), tokenizer


def open_language_model(model: str, *, device: str | None = None) -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer.

    Raises:
        InputError: As :func:`open_model`, or there is no tokenizer.
        FormatError: Its files are damaged.
    """
    from slimc.runtime.generate import without_tokenizer

    opened, tokenizer = open_model(model, device=device)
    if tokenizer is None:
        raise without_tokenizer(model)
    return opened, tokenizer


def open_onnx_model(folder: Path, *, device: str | None = None, kernels: Path | None = None) -> tuple[OnnxDecoder, Any]:
    """Return a decoder in ONNX Runtime, on a CUDA GPU if its provider is there, and the folder's tokenizer.

    Raises:
        InputError: onnxruntime is missing or too old, or lacks the provider, or the folder has no cache or tokenizer.
        FormatError: Its files are damaged.
    """
    from slimc.backends import hf
    from slimc.backends.onnx.session import OnnxDecoder, best_device
    from slimc.runtime.generate import without_tokenizer

    decoder = OnnxDecoder(folder, device=device or best_device(), kernels=kernels, replay=True)
    tokenizer = hf.load_tokenizer(folder)
    if tokenizer is None:
        raise without_tokenizer(folder)
    return decoder, tokenizer


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: There is no such file, it is not UTF-8 text, or it is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a file with text in it")
    return text


def calibration_text(name: str) -> str:
    """Return the text of the file that ``--calibration`` names.

    Raises:
        InputError: As :func:`read_text`; a misspelt 'self' is told apart.
    """
    path = Path(name)
    if not path.exists() and (meant := closest(name, ["self"])):
        raise InputError(f"--calibration {name}: there is no such file{meant}")
    return read_text(path)
