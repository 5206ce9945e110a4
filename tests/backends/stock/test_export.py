"""``slimc.export_hf`` and ``slimc export --format hf``: folders that stock packages open in a process without slimc."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

import slimc
from slimc.backends import hf
from slimc.backends.stock.export import HfReport
from slimc.backends.stock.folder import write_shards
from slimc.cli import app
from slimc.errors import InputError
from slimc.passes import Activations, AllocateBits, Calibrate, Decompose, Fuse, LowRank, Pass, Prune, Quantize
from slimc.runtime.modules import SlimLinear

pytest.importorskip("compressed_tensors")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CASES: dict[str, tuple[torch.dtype, Sequence[Pass]]] = {
    "slim": (torch.float32, [Calibrate(), Quantize("slim"), Prune("2:4"), LowRank(rank=0.1, bits=4), Fuse()]),
    "groups": (torch.bfloat16, [Calibrate(), Quantize("slim", group=32), LowRank(rank=5), Fuse()]),
    "zero-points": (torch.float32, [Calibrate(), Quantize("absmax", 3, 32, symmetric=False), LowRank(rank=4), Fuse()]),
    "int8": (torch.bfloat16, [Quantize("absmax", 8, "channel")]),
    "widths": (
        torch.float32,
        [Calibrate(), AllocateBits(bits=3, group=32, narrowest=1, widest=5), Quantize("gptq", calibrate="sqc")],
    ),
    "numbers": (torch.bfloat16, [Calibrate(), Prune("2:4"), LowRank(rank=3)]),
    "signs": (torch.float32, [Calibrate(), Decompose(ratio=0.5)]),
}

SUMMANDS = 128 + 384
"""No sum in the model has more terms: a product of 128 columns and an adapter, or the logits."""

SUMS = 2 * 9 + 1
"""Seven linears and two products of the attention in each of two layers, and the logits."""

OPEN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[2:]):
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values()), loaded
    with torch.no_grad():
        found = {"logits": model(input_ids=load_file(sys.argv[1])["ids"]).logits}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora" not in name:
            found[name.replace(".base_layer", "")] = module.weight
        if hasattr(module, "lora_A"):
            found[name + ".right"] = module.lora_A["default"].weight
            found[name + ".left"] = module.lora_B["default"].weight
    save_file({name: one.detach().clone() for name, one in found.items()}, folder.with_suffix(".opened"))
assert "slimc" not in sys.modules
"""


