"""The public functions: what they take, what they give back, and what they refuse before any work."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc import api
from slimc.calibration import calibration_batches, count_tokens
from slimc.errors import FormatError, InputError, RecipeError
from slimc.passes import Activations, Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.passes.journal import Journal
from slimc.runtime.modules import SlimLinear

transformers = pytest.importorskip("transformers")

PASSES = [Calibrate(samples=4, length=16, batch=3), Quantize(), Prune(), LowRank(rank=2, bits=4), Fuse()]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def llama(tiny_llama_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture(scope="module")
def small(tiny_llama_folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    return slimc.compile(model, tokens(), PASSES)


def tokens() -> Tensor:
    return torch.randint(2, 384, (4, 16), generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


# ------------------------------------------------------------------------------------------------------ what comes back


def test_the_model_passed_in_is_left_as_it_was(llama: Any, small: Any) -> None:
    before = logits(llama)
    result = slimc.compile(llama, tokens(), PASSES)
    assert type(result) is type(llama)
    assert result is not llama
    assert torch.equal(logits(llama), before)
    assert not any(isinstance(module, SlimLinear) for module in llama.modules())
    assert torch.equal(logits(result), logits(small))
    kept = {name for name, module in result.named_modules() if isinstance(module, SlimLinear)}
    assert kept == {row.name for row in slimc.report(result).sites}
    assert len(kept) == 14


def test_inplace_compresses_the_model_itself(llama: Any, small: Any) -> None:
    assert slimc.compile(llama, tokens(), PASSES, inplace=True) is llama
    assert torch.equal(logits(llama), logits(small))


def test_a_compressed_model_is_an_ordinary_module(small: Any) -> None:
    expected = logits(small)
    twin = copy.deepcopy(small)
    assert torch.equal(logits(twin), expected)
    silenced = {name: torch.zeros_like(value) for name, value in small.state_dict().items()}
    twin.load_state_dict(silenced | {"model.norm.weight": torch.ones(64)}, strict=False)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(small), expected)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(logits(twin), expected)
    assert slimc.report(twin).sites == slimc.report(small).sites


def test_generate_is_the_users_own(small: Any) -> None:
    written = small.generate(tokens()[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    again = small.generate(
        tokens()[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert written.shape == (1, 21)
    assert torch.equal(written[:, :17], again[:, :17])


@pytest.mark.parametrize("passes", [PASSES, [*PASSES[:2], Activations(kind="fp8"), *PASSES[2:]]])
def test_compile_and_export_give_the_same_numbers(passes: list[Pass]) -> None:
    x = torch.randn(5, 16)
    small = slimc.compile(mlp(), [x], passes)
    with torch.no_grad():
        expected = small(x)
        assert torch.allclose(torch.compile(small, backend="aot_eager")(x), expected, atol=1e-6)
        assert torch.allclose(torch.export.export(small, (x,)).module()(x), expected, atol=1e-6)


def test_saved_files_are_as_large_as_promised_and_load_bit_equal_elsewhere(small: Any, tmp_path: Path) -> None:
    slimc.save(small, tmp_path / "out")
    torch.save(logits(small), tmp_path / "logits.pt")
    code = (
        "import sys, torch, slimc; torch.set_num_threads(1); torch.set_grad_enabled(False); "
        "small = slimc.load(sys.argv[1] + '/out'); "
        "ids = torch.randint(2, 384, (4, 16), generator=torch.Generator().manual_seed(0)); "
        "expected = torch.load(sys.argv[1] + '/logits.pt', weights_only=True); "
        "print(torch.equal(small(input_ids=ids).logits, expected), len(slimc.report(small).graph) > 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.stdout.strip() == "True True", process.stderr
    from slimc.runtime.storage import open_folder

    folder = open_folder(tmp_path / "out")
    for row in slimc.report(small).sites:
        promised = row.bits * row.shape[0] * row.shape[1] / 8
        assert folder.site_nbytes(row.name) == pytest.approx(promised, rel=0.01)
    (tmp_path / "out" / "graph.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="graph.txt cannot be read"):
        slimc.load(tmp_path / "out")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_inputs_load_bit_equal_in_another_process(kind: Any, llama: Any, small: Any, tmp_path: Path) -> None:
    rounded = slimc.compile(llama, tokens(), [*PASSES[:-1], Activations(kind=kind), Fuse()])
    assert not torch.equal(logits(rounded), logits(small))
    error = (logits(rounded).float() - logits(small).float()).norm() / logits(small).float().norm()
    assert float(error) < 0.2
    slimc.save(rounded, tmp_path / "out")
    torch.save(logits(rounded), tmp_path / "logits.pt")
    code = (
        "import sys, torch, slimc; torch.set_num_threads(1); torch.set_grad_enabled(False); "
        "small = slimc.load(sys.argv[1] + '/out'); "
        "ids = torch.randint(2, 384, (4, 16), generator=torch.Generator().manual_seed(0)); "
        "expected = torch.load(sys.argv[1] + '/logits.pt', weights_only=True); "
        "print(torch.equal(small(input_ids=ids).logits, expected)); "
        "print({layer.format.activation for layer in small.modules() if hasattr(layer, 'format')})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    stored = {"int8": "int8", "fp8": "float8_e4m3fn"}[kind]
    assert process.stdout.splitlines() == ["True", str({stored})], process.stderr
    assert f"activation={1 if kind == 'int8' else 2}" in slimc.report(slimc.load(tmp_path / "out")).graph


def test_encoders_and_plain_networks_work_too() -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**config, num_attention_heads=4)).eval()
    ids = torch.randint(0, 64, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    small = slimc.compile(bert, [batch, {name: value[:1, :4] for name, value in batch.items()}], PASSES)
    assert small(**batch).last_hidden_state.shape == (2, 7, 32)
    assert slimc.report(small).calibration_tokens == 2 * 7 + 4
    single = slimc.compile(nn.Linear(16, 8), torch.randn(4, 16), [Quantize()])
    assert isinstance(single, SlimLinear)
    assert len(slimc.report(single).sites) == 1


def test_a_printed_report_is_a_table(small: Any) -> None:
    report = slimc.report(small)
    headings, first, *_ = str(report).splitlines()
    assert " ".join(headings.split()) == "layer shape expression bits weight error output error without adapters"
    assert first.split()[:4] == [report.sites[0].name, "64", "x", "64"]
    assert headings.index("shape") == first.index("64 x 64")
    assert "Left dense:\nweight" in str(report)
    assert "model.embed_tokens" in str(report)
    assert str(report).endswith(f"\n14 layers: {report.bits_per_weight:.3f} bits a weight")
    assert repr(report).startswith("Report(recipe=[")


def test_the_report_tells_the_time_by_stage(llama: Any) -> None:
    report = slimc.report(slimc.compile(llama, None, PASSES))
    assert {"calibration data", "capture", "sweep", "fuse"} <= report.seconds.keys()
    assert report.calibration_tokens == 4 * 16
    assert "model.embed_tokens" in [row.name for row in report.left]


# ---------------------------------------------------------------------------------------------------- what can be given


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: list(x.split(3)),
        lambda x: (part for part in x.split(3)),
        lambda x: [(part,) for part in x.split(3)],
        lambda x: [[part] for part in x.split(3)],
        lambda x: [{"input": part} for part in x.split(3)],
        lambda x: torch.utils.data.DataLoader(x, batch_size=3),
    ],
)
def test_calibration_takes_many_forms(form: Callable[[Tensor], Any]) -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    expected = slimc.compile(mlp(), x, PASSES)
    result = slimc.compile(mlp(), form(x), PASSES)
    assert slimc.report(result).calibration_tokens == 7
    for name, value in expected.state_dict().items():
        assert torch.equal(result.state_dict()[name], value)


def test_token_ids_take_many_forms(llama: Any, tokenizer: Any, english: Path) -> None:
    settings = Calibrate(samples=4, length=16, batch=3)
    for given in (tokens(), list(tokens()), [{"input_ids": tokens()}], {"input_ids": tokens()}, tokens()[0]):
        batches = calibration_batches(llama, given, settings)
        assert all(not args and kwargs.keys() == {"input_ids"} for args, kwargs in batches)
        found = torch.cat([kwargs["input_ids"] for _, kwargs in batches])
        assert torch.equal(found, tokens()[: len(found)])
        assert count_tokens(batches) == found.numel()
    text = english.read_text()
    for given in (text, [text], (part for part in [text[:999], text[999:]])):
        batches = calibration_batches(llama, given, settings, tokenizer=tokenizer)
        assert [tuple(kwargs["input_ids"].shape) for _, kwargs in batches] == [(3, 16), (1, 16)]


def test_one_name_or_one_pass_need_no_list() -> None:
    x = torch.randn(3, 16)
    assert [row.name for row in slimc.report(slimc.compile(mlp(), x, Quantize(), exclude="0")).sites] == ["2"]
    assert slimc.report(slimc.compile(mlp(), x, [Quantize(), Fuse()], skip="fuse")).recipe == [{"quantize": {}}]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration data is empty"),
        (iter(()), "calibration data is empty"),
        (7, "calibration is a int; give texts, a tensor, or an iterable"),
        (["some text"], "Calibration texts need tokenizer="),
        ("some text", "Calibration texts need tokenizer="),
        ([torch.randn(2, 16), "text"], "A calibration batch is a str"),
        ([3], "A calibration batch is a int"),
        ([("a", "b")], "a tuple without a tensor"),
        ([{"input": [1.0, 2.0]}], "a dict without a tensor"),
        ([{"inputs": torch.randn(2, 16)}], "does not fit Sequential.forward"),
        ([(torch.randn(2, 16), torch.randn(2, 16))], "does not fit Sequential.forward: too many positional"),
        (torch.empty(0, 16), "calibration data is empty"),
        ([torch.empty(0, 16)], "holds an empty tensor"),
        (None, "Sequential cannot write its own calibration text, because it cannot generate. Pass calibration="),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(calibration: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        slimc.compile(mlp(), calibration, PASSES, journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()


def test_an_example_is_needed_where_inputs_are_unknown() -> None:
    with pytest.raises(InputError, match="Pass calibration= with at least one batch: Sequential must be captured with"):
        slimc.compile(mlp(), None, [Quantize()])


def test_a_recipe_that_does_not_calibrate_needs_only_a_little_text(llama: Any, tokenizer: Any) -> None:
    small = slimc.compile(llama, "Alice was beginning to get very tired of sitting.", "rtn-w4", tokenizer=tokenizer)
    assert len(slimc.report(small).sites) == 14


@pytest.mark.parametrize(("given", "shown"), [("a/path", "'a/path'"), (Path("x"), "'x'"), ({}, "a dict")])
def test_what_is_no_module_is_refused_with_how_to_load_one(given: Any, shown: str) -> None:
    with pytest.raises(InputError, match=f"a loaded torch.nn.Module, not {shown}. Load .*from_pretrained.*'slimc comp"):
        slimc.compile(given, [torch.randn(3, 16)])


def test_a_model_is_checked_before_it_writes_its_own_text(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*arguments: Any) -> None:
        raise RuntimeError("sampling has begun")

    monkeypatch.setattr("slimc.backends.hf.sample_calibration", sample)
    with pytest.raises(RecipeError, match="2:7 does not divide the width 64"):
        slimc.compile(llama, None, [Calibrate(), Prune("2:7")])
    with pytest.raises(RuntimeError, match="sampling has begun"):
        slimc.compile(llama, None, PASSES)


def test_what_is_no_list_of_passes_is_refused(llama: Any) -> None:
    with pytest.raises(RecipeError, match="passes is a int; give a recipe's name"):
        slimc.compile(llama, None, 4)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="Number 1 of the passes is 'quantize', which is not a pass"):
        slimc.compile(llama, None, ["quantize"])  # type: ignore[list-item]


def test_only_compressed_models_have_a_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Sequential was not compressed by slimc; call slimc.compile"):
        slimc.report(mlp())
    with pytest.raises(InputError, match="was not compressed by slimc"):
        slimc.save(mlp(), tmp_path / "out")


def test_an_error_midway_leaves_an_inplace_model_untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no more")

    model, x = mlp(), torch.randn(3, 16)
    before = model(x)
    monkeypatch.setattr(Journal, "write", fail)
    with pytest.raises(OSError, match="no more"):
        slimc.compile(model, [x], PASSES, inplace=True, journal=tmp_path / "journal")
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model(x), before)


def test_a_model_that_cannot_be_copied_says_so_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    model.stream = (one for one in [1])  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(api, "_prepare", None)
        with pytest.raises(InputError, match="Sequential cannot be copied .* Pass inplace=True"):
            slimc.compile(model, torch.randn(2, 16), [Quantize()])
    assert slimc.compile(model, torch.randn(2, 16), [Quantize()], inplace=True) is model


def test_a_compressed_model_is_not_compressed_again(small: Any) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM is compressed already; compress the dense model"):
        slimc.compile(small, tokens(), PASSES)
    with pytest.raises(InputError, match="LlamaForCausalLM is compressed already"):
        slimc.plan(small, tokens(), budget="3bpw")


def test_explain_names_a_kernel_for_every_layer_and_why_others_refused(small: Any) -> None:
    choices = slimc.explain(small)
    lines = str(choices).splitlines()
    assert set(choices) <= set(lines)
    assert any(line.startswith("    1 ") and " token" in line for line in lines)
    assert repr(choices) == repr(dict(choices))
    assert len(choices) == len(slimc.report(small).sites)
    assert all(choice.kernel is not None for of_layer in choices.values() for choice in of_layer)
    with pytest.raises(InputError, match="was not compressed"):
        slimc.explain(mlp())


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu"), torch.enable_grad])
def test_ambient_modes_do_not_reach_the_result(mode: Callable[[], Any]) -> None:
    model, x = mlp(), torch.randn(8, 16)
    expected = slimc.compile(model, x, PASSES)
    with mode():
        found = slimc.compile(model, x, PASSES)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())


class Restless(nn.Module):
    """Changes its input and a buffer in place, and draws random numbers even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x.mul_(2)
        return self.last(torch.nn.functional.dropout(self.first(x)))


