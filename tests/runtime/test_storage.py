"""The native folder: what is written comes back bit for bit, and what was tampered with is refused."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from slimc.errors import FormatError, InputError, NumericsError
from slimc.passes.report import LeftRow, Report, SiteRow
from slimc.runtime import files, storage, tensor_files
from slimc.runtime.description import ModelRecord
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import NM, PackedBinary, PackedLinear, Unstructured, pack_weight
from slimc.runtime.storage import load_folder, open_folder, save_folder

RECORD = ModelRecord(kind="module", architecture="Net")


def packed_linear(rows: int, columns: int, *, sparsity: Any = None, rank: int = 0, seed: int = 0) -> PackedLinear:
    """A random 4-bit weight, perhaps sparse, perhaps with 4-bit factors and an input scale."""
    generator = torch.Generator().manual_seed(seed)

    def quantised(rows: int, columns: int, **options: Any) -> Any:
        codes = torch.randint(16, (rows, columns), dtype=torch.uint8, generator=generator)
        scale = torch.rand(rows, -(-columns // 4), generator=generator).to(torch.bfloat16)
        return pack_weight(codes, bits=4, scale=scale, group=4, **options)

    if sparsity is None:
        weight = quantised(rows, columns)
    else:
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[:, ::2] = True
        weight = quantised(rows, columns, mask=mask, sparsity=sparsity)
    if not rank:
        return PackedLinear(weight)
    scale = torch.rand(columns, generator=generator).to(torch.bfloat16)
    return PackedLinear(weight, quantised(rows, rank), quantised(rank, columns), scale)


class Net(nn.Module):
    """Every kind of state: two linears, a tied head, a norm of another dtype, both kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(1, 9) / 8, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.block(hidden * self.table)
        return self.head(self.norm(hidden.float()).to(hidden.dtype))


def small_net() -> Net:
    torch.manual_seed(0)
    net = Net().to(torch.bfloat16).eval()
    net.norm.float()
    net.steps += 7
    net.block[0] = SlimLinear(packed_linear(12, 8, sparsity=NM(2, 4), rank=3), net.block[0].bias)
    net.block[2] = SlimLinear(packed_linear(8, 12, sparsity=Unstructured(), seed=1))
    return net


REPORT = Report(
    recipe=[{"quantize": {"bits": 4}}, {"fuse": {}}],
    sites=[SiteRow("block.0", (12, 8), "2:4 int4", 3.0, 0.125, None, 0.25)],
    left=[LeftRow("head", (11, 8), "shares its storage with an embedding")],
    calibration_tokens=64,
)


