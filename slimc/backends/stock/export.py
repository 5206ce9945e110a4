"""From a compressed model to a folder that stock transformers opens: what ``slimc.export_hf`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimc.backends import hf
from slimc.backends.stock.card import model_card
from slimc.backends.stock.folder import Record, is_replaceable, write_adapters, write_record, write_shards
from slimc.backends.stock.scheme import Scheme, check_inputs, choose_scheme, first_of, no_codes_for, notes
from slimc.backends.stock.tensors import code_tensors
from slimc.errors import InputError
from slimc.runtime.files import check_replaceable, check_writable, publish_folder, readable, write_file
from slimc.runtime.formats import LinearFormat, specs_nbytes
from slimc.runtime.modules import SlimLinear
from slimc.runtime.storage import ROOM_FOR_DESCRIPTION, Contents, collect, join, site_tensors, tensor_nbytes
from slimc.runtime.tensor_files import torch_name

__all__ = ["ExportedSite", "HfReport", "export_folder"]


@dataclass(frozen=True)
class ExportedSite:
    """What a compressed layer takes in the folder.

    Attributes:
        form: its packed form, for people.
        shape: output and input features.
        bytes: in the folder, without the bias.
        packed_bytes: of its packed form.
        adapter_bytes: of its adapters in the folder, part of ``bytes``.
        packed_adapter_bytes: of the same in their packed form, part of ``packed_bytes``.
        notes: why it takes more.
    """

    form: str
    shape: tuple[int, int]
    bytes: int
    packed_bytes: int
    adapter_bytes: int
    packed_adapter_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HfReport:
    """What an exported folder takes; a table if printed.

    Attributes:
        folder: where it is.
        scheme: of the codes, None if there are none.
        other_bytes: of the tensors that belong to no compressed layer.
        sites: the compressed layers by name.
    """

    folder: Path
    scheme: Scheme | None
    other_bytes: int
    sites: dict[str, ExportedSite]

    def __str__(self) -> str:
        """Say what is how large, and why it is larger than the packed form where it is."""
        layers, packed, adapters, packed_adapters = (
            sum(getattr(site, part) for site in self.sites.values())
            for part in ("bytes", "packed_bytes", "adapter_bytes", "packed_adapter_bytes")
        )
        weights = max(sum(site.shape[0] * site.shape[1] for site in self.sites.values()), 1)
        codes = "dense weights" if self.scheme is None else f"codes {self.scheme}"
        lines = [
            f"{self.folder}: {readable(layers + self.other_bytes)}, for stock transformers: {codes}",
            f"  compressed layers: {len(self.sites)}, {readable(layers)}, {8 * layers / weights:.2f} bits a weight",
            f"    as slimc packs them: {readable(packed)}, {8 * packed / weights:.2f} bits a weight",
        ]
        if adapters:
            lines.append(
                f"    adapters (PEFT LoRA): {readable(adapters)}; as slimc packs them: {readable(packed_adapters)}"
            )
        lines += [
            f"  everything else: {readable(self.other_bytes)}",
        ]
        counts = Counter(note for site in self.sites.values() for note in site.notes)
        return "\n".join(lines + [f"  {note} ({count} of the layers)" for note, count in counts.items()])


@dataclass(frozen=True)
class _Layer:
    """A compressed layer on its way into the folder.

    Attributes:
        module: the layer.
        transposed: whether transformers has its weight [columns, rows].
        merged: why it is decoded with its adapters, None if it is not.
    """

    module: SlimLinear
    transposed: bool
    merged: str | None

    @property
    def form(self) -> LinearFormat:
        return self.module.format

    @property
    def coded(self) -> bool:
        return self.merged is None and self.form.weight.bits is not None

    @property
    def adapted(self) -> bool:
        return self.merged is None and self.form.rank > 0

    def tensors(self, scheme: Scheme | None) -> dict[str, Tensor]:
        """Return the tensors of the base weight, by the names that they have after the layer's."""
        if self.coded and scheme is not None:
            return code_tensors(self.module.packed.weight, scheme)
        weight = self.module.weight if self.merged is not None else self.module.packed.weight.decode()
        return {"weight": weight.t().contiguous() if self.transposed else weight}

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the adapters, left [rows, rank] and right [rank, columns], None if there are none apart."""
        left, right = self.module.packed.left, self.module.packed.right
        return None if not self.adapted or left is None or right is None else (left.decode(), right.decode())

    def size(self, scheme: Scheme | None) -> ExportedSite:
        form, weight = self.form, self.form.weight
        dense = form.rows * form.columns * weight.dtype.itemsize
        base = specs_nbytes(scheme.specs(weight)) if self.coded and scheme is not None else dense
        adapters = packed_adapters = 0
        if self.adapted and form.left is not None and form.right is not None:
            adapters = form.rank * (form.rows + form.columns) * form.left.dtype.itemsize
            packed_adapters = form.left.nbytes() + form.right.nbytes()
        why = [f"decoded to a dense weight: {self.merged}"] if self.merged is not None else []
        return ExportedSite(
            form=form.describe(),
            shape=(form.rows, form.columns),
            bytes=base + adapters,
            packed_bytes=form.nbytes(),
            adapter_bytes=adapters,
            packed_adapter_bytes=packed_adapters,
            notes=tuple(why or notes(form, scheme if self.coded else None)),
        )


def export_folder(model: nn.Module, path: Path, *, tokenizer: Any, allow_dense: bool, overwrite: bool) -> HfReport:
    """Write the folder; see ``slimc.export_hf``."""
    record, _ = hf.saved_form(model)
    if record.kind != "huggingface":
        raise InputError(
            f"{record.architecture} is no class of transformers, so transformers cannot open it; save it with "
            "slimc.save, or export it to ONNX"
        )
    check_replaceable(path, overwrite=overwrite, replaceable=is_replaceable)
    check_writable(path)
    contents = collect(model)
    layers = _place(model, allow_dense=allow_dense)
    scheme = choose_scheme({name: layer.form.weight for name, layer in layers.items() if layer.coded})
    sites = {name: layer.size(scheme) for name, layer in layers.items()}
    others = _other_tensors(model, contents)
    keys: dict[str, Any] = {"dtype": _dtype(others, layers)}
    if scheme is not None:
        dense = _dense_matrices(model) + [name for name, layer in layers.items() if not layer.coded]
        keys["quantization_config"] = scheme.to_json(ignore=dense)
    _, write_model_files = hf.saved_form(model, tokenizer, keys=keys)
    report = HfReport(path, scheme, sum(map(tensor_nbytes, others.values())), sites)
    needed = report.other_bytes + sum(site.bytes for site in sites.values()) + ROOM_FOR_DESCRIPTION
    with publish_folder(path, needed=needed, overwrite=overwrite, replaceable=is_replaceable) as folder:
        write_shards(folder, _all_tensors(others, layers, scheme))
        factors = {name: found for name, layer in layers.items() if (found := layer.factors()) is not None}
        if factors:
            write_adapters(folder, factors, _task(record.architecture))
        write_model_files(folder)
        ranks = [left.shape[1] for left, _ in factors.values()]
        write_file(folder / "README.md", model_card(record.architecture, scheme, most=max(ranks, default=0)).encode())
        rounded = any(layer.merged is not None for layer in layers.values())
        described = {name: asdict(site) for name, site in sites.items()}
        write_record(folder, Record(None if scheme is None else str(scheme), rounded, described))
    return report


def _place(model: nn.Module, *, allow_dense: bool) -> dict[str, _Layer]:
    """Return the compressed layers by all of their names, each with how it goes into the folder.

    Raises:
        InputError: there is no place for some of them.
    """
    found = model.named_modules(remove_duplicate=False)
    modules = {name: module for name, module in found if isinstance(module, SlimLinear)}
    check_inputs({name: module.format for name, module in modules.items()})
    stock = dict(hf.outline(model).named_modules(remove_duplicate=False))
    kinds = {name: type(stock[name]).__name__ for name in modules}
    if unknown := [name for name, kind in kinds.items() if kind not in ("Linear", "Conv1D")]:
        raise InputError(
            f"{first_of(unknown)} is a {kinds[unknown[0]]} in transformers, which slimc cannot write; compress the "
            "model again with exclude= (--exclude) for it"
        )
    layers = {
        name: _Layer(module, kinds[name] == "Conv1D", no_codes_for(module.format, kinds[name]))
        for name, module in modules.items()
    }
    merged = {name: layer.merged for name, layer in layers.items() if layer.merged is not None}
    if merged and not allow_dense:
        raise InputError(
            f"{first_of(merged)} {next(iter(merged.values()))}. Write such layers dense with allow_dense=True "
            "(--allow-dense), choose another recipe ('slimc recipes'), or export to ONNX, which has a place for all"
        )
    return layers


def _dense_matrices(model: nn.Module) -> list[str]:
    """Return the modules with a dense matrix that compressed-tensors may take for a linear, such as routers."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | SlimLinear)
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 2
    ]


