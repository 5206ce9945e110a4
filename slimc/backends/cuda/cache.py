"""Cubins that outlive the process: a folder of files named by what they were compiled from.

A cubin is code that runs with everything this process holds on the GPU within reach, so a file is loaded only if
nobody but this user (and root, who needs no such detour) could have put it there. Everything is done relative to one
open descriptor of the folder: it is the folder that was checked, whatever happens to the path meanwhile.

The folder is a convenience. Where it cannot be used the process compiles for itself and says so once, at level info.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slimc.backends.cuda import compiler

__all__ = ["cache_folder", "cached_cubin", "cubin_key"]

log = logging.getLogger(__name__)

_LAYOUT = 1
"""Version of the layout of a file; part of the key."""

_DIGEST_BYTES = hashlib.sha256().digest_size

_MAX_FILE_BYTES = 64 << 20
"""No kernel is that large: such a file is not ours."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

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
        with _open_folder() as folder:
            cubin = folder.read(key) if folder else None
            if cubin is None:
                cubin = compiler.compile_source(source, name=name, arch=arch, defines=defines)
                if folder:
                    folder.write(key, cubin)
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


def cache_folder() -> Path:
    """Return where cubins are kept: in ``SLIMC_CACHE_DIR``, ``$XDG_CACHE_HOME/slimc`` or ``~/.cache/slimc``.

    Raises:
        RuntimeError: none of them is set and this user has no home.
    """
    chosen = os.environ.get("SLIMC_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute() / "cubins"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    caches = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return caches / "slimc" / "cubins"


@dataclass(frozen=True)
class _Folder:
    """An open cache folder that only this user can write to."""

    path: Path
    descriptor: int

    def read(self, key: str) -> bytes | None:
        """Return the cubin kept under ``key``, or None if there is none that is whole and can be trusted."""
        name = _file_name(key)
        try:
            content = self._content(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.info("%s: compiled again, because it cannot be used (%s)", self.path / name, error.strerror or error)
            return None
        cubin, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if digest != _digest(key, cubin):
            log.info("%s: compiled again, because it is damaged", self.path / name)
            return None
        return cubin

    def write(self, key: str, cubin: bytes) -> None:
        """Keep a cubin; the file appears whole or not at all, and failure is only reported."""
        name = _file_name(key)
        # Not the process's number: processes in two containers that share a folder may have the same one.
        partial = f".{key}.{secrets.token_hex(8)}.partial"
        try:
            self._create(partial, cubin + _digest(key, cubin))
            os.replace(partial, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except OSError as error:
            _memory_only(self.path, error)
            with suppress(OSError):
                os.unlink(partial, dir_fd=self.descriptor)

    def _content(self, name: str) -> bytes:
        """Read a file of ours; an OSError says why it is missing, not ours, or not to be trusted."""
        # A named pipe would block without O_NONBLOCK; a link could lead to a file that others may write to.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(name, flags, dir_fd=self.descriptor), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
                raise OSError("it is no cubin")
            _refuse_strangers(found)
            return file.read()

    def _create(self, name: str, content: bytes) -> None:
        # No flush to the disk: the digest finds what a loss of power leaves behind, and a compiler makes it good.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=self.descriptor), "wb") as file:
            file.write(content)


@contextmanager
def _open_folder() -> Iterator[_Folder | None]:
    """Yield the cache folder, made if it was missing, or None where there is none that can be used."""
    path: Path | str = "the cache folder"
    try:
        path = cache_folder()
        _make_private(path)
        folder = _Folder(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    except (OSError, RuntimeError) as error:
        _memory_only(path, error)
        yield None
        return
    try:
        yield folder if _is_private(folder) else None
    finally:
        os.close(folder.descriptor)


def _make_private(path: Path) -> None:
    """Make a folder and its missing parents, all for this user alone."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)


def _is_private(folder: _Folder) -> bool:
    """Tell whether nobody else can have put a file into the folder, and say so if somebody can."""
    try:
        _refuse_strangers(os.fstat(folder.descriptor))
    except OSError as error:
        _memory_only(folder.path, error)
        return False
    return True


def _refuse_strangers(found: os.stat_result) -> None:
    """Raise an OSError if somebody else may write to what ``found`` describes; a list's access shows as the group's."""
    if found.st_uid not in (os.geteuid(), 0):
        raise OSError(f"it belongs to another user, number {found.st_uid}")
    if found.st_mode & _OTHERS_WRITE:
        raise OSError(f"others may write to it, mode {stat.S_IMODE(found.st_mode):o}; take that away with chmod go-w")


def _memory_only(path: Path | str, error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    _say_once(f"{path}: CUDA kernels are compiled anew in each process, because this folder cannot be used ({reason})")


@cache
def _say_once(message: str) -> None:
    log.info("%s", message)


def _file_name(key: str) -> str:
    return f"{key}.cubin"


def _digest(key: str, cubin: bytes) -> bytes:
    """Return what ends a file: it binds the cubin to its name, so that a file under a wrong name is found too."""
    return hashlib.sha256(key.encode() + cubin).digest()
