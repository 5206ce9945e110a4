"""Builds the library: CUDA kernels compiled by NVRTC, and a C++ host program that holds them. Needs no GPU.

ONNX Runtime's headers and NVIDIA's are not needed either: what is called of both is declared in ``runtime.hpp`` and
``driver.hpp``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from slimc.backends.cuda import decode
from slimc.backends.cuda.compiler import compile_source
from slimc.backends.cuda.layer import FACTOR_GROUP, KERNEL_GROUPS, source, unit_columns
from slimc.backends.onnx.description import is_onnx_folder, read_description
from slimc.backends.onnx.functions import DOMAIN, INPUTS
from slimc.errors import InputError, KernelError
from slimc.runtime.files import check_writable, current_umask, file_inside, make_parents, write_bytes
from slimc.runtime.formats import ACTIVATIONS

__all__ = ["ARCHITECTURES", "Form", "build_library", "forms_of"]

ARCHITECTURES = ("sm_80", "sm_90a")
"""What is compiled for unless told otherwise: Ampere and Ada, and Hopper."""

HEADER = "onnxruntime_c_api.h"
"""ONNX Runtime's public header."""

SOURCES = ("library.cpp", "driver.hpp", "fragments.hpp", "runtime.hpp")

OPTIONS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-static-libstdc++",
)

_TOKEN_TILES = (1, 2)
_BLOCK_TILES = (1, 2, 3)
"""From three tiles of rows a block on the shape of the launch is the same."""


@dataclass(frozen=True, order=True)
class Form:
    """What a kernel is compiled for.

    Attributes:
        sparse: the weight is 2:4.
        group: columns that share a scale, of 32, 64 and 128; 0: all of a row.
        adapters: with low-rank factors.
    """

    sparse: bool
    group: int
    adapters: bool


def forms_of(folder: Path) -> set[Form]:
    """Return the forms of the layers of an ONNX folder whose nodes are ``slim::linear``.

    Raises:
        InputError: it has none, computes in float32, or has layers that the kernels do not know.
        FormatError: it is damaged.
    """
    if not is_onnx_folder(folder):
        raise InputError(
            f"{folder}: is no folder that 'slimc export' wrote; write one with --target cuda --dtype float16"
        )
    description = read_description(folder)
    model = onnx.load(file_inside(folder, description.model), load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == "linear"]
    if not nodes:
        raise InputError(
            f"{folder}: has no layers for a kernel library (target {description.target!r}); export compressed layers "
            "with --target cuda --dtype float16"
        )
    constants = {constant.name: constant for constant in model.graph.initializer}
    return {_form_of(folder, node, constants) for node in nodes}


