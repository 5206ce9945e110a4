"""Cubins loaded and launched through the CUDA driver, with what PyTorch's own launches lack.

``cuLaunchKernelEx`` takes launch attributes: a launch may begin while the one before it drains (programmatic), may
wait for all of its blocks at once (cooperative), and may group blocks that share memory (clusters). A launch neither
allocates nor synchronises anything on the device, so it can be captured into a CUDA graph.

Everything happens in the device's primary context, which is also PyTorch's.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimc.backends.cuda.cache import cached_cubin
from slimc.backends.cuda.compiler import NO_DEFINES
from slimc.errors import KernelError

__all__ = [
    "Function",
    "Launcher",
    "Module",
    "TensorMap",
    "device_arch",
    "driver_version",
    "encode_matrix_map",
    "encode_piece_map",
    "encode_word_map",
    "load",
    "replace_address",
    "target_arch",
]

Dimensions = tuple[int, int, int]

CUDA_ERROR_INVALID_CONTEXT = 201

ATTRIBUTE_SHARED_BYTES = 1
ATTRIBUTE_LOCAL_BYTES = 3
ATTRIBUTE_REGISTERS = 4
ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES = 8
ATTRIBUTE_PREFERRED_SHARED_PERCENT = 9

LAUNCH_COOPERATIVE = 2
LAUNCH_CLUSTER_DIMENSION = 4
LAUNCH_CLUSTER_SCHEDULING_POLICY = 5
LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6
CLUSTER_SPREAD = 1

_PLAIN_TYPES = "?bBhHiIlLqQfdP"
"""Codes, shared by ctypes and struct, of the types that a kernel can take."""


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("gridDimX", ctypes.c_uint),
        ("gridDimY", ctypes.c_uint),
        ("gridDimZ", ctypes.c_uint),
        ("blockDimX", ctypes.c_uint),
        ("blockDimY", ctypes.c_uint),
        ("blockDimZ", ctypes.c_uint),
        ("sharedMemBytes", ctypes.c_uint),
        ("hStream", ctypes.c_void_p),
        ("attrs", ctypes.c_void_p),
        ("numAttrs", ctypes.c_uint),
    )


CONFIG_FIELDS = struct.Struct("@7IPPI")
"""The same fields, all filled by one call: that takes less time than one assignment to each that changes."""


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute`` of cuda.h; each value that is used here is one to three integers."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 16),
    )


class TensorMap(ctypes.Structure):
    """``CUtensorMap`` of cuda.h: how the copy engine finds boxes of a tensor. Kernels want it aligned to 64 bytes."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


TENSOR_MAP_KINDS = {1: 0, 2: 1, 4: 2}
"""What the driver calls unsigned elements of so many bytes."""

TENSOR_MAP_SWIZZLE_128_BYTES = 3
TENSOR_MAP_PROMOTE_128_BYTES = 2
TENSOR_MAP_PROMOTE_256_BYTES = 3


def encode_matrix_map(
    into: TensorMap, address: int, rows: int, columns: int, box_rows: int, box_columns: int, element_bytes: int = 2
) -> None:
    """Describe a matrix of elements of any size, row after row, for copies of boxes.

    Outside of it the engine reads zeros and writes nothing.

    Args:
        into: what is filled.
        address: of the matrix, a multiple of 16.
        rows: of the matrix.
        columns: of the matrix; a row is a multiple of 16 bytes.
        box_rows: of a box, at most 256.
        box_columns: of a box, at most 256. Elements of 1 or 2 bytes make up rows of 128 bytes, whose pieces of 16 bytes
            are swizzled over 8 rows; those of 4 bytes lie in order, in any multiple of 16 bytes.
        element_bytes: 1, 2 or 4.

    Raises:
        KernelError: the driver refuses the map.
    """
    _encode_map(into, address, element_bytes, (columns, rows), (element_bytes * columns,), (box_columns, box_rows))


