"""The kernel library for ONNX Runtime's CUDA provider, as far as it goes without a GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import astuple
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner, Result

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import slimc  # noqa: E402
from slimc.backends.cuda import decode  # noqa: E402
from slimc.backends.cuda.fragments import code_words, metadata_words  # noqa: E402
from slimc.backends.cuda.layer import unit_columns  # noqa: E402
from slimc.backends.onnx.kernels import build  # noqa: E402
from slimc.backends.onnx.kernels.build import Form, build_library, forms_of  # noqa: E402
from slimc.cli import app  # noqa: E402
from slimc.errors import InputError, KernelError  # noqa: E402
from slimc.passes import Activations, Calibrate, Fuse, LowRank, Prune, Quantize  # noqa: E402
from slimc.passes.base import Pass  # noqa: E402
from slimc.runtime.formats import NM  # noqa: E402
from slimc.runtime.packing import pack_weight  # noqa: E402

ONE = torch.ones(1, 1, dtype=torch.float16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host program alone, without kernels."""
    return build_library((), tmp_path_factory.mktemp("library") / "slim_kernels.so")


def exported(path: Path, *passes: Pass, **options: str) -> Path:
    """Export a compressed layer of a bfloat16 model, or as ``options`` say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 192)).to(torch.bfloat16)
    x = torch.randn(32, 128, dtype=torch.bfloat16)
    small = slimc.compile(model, [x], passes=[Calibrate(), *passes, Fuse()])
    slimc.export_onnx(small, path, x, **{"target": "cuda", "dtype": "float16"} | options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2:4 codes of one scale a tensor, with adapters."""
    passes = (Quantize(bits=4), Prune("2:4"), LowRank(rank=8, bits=4))
    return exported(tmp_path_factory.mktemp("exported") / "cuda", *passes)