def build_library(
    forms: Iterable[Form],
    output: Path,
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    include: Path | None = None,
) -> Path:
    """Write a shared library that registers ``slim::linear`` with ONNX Runtime's CUDA provider.

    Args:
        forms: of the layers that it is for.
        output: the file.
        architectures: what the kernels are compiled for, such as ``"sm_80"``; a GPU runs those of its major version.
        include: a folder with ``onnxruntime_c_api.h``, which is then compared with what the library takes for it.

    Returns:
        ``output``, written whole or not at all.

    Raises:
        InputError: ``output`` cannot be written, ``include`` has no such header, or an architecture is none.
        KernelError: a kernel or the host program does not compile, or there is no compiler.
    """
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name the library to write, such as {output}/slim_kernels.so")
    check_writable(output)
    for arch in architectures:
        if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
            raise InputError(f"'{arch}' is no GPU architecture; write sm_ and a compute capability, such as sm_80")
    if include is not None and not (include / HEADER).is_file():
        raise InputError(
            f"{include}: has no {HEADER} to compare with; name the folder that holds it (in ONNX Runtime's sources "
            "include/onnxruntime/core/session), or leave it out"
        )
    command = _compiler()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in SOURCES:
            (work / name).write_text((files("slimc.backends.onnx.kernels") / name).read_text("utf-8"), "utf-8")
        (work / "images.inc").write_text(_images(sorted(set(forms)), architectures, work), "utf-8")
        options = [*OPTIONS, *(["-isystem", str(include.resolve())] if include is not None else [])]
        made = work / "library.so"
        run = subprocess.run(
            [*command, *options, "library.cpp", "-o", made.name, "-ldl"],
            cwd=work, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            raise KernelError(f"the kernel library does not compile with {' '.join(command)}:\n{run.stderr[:4000]}")
        make_parents(output)
        # Not copied over what is there: a process that has the old library open would run on into the new one.
        write_bytes(output, made.read_bytes())
        output.chmod(0o777 & ~current_umask())
    return output


def _form_of(folder: Path, node: NodeProto, constants: dict[str, TensorProto]) -> Form:
    inputs = dict(zip(INPUTS, node.input, strict=False))
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    name = inputs["weight"].removesuffix(".weight")

    def refuse(reason: str) -> InputError:
        return InputError(
            f"{folder}: layer '{name}' {reason}; without a kernel library ONNX Runtime runs it by its body"
        )

    for unknown in ("zero_point", "input_scale", "signs"):
        if inputs.get(unknown):
            raise refuse(f"has a {unknown}, which the kernels do not know")
    if node.overload.rsplit(".", 1)[-1] in ACTIVATIONS:
        raise refuse("rounds its inputs to 8 bits, which the kernels do not do")
    weight, scale = constants.get(inputs["weight"]), constants.get(inputs["scale"])
    if weight is None or scale is None or weight.data_type != TensorProto.INT4:
        raise refuse("has no constant codes of 4 bits with a scale")
    if scale.data_type != TensorProto.FLOAT16:
        raise refuse("computes in another dtype than float16, which --dtype float16 exports")
    columns = weight.dims[0]
    if columns % 8:
        raise refuse(f"has {columns} columns, no multiple of 8")
    block = attributes.get("block_size", 0) if len(scale.dims) == 2 else 0
    group = next((size for size in KERNEL_GROUPS if block % size == 0), None) if 0 < block < columns else 0
    if group is None:
        raise refuse(f"has groups of {block} columns, and the kernels know multiples of {KERNEL_GROUPS[-1]}")
    for factor in ("left", "right"):
        part, its_scale = constants.get(inputs.get(factor, "")), constants.get(inputs.get(f"{factor}_scale", ""))
        if inputs.get(factor) and (part is None or its_scale is None or part.data_type != TensorProto.INT4):
            raise refuse(f"has a {factor} factor that is no constant codes of 4 bits")
        size = attributes.get(f"{factor}_block_size", 0)
        if part is not None and its_scale is not None and prod(its_scale.dims[:-1]) > 1 and size % FACTOR_GROUP:
            raise refuse(
                f"has a {factor} factor with groups of {size}, and the kernels know multiples of {FACTOR_GROUP}"
            )
    sparse = (attributes.get("n"), attributes.get("m")) == (2, 4)
    return Form(sparse, group, bool(inputs.get("left")))


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, or what is there."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(candidate.split()[0]):
            return candidate.split()
    raise KernelError("building a kernel library needs a C++ compiler (c++, g++ or clang++; CXX names another)")


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Image:
    """A kernel for one kind of machine; the attributes are those of ``struct Image`` in ``library.cpp``."""

    kind: str
    arch: str
    sparse: bool
    group: int
    adapters: bool = False
    shape: decode.LaunchShape | None = None
    token_tiles: int = 0

    def cubin(self) -> bytes:
        common: dict[str, int | str] = {"BFLOAT16": 0, "ARCH": 10 * self.major, "GROUP": self.group}
        if self.shape is None:
            own = {"PLACE": int(self.sparse), "UNIT": unit_columns(self.sparse), "VALUES": 0, "SIGNS": 0}
            return compile_source(source("expand.cu"), name="expand", arch=self.arch, defines=common | own)
        own = {
            "SPARSE": int(self.sparse),
            "ADAPTERS": int(self.adapters),
            "TOKEN_TILES": self.token_tiles,
            "ROW_TILES": self.shape.row_tiles,
            "WARP_ROWS": self.shape.warp_rows,
            "WARP_COLUMNS": self.shape.warp_columns,
            "STAGES": self.shape.stages,
        }
        return compile_source(source("decode.cu"), name=decode.KERNEL_NAME, arch=self.arch, defines=common | own)

    @property
    def major(self) -> int:
        """The major compute capability."""
        return int("".join(filter(str.isdigit, self.arch))) // 10

    def row(self, symbol: str) -> str:
        """Return the image as an entry of the table."""
        numbers = (self.major, int(self.sparse), self.group, int(self.adapters), self.token_tiles)
        return f"    {{{self.kind}, {', '.join(map(str, numbers))}, {_written(self.shape)}, {symbol}}},"


def _images(forms: Sequence[Form], architectures: Sequence[str], work: Path) -> str:
    """Compile all images into ``work``; return the table of them, and the constants that decode.py launches with."""
    declared, rows = [], []
    images = list(dict.fromkeys(_wanted(forms, architectures)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(_Image.cubin, images)
    for number, (image, cubin) in enumerate(zip(images, cubins, strict=True)):
        symbol = f"slim_image_{number}"
        (work / f"{symbol}.cubin").write_bytes(cubin)
        declared.append(
            f'asm(".pushsection .rodata\\n.balign 64\\n{symbol}:\\n.incbin \\"{symbol}.cubin\\"\\n.popsection\\n");\n'
            f'extern const unsigned char {symbol}[] asm("{symbol}");'
        )
        rows.append(image.row(symbol))
    return "\n".join(
        [
            _shapes(),
            f"constexpr int kOwnSharedBytes = {decode.OWN_SHARED_BYTES};",
            f"constexpr int kPartialTokens = {decode.PARTIAL_TOKENS};",
            *declared,
            "const Image kImages[] = {",
            *rows,
            "};\n",
        ]
    )


def _shapes() -> str:
    """Return the shapes of launches as an array: tiles of tokens, tiles of rows of a block, best first."""
    table = [[decode.launch_shapes(tokens, rows) for rows in _BLOCK_TILES] for tokens in _TOKEN_TILES]
    written = ", ".join(
        "{" + ", ".join("{" + ", ".join(map(_written, shapes)) + "}" for shapes in row) + "}" for row in table
    )
    return f"constexpr Shape kShapes[{len(table)}][{len(table[0])}][{len(table[0][0])}] = {{{written}}};"


def _written(shape: decode.LaunchShape | None) -> str:
    """Return a shape as ``struct Shape``; zeros if there is none."""
    return "{}" if shape is None else f"{{{shape.row_tiles}, {shape.stages}, {shape.warps}}}"


def _wanted(forms: Sequence[Form], architectures: Sequence[str]) -> Iterator[_Image]:
    for arch in architectures:
        for form in forms:
            yield _Image("kExpand", arch, form.sparse, form.group)
            if form.adapters:
                yield _Image("kExpand", arch, sparse=False, group=FACTOR_GROUP)
            for token_tiles in _TOKEN_TILES:
                for block_tiles in _BLOCK_TILES:
                    for shape in decode.launch_shapes(token_tiles, block_tiles):
                        yield _Image("kDecode", arch, form.sparse, form.group, form.adapters, shape, token_tiles)