def encode_piece_map(into: TensorMap, address: int, rows: int, columns: int, box_rows: int, box_pieces: int) -> None:
    """Describe a matrix of 16-bit elements for boxes of several pieces of 64 columns, one after another.

    Args:
        into: what is filled.
        address: of the matrix, a multiple of 16.
        rows: of the matrix.
        columns: of the matrix, a multiple of 64.
        box_rows: of a box, at most 256.
        box_pieces: of 64 columns in a box; each lies as a box of `encode_matrix_map` would.

    Raises:
        KernelError: the driver refuses the map.
    """
    _encode_map(into, address, 2, (64, rows, columns // 64), (2 * columns, 128), (64, box_rows, box_pieces))


def encode_word_map(into: TensorMap, tensor: Tensor, box: tuple[int, int, int]) -> None:
    """Describe 32-bit words [a, b, c], contiguous, for copies of boxes as they lie; outside the engine reads zeros.

    Args:
        into: what is filled.
        tensor: int32, three axes, the last of a multiple of 4 words.
        box: sizes of a box, each at most 256.

    Raises:
        KernelError: the driver refuses the map.
    """
    a, b, c = tensor.shape
    _encode_map(into, tensor.data_ptr(), 4, (c, b, a), (4 * c, 4 * b * c), tuple(reversed(box)))


def replace_address(of: TensorMap, address: int) -> None:
    """Let a map describe other memory of the same sizes, in a tenth of the time that describing it takes.

    Args:
        of: what is changed.
        address: a multiple of 16.

    Raises:
        KernelError: the driver refuses the address.
    """
    status = _library().cuTensorMapReplaceAddress(ctypes.byref(of), address)
    if status:
        _check(status, f"describing a tensor at {address:#x}")


def _encode_map(
    into: TensorMap,
    address: int,
    element_bytes: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> None:
    """Fill a map; axes from the innermost on, strides in bytes from the second axis on. Words are not swizzled."""
    axes, kind = len(sizes), TENSOR_MAP_KINDS[element_bytes]
    status = _library().cuTensorMapEncodeTiled(
        ctypes.byref(into),
        kind,
        axes,
        address,
        (ctypes.c_uint64 * axes)(*sizes),
        (ctypes.c_uint64 * (axes - 1))(*strides),
        (ctypes.c_uint32 * axes)(*box),
        _ONES,
        0,
        0 if element_bytes == 4 else TENSOR_MAP_SWIZZLE_128_BYTES,
        TENSOR_MAP_PROMOTE_256_BYTES if element_bytes == 4 else TENSOR_MAP_PROMOTE_128_BYTES,
        0,
    )
    _check(status, f"describing a tensor of {list(sizes)} elements of {element_bytes} bytes for boxes of {list(box)}")


_ONES = (ctypes.c_uint32 * 3)(1, 1, 1)


class Module:
    """A cubin on one device, there until the process ends: captured graphs may still launch its kernels.

    Attributes:
        device_index: the device; the current one unless another is named.

    Raises:
        KernelError: PyTorch has no CUDA device, or the driver refuses the cubin.
    """

    def __init__(self, cubin: bytes, device_index: int | None = None) -> None:
        self._library = _library()
        self.device_index = torch.cuda.current_device() if device_index is None else device_index
        self.context = _primary_context(self.device_index)
        self._handle = ctypes.c_void_p()
        self._functions: dict[str, Function] = {}
        self._lock = threading.Lock()
        with _current(self.context):
            status = self._library.cuModuleLoadData(ctypes.byref(self._handle), cubin)
        _check(status, f"loading a cubin onto cuda:{self.device_index}, driver for CUDA {driver_version()}")

    def function(self, name: str, *, shared_bytes: int = 0) -> Function:
        """Return a kernel by its name, allowed to be launched with at least ``shared_bytes`` of dynamic shared memory.

        Raises:
            KernelError: the cubin has no such kernel, or the device has less shared memory than that.
        """
        # The allowance belongs to the kernel, not to the caller: one that asks for less must not lower another's.
        with self._lock, _current(self.context):
            function = self._functions.get(name)
            if function is None:
                function = self._functions[name] = Function(self, name, self._find(name))
            function.allow_shared(shared_bytes)
        return function

    def _find(self, name: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        status = self._library.cuModuleGetFunction(ctypes.byref(handle), self._handle, name.encode())
        _check(status, f"finding kernel {name!r}")
        # Since CUDA 12.4 kernels can be loaded ahead. Left to the first launch, that may synchronise, which a launch
        # being captured into a graph must not.
        load_now = getattr(self._library, "cuFuncLoad", None)
        if load_now is not None:
            _check(load_now(handle), f"loading kernel {name!r}")
        return handle


class Function:
    """A kernel, made by :meth:`Module.function`.

    Attributes:
        name: its name in the source.
        registers: registers a thread.
        local_bytes: local memory a thread; more than its arrays need means that registers spilled.
        static_shared_bytes: shared memory a block that the source declares.
        shared_bytes: the most dynamic shared memory that a launch may ask for.
    """

    def __init__(self, module: Module, name: str, handle: ctypes.c_void_p) -> None:
        self.module = module
        self.name = name
        self.handle = handle
        self._library = _library()
        self.registers = self._attribute(ATTRIBUTE_REGISTERS)
        self.local_bytes = self._attribute(ATTRIBUTE_LOCAL_BYTES)
        self.static_shared_bytes = self._attribute(ATTRIBUTE_SHARED_BYTES)
        self.shared_bytes = self._attribute(ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES)
        self._launchers: dict[tuple[type[Any], ...], Launcher] = {}

    def allow_shared(self, shared_bytes: int) -> None:
        """Let launches use this much dynamic shared memory; beyond 48 KB, less the static part, a kernel must ask.

        Raises:
            KernelError: the device has less.
        """
        if shared_bytes <= self.shared_bytes:
            return
        status = self._library.cuFuncSetAttribute(self.handle, ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        _check(
            status,
            f"kernel {self.name!r}: allowing {shared_bytes} bytes of dynamic shared memory beside "
            f"{self.static_shared_bytes} static ones",
        )
        self.shared_bytes = shared_bytes

    def leave_shared(self) -> None:
        """Ask for multiprocessors that keep all memory they can as shared memory, little as this kernel takes of it.

        A kernel that takes much cannot begin beside one that runs where most is a cache.

        Raises:
            KernelError: the driver refuses.
        """
        status = self._library.cuFuncSetAttribute(self.handle, ATTRIBUTE_PREFERRED_SHARED_PERCENT, 100)
        _check(status, f"kernel {self.name!r}: asking for multiprocessors of most shared memory")

    def max_blocks_per_multiprocessor(self, threads: int, shared_bytes: int = 0) -> int:
        """Return how many blocks of this many threads and dynamic shared bytes a multiprocessor holds at once."""
        blocks = ctypes.c_int()
        with _current(self.module.context):
            status = self._library.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), self.handle, threads, shared_bytes
            )
        _check(status, f"kernel {self.name!r}: counting resident blocks of {threads} threads")
        return blocks.value

    def prepare(self, argument_types: Sequence[type[Any]]) -> Launcher:
        """Return a launcher for arguments of these ctypes types, in the kernel's order; ``c_void_p`` for pointers.

        Raises:
            KernelError: a type is neither a number, a pointer nor a ``ctypes.Structure``.
        """
        return Launcher(self, argument_types)

    def launch(
        self,
        grid: Dimensions,
        block: Dimensions,
        arguments: Sequence[Any],
        *,
        stream: int,
        shared_bytes: int = 0,
        programmatic: bool = False,
        cooperative: bool = False,
        cluster: int = 1,
        spread: bool = False,
    ) -> None:
        """Launch with arguments that tell their type: a plain int is a pointer, anything else a ctypes value.

        See :meth:`Launcher.__call__`, which is what a hot path wants.

        Raises:
            KernelError: an argument is something else, or the driver refuses the launch.
        """
        types = tuple(ctypes.c_void_p if type(argument) is int else type(argument) for argument in arguments)
        launcher = self._launchers.get(types)
        if launcher is None:
            launcher = self._launchers[types] = self.prepare(types)
        launcher(
            *map(_plain, arguments),
            grid=grid,
            block=block,
            stream=stream,
            shared_bytes=shared_bytes,
            programmatic=programmatic,
            cooperative=cooperative,
            cluster=cluster,
            spread=spread,
        )

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        status = self._library.cuFuncGetAttribute(ctypes.byref(value), number, self.handle)
        _check(status, f"kernel {self.name!r}: reading attribute {number}")
        return value.value


class Launcher:
    """A kernel with its argument block laid out, so that a call only fills in values and launches.

    Threads may share one: the block is filled and handed over under a lock.
    """

    def __init__(self, function: Function, argument_types: Sequence[type[Any]]) -> None:
        self._function = function
        self._types = tuple(argument_types)
        self._packing, offsets = _layout(function.name, self._types)
        self._plain = not any(issubclass(kind, ctypes.Structure) for kind in self._types)
        self._values = ctypes.create_string_buffer(max(self._packing.size, 1))
        start = ctypes.addressof(self._values)
        self._parameters = (ctypes.c_void_p * max(len(offsets), 1))(*(start + offset for offset in offsets))
        self._config = LaunchConfig()
        # References made once are the cheapest thing that ctypes can pass.
        self._arguments = ctypes.byref(self._config), function.handle, ctypes.byref(self._parameters), None
        self._launch = _library().cuLaunchKernelEx
        self._lock = threading.Lock()

    def __call__(
        self,
        *values: Any,
        grid: Dimensions,
        block: Dimensions,
        stream: int,
        shared_bytes: int = 0,
        programmatic: bool = False,
        cooperative: bool = False,
        cluster: int = 1,
        spread: bool = False,
    ) -> None:
        """Put a launch into a stream; the module's device must be the current one.

        Args:
            values: a number for each argument, for pointers an address, for structures an instance.
            grid: blocks in x, y and z.
            block: threads of a block in x, y and z.
            stream: handle of the stream, such as ``torch.cuda.current_stream().cuda_stream``.
            shared_bytes: dynamic shared memory of a block.
            programmatic: may start before the launch ahead of it in the stream has ended; the kernel waits itself
                (``griddepcontrol.wait``) before it touches what that one writes.
            cooperative: all blocks must fit on the device at once, so that they may wait for each other.
            cluster: blocks, along x, of a cluster.
            spread: whether the blocks of a cluster had better run on multiprocessors of their own.

        Raises:
            KernelError: the values do not fit the argument types, or the driver refuses the launch. It also hands on
                what an earlier kernel did wrong.
        """
        attributes, count = _launch_attributes(programmatic, cooperative, cluster, spread)
        with self._lock:
            try:
                self._packing.pack_into(self._values, 0, *(values if self._plain else self._as_bytes(values)))
                CONFIG_FIELDS.pack_into(self._config, 0, *grid, *block, shared_bytes, stream, attributes, count)
            except (struct.error, TypeError) as error:
                raise KernelError(self._misfit(values, grid, block, error)) from None
            status = self._launch(*self._arguments)
            if status == CUDA_ERROR_INVALID_CONTEXT:
                status = self._launch_in_own_context()
        if status:
            _check(status, self._describe(grid, block, shared_bytes, programmatic, cooperative, cluster))

    def _as_bytes(self, values: Sequence[Any]) -> Iterator[Any]:
        """Yield structures as their bytes, other values as they are."""
        for value, kind in zip(values, self._types, strict=False):
            if not issubclass(kind, ctypes.Structure):
                yield value
            elif type(value) is kind:
                yield bytes(value)
            else:
                raise TypeError(f"{type(value).__name__} given for {kind.__name__}")

    def _launch_in_own_context(self) -> int:
        """Launch from a thread that has no context yet, as one that PyTorch did not start has none."""
        library = _library()
        return int(library.cuCtxSetCurrent(self._function.module.context) or self._launch(*self._arguments))

    def _misfit(self, values: Sequence[Any], grid: Dimensions, block: Dimensions, error: Exception) -> str:
        types = ", ".join(kind.__name__ for kind in self._types)
        return f"kernel {self._function.name!r} takes ({types}), not {values}, on {grid} blocks of {block}: {error}"

    def _describe(
        self, grid: Dimensions, block: Dimensions, shared: int, programmatic: bool, cooperative: bool, cluster: int
    ) -> str:
        function = self._function
        flags = f"{', programmatic' * programmatic}{', cooperative' * cooperative}"
        return (
            f"launching kernel {function.name!r} on cuda:{function.module.device_index} (grid {grid}, block {block}, "
            f"{shared} of at most {function.shared_bytes} bytes of dynamic shared memory, {function.registers} "
            f"registers, cluster {cluster}{flags})"
        )


_modules: dict[tuple[Any, ...], Module] = {}
_modules_lock = threading.Lock()


def load(source: str, name: str, device_index: int, defines: Mapping[str, int | str] = NO_DEFINES) -> Module:
    """Return the module of a source on a device, compiled or read from the cache on the first call.

    Raises:
        KernelError: the device is too old, or the source cannot be compiled or loaded.
    """
    key = (device_index, name, source, *sorted(defines.items()))
    with _modules_lock:
        module = _modules.get(key)
        if module is None:
            arch = target_arch(*device_arch(device_index))
            cubin = cached_cubin(source, name=name, arch=arch, defines=defines, driver=driver_version())
            module = _modules[key] = Module(cubin, device_index)
        return module


def device_arch(index: int) -> tuple[int, int]:
    """Return the compute capability of a device: (9, 0) for Hopper.

    Raises:
        KernelError: PyTorch has no CUDA device.
    """
    _require_device()
    return torch.cuda.get_device_capability(index)


def target_arch(major: int, minor: int) -> str:
    """Return what to compile for: Hopper with its own instructions, Ampere and Ada alike, newer parts as they are.

    Raises:
        KernelError: the part is older than Ampere.
    """
    if major < 8:
        raise KernelError(
            f"slimc's CUDA kernels need compute capability 8.0 or newer (Ampere, Ada, Hopper, Blackwell: A100, RTX 30, "
            f"L4, H100 and later); this device has {major}.{minor}"
        )
    if major == 8:
        return "sm_80"
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def driver_version() -> str:
    """Return the newest version of CUDA that the driver supports, as ``"13.0"``.

    Raises:
        KernelError: PyTorch has no CUDA device, or there is no driver.
    """
    number = ctypes.c_int()
    _check(_library().cuDriverGetVersion(ctypes.byref(number)), "asking for the driver's version")
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


@cache
def _library() -> Any:
    """Open the driver's library, once PyTorch has initialised it.

    Raises:
        KernelError: PyTorch has no CUDA device, or the library is missing.
    """
    _require_device()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver's library cannot be opened ({error}); install the NVIDIA driver") from None
    _declare(library)
    return library


def _declare(library: Any) -> None:
    """Declare the driver's functions, all but the launch: its arguments are pointers already, and checks cost time."""
    integer, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    text, out, out_integer = ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
    signatures: dict[str, list[Any]] = {
        "cuGetErrorName": [integer, ctypes.POINTER(text)],
        "cuGetErrorString": [integer, ctypes.POINTER(text)],
        "cuDriverGetVersion": [out_integer],
        "cuDeviceGet": [out_integer, integer],
        "cuDevicePrimaryCtxRetain": [out, integer],
        "cuCtxPushCurrent_v2": [pointer],
        "cuCtxPopCurrent_v2": [out],
        "cuCtxSetCurrent": [pointer],
        "cuModuleLoadData": [out, text],
        "cuModuleGetFunction": [out, pointer, text],
        "cuFuncGetAttribute": [out_integer, integer, pointer],
        "cuFuncSetAttribute": [pointer, integer, integer],
        "cuOccupancyMaxActiveBlocksPerMultiprocessor": [out_integer, pointer, integer, size],
    }
    for name, argument_types in signatures.items():
        getattr(library, name).argtypes = argument_types
    library.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    library.cuTensorMapEncodeTiled.argtypes = [
        pointer, integer, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer,
        integer, integer, integer, integer,
    ]  # fmt: skip
    if hasattr(library, "cuFuncLoad"):
        library.cuFuncLoad.argtypes = [pointer]


def _require_device() -> None:
    if torch.cuda.is_available() and torch.version.cuda:
        return
    if torch.version.cuda is None:
        raise KernelError(
            f"CUDA kernels need a CUDA build of PyTorch; this is {torch.__version__}. Install one, see pytorch.org"
        )
    raise KernelError("PyTorch finds no CUDA device; look at nvidia-smi and CUDA_VISIBLE_DEVICES")


def _primary_context(device_index: int) -> ctypes.c_void_p:
    """Return the context that PyTorch uses on a device; it is kept, as PyTorch keeps it, until the process ends."""
    library = _library()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(library.cuDeviceGet(ctypes.byref(device), device_index), f"finding cuda:{device_index}")
    _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"using cuda:{device_index}")
    return context


@contextmanager
def _current(context: ctypes.c_void_p) -> Iterator[None]:
    """Make a context current inside the block, on any thread and whatever device PyTorch has selected there."""
    library = _library()
    _check(library.cuCtxPushCurrent_v2(context), "making the device's context current")
    try:
        yield
    finally:
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@cache
def _launch_attributes(programmatic: bool, cooperative: bool, cluster: int, spread: bool) -> tuple[int, int]:
    """Return the address and the number of the attributes of a launch; there are few combinations and they are kept."""
    values: list[tuple[int, tuple[int, ...]]] = []
    if programmatic:
        values.append((LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
    if cooperative:
        values.append((LAUNCH_COOPERATIVE, (1,)))
    if cluster != 1:
        values.append((LAUNCH_CLUSTER_DIMENSION, (cluster, 1, 1)))
        if spread:
            values.append((LAUNCH_CLUSTER_SCHEDULING_POLICY, (CLUSTER_SPREAD,)))
    if not values:
        return 0, 0
    attributes = (LaunchAttribute * len(values))()
    for attribute, (number, value) in zip(attributes, values, strict=True):
        attribute.id = number
        attribute.value[: len(value)] = value
    _kept.append(attributes)
    return ctypes.addressof(attributes), len(values)


_kept: list[Any] = []
"""What the driver reads through bare addresses."""


def _layout(name: str, types: Sequence[type[Any]]) -> tuple[struct.Struct, list[int]]:
    """Return how to pack arguments of these types into one block, and where in it each of them begins."""
    parts, offsets, end = ["@"], [], 0
    for kind in types:
        padding = -end % _alignment(name, kind)
        offsets.append(end + padding)
        end += padding + ctypes.sizeof(kind)
        code = f"{ctypes.sizeof(kind)}s" if issubclass(kind, ctypes.Structure) else kind._type_
        parts.append(f"{padding}x{code}")
    return struct.Struct("".join(parts)), offsets


def _alignment(name: str, kind: type[Any]) -> int:
    code = getattr(kind, "_type_", None)
    is_plain = isinstance(code, str) and code in _PLAIN_TYPES
    if not (is_plain or issubclass(kind, ctypes.Structure)):
        raise KernelError(
            f"kernel {name!r}: {kind!r} is no type of an argument; use ctypes' numbers, c_void_p, or a Structure"
        )
    return ctypes.alignment(kind)


def _plain(argument: Any) -> Any:
    """Return the number in a ctypes value, a null pointer as 0; structures and plain ints as they are."""
    if type(argument) is int or isinstance(argument, ctypes.Structure):
        return argument
    return argument.value or 0


def _check(status: int, doing: str) -> None:
    """Raise a KernelError that says what was being done and what the driver calls the reason, unless all is well."""
    if status:
        library = _library()
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(name))
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = f"{(name.value or b'unknown error').decode()} ({status}): {(text.value or b'no description').decode()}"
        raise KernelError(f"{doing} failed: {reason}")
