"""Sensitivities as a JSON file: measured once, planned from as often as one likes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from slimc.planning.sensitivity import Choice, SiteChoices
from slimc.recipes import Recipe
from slimc.runtime.files import json_bytes, read_json
from slimc.runtime.formats import LinearFormat
from slimc.runtime.records import Record, parse_record
from slimc.version import __version__

VERSION = 1


class _ChoiceRecord(Record):
    name: str
    damage: float = Field(ge=0, allow_inf_nan=False)
    output_error: float = Field(ge=0, allow_inf_nan=False)
    format: dict[str, Any]


class _SiteRecord(Record):
    name: str
    shape: list[int] = Field(min_length=2, max_length=2)
    group: list[str] = Field(min_length=1)
    embedding: str | None
    choices: list[_ChoiceRecord] = Field(min_length=1)
    refused: dict[str, str]


class SensitivitiesRecord(Record):
    """The file's content: the fields of :class:`slimc.planning.plan.Sensitivities`, the menu as a recipe."""

    format_version: int
    slimc_version: str
    model: str
    weights: str | None = None
    menu: Recipe
    include: list[str]
    exclude: list[str]
    sites: list[_SiteRecord] = Field(min_length=1)

    @classmethod
    def of(
        cls,
        *,
        model: str,
        weights: str | None,
        menu: Recipe,
        include: Iterable[str],
        exclude: Iterable[str],
        sites: Iterable[SiteChoices],
    ) -> SensitivitiesRecord:
        """Return the record of what was measured."""
        return cls(
            format_version=VERSION,
            slimc_version=__version__,
            model=model,
            weights=weights,
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
        return parse_record(
            cls,
            read_json(path),
            path,
            version=VERSION,
            holds="sensitivities",
            again="measure once more into another file",
        )

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
