"""The native folder: a compressed model on disk, really packed, and nothing but JSON and safetensors.

    slimc.json                          what the folder holds: recipe, sites with their formats, digests, ties
    run.json                            timings, versions, and what decided the result; the names of the caller's files
    slimc-00001-of-0000n.safetensors    the tensors, under their names in the model's ``state_dict``
    config.json, tokenizer files ...    for Hugging Face models, written by the caller

The weight files are named so that no stock loader takes them for a dense checkpoint. Equal models give equal
bytes in everything but ``run.json``. A folder is believed only after every size, name, shape, dtype and digest
has been checked, and all of that happens before the first tensor is allocated.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimc.errors import FormatError, InputError, NumericsError, closest
from slimc.runtime.description import (
    DESCRIPTION,
    FORMAT_VERSION,
    Description,
    ModelRecord,
    parse_description,
    parse_format,
)
from slimc.runtime.files import file_inside, json_bytes, publish_folder, read_json, recover, write_file
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import LinearFormat, PackedLinear
from slimc.runtime.rebuild import (
    all_tensors,
    cast_buffer,
    linear_shape,
    names_of,
    owner,
    replace_modules,
    tie,
)
from slimc.runtime.tensor_files import (
    DTYPES_BY_TORCH_NAME,
    NAMES,
    Entry,
    TensorDigest,
    read_header,
    torch_name,
    write_tensors,
)
from slimc.version import __version__

RUN = "run.json"
MAX_SHARD_BYTES = 4_000_000_000

_SHARD = re.compile(r"slimc-\d{5,}-of-\d{5,}\.safetensors")

ROOM_FOR_DESCRIPTION = 16 << 20
"""Free space asked for beyond the tensors: JSON and tokenizer files."""


@dataclass(frozen=True)
class Contents:
    """What of a model is stored.

    Attributes:
        tensors: each distinct tensor of the ``state_dict`` under its first name.
        ties: every further name of such a tensor, with its first name.
        sites: the format of each compressed linear, by module name; one in several places has several names.
        buffers: dtypes of the buffers that are not stored.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]
    sites: dict[str, LinearFormat]
    buffers: dict[str, torch.dtype]

    def stored_name(self, name: str) -> str:
        """Return the name under which the tensor called ``name`` is stored."""
        return self.ties.get(name, name)

    def dense(self) -> list[str]:
        """Return the stored names that no site accounts for, sorted."""
        packed = {self.stored_name(name) for site in self.sites for name, _ in site_tensors(site, self.sites[site])}
        return sorted(self.tensors.keys() - packed)


def join(module: str, tensor: str) -> str:
    """Return the ``state_dict`` name of a tensor of a module."""
    return f"{module}.{tensor}" if module else tensor


def site_tensors(site: str, form: LinearFormat) -> list[tuple[str, str]]:
    """Return the full and the short name of every tensor of a site, sorted."""
    return [(join(site, name), name) for name in sorted(form.tensor_specs())]


# ---------------------------------------------------------------------------------------------------- writing


def _content(tensor: Tensor) -> str:
    """Return a digest of the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def collect(model: nn.Module) -> Contents:
    """Find what of ``model`` must be stored, each storage once.

    Raises:
        InputError: the ``state_dict`` holds something that a safetensors file cannot.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    shareable = {
        join(name, tensor)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SlimLinear) and module.format.right is not None
        for tensor in module.format.tensor_specs()
        if tensor.startswith("right_")
    }
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.dtype not in NAMES or value.layout != torch.strided:
            kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(f"{name} is {kind}, which cannot be saved: only plain tensors are stored")
        if value.is_meta:
            raise InputError(f"{name} is on the meta device and has no values to save; load the model's weights first")
        place: tuple[object, ...] = (name,)
        if value.numel():
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if name in shareable:
            # Siblings may have one right factor; a device may hold it for each of them.
            place = ("right factor", value.dtype, value.shape, _content(value))
        first = first_names.setdefault(place, name)
        if first == name:
            tensors[name] = value
        else:
            ties[name] = first
    # A linear used in two places has two names in the state_dict, so both are listed; its tensors are tied above.
    modules = model.named_modules(remove_duplicate=False)
    sites = {name: module.format for name, module in modules if isinstance(module, SlimLinear)}
    persistent = tensors.keys() | ties.keys()
    # Whatever else a compressed linear holds is made of its tensors, for one device.
    buffers = {
        name: buffer.dtype
        for name, buffer in model.named_buffers()
        if name not in persistent and owner(name) not in sites and buffer.dtype in NAMES
    }
    return Contents(tensors, ties, sites, buffers)


