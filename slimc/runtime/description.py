"""``slimc.json``: what a native folder says about itself, and the check that it says it in the right form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from slimc.errors import FormatError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.records import Record, parse_record

DESCRIPTION = "slimc.json"
FORMAT_VERSION = 2
"""Of what is written. In version 1 adapters beside rounded inputs read these as they came; nothing else differs."""


class ModelRecord(Record):
    """Which model the tensors belong to.

    ``huggingface`` models are rebuilt from ``config.json``; for a ``module`` the caller brings an instance.
    ``attention`` is the attention implementation the model ran with, where it is a portable one.
    """

    kind: Literal["huggingface", "module"]
    architecture: str
    attention: Literal["eager", "sdpa"] | None = None


class _SiteRow(Record):
    name: str
    shape: list[int]
    expression: str
    bits: float
    weight_error: float
    base_output_error: float | None
    output_error: float | None
    held_out_error: float | None = None
    stream_error: float | None = None
    unrounded: str | None = None
    compression_ratio: float | None = None
    fallback: str | None = None


class _LeftRow(Record):
    name: str
    shape: list[int]
    reason: str


class ReportRecord(Record):
    """The compression's report, in the form of ``Report.to_json()``."""

    recipe: list[dict[str, Any]]
    sites: list[_SiteRow]
    left: list[_LeftRow]
    calibration_tokens: int


class SiteRecord(Record):
    """A compressed linear: its module's name, its format, and the digest of its packed tensors."""

    name: str
    format: dict[str, Any]
    sha256: str


class DenseRecord(Record):
    """A tensor stored as it is: its ``state_dict`` name, its form, and the digest of its bytes."""

    name: str
    dtype: str
    shape: list[int]
    sha256: str


class Description(Record):
    """All of ``slimc.json``.

    ``ties`` maps every further name of a stored tensor to the name it is stored under; ``buffers`` gives the
    dtype of each buffer that the model makes for itself and that is not stored.
    """

    format_version: int
    slimc_version: str
    model: ModelRecord
    report: ReportRecord
    sites: list[SiteRecord]
    dense: list[DenseRecord]
    ties: dict[str, str]
    buffers: dict[str, str]
    shards: list[str]


def parse_description(value: Any, source: Path) -> Description:
    """Validate the content of ``slimc.json``: the version first, then every key and type."""
    if isinstance(value, dict) and _is_one(value.get("format_version")) and not _reads_otherwise(value):
        value = {**value, "format_version": FORMAT_VERSION}
    return parse_record(
        Description,
        value,
        source,
        version=FORMAT_VERSION,
        holds="compressed model",
        again="compress the model again",
    )


def _is_one(version: Any) -> bool:
    return version == 1 and not isinstance(version, bool)


def _reads_otherwise(value: dict[str, Any]) -> bool:
    """Tell whether a folder of version 1 has adapters that read what this version rounds."""
    sites = value.get("sites")
    formats = [site.get("format") for site in sites if isinstance(site, dict)] if isinstance(sites, list) else []
    return any(
        isinstance(one, dict) and "activation" in one and one.get("left") is not None and not one.get("input_scaled")
        for one in formats
    )


def parse_format(site: SiteRecord, source: Path) -> LinearFormat:
    """Validate the format of a site."""
    try:
        return LinearFormat.from_json(site.format)
    except FormatError as error:
        raise FormatError(f"{source}: site {site.name[:200]!r}: {error}") from None
