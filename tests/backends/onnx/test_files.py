"""Folders with an ONNX model: they appear whole or not at all, in little memory, and damage is found."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import FormatError, InputError
from slimc.passes import AllocateBits, Calibrate, Decompose, Fuse, LowRank, Prune, Quantize

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402 - after the check that it is there

from slimc.backends.onnx.description import Description  # noqa: E402
from slimc.backends.onnx.files import DATA, MODEL, OnnxGraph, open_folder, write_folder  # noqa: E402
from slimc.backends.onnx.initializers import Bytes, Initializer  # noqa: E402
from slimc.backends.onnx.verify import verify_folder  # noqa: E402

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]


class Two(nn.Sequential):
    """Two layers, wide enough for constants that do not stay in the graph."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 64))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    passes = [
        Quantize(bits=4, group=32, method="absmax"),
        Prune("2:4", method="magnitude"),
        LowRank(rank=8, bits=4, method="svd"),
        Fuse(),
    ]
    return slimc.compile(Two(), [torch.randn(4, 128)], passes=passes)


@pytest.fixture(scope="module")
def exported(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "two"
    slimc.export_onnx(small, folder, torch.randn(4, 128))
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def graph_of(*constants: tuple[str, Initializer]) -> OnnxGraph:
    """Return a graph that adds constants to its input."""
    names = [name for name, _ in constants]
    values = ["x", *(f"sum_{index}" for index in range(1, len(names))), "y"]
    nodes = [helper.make_node("Add", [values[i], name], [values[i + 1]]) for i, name in enumerate(names)]
    shape = constants[0][1].dims
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return OnnxGraph(model, dict(constants), Description("portable", 21, ("x",), ("y",)))


def test_the_folder_runs_and_is_as_large_as_reported(small: nn.Module, exported: Path, in_runtime: Runtime) -> None:
    assert {path.name for path in exported.iterdir()} == {MODEL, DATA, "slim_onnx.json"}
    x = torch.randn(7, 128)
    model, description, record = open_folder(exported)
    (found,) = in_runtime(exported / MODEL, {description.inputs[0]: x.numpy()})
    with torch.no_grad():
        expected = small(x)
    assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()
    assert record["files"] == {name: (exported / name).stat().st_size for name in (MODEL, DATA)}
    stored = sum(constant.ByteSize() for constant in model.graph.initializer)
    assert record["sizes"]["layers"] + record["sizes"]["others"] <= record["files"][DATA] + stored


def test_the_report_says_what_is_how_large(small: nn.Module, tmp_path: Path) -> None:
    report = slimc.export_onnx(small, tmp_path / "out" / MODEL, torch.randn(4, 128))
    assert report.folder == tmp_path / "out"
    text = str(report)
    assert "compressed layers: 2" in text
    assert "2:4 int4/32 is stored without its pattern, pruned positions as 4-bit codes (2 of the layers)" in text
    packed = sum(layer.format.nbytes() for layer in (small[0], small[2]))
    assert sum(site.packed_bytes for site in report.sites.values()) == packed
    codes = (128 * 96 + 96 * 64) // 2
    assert codes < sum(site.bytes for site in report.sites.values()) < 2 * packed


def test_one_constant_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def maker(value: float) -> Callable[[], Bytes]:
        def make() -> Bytes:
            nonlocal most
            made = np.full(4096, value, dtype=np.float32).view(np.uint8)
            alive.append(weakref.ref(made))
            most = max(most, sum(one() is not None for one in alive))
            return made

        return make

    constants = [(f"c{index}", Initializer(TensorProto.FLOAT, (4096,), maker(index))) for index in range(6)]
    write_folder(graph_of(*constants), tmp_path / "out")
    assert most <= 2, "the one that is written, and the one that replaces it"
    session = ort.InferenceSession(str(tmp_path / "out" / MODEL), providers=["CPUExecutionProvider"])
    assert (session.run(None, {"x": np.zeros(4096, np.float32)})[0] == 15).all()


def test_nothing_is_left_of_a_folder_that_could_not_be_finished(tmp_path: Path) -> None:
    def fail() -> Bytes:
        raise OSError(28, "No space left on device")

    good = Initializer(TensorProto.FLOAT, (4096,), lambda: np.zeros(4 * 4096, np.uint8))
    bad = Initializer(TensorProto.FLOAT, (4096,), fail)
    with pytest.raises(InputError, match="the disk is full"):
        write_folder(graph_of(("good", good), ("bad", bad)), tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_constant_of_the_wrong_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="was made of 3 bytes, not of 16"):
        Initializer(TensorProto.FLOAT, (4,), lambda: np.zeros(3, np.uint8)).content()


@pytest.mark.parametrize(
    ("name", "message"),
    [("other.onnx", "it is called model.onnx; name the folder"), ("taken", "already exists"), ("file", "is a file")],
)
def test_places_that_are_refused_before_any_work(
    name: str, message: str, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("slimc.backends.onnx.export.export_module", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(InputError, match=message):
        slimc.export_onnx(small, tmp_path / name, torch.randn(4, 128))
    with pytest.raises(InputError, match="holds files that slimc did not write"):
        slimc.export_onnx(small, tmp_path / "taken", torch.randn(4, 128), overwrite=True)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


def test_a_read_only_place(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="is read-only, so nothing was written"):
        slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["bias", "scale"])
def test_a_number_that_float16_lacks_is_refused_before_any_work(where: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16)
    with torch.no_grad():
        if where == "bias":
            model[0].bias[3] = 1e6
        else:
            model[0].weight *= 1e7
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    small = slimc.compile(model, x, [Quantize("absmax", 4, "channel")])
    with pytest.raises(InputError, match=rf"'0\.\w*{where}' holds .* of float16 is 65504; export .* dtype float32"):
        slimc.export_onnx(small, tmp_path / "out", x, dtype="float16")
    assert not list(tmp_path.iterdir())
    slimc.export_onnx(small, tmp_path / "out", x)


def tiny_scales(passes: list[Any], factor: float) -> nn.Module:
    """Return two bfloat16 layers, the weight of the first times ``factor``, compressed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight *= factor
    return slimc.compile(model, torch.randn(16, 64, dtype=torch.bfloat16), [*passes, Fuse()])


@pytest.mark.parametrize(
    ("passes", "part"),
    [
        ([Quantize("absmax", 4, 32)], "scale"),
        ([Quantize("absmax", 4)], "scale"),
        ([Prune("2:4", method="magnitude")], "values"),
        ([Quantize("absmax", 4, 32), LowRank(rank=4, method="svd")], "scale"),
        ([Calibrate(), Decompose(ratio=0.5, rounds=1)], "sign_left|values|sign_right"),
    ],
)
def test_numbers_too_small_for_float16_are_refused_before_any_work(
    passes: list[Any], part: str, tmp_path: Path
) -> None:
    small, x = tiny_scales(passes, 2**-19), torch.randn(4, 64)
    message = rf"'0\.({part})' holds numbers of .* float16 keeps all digits from 6.1e-05 on: .* dtype float32"
    with pytest.raises(InputError, match=message):
        slimc.export_onnx(small, tmp_path / "out", x, dtype="float16")
    assert not list(tmp_path.iterdir())
    slimc.export_onnx(small, tmp_path / "out", x)
    assert all(check.passed for check in verify_folder(tmp_path / "out", against=small))


def test_a_dense_matrix_too_small_for_float16(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).to(torch.bfloat16)
    with torch.no_grad():
        model[1].weight *= 2**-19
        model[1].bias *= 2**-19  # which is nothing beside what is added to
    with pytest.raises(InputError, match=r"'1\.weight' holds numbers of .* of the matrix would be lost"):
        slimc.export_onnx(model, tmp_path / "out", torch.randn(4, 64, dtype=torch.bfloat16), dtype="float16")


def test_rows_that_vanish_beside_others_are_no_reason_to_refuse(in_runtime: Runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[:8] *= 2**-30
    x = torch.randn(4, 64)
    small = slimc.compile(model, x.bfloat16(), [Quantize("absmax", 4, 32), LowRank(rank=2, method="svd"), Fuse()])
    slimc.export_onnx(small, tmp_path / "out", x, dtype="float16", target="ort")
    name = onnx.load(tmp_path / "out" / MODEL, load_external_data=False).graph.input[0].name
    (found,) = in_runtime(tmp_path / "out" / MODEL, {name: x.half().numpy()})
    with torch.no_grad():
        expected = small.float()(x).numpy()
    # Sums of 64 terms of float16.
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "there is no target 'tensorrt'"),
        ({"opset": 99}, "opset 99 is not supported: use 21 to 26"),
        ({"accuracy_level": 9}, "there is no accuracy level 9"),
        ({"accuracy_level": 4}, "'portable' has no accuracy level of its own"),
        ({"dtype": "bfloat16"}, "cannot compute in 'bfloat16'"),
        ({"example_inputs": None}, "Pass example_inputs= with at least one batch"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        slimc.export_onnx(small, tmp_path / "out", **{"example_inputs": torch.randn(4, 128), **options})
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_if_asked(small: nn.Module, folder: Path) -> None:
    before = (folder / MODEL).read_bytes()
    slimc.export_onnx(small, folder, torch.randn(4, 128), "dense", overwrite=True)
    assert (folder / MODEL).read_bytes() != before


def test_files_of_others_are_never_replaced(small: nn.Module, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds 'notes.txt', which slimc did not write"):
        slimc.export_onnx(small, folder, torch.randn(4, 128), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_equal_models_give_equal_bytes(small: nn.Module, exported: Path, tmp_path: Path) -> None:
    slimc.export_onnx(small, tmp_path / "again", torch.randn(4, 128))
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# -------------------------------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("target", ["portable", "ort", "cuda", "dense"])
def test_a_sound_folder_passes(target: str, small: nn.Module, tmp_path: Path) -> None:
    slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128), target)
    checks = list(verify_folder(tmp_path / "out", against=small))
    assert [check.name for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    assert {"files", "digests", "rules of ONNX", "constants", "ONNX Runtime", "outputs"} <= names
    assert sum(check.name.startswith("layer ") for check in checks) == 1, "both layers are of one form"


@pytest.mark.parametrize("target", ["portable", "ort", "dense"])
def test_groups_with_widths_are_exported_as_what_they_are(target: str, tmp_path: Path) -> None:
    """SliM-LLM on a symmetric grid, whose zero is another code at each width; signs among them."""
    passes = [Calibrate(), AllocateBits(2, 32), Quantize("gptq", symmetric=True)]
    generator = torch.Generator().manual_seed(6)
    small = slimc.compile(Two(), [torch.randn(64, 128, generator=generator)], passes=passes)
    slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128), target)
    assert failed(tmp_path / "out", small) == []


@pytest.mark.parametrize("target", ["portable", "ort", "dense"])
def test_signs_are_exported_as_what_they_are(target: str, tmp_path: Path) -> None:
    small = slimc.compile(Two(), [torch.randn(64, 128)], passes=[Calibrate(), Decompose(rounds=1)])
    slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128), target)
    assert failed(tmp_path / "out", small) == []


def failed(folder: Path, against: nn.Module | None = None) -> list[str]:
    return [check.name for check in verify_folder(folder, against=against) if not check.passed]


def test_outputs_of_another_model(folder: Path) -> None:
    assert failed(folder, Two().requires_grad_(False)) == ["outputs"]


def test_a_constant_larger_than_promised(folder: Path) -> None:
    """A decoded weight in the place of codes."""
    model = onnx.load(folder / MODEL)
    codes = next(constant for constant in model.graph.initializer if constant.name == "0.weight")
    numbers = TensorProto(name=codes.name, data_type=TensorProto.INT8, dims=codes.dims)
    numbers.raw_data = bytes(128 * 96)
    codes.CopyFrom(numbers)
    for name in (MODEL, DATA):
        (folder / name).unlink()
    onnx.save(model, folder / MODEL, save_as_external_data=True, location=DATA, size_threshold=1024)
    record = json.loads((folder / "slim_onnx.json").read_text())
    record["files"] = {name: (folder / name).stat().st_size for name in (MODEL, DATA)}
    (folder / "slim_onnx.json").write_text(json.dumps(record))
    assert "constants" in failed(folder)


def test_bytes_other_than_those_written(folder: Path) -> None:
    with (folder / DATA).open("r+b") as file:
        file.seek(100)
        (byte,) = file.read(1)
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    checks = {check.name: check for check in verify_folder(folder)}
    assert not checks["digests"].passed
    assert checks["digests"].detail == "not the bytes that were written: model.onnx.data"


def test_a_missing_file_beside_the_model(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    record["sha256"]["config.json"] = "0" * 64
    (folder / "slim_onnx.json").write_text(json.dumps(record))
    assert failed(folder) == ["digests"]


def remove(folder: Path) -> None:
    (folder / DATA).unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / DATA, 100)


def garble(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"\xff" * (folder / MODEL).stat().st_size)


def age(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    (folder / "slim_onnx.json").write_text(json.dumps(record | {"format": 99}))


def forget_files(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    (folder / "slim_onnx.json").write_text(json.dumps({key: value for key, value in record.items() if key != "files"}))


def forget_digests(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    (folder / "slim_onnx.json").write_text(json.dumps(record | {"sha256": {}}))


def leave_the_folder(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    record["files"]["../slim_onnx.json"] = 1
    (folder / "slim_onnx.json").write_text(json.dumps(record))


def forget_sizes(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    (folder / "slim_onnx.json").write_text(json.dumps(record | {"sizes": None}))


def garble_a_site(folder: Path) -> None:
    record = json.loads((folder / "slim_onnx.json").read_text())
    (folder / "slim_onnx.json").write_text(json.dumps(record | {"sites": {"0": {"form": "int4", "bytes": 1}}}))


def test_constants_beyond_the_end_of_their_file(folder: Path) -> None:
    model = onnx.load(folder / MODEL, load_external_data=False)
    codes = next(constant for constant in model.graph.initializer if constant.name == "0.weight")
    for entry in codes.external_data:
        if entry.key == "offset":
            entry.value = "9" * len(entry.value)
    record = json.loads((folder / "slim_onnx.json").read_text())
    record["files"][MODEL] = (folder / MODEL).write_bytes(model.SerializeToString())
    (folder / "slim_onnx.json").write_text(json.dumps(record))
    assert any(name.startswith("layer ") or name == "ONNX Runtime" for name in failed(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forget_sizes, "lacks or garbles sizes"),
        (garble_a_site, "lacks or garbles sites"),
        (remove, "model.onnx.data: is missing, but slim_onnx.json lists it; copy the whole folder"),
        (cut, "has 100 bytes, not the"),
        (garble, "is not an ONNX model"),
        (age, "is of format 99, this slimc reads format 1"),
        (forget_files, "lists no files"),
        (forget_digests, "has no SHA-256 of model.onnx and model.onnx.data"),
        (leave_the_folder, "is not a plain file name inside the folder"),
    ],
)
def test_damage_is_found(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=message):
        list(verify_folder(folder))


def test_folders_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no slim_onnx.json"):
        list(verify_folder(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        list(verify_folder(tmp_path / "nowhere"))


def test_missing_packages_are_named(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package onnx: pip install 'slimc\[onnx\]'"):
        slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128))


def test_the_model_is_left_as_it_was(small: nn.Module, tmp_path: Path) -> None:
    def snapshot() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in small.state_dict().items()}

    before = snapshot()
    slimc.export_onnx(small, tmp_path / "out", torch.randn(4, 128), dtype="float16")
    after = snapshot()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
