"""CUDA C++ compiled at run time by NVRTC, the compiler library that PyTorch's CUDA builds depend on.

The result is a cubin, machine code for one architecture: the driver loads it without compiling anything again. No
headers are at hand at run time, so sources include none and declare what they need.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from slimc.errors import KernelError

__all__ = ["NO_DEFINES", "Nvrtc", "compile_options", "compile_source", "find_nvrtc", "version"]

log = logging.getLogger(__name__)

NO_DEFINES: Mapping[str, int | str] = MappingProxyType({})

OPTIONS = ("-std=c++17", "-default-device", "-lineinfo")
"""What every kernel is compiled with. Fast maths stays off: it changes results."""

_KNOWN_MAJORS = range(15, 11, -1)
"""Major versions of CUDA whose NVRTC may be asked for by name, newest first."""

_LOG_LINES = 20
"""Lines of the compiler's log that an error repeats: the first mistake causes most of those after it."""


@dataclass(frozen=True)
class Nvrtc:
    """NVRTC, loaded: its functions, where it was found, and its version as ``"13.0"``."""

    functions: Any
    path: str
    version: str


@cache
def find_nvrtc() -> Nvrtc:
    """Load NVRTC: one that is in the process, else from pip's wheels, a CUDA toolkit, or the loader's search path.

    Within each of these places the version that PyTorch was built for comes first.

    Raises:
        KernelError: there is none; the message lists the places and what was wrong with those found.
    """
    searched = []
    for place, names, mode in _places():
        searched.append(place)
        for name in names:
            try:
                return _opened(name, mode)
            except (OSError, AttributeError) as error:
                # Most sonames exist nowhere, which is not worth a word; a file that is there should have loaded.
                if os.path.isabs(name):  # noqa: PTH117 - sonames are no paths
                    searched.append(f"  {name}: {error}")
    raise KernelError(
        "CUDA kernels are compiled by NVRTC (libnvrtc.so), which was not found. Install it with "
        "`pip install nvidia-cuda-nvrtc`, or set CUDA_HOME to a CUDA toolkit of version 12 or newer. Searched:\n  "
        + "\n  ".join(searched)
    )


def version() -> str:
    """Return the version of NVRTC as ``"13.0"``; raises a KernelError if there is none."""
    return find_nvrtc().version


def compile_options(arch: str, defines: Mapping[str, int | str] = NO_DEFINES) -> list[str]:
    """Return all options for ``arch`` ("sm_80", "sm_90a") and the macros, in one order whatever that of ``defines``.

    Raises:
        KernelError: ``arch`` or the name of a macro has the wrong form.
    """
    if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise KernelError(f"{arch!r} is no architecture to compile for; one looks like 'sm_80' or 'sm_90a'")
    return [f"--gpu-architecture={arch}", *OPTIONS, *(_macro(name, defines[name]) for name in sorted(defines))]


def compile_source(source: str, *, name: str, arch: str, defines: Mapping[str, int | str] = NO_DEFINES) -> bytes:
    """Compile CUDA C++ that includes nothing into a cubin.

    Args:
        source: the text; kernels are ``extern "C" __global__`` so that they can be found by name.
        name: what messages and profilers call the source.
        arch: the machine to compile for, such as ``"sm_80"`` or ``"sm_90a"``.
        defines: macros, as ``-Dname=value`` would define them.

    Raises:
        KernelError: there is no NVRTC, or it refuses the source or the architecture; the message has its log.
    """
    options = compile_options(arch, defines)
    nvrtc = find_nvrtc()
    with _program(nvrtc, source, name) as program:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.functions.nvrtcCompileProgram(program, len(options), arguments)
        messages = _text(nvrtc, program)
        if status:
            raise KernelError(
                f"kernel {name!r} does not compile for {arch} with NVRTC {nvrtc.version} "
                f"({_reason(nvrtc, status)}):\n{_beginning(messages)}"
            )
        if messages:
            log.debug("kernel %r for %s: %s", name, arch, messages)
        return _cubin(nvrtc, program)