def save_folder(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    record: ModelRecord,
    report: Mapping[str, Any],
    seconds: Mapping[str, float] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write ``model`` as a native folder and return where it is.

    The folder appears whole or not at all, and an existing one is replaced only once the new one is on the disk.

    Args:
        model: a model whose compressed linears are ``SlimLinear`` modules; anything else in it is stored dense.
        path: the folder to write; missing parents are made.
        record: what kind of model it is.
        report: ``Report.to_json()`` of the compression.
        seconds: timings, for ``run.json``.
        fingerprint: what decided the result, for ``run.json``; see :func:`recorded_fingerprint`.
        write_extra: writes further files (configuration, tokenizer) into the folder it is given.
        overwrite: replace an existing native folder, unless there is anything in it that was not saved with it.
        max_shard_bytes: how large a weight file may grow; a single larger tensor gets a file of its own.

    Raises:
        InputError: the target exists (and with ``overwrite``: holds files of others, which are named), the disk is
            full, a step of writing fails, or a tensor cannot be stored.
        NumericsError: the report holds NaN or Inf.
    """
    # torch.compile's wrapper adds a prefix to every name; what it wraps is the model.
    model = getattr(model, "_orig_mod", model)
    contents = collect(model)
    shards = plan_shards(contents.tensors, max_shard_bytes)
    description = describe(contents, [name for name, _ in shards], record, report)
    needed = sum(tensor_nbytes(tensor) for tensor in contents.tensors.values()) + ROOM_FOR_DESCRIPTION
    target = Path(path)
    with publish_folder(target, needed=needed, overwrite=overwrite, replaceable=is_replaceable) as folder:
        for name, members in shards:
            write_tensors(folder / name, {member: contents.tensors[member] for member in members})
        if write_extra is not None:
            write_extra(folder)
        extra = sorted(files_in(folder) - {name for name, _ in shards})
        run = {
            "extra_files": extra,
            "fingerprint": dict(fingerprint or {}),
            "seconds": dict(seconds or {}),
            "versions": versions(),
        }
        write_file(folder / RUN, json_bytes(run))
        write_file(folder / DESCRIPTION, description)
    return target


def plan_shards(tensors: Mapping[str, Tensor], limit: int) -> list[tuple[str, list[str]]]:
    """Distribute tensors, by name, over files of at most ``limit`` bytes; return each file's name and members."""
    shards: list[list[str]] = [[]]
    room = limit
    for name in sorted(tensors):
        size = tensor_nbytes(tensors[name])
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return list(zip(shard_names(len(shards)), shards, strict=True))


def shard_names(count: int) -> list[str]:
    """Return the names of ``count`` weight files."""
    return [f"slimc-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def tensor_nbytes(tensor: Tensor) -> int:
    """Return how many bytes ``tensor`` takes in a file."""
    return tensor.numel() * tensor.dtype.itemsize


def describe(contents: Contents, shards: list[str], record: ModelRecord, report: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``slimc.json``."""

    def digest(names: Iterable[tuple[str, str]]) -> str:
        sha = TensorDigest()
        for name, label in names:
            sha.add(label, contents.tensors[contents.stored_name(name)])
        return sha.hexdigest()

    value = {
        "format_version": FORMAT_VERSION,
        "slimc_version": __version__,
        "model": record.model_dump(),
        "report": dict(report),
        "sites": [
            {"name": name, "format": form.to_json(), "sha256": digest(site_tensors(name, form))}
            for name, form in sorted(contents.sites.items())
        ],
        "dense": [
            {
                "name": name,
                "dtype": torch_name(contents.tensors[name].dtype),
                "shape": list(contents.tensors[name].shape),
                "sha256": digest([(name, name)]),
            }
            for name in contents.dense()
        ],
        "ties": contents.ties,
        "buffers": {name: torch_name(dtype) for name, dtype in contents.buffers.items()},
        "shards": shards,
    }
    try:
        return json_bytes(value)
    except ValueError as error:
        raise NumericsError(f"the report of this model holds NaN or Inf ({error}); compress it again") from error


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    packages = {}
    for name in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return packages | {"python": platform.python_version(), "slimc": __version__}


def is_native_folder(path: Path) -> bool:
    """Tell whether ``path`` is a folder that slimc wrote."""
    return (path / DESCRIPTION).is_file()


def is_replaceable(path: Path) -> bool:
    """Tell whether ``path`` is a folder that slimc wrote; one that others put files into is refused by name.

    Raises:
        InputError: it is a native folder and holds files that were not saved with it.
    """
    return may_be_replaced(path, DESCRIPTION, _written)


def _written(path: Path) -> set[str]:
    return {RUN, *extra_files(path), *filter(_SHARD.fullmatch, files_in(path))}


def may_be_replaced(path: Path, description: str, written: Callable[[Path], Iterable[str]]) -> bool:
    """Tell whether ``path`` is a folder of the kind that is known by a file ``description``, with nothing else in it.

    Args:
        path: the folder.
        description: the name of that file.
        written: returns the files that were written with it, as relative paths with ``/``.

    Raises:
        InputError: it is such a folder and holds files of others, which are named.
    """
    if not (path / description).is_file():
        return False
    foreign = files_in(path) - {description, *written(path)}
    if foreign:
        raise InputError(
            f"{path}: holds {some(foreign)}, which slimc did not write, so it will not be replaced; move them "
            "elsewhere or choose another folder"
        )
    return True


def files_in(folder: Path) -> set[str]:
    """Return all that is in ``folder`` and its folders, but for the folders, as relative paths with ``/``."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def extra_files(folder: Path) -> set[str]:
    """Return the configuration and tokenizer files that ``run.json`` lists, none if it cannot be read."""
    names = _run_record(folder).get("extra_files")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def recorded_fingerprint(folder: Path) -> dict[str, Any]:
    """Return what decided the result, as ``run.json`` has it; nothing if it was not recorded or cannot be read."""
    fingerprint = _run_record(folder).get("fingerprint")
    return fingerprint if isinstance(fingerprint, dict) else {}


def _run_record(folder: Path) -> dict[str, Any]:
    try:
        run = read_json(folder / RUN)
    except FormatError:
        return {}
    return run if isinstance(run, dict) else {}


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class NativeFolder:
    """A native folder whose files have all been checked and whose tensors have not been loaded.

    Attributes:
        path: where it is.
        description: the validated ``slimc.json``.
        formats: the format of each site.
        entries: for every stored tensor its file and its place in it.
    """

    path: Path
    description: Description
    formats: dict[str, LinearFormat]
    entries: dict[str, tuple[Path, Entry]]

    @property
    def report(self) -> dict[str, Any]:
        """The compression's report, in the form of ``Report.to_json()``."""
        return self.description.report.model_dump()

    def stored_name(self, name: str) -> str:
        """Return the name under which the tensor called ``name`` is stored."""
        return self.description.ties.get(name, name)

    def site_nbytes(self, site: str) -> int:
        """Return the bytes that the tensors of a site take in the files."""
        stored = {self.stored_name(name) for name, _ in site_tensors(site, self.formats[site])}
        return sum(self.entries[name][1].end - self.entries[name][1].start for name in stored)

    def check_digests(self) -> None:
        """Compare the bytes of every tensor with the digests in ``slimc.json``.

        Raises:
            FormatError: they differ.
        """

        def check(job: tuple[str, str, list[tuple[str, str]]]) -> None:
            owner, expected, names = job
            sha = TensorDigest()
            for name, label in names:
                path, entry = self.entries[self.stored_name(name)]
                sha.add_stored(label, path, entry)
            if sha.hexdigest() != expected:
                path, _ = self.entries[self.stored_name(names[0][0])]
                raise FormatError(
                    f"{path}: the bytes of {owner!r} do not match their digest in {DESCRIPTION}; "
                    "the file is damaged or was changed, copy or compress it again"
                )

        jobs = [
            (site.name, site.sha256, site_tensors(site.name, self.formats[site.name]))
            for site in self.description.sites
        ]
        jobs += [(dense.name, dense.sha256, [(dense.name, dense.name)]) for dense in self.description.dense]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(check, jobs):
                pass

    def check_fits(self, model: nn.Module) -> None:
        """Check, without changing it, that ``model`` is of the architecture that the folder was written from.

        Raises:
            FormatError: a site or a tensor is missing on either side, or has another shape.
        """
        where = f"{self.path}: does not fit {type(model).__name__}"
        modules = dict(model.named_modules(remove_duplicate=False))
        stored = {dense.name for dense in self.description.dense} | self.description.ties.keys()
        for site, form in self.formats.items():
            if site not in modules:
                raise FormatError(f"{where}, which has no module {site!r}{closest(site, modules)}")
            shape = linear_shape(modules[site])
            if shape is not None and sorted(shape) != sorted((form.rows, form.columns)):
                raise FormatError(f"{where}: {site} is {form.rows} x {form.columns} here and {shape} in the model")
            if getattr(modules[site], "bias", None) is not None and join(site, "bias") not in stored:
                raise FormatError(f"{where}: {site} has a bias in the model, and none here")
        replaced = names_of(model, self.formats)
        found = {name: value for name, value in model.state_dict().items() if owner(name) not in replaced}
        expected = {name for name in stored if owner(name) not in replaced}
        for names, problem in (
            (found.keys() - expected, "the folder lacks"),
            (expected - found.keys(), "the model lacks"),
        ):
            if names:
                raise FormatError(f"{where}: {problem} {some(names)}")
        for name, value in found.items():
            entry = self.entries[self.stored_name(name)][1]
            if tuple(value.shape) != entry.shape or value.is_floating_point() != entry.dtype.is_floating_point:
                raise FormatError(
                    f"{where}: {name} is {entry.dtype} {list(entry.shape)} here and {value.dtype} {list(value.shape)} "
                    "in the model"
                )

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Load every stored tensor onto ``device``, in memory of its own.

        Raises:
            FormatError: a file changed since it was checked.
        """
        loaded: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, (path, _) in self.entries.items():
                try:
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = files[path].get_tensor(name)
                except (SafetensorError, OSError) as error:
                    raise FormatError(f"{path}: cannot be read ({error}); get the file again") from None
                # A view into the mapped file would die with the file; a copy is aligned and ours.
                loaded[name] = tensor.clone() if device.type == "cpu" else tensor.to(device)
        return loaded

    def restore(self, model: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
        """Turn ``model``, an instance of the right architecture, into the stored model, in place, and return it.

        Sites become ``SlimLinear`` modules, all other parameters and buffers are filled, ties are restored, and
        the model is put on ``device`` in evaluation mode. Parameters of ``model`` may be on the meta device.

        Raises:
            FormatError: the model does not fit (it is then unchanged), or a packed tensor is not valid.
        """
        self.check_fits(model)
        device = torch.device(device)
        tensors = self.tensors(device)
        for alias, name in self.description.ties.items():
            tensors[alias] = tensors[name]
        linears = {site: self._linear(site, form, tensors) for site, form in self.formats.items()}
        model = replace_modules(model, linears)
        packed = {name for site, form in self.formats.items() for name, _ in site_tensors(site, form)}
        wanted = model.state_dict().keys() - packed
        dense = {name: tensor for name, tensor in tensors.items() if name in wanted}
        model.load_state_dict(dense, strict=False, assign=True)
        for alias, name in self.description.ties.items():
            tie(model, alias, name)
        for name, dtype in self.description.buffers.items():
            cast_buffer(model, name, DTYPES_BY_TORCH_NAME[dtype])
        unfilled = [name for name, tensor in all_tensors(model) if tensor.is_meta]
        if unfilled:
            raise FormatError(f"{self.path}: {type(model).__name__} is left without values for {some(unfilled)}")
        return model.to(device).eval()

    def _linear(self, site: str, form: LinearFormat, tensors: Mapping[str, Tensor]) -> SlimLinear:
        try:
            packed = PackedLinear.from_tensors(form, {short: tensors[name] for name, short in site_tensors(site, form)})
            return SlimLinear(packed, tensors.get(join(site, "bias")))
        except FormatError as error:
            raise FormatError(f"{self.path}: site {site!r}: {error}") from None


def open_folder(path: str | os.PathLike[str], *, verify: bool = True) -> NativeFolder:
    """Read and check the description of a native folder and everything it says about the weight files.

    A folder that a process put aside to replace it, and was killed before the new one stood, is put back first.

    Args:
        path: the folder.
        verify: also read all weights once and compare their digests.

    Raises:
        InputError: there is no such folder.
        FormatError: a file is missing, malformed, of another version, or disagrees with another one.
    """
    folder = Path(path)
    if not folder.exists():
        recover(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not is_native_folder(folder):
        raise FormatError(f"{folder}: has no {DESCRIPTION}, so it is not a folder that slimc wrote")
    source = file_inside(folder, DESCRIPTION)
    description = parse_description(read_json(source), source)
    formats = {site.name: parse_format(site, source) for site in description.sites}
    native = NativeFolder(folder, description, formats, read_shards(folder, description.shards))
    check_names(native, source)
    check_specs(native, source)
    if verify:
        native.check_digests()
    return native


def load_folder(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    skeleton: Callable[[NativeFolder], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a native folder; return the model and its report in the form of ``Report.to_json()``.

    Args:
        path: the folder.
        model: an instance of the architecture that was saved; it is filled in place and returned. Needed for
            models that are not Hugging Face ones.
        skeleton: builds the model of a ``huggingface`` folder, parameters on the meta device.
        device: where to put the model.
        verify: compare digests; costs one more read of the weights.

    Raises:
        InputError: no such folder, or a plain module was saved and no ``model`` is given.
        FormatError: the folder is damaged, hostile, of another version, or does not fit ``model``.
    """
    folder = open_folder(path, verify=verify)
    if model is None:
        record = folder.description.model
        if record.kind == "module" or skeleton is None:
            raise InputError(
                f"{folder.path}: holds a {record.architecture}, which slimc cannot build by itself; make one and hand "
                "it in as model=..."
            )
        model = skeleton(folder)
    return folder.restore(model, device), folder.report


def read_shards(folder: Path, names: list[str]) -> dict[str, tuple[Path, Entry]]:
    """Check the names and headers of the weight files and return where each tensor is."""
    if not names or names != shard_names(len(names)):
        raise FormatError(
            f"{folder / DESCRIPTION}: the weight files must be called {shard_names(max(len(names), 1))[0]} and so on"
        )
    strangers = sorted({path.name for path in folder.glob("slimc-*.safetensors")} - set(names))
    if strangers:
        raise FormatError(f"{folder}: {strangers[0]} does not belong to the others; two saved models were mixed")
    entries: dict[str, tuple[Path, Entry]] = {}
    for name in names:
        path = file_inside(folder, name)
        for tensor, entry in read_header(path).items():
            if tensor in entries:
                raise FormatError(f"{path}: tensor {tensor[:200]!r} is also in {entries[tensor][0].name}")
            entries[tensor] = (path, entry)
    return entries


def check_names(native: NativeFolder, source: Path) -> None:
    """Check that no tensor has two owners and every tie leads to a stored tensor."""
    description = native.description
    for what, names in (
        ("site", [site.name for site in description.sites]),
        ("tensor", [d.name for d in description.dense]),
    ):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{source}: {what} {twice[:200]!r} is listed twice")
    for alias, name in description.ties.items():
        if alias in native.entries or name not in native.entries:
            raise FormatError(
                f"{source}: the tie of {alias[:200]!r} to {name[:200]!r} does not lead to a stored tensor"
            )
    for name, dtype in description.buffers.items():
        if dtype not in DTYPES_BY_TORCH_NAME:
            raise FormatError(f"{source}: buffer {name[:200]!r} has the unknown dtype {dtype[:40]!r}")


def check_specs(native: NativeFolder, source: Path) -> None:
    """Check that the files hold exactly the tensors that the description implies, in shape and dtype."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for site, form in native.formats.items():
        for short, spec in form.tensor_specs().items():
            expected[native.stored_name(join(site, short))] = spec
    for dense in native.description.dense:
        if dense.dtype not in DTYPES_BY_TORCH_NAME:
            raise FormatError(f"{source}: {dense.name[:200]!r} has the unknown dtype {dense.dtype[:40]!r}")
        if dense.name in expected:
            raise FormatError(f"{source}: {dense.name[:200]!r} is listed both as dense and as part of a site")
        if owner(dense.name) in native.formats and dense.name != join(owner(dense.name), "bias"):
            raise FormatError(f"{source}: {dense.name[:200]!r} is no part of the format of its site")
        expected[dense.name] = (tuple(dense.shape), DTYPES_BY_TORCH_NAME[dense.dtype])
    for names, problem in (
        (expected.keys() - native.entries.keys(), "the weight files lack"),
        (native.entries.keys() - expected.keys(), f"{DESCRIPTION} does not mention"),
    ):
        if names:
            raise FormatError(f"{native.path}: {problem} {some(names)}; get the whole folder again")
    for name, (shape, dtype) in expected.items():
        path, entry = native.entries[name]
        if (entry.shape, entry.dtype) != (shape, dtype):
            raise FormatError(
                f"{path}: {name} is {entry.dtype} {list(entry.shape)}, but {DESCRIPTION} implies {dtype} {list(shape)}"
            )


def some(names: Iterable[str]) -> str:
    """Return a few of ``names`` for a message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name[:200]) for name in ordered[:3])
    return shown if len(ordered) <= 3 else f"{shown} and {len(ordered) - 3} more"
