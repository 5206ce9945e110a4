"""JSON files that slimc writes and reads again: the keys and types of one version, or an error that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from slimc.errors import FormatError
from slimc.version import __version__


class Record(BaseModel):
    """A file's content or a part of it: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(kind: type[AnyRecord], value: Any, source: Path, *, version: int, holds: str, again: str) -> AnyRecord:
    """Validate the content of a file: the version first, then every key and type.

    Args:
        kind: of the record; it has a ``format_version``.
        value: the file's content, as JSON gives it.
        source: the file, for messages.
        version: that is read.
        holds: what the file is expected to hold.
        again: what to do about a file of an earlier version.

    Raises:
        FormatError: it is another file or version, or is damaged.
    """
    found = value.get("format_version") if isinstance(value, dict) else None
    if type(found) is not int:
        raise FormatError(f"{source}: has no format_version, so it holds no {holds} of slimc")
    if found != version:
        raise FormatError(
            f"{source}: has format version {found}, but slimc {__version__} reads version {version}; "
            f"{'upgrade slimc' if found > version else again}"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise FormatError(f"{source}: {where}: {first['msg']}; the file is damaged or was edited") from None
