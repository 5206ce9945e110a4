"""Cubins that outlive the process, in a folder of slimc's cache, named by what they were compiled from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from slimc.backends.cuda import compiler
from slimc.backends.private_folder import PrivateFolder

__all__ = ["cached_cubin", "cubin_key"]

_LAYOUT = 1
"""Version of the layout of a file; part of the key."""

_FOLDER = PrivateFolder("cubins", ".cubin", "CUDA kernels are compiled anew in each process")

_in_memory: dict[str, bytes] = {}


def cached_cubin(source: str, *, name: str, arch: str, defines: Mapping[str, int | str], driver: str) -> bytes:
    """Return the cubin of a source from memory or the cache folder, else compile and keep it.

    Threads and processes may do this at once: at worst each of them compiles, and the last file stays.

    Args:
        source: CUDA C++, see :func:`slimc.backends.cuda.compiler.compile_source`.
        name: what messages and profilers call it.
        arch: the machine, such as ``"sm_90a"``.
        defines: macros.
        driver: version of the driver that will load the cubin.

    Raises:
        KernelError: there is no NVRTC, or it refuses the source. Trouble with the folder raises nothing.
    """
    key = cubin_key(source, name=name, arch=arch, defines=defines, driver=driver)
    cubin = _in_memory.get(key)
    if cubin is None:
        cubin = _FOLDER.read(key)
        if cubin is None:
            cubin = compiler.compile_source(source, name=name, arch=arch, defines=defines)
            _FOLDER.write(key, cubin)
        _in_memory[key] = cubin
    return cubin


def cubin_key(source: str, *, name: str, arch: str, defines: Mapping[str, int | str], driver: str) -> str:
    """Return the digest of all that decides what a cubin is: source, options, compiler and driver.

    Raises:
        KernelError: there is no NVRTC, or an option has the wrong form.
    """
    options = compiler.compile_options(arch, defines)
    # JSON keeps the parts apart: no text can be moved from one to the next without changing the key.
    parts = json.dumps([_LAYOUT, source, name, options, compiler.version(), driver])
    return hashlib.sha256(parts.encode()).hexdigest()
