"""Sensitivities as a JSON file: measured once, planned from as often as one likes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimc.errors import FormatError
from slimc.planning.sensitivity import Choice, SiteChoices
from slimc.recipes import Recipe
from slimc.runtime.files import json_bytes, read_json
from slimc.runtime.formats import LinearFormat
from slimc.version import __version__

VERSION = 1


class _Record(BaseModel):
    """Part of the file: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ChoiceRecord(_Record):
    name: str
    damage: float = Field(ge=0, allow_inf_nan=False)
    output_error: float = Field(ge=0, allow_inf_nan=False)
    format: dict[str, Any]


class _SiteRecord(_Record):
    name: str
    shape: list[int] = Field(min_length=2, max_length=2)
    group: list[str] = Field(min_length=1)
    embedding: str | None
    choices: list[_ChoiceRecord] = Field(min_length=1)
    refused: dict[str, str]


class SensitivitiesRecord(_Record):
    """The file's content: the fields of :class:`slimc.planning.plan.Sensitivities`, the menu as a recipe."""

    format_version: int
    slimc_version: str
    model: str
    menu: Recipe
    include: list[str]
    exclude: list[str]
    sites: list[_SiteRecord]

    @classmethod
    def of(
        cls, *, model: str, menu: Recipe, include: Iterable[str], exclude: Iterable[str], sites: Iterable[SiteChoices]
    ) -> SensitivitiesRecord:
        """Return the record of what was measured."""
        return cls(
            format_version=VERSION,
            slimc_version=__version__,
            model=model,
            menu=menu,
            include=list(include),
            exclude=list(exclude),
            sites=[
                _SiteRecord(
                    name=site.name,
                    shape=list(site.shape),
                    group=list(site.group),
                    embedding=site.embedding,
                    choices=[
                        _ChoiceRecord(
                            name=choice.name,
                            damage=choice.damage,
                            output_error=choice.output_error,
                            format=choice.format.to_json(),
                        )
                        for choice in site.choices
                    ],
                    refused=dict(site.refused),
                )
                for site in sites
            ],
        )

    @classmethod
    def read(cls, path: Path) -> SensitivitiesRecord:
        """Read a file.

        Raises:
            FormatError: it is none of these, is damaged, or comes from another version.
        """
        value = read_json(path)
        version = value.get("format_version") if isinstance(value, dict) else None
        if type(version) is not int:
            raise FormatError(f"{path}: has no format_version, so it holds no sensitivities of slimc")
        if version != VERSION:
            raise FormatError(
                f"{path}: has format version {version}, but slimc {__version__} reads version {VERSION}; measure again"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part)[:100] for part in first["loc"])
            raise FormatError(f"{path}: {where}: {first['msg']}; the file is damaged or was edited") from None

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return json_bytes(self.model_dump())

    def choices(self) -> tuple[SiteChoices, ...]:
        """Return what was measured, site by site.

        Raises:
            FormatError: the form of a choice is none.
        """
        return tuple(
            SiteChoices(
                name=site.name,
                shape=(site.shape[0], site.shape[1]),
                group=tuple(site.group),
                choices=tuple(
                    Choice(one.name, LinearFormat.from_json(one.format), one.damage, one.output_error)
                    for one in site.choices
                ),
                refused=site.refused,
                embedding=site.embedding,
            )
            for site in self.sites
        )
