from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import slimc

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def fresh(code: str) -> str:
    """Return what ``code`` prints in a process of its own."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return process.stdout.strip()


def test_importing_slimc_imports_no_backend() -> None:
    code = "import slimc, sys; slimc.compile; print(sorted({'transformers', 'onnx', 'triton'} & set(sys.modules)))"
    assert fresh(code) == "[]"


def test_the_public_names_are_there() -> None:
    assert fresh("import slimc; print(*[n for n in slimc.__all__ if getattr(slimc, n, None) is None])") == ""
    assert fresh("import slimc; print(dir(slimc) == sorted(slimc.__all__))") == "True"
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        slimc.compres  # noqa: B018 - the access is the test


def test_the_version_has_one_source(project: dict[str, Any]) -> None:
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "slimc/version.py"
    assert slimc.__version__ == fresh("from slimc.version import __version__; print(__version__)")


def test_dependencies_are_lower_bounds_only(project: dict[str, Any]) -> None:
    extras = [one for group in project["project"]["optional-dependencies"].values() for one in group]
    for requirement in [*project["project"]["dependencies"], *extras]:
        name_and_bounds = requirement.split(";")[0]
        assert not any(sign in name_and_bounds for sign in ("==", "<", "~=", "!=")), requirement


def test_recipes_and_types_ship_with_the_package() -> None:
    package = Path(slimc.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "recipes" / "slim-w4-2x4.yaml").is_file()