def compressed(source: Path, dtype: torch.dtype, passes: Sequence[Pass]) -> nn.Module:
    model, _ = hf.load_model(source, dtype=dtype)
    ids = torch.randint(0, 384, (4, 32), generator=torch.Generator().manual_seed(1))
    return slimc.compile(model, [{"input_ids": ids}], passes)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, ids: torch.Tensor
) -> dict[str, tuple[nn.Module, HfReport, dict[str, torch.Tensor]]]:
    """Every case: the model, its report, and what stock packages find in its folder."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("stock")
    save_file({"ids": ids}, place / "ids")
    models = {name: compressed(tiny_llama_folder, *case) for name, case in CASES.items()}
    reports = {
        name: slimc.export_hf(model, place / name, allow_dense=name == "signs") for name, model in models.items()
    }
    process = subprocess.run(
        [sys.executable, "-c", OPEN, place / "ids", *(place / name for name in CASES)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return {name: (models[name], reports[name], load_file(place / f"{name}.opened")) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_stock_packages_find_the_same_weights(case: str, opened: dict[str, Any]) -> None:
    model, _, found = opened[case]
    layers = {name: one for name, one in model.named_modules() if isinstance(one, SlimLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        merged = layer.format.binary is not None
        assert torch.equal(found[name], layer.weight if merged else layer.packed.weight.decode())
        assert (f"{name}.left" in found) == (layer.packed.left is not None)
        if layer.packed.left is not None and layer.packed.right is not None:
            # PEFT computes adapters in float32, which holds every number of 16 bits.
            assert torch.equal(found[f"{name}.left"].float(), layer.packed.left.decode().float())
            assert torch.equal(found[f"{name}.right"].float(), layer.packed.right.decode().float())


@pytest.mark.parametrize("case", CASES)
def test_stock_packages_compute_the_same(case: str, opened: dict[str, Any], ids: torch.Tensor) -> None:
    """The weights are equal, so that only the order of sums differs, and where adapters' products are rounded.

    In units of the largest logit each of SUMS sums is off by at most an ulp for each term in float32 (and for each of
    the few roundings of a linear, its adapters and what follows in bfloat16, which sums in float32).
    """
    model, _, found = opened[case]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    roundings = SUMMANDS if expected.dtype == torch.float32 else 4
    bound = SUMS * roundings * torch.finfo(expected.dtype).eps * expected.abs().max().float()
    assert (found["logits"].float() - expected.float()).abs().max() <= bound


def test_the_report_has_the_bytes_of_the_files(opened: dict[str, Any]) -> None:
    for _, report, _ in opened.values():
        tensors = [load_file(path) for path in report.folder.glob("*.safetensors")]
        stored = sum(one.nbytes for file in tensors for one in file.values())
        assert stored == report.other_bytes + sum(site.bytes for site in report.sites.values())
        record = json.loads((report.folder / "slimc_export.json").read_text())
        assert record["sites"].keys() == report.sites.keys()


def test_the_report_says_what_the_format_costs(opened: dict[str, Any]) -> None:
    text = str(opened["slim"][1])
    assert "codes int4 per channel" in text
    assert "compressed layers: 14" in text
    assert "zeros of 2:4 are stored, so the codes are as large as without it (14 of the layers)" in text
    assert "adapters of 4 bits take 32 (14 of the layers)" in text
    assert "adapters (PEFT LoRA): 44.5 kB; as slimc packs them: " in text
    assert "PEFT" not in str(opened["int8"][1])
    assert "decoded to a dense weight: has signs with a magnitude of low rank (14 of the layers)" in str(
        opened["signs"][1]
    )


def test_the_folder_says_how_to_open_it(opened: dict[str, Any]) -> None:
    readme = (opened["slim"][1].folder / "README.md").read_text()
    assert "pip install transformers compressed-tensors peft" in readme
    assert "--enable-lora --max-lora-rank 8" in readme
    assert "peft" not in (opened["int8"][1].folder / "README.md").read_text()


def test_signs_are_refused_and_nothing_is_left(tiny_llama_folder: Path, tmp_path: Path, opened: dict[str, Any]) -> None:
    small = opened["signs"][0]
    message = r"q_proj' \(and 13 other layers\) has signs.*--allow-dense"
    with pytest.raises(InputError, match=message):
        slimc.export_hf(small, tmp_path / "out")
    rounded = compressed(
        tiny_llama_folder, torch.bfloat16, [Quantize(bits=4, group=32, method="absmax"), Activations()]
    )
    with pytest.raises(InputError, match="rounds its inputs to int8"):
        slimc.export_hf(rounded, tmp_path / "out", allow_dense=True)
    with pytest.raises(InputError, match="was not compressed by slimc"):
        slimc.export_hf(hf.load_model(tiny_llama_folder)[0], tmp_path / "out")
    plain = slimc.compile(nn.Sequential(nn.Linear(32, 8)), torch.rand(2, 32), [Quantize("absmax", 4, 32)])
    with pytest.raises(InputError, match="Sequential is no class of transformers"):
        slimc.export_hf(plain, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(opened: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwilling:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no")

    with pytest.raises(InputError, match="cannot be written"):
        slimc.export_hf(opened["slim"][0], tmp_path / "out", tokenizer=Unwilling())
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_not_replaced(opened: dict[str, Any], tmp_path: Path) -> None:
    small, out = opened["int8"][0], tmp_path / "out"
    slimc.export_hf(small, out)
    with pytest.raises(InputError, match="already exists"):
        slimc.export_hf(small, out)
    slimc.export_hf(small, out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which slimc did not write"):
        slimc.export_hf(small, out, overwrite=True)


def test_many_files_and_one_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [(name, torch.zeros(100)) for name in "abcde"], limit=800)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, place in index["weight_map"].items():
        assert name in load_file(tmp_path / place)


def test_conv1d_of_gpt2_is_decoded_if_allowed(tmp_path: Path, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    small = slimc.compile(transformers.GPT2LMHeadModel(config).eval(), ids, [Quantize("absmax", 4, 32)])
    with pytest.raises(InputError, match="is a Conv1D in transformers"):
        slimc.export_hf(small, tmp_path / "out")
    slimc.export_hf(small, tmp_path / "out", allow_dense=True)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found = small(input_ids=ids).logits, again(input_ids=ids).logits
    assert (found - expected).abs().max() <= SUMS * SUMMANDS * torch.finfo(torch.float32).eps * expected.abs().max()


# ------------------------------------------------------------------------------------------------------ command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_and_its_check(opened: dict[str, Any], tiny_llama_folder: Path, tmp_path: Path) -> None:
    native, out = tmp_path / "small", tmp_path / "out"
    slimc.save(opened["groups"][0], native, tokenizer=hf.load_tokenizer(tiny_llama_folder))
    done = invoke("export", native, "-o", out, "--format", "hf")
    assert done.exit_code == 0, done.output
    assert "for stock transformers: codes int4/32" in done.stdout
    assert (out / "tokenizer.json").exists()
    checked = invoke("verify", out, "--against", native)
    assert checked.exit_code == 0, checked.output
    assert "ok    digests" in checked.stdout
    assert "ok    outputs: transformers" in checked.stdout
    (out / "config.json").write_text("{}")
    assert invoke("verify", out).exit_code == 2


@pytest.mark.parametrize(
    "option",
    [
        "--target=ort",
        "--target=portable",
        "--dtype=float32",
        "--opset=22",
        "--accuracy-level=0",
        "--cache",
        "--no-cache",
        "--embedding-bits=8",
        "--exporter=auto",
    ],
)
def test_options_for_onnx_are_refused_whatever_they_say(option: str, tmp_path: Path) -> None:
    wrong = invoke("export", "nowhere", "-o", tmp_path / "out", "--format", "hf", option)
    assert wrong.exit_code == 2
    name = "--cache" if "cache" in option else option.partition("=")[0]
    assert f"{name} has no meaning with --format hf; leave it out, or use --format onnx" in " ".join(
        wrong.output.split()
    )


def test_an_option_for_transformers_is_refused_with_onnx(tmp_path: Path) -> None:
    wrong = invoke("export", "nowhere", "-o", tmp_path / "out", "--allow-dense")
    assert "--allow-dense has no meaning with --format onnx; leave it out" in " ".join(wrong.output.split())
