"""Compiling at run time, on machines without a GPU too: NVRTC needs none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product

import pytest

from slimc.backends.cuda import compiler, prefill
from slimc.backends.cuda.layer import source
from slimc.backends.cuda.rounding import ACTIVATION_CODES
from slimc.errors import KernelError

TRIVIAL = 'extern "C" __global__ void fill(int* to) { to[threadIdx.x] = VALUE; }'


def test_a_source_becomes_machine_code() -> None:
    cubin = compiler.compile_source(TRIVIAL, name="fill", arch="sm_80", defines={"VALUE": 3})
    assert cubin.startswith(b"\x7fELF")
    assert b"fill" in cubin


def test_a_mistake_in_a_source_is_told_with_its_line() -> None:
    with pytest.raises(KernelError, match=r"kernel 'fill' does not compile for sm_80.*\n(.*\n)*.*VALUE.*undefined"):
        compiler.compile_source(TRIVIAL, name="fill", arch="sm_80")


@pytest.mark.parametrize("arch", ["sm80", "compute_80", "sm_80 -G", ""])
def test_what_is_no_architecture_is_refused(arch: str) -> None:
    with pytest.raises(KernelError, match="no architecture"):
        compiler.compile_source(TRIVIAL, name="fill", arch=arch, defines={"VALUE": 3})


def test_options_do_not_depend_on_the_order_of_macros() -> None:
    assert compiler.compile_options("sm_80", {"A": 1, "B": True}) == compiler.compile_options("sm_80", {"B": 1, "A": 1})
    with pytest.raises(KernelError, match="name of a macro"):
        compiler.compile_options("sm_80", {"A=1 -I": 1})


@pytest.fixture
def no_places(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiler, "_places", lambda: iter([("nowhere", ["libnvrtc.so.99"], 0)]))
    compiler.find_nvrtc.cache_clear()
    yield
    compiler.find_nvrtc.cache_clear()


@pytest.mark.usefixtures("no_places")
def test_without_nvrtc_the_error_says_how_to_get_it() -> None:
    with pytest.raises(KernelError, match=r"pip install nvidia-cuda-nvrtc(.*\n)*.*nowhere"):
        compiler.compile_source(TRIVIAL, name="fill", arch="sm_80")


FORMS = [(1, 0, 1), (1, 32, 1), (1, 64, 1), (1, 128, 1), (1, 0, 0), (0, 0, 1), (0, 32, 1), (0, 64, 0)]
"""Whether W is 2:4, its groups, and whether there are adapters."""


@pytest.mark.parametrize(("sparse", "group", "adapters"), FORMS)
@pytest.mark.parametrize(("arch", "number"), [("sm_80", 80), ("sm_90a", 90)])
@pytest.mark.parametrize("bfloat16", [0, 1])
def test_the_kernel_for_few_tokens_compiles(
    arch: str, number: int, sparse: int, group: int, adapters: int, bfloat16: int
) -> None:
    defines = {
        "BFLOAT16": bfloat16, "ARCH": number, "SPARSE": sparse, "GROUP": group, "ADAPTERS": adapters,
        "TOKEN_TILES": 1, "ROW_TILES": 2, "WARP_ROWS": 1, "WARP_COLUMNS": 16, "STAGES": 2,
    }  # fmt: skip
    cubin = compiler.compile_source(source("decode.cu"), name="decode_linear", arch=arch, defines=defines)
    assert cubin.startswith(b"\x7fELF")


UNPACKED = [
    (4, 0, 4), (4, 0, 1), (4, 1, 1), (4, 2, 2), (4, 2, 1), (3, 0, 1), (3, 2, 1), (8, 0, 4), (7, 1, 1), (0, 1, 1),
    (0, 2, 1),
]  # fmt: skip
"""Bits of a code, which columns are kept, and bytes that are loaded at once."""


@pytest.mark.parametrize(("bits", "kept", "load"), UNPACKED)
@pytest.mark.parametrize(("arch", "number", "bfloat16"), [("sm_80", 80, 1), ("sm_90a", 90, 0), ("sm_90a", 90, 1)])
def test_the_kernel_that_decodes_compiles(
    arch: str, number: int, bfloat16: int, bits: int, kept: int, load: int
) -> None:
    defines = {
        "BFLOAT16": bfloat16, "ARCH": number, "BITS": bits, "KEPT": kept, "SCALES": bfloat16, "ASYMMETRIC": bfloat16,
        "LOAD_BYTES": load, "TAIL": int(load == 1), "ROWS": 4, "SIGNS": bfloat16, "TOKENS": 8,
    }  # fmt: skip
    cubin = compiler.compile_source(source("unpack.cu"), name="unpack_weight", arch=arch, defines=defines)
    assert b"unpack_weight" in cubin
    assert b"unpack_linear" in cubin


EXPANDED = [
    (0, 64, 32, 0), (0, 64, 64, 0), (0, 64, 128, 0), (0, 128, 0, 0), (1, 128, 32, 0), (1, 128, 64, 0), (1, 128, 0, 0),
    (0, 128, 0, 1), (1, 128, 0, 1),
]  # fmt: skip
"""Whether zeros are placed, columns of 64 codes, columns that share a scale, and whether codes are values."""


@pytest.mark.parametrize("signs", [0, 1])
@pytest.mark.parametrize(("place", "unit", "group", "values"), EXPANDED)
@pytest.mark.parametrize(("arch", "number", "bfloat16"), [("sm_80", 80, 1), ("sm_90a", 90, 0), ("sm_90a", 90, 1)])
def test_the_kernel_that_expands_fragments_compiles(
    arch: str, number: int, bfloat16: int, place: int, unit: int, group: int, values: int, signs: int
) -> None:
    defines = {
        "BFLOAT16": bfloat16, "ARCH": number, "PLACE": place, "UNIT": unit, "GROUP": group, "VALUES": values,
        "SIGNS": signs,
    }  # fmt: skip
    cubin = compiler.compile_source(source("expand.cu"), name="expand", arch=arch, defines=defines)
    assert cubin.startswith(b"\x7fELF")


PREFILL_FORMS = [
    *(prefill.Form(bool(sparse), group, bool(adapters), None) for sparse, group, adapters in FORMS),
    *(prefill.Form(sparse, 0, True, None, values=True) for sparse in (True, False)),
    *(
        prefill.Form(sparse, 0, adapters, activation)
        for sparse, adapters in ((True, True), (False, False))
        for activation in ("int8", "float8_e4m3fn")
    ),
]
PREFILL_SHAPES = [
    prefill.LaunchShape(128, 4, 1),
    prefill.LaunchShape(128, 2, 2, outputs=128),
    prefill.LaunchShape(128, 2, 2, outputs=128, multicast=2),
    prefill.LaunchShape(128, 2, 1),
    prefill.LaunchShape(64, 2, 1, 2),
]


OF_T = [
    (shape, prefill.Form(False, 64, False, activation))
    for shape in (prefill.LaunchShape(128, 2, 1), prefill.LaunchShape(64, 2, 1, 2))
    for activation in ("int8", "float8_e4m3fn")
]
"""Sums a group beside those of bytes: others would need more registers."""


@pytest.mark.parametrize(("shape", "form"), [*product(PREFILL_SHAPES, PREFILL_FORMS), *OF_T], ids=str)
def test_the_kernel_for_many_tokens_compiles_and_its_products_overlap(
    shape: prefill.LaunchShape, form: prefill.Form, caplog: pytest.LogCaptureFixture
) -> None:
    shape = prefill.for_values(shape, form, 4096, 4096 * shape.multicast) if form.values else shape
    defines = prefill.defines(form, shape, bfloat16=True)
    with caplog.at_level(logging.DEBUG, compiler.__name__):
        cubin = compiler.compile_source(source("prefill.cu"), name="prefill_linear", arch="sm_90a", defines=defines)
    assert cubin.startswith(b"\x7fELF")
    assert "serialized" not in caplog.text


@pytest.mark.parametrize("form", PREFILL_FORMS, ids=str)
@pytest.mark.parametrize("shape", PREFILL_SHAPES, ids=str)
def test_the_slots_of_the_kernel_for_many_tokens_fit(shape: prefill.LaunchShape, form: prefill.Form) -> None:
    shape = prefill.for_values(shape, form, 4096, 4096 * shape.multicast) if form.values else shape
    assert form.stages(shape) >= 3
    assert shape.blocks * (form.shared_bytes(shape) + 2 * form.stages(shape) * 8 + 1024) <= 228 << 10


ROUNDING = [("sm_80", 80, "int8"), ("sm_90a", 90, "int8"), ("sm_90a", 90, "float8_e4m3fn")]
"""Ampere has no conversion to float8."""


@pytest.mark.parametrize(("arch", "number", "activation"), ROUNDING)
@pytest.mark.parametrize("bfloat16", [0, 1])
def test_rounding_of_activations_compiles(bfloat16: int, arch: str, number: int, activation: str) -> None:
    defines = {
        "BFLOAT16": bfloat16, "ARCH": number, "ACTIVATION": ACTIVATION_CODES[activation], "THREADS": 256, "KEPT": 8,
    }  # fmt: skip
    cubin = compiler.compile_source(source("quantize.cu"), name="quantize_tokens", arch=arch, defines=defines)
    assert b"round_tokens" in cubin


@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize(("head", "rows", "mask"), [(64, 1, 1), (128, 4, 1), (128, 8, 0)])
def test_the_attention_of_a_new_token_compiles(bfloat16: int, head: int, rows: int, mask: int) -> None:
    defines = {"BFLOAT16": bfloat16, "ARCH": 90, "HEAD": head, "ROWS": rows, "MASK": mask, "BLOCKS": 4}
    cubin = compiler.compile_source(source("attend.cu"), name="attend", arch="sm_90a", defines=defines)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("chunks", [1, 4])
def test_what_is_between_linears_compiles(bfloat16: int, chunks: int) -> None:
    defines = {"BFLOAT16": bfloat16, "ARCH": 90, "CHUNKS": chunks}
    cubin = compiler.compile_source(source("between.cu"), name="between", arch="sm_90a", defines=defines)
    assert b"add_norm" in cubin
    assert b"gate" in cubin