def test_calibration_changes_neither_the_model_nor_the_data_and_repeats() -> None:
    model, x = Restless().eval(), torch.randn(8, 16)
    before = x.clone()
    first, second = (slimc.compile(model, [x], PASSES).state_dict() for _ in range(2))
    assert torch.equal(x, before)
    assert torch.equal(model.calls, torch.zeros(1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_compiled_model_is_saved_as_the_model_inside(small: Any, tmp_path: Path) -> None:
    slimc.save(torch.compile(small, backend="eager"), tmp_path / "out")
    assert type(slimc.load(tmp_path / "out")) is type(small)


def test_rounds_would_undo_what_sparsegpt_corrected() -> None:
    passes = [Calibrate(), Quantize(), Prune(method="sparsegpt"), LowRank(rounds=2)]
    with pytest.raises(RecipeError, match="rounds=2 would store .* Use rounds=0 with sparsegpt, or prune with wanda"):
        slimc.compile(mlp(), torch.randn(8, 16), passes)


def test_texts_longer_than_the_table_of_positions_are_refused() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(InputError, match="9 tokens do not fit this GPT2LMHeadModel, which has 8 positions"):
        slimc.compile(model, torch.ones(2, 9, dtype=torch.long), PASSES)


def test_save_pretrained_of_a_compressed_model_points_to_save(small: Any, tmp_path: Path) -> None:
    for model in (small, copy.deepcopy(small)):
        with pytest.raises(InputError, match=r"slimc\.save"):
            model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_none_is_refused_before_a_folder_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no device 'gpu7'; name cpu, cuda"):
        slimc.load(tmp_path, device="gpu7")
