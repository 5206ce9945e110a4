"""Files that can be trusted: bounded reads of hostile input, and writes that happen wholly or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from slimc.errors import FormatError, InputError

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64

WINDOWS = os.name == "nt"


def parse_json(text: bytes, source: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, at most 64 levels deep.

    Raises:
        FormatError: the text breaks one of these rules; the message names ``source``.
    """

    def refuse_constant(word: str) -> NoReturn:
        raise FormatError(f"{source}: {word} is not JSON")

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{source}: the key {twice[:100]!r} appears twice in one object")
        return record

    too_deep = FormatError(f"{source}: JSON nested more than {MAX_JSON_DEPTH} levels deep")
    try:
        value = json.loads(text.decode(), parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise FormatError(f"{source}: not valid JSON ({error}); the file is damaged or is something else") from None

    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise too_deep


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes under the rules of :func:`parse_json`.

    Raises:
        FormatError: the file is missing, not a regular file, unreadable, too large, or not strict JSON.
    """
    size = regular_file_size(path)
    if size > limit:
        raise FormatError(f"{path}: {size} bytes is too large for a description file (the limit is {limit})")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as canonical JSON: sorted keys, two-space indent, a newline at the end.

    Equal values give equal bytes. NaN and Infinity raise ``ValueError``.
    """
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def regular_file_size(path: Path) -> int:
    """Return the size of a regular file (links to one are followed), else raise a FormatError."""
    try:
        found = path.stat()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: is not a regular file")
    return found.st_size


def file_inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` after checking that it is a plain file name and no link leads elsewhere.

    Raises:
        FormatError: ``name`` is no plain file name, or the file is a link, missing, or not a regular file.
    """
    plain = name and name not in (".", "..") and not set(name) & set("/\\:\0")
    if not plain:
        raise FormatError(f"{folder}: {name[:100]!r} is not a plain file name inside the folder")
    path = folder / name
    if path.is_symlink():
        raise FormatError(f"{path}: is a symbolic link; put the file itself into the folder")
    regular_file_size(path)
    return path


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        flush_to_disk(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file so that, whenever the program dies, ``path`` holds the old bytes or all the new ones.

    Raises:
        InputError: the disk is full or the operating system refuses a step; ``path`` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        write_file(partial, content)
        partial.replace(path)
        flush_path(path.parent)
    except OSError as error:
        raise InputError(describe_write_failure(error, path, len(content))) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    """Wait until an open file or folder is on the disk; file systems that cannot say are taken at their word."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def flush_path(path: Path) -> None:
    """Wait until a file, or the list of what is in a folder, is on the disk; Windows cannot, so there it returns."""
    # Windows opens no folders, and flushes only what is open for writing.
    if WINDOWS:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publish_folder(
    target: Path, *, needed: int, overwrite: bool, replaceable: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; once the block ends well, it takes the place of ``target``.

    Until then ``target`` is untouched, and if the block or the exchange fails nothing of the new folder is
    left and the old one is where it was. An empty folder counts as no output; other existing output is
    replaced only with ``overwrite`` and if ``replaceable`` says that it is what this program writes. What a
    killed predecessor left beside ``target`` is cleared away first, see :func:`recover`.

    Args:
        target: the folder to appear; parents are made as needed.
        needed: bytes that will be written, checked against the free space first.
        overwrite: replace existing output.
        replaceable: tells whether an existing folder may be deleted; may raise an InputError that says why not.

    Raises:
        InputError: the target exists, the disk is full, or the operating system refuses a step.
    """
    target = target.resolve()
    recover(target)
    check_replaceable(target, overwrite=overwrite, replaceable=replaceable)
    fresh: Path | None = None
    made: list[Path] = []
    try:
        made = make_parents(target)
        check_free_space(target.parent, needed)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        fresh.chmod(0o777 & ~current_umask())
        with claimed(fresh):
            yield fresh
            for path in (fresh, *fresh.rglob("*")):
                flush_path(path)
            exchange(fresh, target)
    except BaseException as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        for parent in reversed(made):
            remove_if_empty(parent)
        if isinstance(error, OSError):
            raise InputError(describe_write_failure(error, target, needed)) from error
        raise
    flush_path(target.parent)


def recover(target: Path) -> None:
    """Put right what a process killed inside :func:`publish_folder` left beside ``target``.

    An old folder that was put aside comes back if ``target`` is missing, and abandoned temporary folders are
    deleted. Those that a living process still works on are left alone, and so are all where that cannot be told
    (on Windows, and on file systems without locks), except that an old folder comes back on Windows too.
    """
    if not target.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(old|partial)")
    for sibling in sorted(target.parent.iterdir()):
        if not ours.fullmatch(sibling.name) or sibling.is_symlink() or not sibling.is_dir():
            continue
        # A folder that cannot be tidied up is no reason to refuse the new one.
        with suppress(OSError), claimed(sibling) as abandoned:
            old = sibling / target.name
            if sibling.suffix == ".old" and (abandoned or WINDOWS) and old.is_dir() and not target.exists():
                old.rename(target)
            if abandoned:
                shutil.rmtree(sibling, ignore_errors=True)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Lock a folder inside the block and yield whether that worked; the lock of a killed process is gone with it."""
    if WINDOWS:
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def check_replaceable(target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise an InputError unless ``target`` is free, an empty folder, or output that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder to write to")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{target}: already exists; choose another folder, or replace it with overwrite=True (--overwrite)"
        )
    if not replaceable(target):
        raise InputError(
            f"{target}: holds files that slimc did not write, so it will not be replaced; choose another folder"
        )


def check_writable(target: Path) -> None:
    """Raise an InputError unless ``target`` and its missing parents can be made, before work is spent on its content.

    Raises:
        InputError: the nearest parent that exists is no folder, or may not be written to.
    """
    home = next(parent for parent in target.absolute().parents if parent.exists())
    if not home.is_dir():
        raise InputError(f"{target}: {home} is a file, so nothing was written; choose a folder that you may write to")
    if not os.access(home, os.W_OK | os.X_OK):
        raise InputError(
            f"{target}: {home} is read-only, so nothing was written; choose a folder that you may write to"
        )


def make_parents(target: Path) -> list[Path]:
    """Make the missing parents of ``target`` and return them, outermost first."""
    missing = [parent for parent in target.parents if not parent.exists()][::-1]
    for parent in missing:
        parent.mkdir(exist_ok=True)
    return missing


def remove_if_empty(folder: Path) -> None:
    """Remove ``folder`` unless someone has put something into it meanwhile."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_free_space(folder: Path, needed: int) -> None:
    """Raise an InputError if fewer than ``needed`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {readable(needed)} are needed and {readable(free)} are free; make room or choose another disk"
        )


def exchange(fresh: Path, target: Path) -> None:
    """Rename ``fresh`` to ``target``; what was there is put aside first and comes back if the rename fails."""
    if not target.exists():
        fresh.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        with claimed(aside):
            target.rename(aside / target.name)
            try:
                fresh.rename(target)
            except BaseException:
                (aside / target.name).rename(target)
                raise
    except BaseException:
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def describe_write_failure(error: OSError, target: Path, needed: int) -> str:
    """Say why ``target`` could not be written, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{target}: the disk is full; {readable(needed)} are needed there. Nothing was written; make room or "
            "choose another disk"
        )
    reason = error.strerror or str(error)
    return f"{target}: cannot be written ({reason}). Nothing was written; choose a folder that you may write to"


def current_umask() -> int:
    """Return the process's file mode mask (which can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def readable(size: int) -> str:
    """Return a number of bytes as a person would say it: ``"3.2 GB"``."""
    amount = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