def in_a_graph(codes: Tensor) -> np.ndarray:
    """Return unsigned codes [rows, columns] as the bytes of INT4 [columns, rows]."""
    nibbles = ((codes.t().flatten().int() - 8) & 15).numpy().astype(np.uint8)
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, dtype=np.uint8))
    return nibbles[::2] | nibbles[1::2] << 4


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (24, 136), (33, 200), (96, 576)])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_graphs_codes_become_the_fragments_that_kernels_read(
    library: Path, rows: int, columns: int, sparse: bool
) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    kept = None
    if sparse:
        kept = (torch.rand(rows, columns // 4, 4).argsort(-1) < 2).flatten(1)
        # Of a kept code of zero nobody can see that it was kept.
        codes = torch.where(kept, torch.where(codes == 8, 9, codes), 8).to(torch.uint8)
    packed = pack_weight(codes, bits=4, scale=ONE, group=None, mask=kept, sparsity=NM(2, 4) if sparse else None)
    words = code_words(packed.values)
    metadata = None if packed.pattern is None else metadata_words(packed.pattern)
    found, found_metadata = torch.zeros_like(words), None if metadata is None else torch.zeros_like(metadata)
    done = ctypes.CDLL(str(library)).slim_fragments(
        in_a_graph(codes).ctypes.data_as(ctypes.c_void_p),
        rows,
        columns,
        ctypes.c_void_p(found.data_ptr()),
        None if found_metadata is None else ctypes.c_void_p(found_metadata.data_ptr()),
    )
    assert done == 1
    assert torch.equal(found, words)
    assert metadata is None or (found_metadata is not None and torch.equal(found_metadata, metadata))


def test_a_kept_code_of_zero_is_as_good_as_a_pruned_one(library: Path) -> None:
    codes = torch.full((16, 128), 8, dtype=torch.uint8)
    codes[:, 3::4] = 11
    words, metadata = torch.zeros(1, 1, 32, 4, dtype=torch.int32), torch.zeros(1, 1, 32, 2, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (words, metadata)]
    rearrange = ctypes.CDLL(str(library)).slim_fragments
    assert rearrange(in_a_graph(codes).ctypes.data_as(ctypes.c_void_p), 16, 128, *pointers) == 1
    # Columns 0 and 3 of each four are kept: zero, and three above it.
    assert set(metadata.flatten().tolist()) == {int.from_bytes(b"\xcc" * 4, "little", signed=True)}
    assert set(words.view(torch.uint8).flatten().tolist()) == {0x88, 0xBB}


def test_three_of_four_are_not_taken_for_2_to_4(library: Path) -> None:
    codes = torch.full((16, 128), 9, dtype=torch.uint8)
    words, metadata = torch.zeros(1, 1, 32, 4, dtype=torch.int32), torch.zeros(1, 1, 32, 2, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (words, metadata)]
    rearrange = ctypes.CDLL(str(library)).slim_fragments
    assert rearrange(in_a_graph(codes).ctypes.data_as(ctypes.c_void_p), 16, 128, *pointers) == 0


@given(
    columns=st.integers(1, 4096).map(lambda eights: 8 * eights),
    sparse=st.booleans(),
    tokens=st.integers(1, decode.MAX_TOKENS),
    ranks=st.integers(0, 100).map(lambda units: 64 * units),
    block_tiles=st.integers(1, 9),
    available=st.integers(60, 226).map(lambda kibibytes: kibibytes << 10),
)
def test_a_launch_is_staged_as_in_python(
    library: Path, columns: int, sparse: bool, tokens: int, ranks: int, block_tiles: int, available: int
) -> None:
    unit, found = unit_columns(sparse), (ctypes.c_int * 7)()
    fits = ctypes.CDLL(str(library)).slim_fitting(columns, unit, tokens, ranks, block_tiles, available, found)
    shapes = decode.launch_shapes(-(-tokens // 8), block_tiles)
    try:
        shape, staging = decode._fitting(shapes, columns, unit, tokens, ranks, available)
    except KernelError:
        assert fits == 0
    else:
        expected = [shape.row_tiles, shape.stages, shape.warps, *astuple(staging)]
        assert (fits, list(found)) == (1, expected)


def test_onnx_runtime_takes_the_kernel_in_place_of_the_body(library: Path, folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    path = str(folder / "model.onnx")
    assert onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    options.register_custom_ops_library(str(library))
    # It is a kernel of the CUDA provider, which is not here: had the body been taken, the model would have opened.
    with pytest.raises(Exception, match=r"Could not find an implementation for linear\(1\)"):
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_forms_are_those_of_the_layers(folder: Path, tmp_path: Path) -> None:
    assert forms_of(folder) == {Form(sparse=True, group=0, adapters=True)}
    assert forms_of(exported(tmp_path / "grouped", Quantize(bits=4, group=64))) == {
        Form(sparse=False, group=64, adapters=False)
    }


@pytest.mark.parametrize(
    ("passes", "options", "reason"),
    [
        ((Quantize(bits=4),), {"dtype": "float32"}, "computes in another dtype than float16"),
        ((Quantize(bits=4, group=16),), {}, "has groups of 16 columns"),
        ((Quantize(bits=8),), {}, "no constant codes of 4 bits"),
        ((Quantize(bits=4), Activations(kind="int8")), {}, "rounds its inputs to 8 bits"),
        ((Quantize(bits=4),), {"target": "ort"}, "has no layers for a kernel library"),
    ],
)
def test_what_the_kernels_do_not_know_is_said_before_anything_is_built(
    passes: tuple[Pass, ...], options: dict[str, str], reason: str, tmp_path: Path
) -> None:
    path = exported(tmp_path / "out", *passes, **options)
    with pytest.raises(InputError, match=reason):
        forms_of(path)


def test_the_command_builds_a_library_for_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few of its kernels are enough here; the tests of the CUDA package compile all of them.
    monkeypatch.setattr(build, "_TOKEN_TILES", (1,))
    monkeypatch.setattr(build, "_BLOCK_TILES", (1,))
    result = CliRunner().invoke(app, ["kernels", str(folder), "-o", str(tmp_path / "k.so"), "--arch", "sm_90a"])
    assert result.exit_code == 0, result.output
    assert "kernels for sm_90a" in result.output
    assert b"decode_linear" in (tmp_path / "k.so").read_bytes()
    assert b"expand_fragments" in (tmp_path / "k.so").read_bytes()


def test_refusals(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "-p", "x", "--kernels", str(library)])
    assert result.exit_code == 2
    assert "a kernel library is for an ONNX folder" in " ".join(result.output.split())
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="needs a C\\+\\+ compiler"):
        build_library((), tmp_path / "k.so")


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelError, match="does not compile with false"):
        build_library((), tmp_path / "k.so")
    assert not list(tmp_path.iterdir())


def kernels(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["kernels", *map(str, arguments)])


def test_the_command_replaces_no_file_unasked(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    refused = kernels(folder, "-o", precious)
    assert (refused.exit_code, "add --overwrite" in refused.output) == (2, True)
    assert precious.read_text() == "mine"
    refused = kernels(folder, "-o", tmp_path)
    assert (refused.exit_code, "is a folder" in refused.output) == (2, True)


def test_a_folder_that_is_no_onnx_model_is_told_apart(tmp_path: Path) -> None:
    refused = kernels(tmp_path, "-o", tmp_path / "k.so")
    assert (refused.exit_code, "is no folder that 'slimc export' wrote" in refused.output) == (2, True)


@pytest.mark.parametrize("arch", ["banana", "sm_", "80", "sm_9x"])
def test_what_is_no_architecture_is_refused_before_anything_is_compiled(arch: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no GPU architecture; write sm_"):
        build_library((), tmp_path / "k.so", architectures=[arch])


def test_a_header_that_is_not_there_is_not_taken_for_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no onnxruntime_c_api\.h to compare with"):
        build_library((), tmp_path / "k.so", include=tmp_path)


def test_a_library_that_is_open_stays_what_it_is(tmp_path: Path) -> None:
    path = build_library((), tmp_path / "deep" / "k.so")
    with path.open("rb") as opened:
        build_library((), path)
        assert os.fstat(opened.fileno()).st_ino != path.stat().st_ino
    assert [one.name for one in path.parent.iterdir()] == ["k.so"]


# ------------------------------------------------------------------------------------------- what is called of the API

PLACES = {
    "CreateStatus": 0,
    "GetErrorMessage": 2,
    "CreateCustomOpDomain": 26,
    "CustomOpDomain_Add": 27,
    "AddCustomOpDomain": 28,
    "GetTensorMutableData": 51,
    "GetTensorElementType": 60,
    "GetDimensionsCount": 61,
    "GetDimensions": 62,
    "GetTensorTypeAndShape": 65,
    "KernelInfoGetAttribute_int64": 86,
    "KernelContext_GetInput": 90,
    "KernelContext_GetOutput": 91,
    "ReleaseStatus": 93,
    "ReleaseTensorTypeAndShapeInfo": 99,
    "KernelContext_GetGPUComputeStream": 193,
    "KernelInfo_GetNodeName": 244,
    "KernelInfoGetConstantInput_tensor": 249,
    "KernelContext_GetResource": 265,
}
"""Of ``struct OrtApi``, as ONNX Runtime's C# binding lists its members."""

OPERATOR = [
    "version",
    "CreateKernel",
    "GetName",
    "GetExecutionProviderType",
    "GetInputType",
    "GetInputTypeCount",
    "GetOutputType",
    "GetOutputTypeCount",
    "KernelCompute",
    "KernelDestroy",
    "GetInputCharacteristic",
    "GetOutputCharacteristic",
    "GetInputMemoryType",
    "GetVariadicInputMinArity",
    "GetVariadicInputHomogeneity",
    "GetVariadicOutputMinArity",
    "GetVariadicOutputHomogeneity",
    "CreateKernelV2",
    "KernelComputeV2",
    "InferOutputShapeFn",
    "GetStartVersion",
    "GetEndVersion",
    "GetMayInplace",
    "ReleaseMayInplace",
    "GetAliasMap",
    "ReleaseAliasMap",
]
"""Members of ``struct OrtCustomOp``."""


def write_header(folder: Path, *, shifted_from: int = 1000, int4: int = 22) -> Path:
    """Write what of ONNX Runtime's public header the library is compared with.

    Args:
        folder: of the header.
        shifted_from: from this place of the table on, all functions are one further.
        int4: the number of the type.
    """
    names = {place + (place >= shifted_from): name for name, place in PLACES.items()}
    table = "\n".join(f"    void* {names.get(place, f'unnamed{place}')};" for place in range(max(names) + 1))
    operator = "\n".join(f"    void* {name};" for name in OPERATOR)
    folder.mkdir()
    (folder / "onnxruntime_c_api.h").write_text(
        f"#pragma once\nstruct OrtApi {{\n{table}\n}};\nstruct OrtCustomOp {{\n{operator}\n}};\n"
        f"enum {{ ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 = {int4} }};\n"
        "enum { OrtMemTypeCPUInput = -2, OrtMemTypeDefault = 0, INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL };\n"
    )
    return folder


def test_the_public_header_is_compared_with_what_the_library_takes_for_it(tmp_path: Path) -> None:
    assert build_library((), tmp_path / "k.so", include=write_header(tmp_path / "same")).is_file()
    (tmp_path / "k.so").unlink()
    for name, options, reason in (
        ("table", {"shifted_from": 65}, "the API's table has changed"),
        ("types", {"int4": 23}, "types have changed"),
    ):
        with pytest.raises(KernelError, match=reason):
            build_library((), tmp_path / "k.so", include=write_header(tmp_path / name, **options))
    assert not (tmp_path / "k.so").exists()


def test_onnx_runtime_has_the_functions_where_the_library_calls_them(tmp_path: Path) -> None:
    """All of the table that needs no GPU, called in the ONNX Runtime that is installed."""
    library, source = tmp_path / "probe.so", Path(__file__).with_name("probe.cpp")
    include = str(files("slimc.backends.onnx.kernels"))
    options = [*build.OPTIONS, "-fvisibility=default", "-I", include]
    subprocess.run([*build._compiler(), *options, str(source), "-o", str(library)], check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))

    def run(x: np.ndarray, name: str = "probe") -> np.ndarray:
        sizes = ",".join("N" * x.ndim)
        model = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 21, "tried" : 1]>
            graph (float[{sizes}] x) => (float[{sizes}] y) <float[1] constant = {{0.5}}>
            {{ y = tried.Probe <factor: int = 3> (x, constant) }}"""
        )
        model.graph.node[0].name = name
        opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (y,) = opened.run(None, {"x": x})
        return np.asarray(y)

    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(run(x), x * 3 + 0.5)
    with pytest.raises(Exception, match="this is no matrix"):
        run(x[0])
    with pytest.raises(Exception, match="another name"):
        run(x, "other")


def test_nothing_is_compiled_where_the_library_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(subprocess, "run", compiled)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path, tmp_path / "file" / "k.so"):
        with pytest.raises(InputError):
            build_library((), output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
