"""Files that outlive the process: folders of a cache that nobody but this user can write to.

What is kept there decides what the next process does, up to the machine code that it runs with everything it holds
within reach. So a file is read only if nobody but this user (and root, who needs no such detour) could have put it
there. Everything is done relative to one open descriptor of the folder: it is the folder that was checked, whatever
happens to the path meanwhile.

A folder is a convenience. Where it cannot be used the process does without and warns once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["PrivateFolder", "cache_root"]

log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size

_MAX_FILE_BYTES = 64 << 20
"""Nothing that is kept is that large: such a file is not ours."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """Return where slimc keeps things: ``SLIMC_CACHE_DIR``, ``$XDG_CACHE_HOME/slimc`` or ``~/.cache/slimc``.

    Raises:
        RuntimeError: none of them is set and this user has no home.
    """
    chosen = os.environ.get("SLIMC_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    caches = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return caches / "slimc"


@dataclass(frozen=True)
class PrivateFolder:
    """One folder of the cache: files named by a key, each whole or not there.

    Threads and processes may read and write at once; of several that write under one key the last file stays.

    Attributes:
        name: of the folder.
        suffix: of its files, such as ``".cubin"``.
        otherwise: what happens where the folder cannot be used, for the log.
    """

    name: str
    suffix: str
    otherwise: str

    def read(self, key: str) -> bytes | None:
        """Return what is kept under ``key`` (letters and digits), or None unless it is whole and can be trusted."""
        with self._open() as folder:
            if folder is None:
                return None
            name = key + self.suffix
            try:
                content = _content(name, folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                log.info("%s of %s is ignored, because it cannot be used (%s)", name, self.name, _reason(error))
                return None
        kept, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if digest != _digest(key, kept):
            log.info("%s of %s is ignored, because it is damaged", name, self.name)
            return None
        return kept

    def write(self, key: str, content: bytes) -> None:
        """Keep ``content``; failure is only reported."""
        with self._open() as folder:
            if folder is None:
                return
            # Not the process's number: processes in two containers that share a folder may have the same one.
            partial = f".{key}.{secrets.token_hex(8)}.partial"
            try:
                _create(partial, content + _digest(key, content), folder)
                os.replace(partial, key + self.suffix, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                self._do_without(self.name, error)
                with suppress(OSError):
                    os.unlink(partial, dir_fd=folder)

    @contextmanager
    def _open(self) -> Iterator[int | None]:
        """Yield a descriptor of the folder, made if it was missing, or None where there is none that can be used."""
        path: Path | str = "the cache folder"
        try:
            path = cache_root() / self.name
            _make_private(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, RuntimeError) as error:
            self._do_without(path, error)
            yield None
            return
        try:
            yield descriptor if self._is_private(path, descriptor) else None
        finally:
            os.close(descriptor)

    def _is_private(self, path: Path, descriptor: int) -> bool:
        """Tell whether nobody else can have put a file into the folder, and say so if somebody can."""
        try:
            _refuse_strangers(os.fstat(descriptor))
        except OSError as error:
            self._do_without(path, error)
            return False
        return True

    def _do_without(self, path: Path | str, error: Exception) -> None:
        _warn_once(
            f"{path}: {self.otherwise}, because this folder cannot be used ({_reason(error)}); "
            "the environment variable SLIMC_CACHE_DIR names another one"
        )


def _content(name: str, folder: int) -> bytes:
    """Read a file of ours; an OSError says why it is missing, not ours, or not to be trusted."""
    # A named pipe would block without O_NONBLOCK; a link could lead to a file that others may write to.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
            raise OSError("it is no file of slimc's")
        _refuse_strangers(found)
        return file.read()


def _create(name: str, content: bytes, folder: int) -> None:
    # No flush to the disk: the digest finds what a loss of power leaves behind, and it can be made again.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(content)


def _make_private(path: Path) -> None:
    """Make a folder and its missing parents, all for this user alone."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)


def _refuse_strangers(found: os.stat_result) -> None:
    """Raise an OSError if somebody else may write to what ``found`` describes; a list's access shows as the group's."""
    if found.st_uid not in (os.geteuid(), 0):
        raise OSError(f"it belongs to another user, number {found.st_uid}")
    if found.st_mode & _OTHERS_WRITE:
        raise OSError(f"others may write to it, mode {stat.S_IMODE(found.st_mode):o}; take that away with chmod go-w")


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _digest(key: str, content: bytes) -> bytes:
    """Return what ends a file: it binds the content to its name, so that a file under a wrong name is found too."""
    return hashlib.sha256(key.encode() + content).digest()