def _places() -> Iterator[tuple[str, Iterable[str], int]]:
    """Yield each place to search as its name for people, the libraries to try there, and the mode to open them with."""
    majors = sorted(_KNOWN_MAJORS, key=_is_not_torchs)
    sonames = [f"libnvrtc.so.{major}" for major in majors]
    no_load = getattr(os, "RTLD_NOLOAD", None)
    if no_load is not None:
        yield "the libraries in this process", sonames, no_load
    # The same search that `import nvidia` would do: the wheels share that package without owning it.
    package = importlib.util.find_spec("nvidia")
    for root in (package and package.submodule_search_locations) or ():
        yield f"{root}/*/lib (pip's wheels)", _libraries(Path(root).glob("*/lib/libnvrtc.so.*")), ctypes.DEFAULT_MODE
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            files = [file for lib in ("lib64", "lib") for file in Path(home).absolute().glob(f"{lib}/libnvrtc.so.*")]
            yield f"{home} (a CUDA toolkit)", _libraries(files), ctypes.DEFAULT_MODE
    yield "the loader's search path", sonames, ctypes.DEFAULT_MODE


def _libraries(files: Iterable[Path]) -> list[str]:
    """Order library files: the version that PyTorch was built for first, then newer before older."""
    return [str(file) for file in sorted(files, key=lambda file: (_is_not_torchs(_major(file)), -_major(file)))]


def _major(file: Path) -> int:
    """Return 13 for ``libnvrtc.so.13`` and ``libnvrtc.so.13.0.88``."""
    digits = re.match(r"libnvrtc\.so\.(\d+)", file.name)
    return int(digits[1]) if digits else 0


def _is_not_torchs(major: int) -> bool:
    return (torch.version.cuda or "").partition(".")[0] != str(major)


def _opened(name: str, mode: int) -> Nvrtc:
    """Open a library and declare its functions; an OSError or AttributeError says why it cannot be used."""
    library = ctypes.CDLL(name, mode)
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
    texts, integer = ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_int)
    signatures: dict[str, list[Any]] = {
        "nvrtcVersion": [integer, integer],
        "nvrtcCreateProgram": [ctypes.POINTER(pointer), text, text, ctypes.c_int, texts, texts],
        "nvrtcDestroyProgram": [ctypes.POINTER(pointer)],
        "nvrtcCompileProgram": [pointer, ctypes.c_int, texts],
        "nvrtcGetCUBINSize": [pointer, size],
        "nvrtcGetCUBIN": [pointer, text],
        "nvrtcGetProgramLogSize": [pointer, size],
        "nvrtcGetProgramLog": [pointer, text],
        "nvrtcGetErrorString": [ctypes.c_int],
    }
    for function, argument_types in signatures.items():
        getattr(library, function).argtypes = argument_types
    library.nvrtcGetErrorString.restype = text
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise OSError("it does not tell its version")
    return Nvrtc(library, name, f"{major.value}.{minor.value}")


def _macro(name: str, value: int | str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise KernelError(f"{name!r} cannot be the name of a macro")
    # True would become a word that the compiler does not know here.
    return f"-D{name}={int(value) if isinstance(value, bool) else value}"


@contextmanager
def _program(nvrtc: Nvrtc, source: str, name: str) -> Iterator[ctypes.c_void_p]:
    """Yield NVRTC's handle of a source, valid inside the block."""
    program = ctypes.c_void_p()
    create = nvrtc.functions.nvrtcCreateProgram
    _check(nvrtc, create(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        yield program
    finally:
        nvrtc.functions.nvrtcDestroyProgram(ctypes.byref(program))


def _cubin(nvrtc: Nvrtc, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc.functions.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    cubin = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc.functions.nvrtcGetCUBIN(program, cubin))
    return cubin.raw


def _text(nvrtc: Nvrtc, program: ctypes.c_void_p) -> str:
    """Return what the compiler has said about the program."""
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc.functions.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    messages = ctypes.create_string_buffer(max(size.value, 1))
    _check(nvrtc, nvrtc.functions.nvrtcGetProgramLog(program, messages))
    return messages.value.decode(errors="replace").strip()


def _beginning(messages: str) -> str:
    lines = messages.splitlines()
    more = [f"... and {len(lines) - _LOG_LINES} more lines"] if len(lines) > _LOG_LINES else []
    return "\n".join(lines[:_LOG_LINES] + more)


def _reason(nvrtc: Nvrtc, status: int) -> str:
    return str(nvrtc.functions.nvrtcGetErrorString(status).decode())


def _check(nvrtc: Nvrtc, status: int) -> None:
    if status:
        raise KernelError(f"NVRTC {nvrtc.version} ({nvrtc.path}) failed: {_reason(nvrtc, status)}")