def _other_tensors(model: nn.Module, contents: Contents) -> dict[str, Tensor]:
    """Return what belongs to no compressed layer, without the names that transformers ties by itself."""
    by_itself = set(getattr(model, "all_tied_weights_keys", {}))
    packed = {name for site, form in contents.sites.items() for name, _ in site_tensors(site, form)}
    extra = {
        alias: contents.tensors[first]
        for alias, first in contents.ties.items()
        if alias not in by_itself and alias not in packed
    }
    return {name: contents.tensors[name] for name in contents.dense()} | extra


def _all_tensors(
    others: Mapping[str, Tensor], layers: Mapping[str, _Layer], scheme: Scheme | None
) -> Iterator[tuple[str, Tensor]]:
    yield from others.items()
    for name, layer in layers.items():
        for part, tensor in layer.tensors(scheme).items():
            yield join(name, part), tensor


def _dtype(others: Mapping[str, Tensor], layers: Mapping[str, _Layer]) -> str:
    """Return what transformers is to compute in: the dtype of the first dense weight, whatever the model came from."""
    dtypes = [tensor.dtype for tensor in others.values() if tensor.is_floating_point()]
    dtypes += [layer.form.weight.dtype for layer in layers.values()]
    return torch_name(dtypes[0])


def _task(architecture: str) -> str | None:
    """Return the name that PEFT has for what a model is for, None if it need not be known."""
    return "CAUSAL_LM" if architecture.endswith("ForCausalLM") else None
