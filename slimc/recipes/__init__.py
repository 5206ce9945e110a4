"""Recipes: what to do to a model, as a short YAML file.

A recipe names its passes in the grammar of :func:`slimc.passes.from_config`::

    name: my-recipe
    description: 3-bit weights, everything else as in slim-w4
    extends: slim-w4          # optional: start from a preset (or another file beside this one)
    passes:
      - quantize: {bits: 3}   # with `extends`: changes these options of the inherited pass
    exclude: ["*.layers.0.*"] # optional: weights to leave dense

Without ``extends``, ``passes`` is the whole list, in order. Reading a recipe imports neither torch nor any pass;
:meth:`Recipe.build` makes the passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slimc.errors import RecipeError, closest

if TYPE_CHECKING:
    from slimc.passes import Pass

DEFAULT = "joint-w4-2x4"

_FOLDER = Path(__file__).parent
# A plan has a line for every layer.
_MAX_BYTES = 1024 * 1024
_MAX_DEPTH = 16
_INLINE = 12
"""The most entries of a mapping that are written in one line."""

_MAX_EXTENDS = 8

PassConfig = str | dict[str, Any]


class Recipe(BaseModel):
    """A validated recipe.

    Attributes:
        name: How it is called.
        description: What it does and when to choose it.
        passes: One entry a pass, each ``"fuse"`` or ``{"quantize": {"bits": 4}}``.
        include: Patterns of weights to compress although they would be left dense by default.
        exclude: Patterns of weights to leave dense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    description: str = ""
    passes: list[PassConfig] = Field(min_length=1)
    include: list[str] = []
    exclude: list[str] = []

    @field_validator("passes")
    @classmethod
    def _one_pass_an_entry(cls, entries: list[PassConfig]) -> list[PassConfig]:
        for entry in entries:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError(f"each entry names one pass, such as 'quantize: {{bits: 4}}'; found {entry}")
        return entries

    def build(self) -> list[Pass]:
        """Return the passes.

        Raises:
            RecipeError: A pass or an option is unknown, a value cannot be used, or the order cannot work.
        """
        from slimc.passes import check_order, from_config

        try:
            passes = from_config(self.passes)
            check_order(passes)
        except RecipeError as error:
            raise RecipeError(f"recipe '{self.name}': {error}") from error
        return passes

    @property
    def pass_names(self) -> list[str]:
        """The names of the passes, in order."""
        return [_split(entry)[0] for entry in self.passes]

    def override(self, settings: Iterable[str]) -> Recipe:
        """Return a copy with pass options changed by settings such as ``"quantize.bits=3"``.

        Values are read as YAML: ``null``, ``true``, ``0.1``, ``2:4`` and ``[1, 2]`` mean what they mean in a recipe.

        Raises:
            RecipeError: A setting is not of that form, or names a pass that the recipe does not have exactly once.
        """
        passes = self.passes
        for setting in settings:
            match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", setting, flags=re.DOTALL)
            if match is None:
                raise RecipeError(f"'{setting}' is no setting; write PASS.OPTION=VALUE, for example quantize.bits=3")
            pass_name, option, value = match.groups()
            change = {pass_name: {option: _parse(value, f"the value of {pass_name}.{option}")}}
            passes = _merge(passes, [change], f"recipe '{self.name}'")
        return self.model_copy(update={"passes": passes})

    def to_yaml(self) -> str:
        """Return the recipe as YAML that reads back to an equal recipe."""
        record = {key: value for key, value in self.model_dump().items() if value}
        return yaml.dump(record, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def names() -> list[str]:
    """Return the names of the presets, the default first."""
    found = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def load(recipe: str | Path) -> Recipe:
    """Read a preset by name, or a recipe file by path.

    Args:
        recipe: A name out of :func:`names`, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        RecipeError: There is no such recipe, or the file is not a valid one.
    """
    return _load(_locate(str(recipe), beside=None), depth=0)


def _locate(recipe: str, beside: Path | None) -> Path:
    """Return the file of a preset's name, or of a path (relative to the folder ``beside``, if given)."""
    if recipe in names():
        return _FOLDER / f"{recipe}.yaml"
    path = Path(recipe) if beside is None else beside / recipe
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise RecipeError(f"there is no recipe file '{path}'")
    raise RecipeError(f"there is no recipe '{recipe}'{closest(recipe, names())}; presets: {', '.join(names())}")


def read(path: Path, what: str) -> Any:
    """Return the plain data of a small YAML file, which messages call ``what``.

    Raises:
        RecipeError: The file cannot be read, is too large, or is not YAML as recipes have it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{what} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise RecipeError(f"{what} is larger than {_MAX_BYTES // 1024} KiB; that is too much")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what} is not UTF-8 text") from error
    return _parse(text, what)


def _load(path: Path, depth: int) -> Recipe:
    record = read(path, f"recipe '{path}'")
    if record is None:
        raise RecipeError(f"recipe '{path}' is empty; 'slimc recipes {DEFAULT}' prints one to start from")
    if not isinstance(record, dict):
        raise RecipeError(f"recipe '{path}' must be a mapping with the keys {_KEYS}; found {type(record).__name__}")
    for key in record:
        if key not in _KEYS:
            raise RecipeError(f"recipe '{path}': unknown key '{key}'{closest(str(key), _KEYS)}; keys: {_KEYS}")

    base = record.pop("extends", None)
    if base is not None:
        record = _extend(record, base, path, depth)
    elif "passes" not in record:
        raise RecipeError(f"recipe '{path}' has no 'passes' list, and does not extend another recipe")
    return _validate({"name": path.stem} | record, path)


def _extend(record: dict[str, Any], base: object, path: Path, depth: int) -> dict[str, Any]:
    """Fill in what a recipe inherits: pass options and patterns are added to those of its base."""
    if not isinstance(base, str):
        raise RecipeError(f"recipe '{path}': 'extends' takes one recipe's name; found {base!r}")
    if depth == _MAX_EXTENDS:
        raise RecipeError(f"recipe '{path}': more than {_MAX_EXTENDS} recipes extend each other; is it a circle?")
    parent = _load(_locate(base, beside=path.parent), depth + 1)
    own = _validate({"name": path.stem, "passes": parent.passes} | record, path)
    changes = own.passes if "passes" in record else []
    return {
        "name": own.name,
        "description": own.description or parent.description,
        "passes": _merge(parent.passes, changes, f"recipe '{path}'"),
        "include": parent.include + own.include,
        "exclude": parent.exclude + own.exclude,
    }


def _validate(record: dict[str, Any], path: Path) -> Recipe:
    try:
        return Recipe.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:2])
        raise RecipeError(f"recipe '{path}': {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _merge(passes: list[PassConfig], changes: list[PassConfig], where: str) -> list[PassConfig]:
    """Return ``passes`` with the options in ``changes`` set; each change names a pass that is there once."""
    merged = [_split(entry) for entry in passes]
    for change in changes:
        name, options = _split(change)
        places = [place for place, (present, _) in enumerate(merged) if present == name]
        if not places:
            present = [other for other, _ in merged]
            raise RecipeError(
                f"{where}: there is no pass '{name}' to change{closest(name, present)}; it has {', '.join(present)}. "
                "To add a pass, write the whole list in a recipe of its own"
            )
        if len(places) > 1:
            raise RecipeError(f"{where}: '{name}' stands there {len(places)} times; write the whole list instead")
        base = merged[places[0]][1]
        if options and not (isinstance(base, Mapping) and isinstance(options, Mapping)):
            raise RecipeError(f"{where}: '{name}' takes options as a mapping, such as 'quantize: {{bits: 4}}'")
        merged[places[0]] = (name, {**base, **options})
    return [{name: options} if options else name for name, options in merged]


def _split(entry: PassConfig) -> tuple[str, Any]:
    """Return a pass entry as its name and its options."""
    if isinstance(entry, str):
        return entry, {}
    ((name, options),) = entry.items()
    return name, {} if options is None else options


_KEYS = sorted({*Recipe.model_fields, "extends"})


def _refusal(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """YAML as recipes need it: plain data, small, and read as YAML 1.2's core schema.

    YAML 1.1, PyYAML's dialect, reads ``2:4`` as the base-60 number 124, ``1e-3`` as text and ``no`` as false.
    Aliases are refused (a few nested ones unfold into gigabytes), and so is a key that stands twice.
    """

    depth = 0

    def _mark(self) -> yaml.Mark:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return mark

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _refusal("aliases (*name) are not allowed", self._mark())
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _refusal("nested too deeply", self._mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise _refusal(f"'{key.value}' stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.yaml_implicit_resolvers = {}
_CORE_SCHEMA = [
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]
for _tag, _regexp, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_regexp})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads, with multi-line text as a block and long mappings a line an entry."""


_Dumper.add_representer(
    dict,
    lambda dumper, data: dumper.represent_mapping(
        "tag:yaml.org,2002:map", data, flow_style=False if len(data) > _INLINE else None
    ),
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _parse(text: str, where: str) -> Any:
    """Parse YAML text into plain data."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error
