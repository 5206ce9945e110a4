"""``slimc export`` and ``slimc verify``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import slimc
from slimc.backends import hf
from slimc.cli import app
from slimc.passes import Fuse, Quantize

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A compressed folder."""
    folder = tmp_path_factory.mktemp("native") / "small"
    model, tokenizer = hf.load_model(tiny_llama_folder)
    ids = torch.randint(0, 300, (2, 16))
    small = slimc.compile(model, [ids], passes=[Quantize(bits=4, group=32, method="absmax"), Fuse()])
    slimc.save(small, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def exported(native: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    return folder, invoke("export", native, "-o", folder)


def test_export_says_what_it_wrote(exported: tuple[Path, Result]) -> None:
    folder, result = exported
    assert result.exit_code == 0, result.output
    assert "target portable" in result.stdout
    assert "compressed layers: 14" in result.stdout
    assert {"model.onnx", "model.onnx.data", "slim_onnx.json", "config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }


def test_verify_compares_with_the_model(native: Path, exported: tuple[Path, Result]) -> None:
    result = invoke("verify", exported[0], "--against", native)
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.stdout
    assert "ok    outputs: ONNX Runtime and PyTorch differ by" in result.stdout
    assert "320 of 320 greedy tokens are PyTorch's" in result.stdout


def test_verify_fails_for_another_model(exported: tuple[Path, Result], tiny_llama_folder: Path) -> None:
    result = invoke("verify", exported[0], "--against", tiny_llama_folder)
    assert result.exit_code == 2
    assert "FAIL  outputs" in result.stdout
    assert "did not pass: outputs" in result.output


def test_verify_reads_native_folders_too(native: Path) -> None:
    result = invoke("verify", native)
    assert (result.exit_code, "every file is whole, 14 compressed layers" in result.stdout) == (0, True)


def test_refusals(native: Path, exported: tuple[Path, Result], tmp_path: Path) -> None:
    again = invoke("export", native, "-o", exported[0])
    assert again.exit_code == 2
    assert "already exists" in again.output
    assert invoke("export", native, "-o", tmp_path / "out", "--format", "gguf").exit_code == 2
    assert invoke("export", native, "-o", tmp_path / "out", "--opset", "7").exit_code == 2
    assert not list(tmp_path.iterdir())