def save(net: nn.Module, path: Path, **options: Any) -> Path:
    return save_folder(net, path, record=RECORD, report=REPORT.to_json(), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two weight files; tests that change it copy it first."""
    return save(small_net(), tmp_path_factory.mktemp("native") / "net", max_shard_bytes=300)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "net")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def nothing_else_in(parent: Path, *expected: str) -> bool:
    return sorted(path.name for path in parent.iterdir()) == sorted(expected)


# ------------------------------------------------------------------------------------------------ round trip


def test_output_after_loading_is_bit_equal(saved: Path) -> None:
    ids = torch.arange(11)[None]
    loaded, report = load_folder(saved, model=Net())
    assert torch.equal(loaded(ids), small_net()(ids))
    assert not loaded.training
    assert Report.from_json(report) == REPORT


def test_state_dict_after_loading_is_the_same(saved: Path) -> None:
    expected, (loaded, _) = small_net().state_dict(), load_folder(saved, model=Net())
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_every_tensor_is_stored_once_under_its_own_name_and_dtype(saved: Path) -> None:
    stored = {name: tensor for path in saved.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = {name: tensor for name, tensor in small_net().state_dict().items() if name != "head.weight"}
    assert stored.keys() == expected.keys()
    assert all(stored[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert stored["norm.weight"].dtype == torch.float32


def test_rounded_inputs_come_back_and_cost_no_byte(saved: Path, tmp_path: Path) -> None:
    net = small_net()
    rounded = replace(net.block[0].packed, activation="float8_e4m3fn")
    net.block[0] = SlimLinear(rounded, net.block[0].bias)
    folder = save(net, tmp_path / "net", max_shard_bytes=300)
    loaded, _ = load_folder(folder, model=Net())
    assert [loaded.block[0].format.activation, loaded.block[2].format.activation] == ["float8_e4m3fn", None]
    ids = torch.arange(11)[None]
    assert torch.equal(loaded(ids), net(ids))
    assert not torch.equal(loaded(ids), small_net()(ids))
    for path in saved.glob("*.safetensors"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_signs_come_back_and_take_the_promised_bytes(tmp_path: Path) -> None:
    net = small_net()
    first = net.block[0].packed
    signs = torch.randint(0, 256, (12, 1), dtype=torch.uint8)
    binary = PackedBinary(signs, torch.rand(12, 1).bfloat16(), torch.rand(1, 8).bfloat16())
    net.block[0] = SlimLinear(replace(first, binary=binary), net.block[0].bias)
    folder = save(net, tmp_path / "net")
    loaded, _ = load_folder(folder, model=Net())
    ids = torch.arange(11)[None]
    assert torch.equal(loaded(ids), net(ids))
    assert loaded.block[0].format.nbytes() == first.format.nbytes() + 12 + 2 * (12 + 8)
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(stored["block.0.signs"], signs)


def test_a_folder_from_before_inputs_were_rounded_is_read(folder: Path) -> None:
    path = folder / "slimc.json"
    record = json.loads(path.read_text("utf-8"))
    assert all("activation" not in site["format"] for site in record["sites"])
    for row in record["report"]["sites"]:
        del row["unrounded"]
    record["format_version"] = 1
    path.write_text(json.dumps(record), encoding="utf-8")
    ids = torch.arange(11)[None]
    loaded, report = load_folder(folder, model=Net())
    assert torch.equal(loaded(ids), small_net()(ids))
    assert Report.from_json(report).sites[0].unrounded is None


def test_ties_are_one_parameter_again(saved: Path) -> None:
    model = Net()
    model.head.weight = nn.Parameter(torch.zeros(11, 8))
    loaded, _ = load_folder(saved, model=model)
    assert loaded.head.weight is loaded.embed.weight


def test_buffers_that_are_not_stored_get_the_dtype_they_had(saved: Path) -> None:
    assert Net().table.dtype == torch.float32
    loaded, _ = load_folder(saved, model=Net())
    assert loaded.table.dtype == torch.bfloat16


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    with torch.device("meta"):
        outline = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    dense = nn.Sequential(SlimLinear(packed_linear(12, 8)), nn.Linear(12, 4))
    dense[0].bias = nn.Parameter(torch.ones(12))
    save(dense, tmp_path / "net")
    loaded, _ = load_folder(tmp_path / "net", model=outline)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), dense(x))


def test_a_module_used_twice_is_replaced_in_both_places(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        shared = nn.Linear(8, 8, bias=False)
        return nn.Sequential(shared, nn.ReLU(), shared)

    compressed = net()
    compressed[0] = compressed[2] = SlimLinear(packed_linear(8, 8))
    save(compressed, tmp_path / "net")
    loaded, _ = load_folder(tmp_path / "net", model=net())
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(torch.eye(8)), compressed(torch.eye(8)))


def test_one_linear_under_two_names_comes_back_where_two_shared_a_parameter(tmp_path: Path) -> None:
    def net() -> nn.ModuleDict:
        linears = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "ab"})
        linears["b"].weight = linears["a"].weight
        return linears

    compressed = net()
    compressed["a"] = compressed["b"] = SlimLinear(packed_linear(8, 8))
    save(compressed, tmp_path / "net")
    assert open_folder(tmp_path / "net").formats.keys() == {"a", "b"}
    loaded, _ = load_folder(tmp_path / "net", model=net())
    assert loaded["a"].values is loaded["b"].values
    assert torch.equal(loaded["b"](torch.eye(8)), compressed["a"](torch.eye(8)))


def test_a_compiled_model_is_saved_like_the_model_itself(saved: Path, tmp_path: Path) -> None:
    assert contents(
        save(torch.compile(small_net(), backend="eager"), tmp_path / "net", max_shard_bytes=300)
    ) == contents(saved)


def test_two_layers_that_share_a_packed_weight_share_it_again(tmp_path: Path) -> None:
    packed = packed_linear(8, 8)
    compressed = nn.Sequential(SlimLinear(packed, torch.ones(8)), SlimLinear(packed, torch.zeros(8)))
    save(compressed, tmp_path / "net")
    loaded, _ = load_folder(tmp_path / "net", model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert loaded[0].values.data_ptr() == loaded[1].values.data_ptr()
    assert torch.equal(loaded(torch.eye(8)), compressed(torch.eye(8)))


def test_a_model_that_is_one_linear(tmp_path: Path) -> None:
    compressed = SlimLinear(packed_linear(12, 8), torch.ones(12))
    save(compressed, tmp_path / "net")
    loaded, _ = load_folder(tmp_path / "net", model=nn.Linear(8, 12))
    assert torch.equal(loaded(torch.eye(8)), compressed(torch.eye(8)))


def test_equal_models_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    again = save(copy.deepcopy(small_net()), tmp_path / "net", max_shard_bytes=300, seconds={"sweep": 1.5})
    assert contents(again) == contents(saved)
    reloaded, _ = load_folder(saved, model=Net())
    assert contents(save(reloaded, tmp_path / "again", max_shard_bytes=300)) == contents(saved)


def test_timings_and_versions_are_kept_apart(tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "net", seconds={"sweep": 1.5})
    assert json.loads((path / "run.json").read_bytes())["seconds"] == {"sweep": 1.5}
    assert b"seconds" not in (path / "slimc.json").read_bytes()


def test_files_are_no_larger_than_asked_and_sites_take_the_promised_bytes(saved: Path) -> None:
    folder = open_folder(saved)
    assert len(folder.description.shards) > 1
    for shard in folder.description.shards:
        held = [entry for path, entry in folder.entries.values() if path.name == shard]
        assert sum(entry.end - entry.start for entry in held) <= 300
    for site, form in folder.formats.items():
        assert folder.site_nbytes(site) == form.nbytes()


def test_extra_files_are_part_of_the_folder(tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "net", write_extra=lambda place: files.write_file(place / "a.txt", b"a"))
    assert (path / "a.txt").read_bytes() == b"a"


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(tensor_files.NAMES, key=str)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_tensors_survive_the_weight_file(tmp_path_factory: pytest.TempPathFactory, specs: Any) -> None:
    specs.pop("__metadata__", None)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.tensor([(7 * i + len(name)) % 2 for i in range(count)], dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensor_files.write_tensors(path, tensors)
    entries, found = tensor_files.read_header(path), load_file(path)
    assert entries.keys() == found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (entries[name].dtype, entries[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert bytes(tensor_files.tensor_bytes(found[name])) == bytes(tensor_files.tensor_bytes(tensor))
        assert entries[name].start % tensor.dtype.itemsize == 0


# --------------------------------------------------------------------------------------------- tampered input


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "slimc.json"
        value = json.loads(path.read_bytes())
        change(value)
        path.write_text(json.dumps(value))

    return edit


def edit_text(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "slimc.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def first_shard(folder: Path) -> Path:
    return min(folder.glob("slimc-*.safetensors"))


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = first_shard(folder)
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        text = json.dumps(header).encode() if changed is None else changed
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return edit


def cut(size: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with first_shard(folder).open("r+b") as file:
            file.truncate(size if size >= 0 else os.fstat(file.fileno()).st_size + size)

    return edit


def flip_last_byte(folder: Path) -> None:
    path = first_shard(folder)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def link_shard(folder: Path) -> None:
    path = first_shard(folder)
    outside = folder.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def append(data: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with first_shard(folder).open("ab") as file:
            file.write(data)

    return edit


def deep_json(folder: Path) -> None:
    (folder / "slimc.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in sorted(header.items()) if name != "__metadata__" and value["shape"])


def overlap(header: dict[str, Any]) -> None:
    """Let a tensor start where the one before it starts, if both have the same size."""
    entries = sorted(
        (value for name, value in header.items() if name != "__metadata__"), key=lambda value: value["data_offsets"]
    )
    seen: dict[int, list[int]] = {}
    for entry in entries:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = seen.setdefault(end - start, [start, end])


def gap(header: dict[str, Any]) -> None:
    last = max((v for name, v in header.items() if name != "__metadata__"), key=lambda v: v["data_offsets"])
    last["data_offsets"] = [side + 8 for side in last["data_offsets"]]


def folder_as_shard(folder: Path) -> None:
    path = first_shard(folder)
    path.unlink()
    path.mkdir()


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda folder: (folder / "slimc.json").unlink(), "has no slimc.json"),
    "empty description": (lambda folder: (folder / "slimc.json").write_bytes(b""), "not valid JSON"),
    "cut description": (lambda folder: (folder / "slimc.json").write_bytes(b'{"format_version": 1'), "not valid JSON"),
    "binary description": (lambda folder: (folder / "slimc.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "description is a list": (lambda folder: (folder / "slimc.json").write_bytes(b"[1]"), "has no format_version"),
    "deep description": (deep_json, "levels deep"),
    "link as description": (
        lambda folder: (folder / "slimc.json").replace(folder / "x") and (folder / "slimc.json").symlink_to("x"),
        "symbolic link",
    ),
    "newer version": (edit_json(lambda d: d.update(format_version=9)), "upgrade slimc"),
    "other rule for adapters beside rounded inputs": (
        edit_json(
            lambda d: (
                d.update(format_version=1),
                d["sites"][0]["format"].update(activation="int8", input_scaled=False, left={}, right={}),
            )
        ),
        "has format version 1, .*compress the model again",
    ),
    "older version": (edit_json(lambda d: d.update(format_version=0)), "compress the model again"),
    "version is true": (edit_json(lambda d: d.update(format_version=True)), "has no format_version"),
    "unknown key": (edit_json(lambda d: d.update(colour="red")), "colour: Extra inputs are not permitted"),
    "unknown key inside": (edit_json(lambda d: d["dense"][0].update(x=1)), r"dense\.0\.x: Extra inputs"),
    "missing key": (edit_json(lambda d: d.pop("ties")), "ties: Field required"),
    "wrong type": (edit_json(lambda d: d.update(dense={})), "dense: Input should be a valid list"),
    "number as text": (edit_json(lambda d: d["dense"][0].update(shape=["8"])), "valid integer"),
    "unknown kind": (edit_json(lambda d: d["model"].update(kind="pickle")), "model.kind"),
    "report row without name": (edit_json(lambda d: d["report"]["sites"][0].pop("name")), "report.sites.0.name"),
    "duplicate key": (edit_text('"format_version": 2', '"format_version": 2, "format_version": 2'), "appears twice"),
    "NaN": (edit_text("0.125", "NaN"), "NaN is not JSON"),
    "huge number": (edit_text('"calibration_tokens": 64', f'"calibration_tokens": {"9" * 5000}'), "not valid JSON"),
    "unknown format key": (edit_json(lambda d: d["sites"][0]["format"].update(bit=4)), "unknown key 'bit'"),
    "absurd format": (
        edit_json(lambda d: d["sites"][0]["format"]["weight"].update(rows=10**15)),
        "a weight cannot have 1000000000000000 rows",
    ),
    "other format": (edit_json(lambda d: d["sites"][0]["format"]["weight"].update(rows=24)), "do not correct"),
    "other bits": (edit_json(lambda d: d["sites"][1]["format"]["weight"].update(bits=8)), "implies torch.uint8"),
    "inputs of no known kind": (
        edit_json(lambda d: d["sites"][0]["format"].update(activation="int9")),
        "site 'block.0': inputs cannot be rounded to 'int9'.*did you mean 'int8'",
    ),
    "inputs of a number": (edit_json(lambda d: d["sites"][0]["format"].update(activation=8)), "must be text, not 8"),
    "site twice": (edit_json(lambda d: d["sites"].append(d["sites"][0])), "site 'block.0' is listed twice"),
    "dense twice": (edit_json(lambda d: d["dense"].append(d["dense"][0])), "is listed twice"),
    "packed and dense": (edit_json(lambda d: d["dense"][0].update(name="block.0.values")), "both as dense and as part"),
    "stray tensor in a site": (edit_json(lambda d: d["dense"][0].update(name="block.0.x")), "no part of the format of"),
    "dense left out": (edit_json(lambda d: d["dense"].pop()), "slimc.json does not mention"),
    "dense not there": (edit_json(lambda d: d["dense"].append(d["dense"][0] | {"name": "x"})), "weight files lack 'x'"),
    "dense of another dtype": (edit_json(lambda d: d["dense"][0].update(dtype="float16")), "implies torch.float16"),
    "dense of no dtype": (edit_json(lambda d: d["dense"][0].update(dtype="object")), "unknown dtype 'object'"),
    "dense of another shape": (edit_json(lambda d: d["dense"][0].update(shape=[3])), r"implies .* \[3\]"),
    "tie to nothing": (edit_json(lambda d: d["ties"].update(a="b")), "does not lead to a stored tensor"),
    "tie of a stored tensor": (
        edit_json(lambda d: d["ties"].update({"norm.bias": "norm.weight"})),
        "does not lead to a stored tensor",
    ),
    "buffer of no dtype": (edit_json(lambda d: d["buffers"].update(table="float3")), "unknown dtype 'float3'"),
    "no shards": (edit_json(lambda d: d.update(shards=[])), "weight files must be called"),
    "absolute shard": (edit_json(lambda d: d.update(shards=["/etc/passwd"])), "weight files must be called"),
    "shard above": (edit_json(lambda d: d.update(shards=["../x.safetensors"])), "weight files must be called"),
    "shard link": (link_shard, "is a symbolic link"),
    "shard is a folder": (folder_as_shard, "is not a regular file"),
    "shard missing": (lambda folder: first_shard(folder).unlink(), "cannot be read"),
    "shard of another save": (
        lambda folder: shutil.copy(first_shard(folder), folder / "slimc-00001-of-00009.safetensors"),
        "two saved models were mixed",
    ),
    "empty file": (cut(0), "truncated or not a safetensors file"),
    "cut in the length": (cut(5), "truncated or not a safetensors file"),
    "cut in the header": (cut(40), "truncated or not a safetensors file"),
    "cut in the data": (cut(-1), "cut short"),
    "bytes appended": (append(b"x"), "cut short|describes a file of"),
    "endless header": (
        lambda folder: first_shard(folder).write_bytes(b"\xff" * 64),
        "truncated or not a safetensors file",
    ),
    "header is no JSON": (edit_header(lambda header: b"{]"), "not valid JSON"),
    "header is a list": (edit_header(lambda header: b"[]"), "header is not a JSON object"),
    "header with a duplicate": (edit_header(lambda header: b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "overlapping tensors": (edit_header(overlap), "overlaps the tensor before it"),
    "gap": (edit_header(gap), "leaves a gap before it"),
    "negative offset": (edit_header(lambda h: first(h).update(data_offsets=[-8, 0])), "impossible offsets"),
    "three offsets": (edit_header(lambda h: first(h).update(data_offsets=[0, 1, 2])), "impossible offsets"),
    "absurd shape": (edit_header(lambda h: first(h).update(shape=[2**40, 2**40])), "impossible shape"),
    "larger shape": (edit_header(lambda h: first(h).update(shape=[10**6])), "cannot take"),
    "unknown dtype": (edit_header(lambda h: first(h).update(dtype="PICKLE")), "unknown dtype 'PICKLE'"),
    "other dtype": (edit_header(lambda h: first(h).update(dtype="F64")), "cannot take"),
    "unknown header key": (edit_header(lambda h: first(h).update(code="x")), "exactly dtype, shape and data_offsets"),
    "flipped bit": (flip_last_byte, "do not match their digest"),
    "wrong digest": (edit_json(lambda d: d["sites"][0].update(sha256="0" * 64)), "'block.0' do not match their digest"),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_tampered_folder_is_refused(folder: Path, case: str) -> None:
    tamper, message = TAMPERINGS[case]
    tamper(folder)
    with pytest.raises(FormatError, match=message) as refusal:
        open_folder(folder)
    assert str(folder) in str(refusal.value)


def test_too_large_a_description_is_refused(folder: Path) -> None:
    with pytest.raises(FormatError, match="too large for a description file"):
        files.read_json(folder / "slimc.json", limit=100)


def test_too_large_a_header_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", 64)
    with pytest.raises(FormatError, match="header of .* bytes is too large"):
        open_folder(folder)


def test_moderately_deep_json_is_refused_too() -> None:
    assert files.parse_json(b"[" * 63 + b"]" * 63, "x")
    with pytest.raises(FormatError, match="x: JSON nested more than 64 levels deep"):
        files.parse_json(b"[" * 66 + b"]" * 66, "x")


def test_a_packed_pattern_that_keeps_too_much_is_refused(folder: Path) -> None:
    """The digests of a hostile author match; the packed tensors must still fit each other."""
    native = open_folder(folder)
    path, entry = native.entries["block.0.pattern"]
    raw = bytearray(path.read_bytes())
    raw[entry.start] = 0xFF
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"site 'block\.0'"):
        load_folder(folder, model=Net(), verify=False)


def test_a_format_without_its_signs_is_refused(folder: Path) -> None:
    path = folder / "slimc.json"
    record = json.loads(path.read_text("utf-8"))
    record["sites"][0]["format"]["binary"] = {"rank": 1, "dtype": "bfloat16"}
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(FormatError, match="signs"):
        load_folder(folder, model=Net())


def test_a_bias_of_another_length_is_refused(folder: Path) -> None:
    edit_json(lambda d: d["dense"][0].update(shape=[3, 4]))(folder)
    edit_header(lambda header: header["block.0.bias"].update(shape=[3, 4]))(folder)
    with pytest.raises(FormatError, match=r"site 'block\.0': the bias must have 12 entries"):
        load_folder(folder, model=Net(), verify=False)


def test_digests_can_be_skipped(folder: Path) -> None:
    flip_last_byte(folder)
    assert open_folder(folder, verify=False).formats


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------- models that do not fit


def changed(change: Callable[[Net], Any]) -> Net:
    net = Net()
    change(net)
    return net


MISFITS: dict[str, tuple[Callable[[Net], Any], str]] = {
    "no such module": (lambda net: delattr(net, "block"), r"has no module 'block\.0'"),
    "another width": (lambda net: net.block.__setitem__(0, nn.Linear(8, 13)), r"block\.0 is 12 x 8 here"),
    "another norm": (lambda net: setattr(net, "norm", nn.LayerNorm(4)), r"norm\.weight is .* \[8\] here"),
    "a layer more": (lambda net: setattr(net, "more", nn.Linear(2, 2)), r"the folder lacks 'more\.bias'"),
    "a layer less": (lambda net: setattr(net, "norm", nn.Identity()), r"the model lacks 'norm\.bias'"),
    "a bias more": (lambda net: net.block.__setitem__(2, nn.Linear(12, 8)), r"block\.2 has a bias in the model"),
    "integers": (lambda net: setattr(net, "steps", torch.zeros(())), "steps is torch.int64"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(saved: Path, case: str) -> None:
    change, message = MISFITS[case]
    model = changed(change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        load_folder(saved, model=model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_plain_module_needs_an_instance(saved: Path) -> None:
    with pytest.raises(InputError, match="holds a Net, which slimc cannot build by itself; .* model="):
        load_folder(saved)


def test_a_buffer_without_values_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        outline = Net()
    with pytest.raises(FormatError, match="left without values for 'table'"):
        load_folder(saved, model=outline)


# ---------------------------------------------------------------------------------------------------- writing


def test_existing_output_is_kept_unless_asked(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(InputError, match="already exists; choose another folder, or replace it with overwrite=True"):
        save(small_net(), folder)
    assert contents(folder) == before
    save(small_net(), folder, overwrite=True)
    assert len(open_folder(folder).description.shards) == 1
    assert nothing_else_in(folder.parent, "net")


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds files that slimc did not write"):
        save(small_net(), tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        save(small_net(), tmp_path / "file", overwrite=True)
    assert nothing_else_in(tmp_path, "home", "file")


def test_a_native_folder_with_foreign_files_is_not_replaced(tmp_path: Path) -> None:
    def tokenizer(place: Path) -> None:
        files.write_file(place / "tokenizer.json", b"{}")
        (place / "templates").mkdir()
        files.write_file(place / "templates" / "chat.jinja", b"")

    target = save(small_net(), tmp_path / "net", write_extra=tokenizer)
    save(small_net(), target, write_extra=tokenizer, overwrite=True)
    for name in ("notes.md", "templates/own.jinja"):
        (target / name).write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.md', 'templates/own\.jinja', which slimc did not write"):
        save(small_net(), target, overwrite=True)
    assert (target / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("run", [b"", b"[]", b'{"extra_files": 3}', b'{"extra_files": [["tokenizer.json"]]}'])
def test_without_a_list_of_the_files_none_but_slimcs_own_are_replaced(folder: Path, run: bytes) -> None:
    (folder / "run.json").write_bytes(run)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"holds 'tokenizer\.json', which slimc did not write"):
        save(small_net(), folder, overwrite=True)
    (folder / "tokenizer.json").unlink()
    save(small_net(), folder, overwrite=True)


def test_what_a_killed_process_left_is_put_right(folder: Path) -> None:
    before, parent = contents(folder), folder.parent
    (parent / ".net.abcd_123.old").mkdir()
    folder.rename(parent / ".net.abcd_123.old" / "net")
    (parent / ".net.00000000.partial").mkdir()
    (parent / ".net.00000000.partial" / "half").write_bytes(b"x")
    mine = [".net.backup.old", ".other.00000000.partial", ".net.00000001.partial"]
    for name in mine[:2]:
        (parent / name).mkdir()
    (parent / mine[2]).write_bytes(b"a file, not a folder")
    with pytest.raises(InputError, match="already exists"):
        save(small_net(), folder)
    assert contents(folder) == before
    assert nothing_else_in(parent, "net", *mine)


def test_a_folder_that_was_put_aside_is_loaded_all_the_same(saved: Path, folder: Path) -> None:
    (folder.parent / ".net.abcd_123.old").mkdir()
    folder.rename(folder.parent / ".net.abcd_123.old" / "net")
    assert open_folder(folder).description == open_folder(saved).description
    assert nothing_else_in(folder.parent, "net")


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".net.00000000.partial").mkdir()
    with files.claimed(tmp_path / ".net.00000000.partial") as locked:
        assert locked
        save(small_net(), tmp_path / "net")
    assert nothing_else_in(tmp_path, "net", ".net.00000000.partial")


def test_on_windows_no_folder_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.os, "open", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    save(small_net(), folder, overwrite=True)
    (folder.parent / ".net.00000000.old").mkdir()
    folder.rename(folder.parent / ".net.00000000.old" / "net")
    files.recover(folder)
    assert open_folder(folder).formats


def test_an_empty_folder_is_no_output_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(small_net(), tmp_path / "empty")
    save(small_net(), tmp_path / "a" / "b")
    assert open_folder(tmp_path / "empty").description == open_folder(tmp_path / "a" / "b").description


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("step", ["write_tensors", "write_file", "flush"])
def test_a_full_disk_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    full = fail_with(OSError(errno.ENOSPC, "No space left on device"))
    target = {"write_tensors": storage, "write_file": storage, "flush": files}[step]
    monkeypatch.setattr(target, {"flush": "flush_path"}.get(step, step), full)
    before = contents(folder)
    with pytest.raises(InputError, match=r"net: the disk is full; 16\.8 MB are needed there. Nothing was written"):
        save(small_net(), folder, overwrite=True)
    with pytest.raises(InputError, match="the disk is full"):
        save(small_net(), folder.parent / "a" / "b")
    assert contents(folder) == before
    assert nothing_else_in(folder.parent, "net")


def test_too_little_room_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"16\.8 MB are needed and 1\.0 kB are free"):
        save(small_net(), tmp_path / "deep" / "net")
    assert nothing_else_in(tmp_path)


def test_a_forbidden_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "mkdtemp", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        save(small_net(), tmp_path / "net")


def test_a_failed_exchange_brings_the_old_folder_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(folder), Path.rename

    def fail_on_fresh(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_fresh)
    with pytest.raises(InputError, match="Input/output error"):
        save(small_net(), folder, overwrite=True)
    assert contents(folder) == before
    assert nothing_else_in(folder.parent, "net")


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "write_file", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(small_net(), tmp_path / "net")
    assert nothing_else_in(tmp_path)


def test_folders_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    assert save(small_net(), tmp_path / "net").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(files, "flush_to_disk", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="the disk is full; 3 bytes are needed"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert nothing_else_in(tmp_path, "x")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\x", "C:x", "a\0b"])
def test_names_that_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="is not a plain file name"):
        files.file_inside(tmp_path, name)


def test_tensors_without_values_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weight is on the meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "net")
    net = nn.Linear(2, 2)
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(InputError, match="sparse is a torch.float32 tensor, which cannot be saved"):
        save(net, tmp_path / "net")


def test_a_report_with_nan_cannot_be_saved(tmp_path: Path) -> None:
    report = REPORT.to_json()
    report["sites"][0]["weight_error"] = float("nan")
    with pytest.raises(NumericsError, match="holds NaN or Inf"):
        save_folder(small_net(), tmp_path / "net", record=RECORD, report=report)


def test_digests_are_of_name_dtype_shape_and_bytes(saved: Path) -> None:
    norm = next(dense for dense in open_folder(saved).description.dense if dense.name == "norm.bias")
    expected = hashlib.sha256(b"norm.bias F32 [8]\n" + bytes(32)).hexdigest()
    assert norm.sha256 == expected
