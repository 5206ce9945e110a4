"""Hugging Face models: opened with care, saved natively, rebuilt bit for bit, and given text."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from slimc.backends import checkpoints, hf
from slimc.errors import FormatError, InputError, NumericsError
from slimc.passes.report import Report
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear, pack_weight
from slimc.runtime.storage import load_folder, save_folder

IDS = torch.arange(24).view(2, 12)
REPORT = Report(recipe=[], sites=[], left=[]).to_json()


def test_the_meta_device_means_the_same_after_a_model_was_loaded(tiny_llama_folder: Path) -> None:
    code = """
import sys, torch
from slimc.backends import hf
hf.load_model(sys.argv[1])
with torch.device("meta"):
    print(torch.linspace(0, 1, 3).device)
"""
    words = [sys.executable, "-c", code, str(tiny_llama_folder)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "meta\n"


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def rounded(linear: nn.Linear) -> SlimLinear:
    """The linear on an 8-bit grid, packed."""
    weight = linear.weight.detach().float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(linear.weight.dtype)
    codes = (weight / scale.float()).round().clamp(-128, 127).add(128).to(torch.uint8)
    return SlimLinear(PackedLinear(pack_weight(codes, bits=8, scale=scale)), linear.bias)


def compress(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.self_attn.q_proj = rounded(layer.self_attn.q_proj)
        layer.mlp.down_proj = rounded(layer.mlp.down_proj)
    return model


def save(model: nn.Module, path: Path, tokenizer: Any = None) -> Path:
    record, write_extra = hf.saved_form(model, tokenizer)
    return save_folder(model, path, record=record, report=REPORT, write_extra=write_extra)


def load(path: Path) -> Any:
    return load_folder(path, skeleton=hf.native_skeleton)[0]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def native(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed tiny Llama; tests that change it copy it first."""
    model, tokenizer = hf.load_model(tiny_llama_folder)
    return save(compress(model), tmp_path_factory.mktemp("native") / "small", tokenizer)


@pytest.fixture
def small(native: Path, tmp_path: Path) -> Path:
    return shutil.copytree(native, tmp_path / "small")


# --------------------------------------------------------------------------------------------------- opening


def test_a_folder_is_opened_in_its_own_dtype(tiny_llama_folder: Path) -> None:
    model, tokenizer = hf.load_model(tiny_llama_folder)
    expected = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert torch.equal(logits(model), logits(expected))
    assert tokenizer.decode(tokenizer("Alice").input_ids) == "Alice"


def test_another_dtype_can_be_asked_for(tiny_llama_folder: Path) -> None:
    model, _ = hf.load_model(str(tiny_llama_folder), dtype=torch.float32)
    assert model.dtype == torch.float32


def test_an_encoder_without_tokenizer_is_opened(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    model, tokenizer = hf.load_model(tmp_path / "bert")
    assert type(model) is BertModel
    assert tokenizer is None


def test_a_folder_of_several_weight_files_is_opened(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert hf.load_model(folder)[0].dtype == torch.bfloat16


def test_opening_says_nothing(tiny_llama_folder: Path, tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf.load_model(tiny_llama_folder)
    hf.load_model(tiny_gguf)
    assert capfd.readouterr() == ("", "")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))

    return edit


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def index(places: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return edit


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        InputError,
        "has no config.json, so it is not a Hugging Face",
    ),
    "only a gguf": (
        lambda f: ((f / "config.json").unlink(), (f / "a.gguf").touch()),
        InputError,
        r"name the file itself, .*a\.gguf",
    ),
    "pickle": (pickled_weights, InputError, "its weights in pytorch_model.bin, a pickle, which can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InputError, "has no weights"),
    "adapter": (lambda f: (f / "adapter_config.json").touch(), InputError, "holds a PEFT adapter; merge it"),
    "training checkpoint": (
        lambda f: (f / "shard-00000-model-00001-of-00001.safetensors").touch(),
        InputError,
        "distributed training checkpoint",
    ),
    "compressed already": (lambda f: (f / "slimc.json").touch(), InputError, "compressed already; open it with slimc"),
    "quantised": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        InputError,
        r"already quantised \(gptq\); start from the dense model",
    ),
    "own code": (
        edit_config(architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "code.MyModel"}),
        InputError,
        "needs the class 'MyModel', which transformers .* does not have; slimc runs no code",
    ),
    "class that is no model": (edit_config(architectures=["AutoTokenizer"]), InputError, "needs the class"),
    "no class": (edit_config(architectures=None), FormatError, "does not name the model's class"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), FormatError, "is not a JSON object"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), FormatError, "not valid JSON"),
    "weights cut": (cut_weights, FormatError, "model.safetensors: the header describes .* cut short"),
    "index without map": (index([]), FormatError, "has no weight_map"),
    "index to elsewhere": (index({"a": "../secret.safetensors"}), FormatError, "is not the name of a safetensors file"),
    "index to a pickle": (index({"a": "model.bin"}), FormatError, "is not the name of a safetensors file"),
    "index to nothing": (index({"a": "model-1.safetensors"}), FormatError, "model-1.safetensors: cannot be read"),
    "absurd layers": (edit_config(num_hidden_layers=10**9), FormatError, "num_hidden_layers is 1000000000, but"),
    "absurd width": (edit_config(vocab_size=10**10), FormatError, "describes a model of .* weights, but the weight"),
    "impossible width": (edit_config(hidden_size=2**62), FormatError, "config.json: transformers .* cannot open it"),
    "text for a number": (edit_config(hidden_size="wide"), FormatError, "config.json: transformers .* cannot open it"),
    "a layer missing": (
        without_a_layer,
        FormatError,
        r"missing weights: model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\); the checkpoint is incomplete",
    ),
    "another width": (
        edit_config(intermediate_size=96),
        FormatError,
        r"mismatched weights: model\.layers\.0\.mlp\.down_proj",
    ),
    "tokenizer cut": (lambda f: (f / "tokenizer.json").write_text("{"), FormatError, "model: transformers .* cannot"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused(folder: Path, case: str) -> None:
    change, error, message = REFUSED[case]
    change(folder)
    with pytest.raises(error, match=message) as refusal:
        hf.load_model(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["./x", "/no/such", "~/no-such-folder", "a/b/c", "model.gguf", "../no-such", "x.safetensors"]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        hf.load_model(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="neither a model folder nor a .gguf file"):
        hf.load_model(tmp_path / "notes.txt")


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        InputError, match=r"some/model: no such folder, and the Hugging Face hub cannot be reached \(Con"
    ):
        hf.load_model("some/model")


def test_a_model_on_the_hub_is_checked_like_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hf.load_model("some/model")[0].dtype == torch.bfloat16
    assert not any(pattern.endswith((".py", ".bin")) or pattern == "*" for pattern in asked["some/model"])
    cut_weights(folder)
    with pytest.raises(FormatError, match="cut short"):
        hf.load_model("some/model")


def test_without_transformers(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package transformers: pip install 'slimc\[hf\]'"):
        hf.load_model(tiny_llama_folder)


# ------------------------------------------------------------------------------------------------------ GGUF


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file in float32."""
    from gguf import GGUFWriter

    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    config = model.config
    tokenizer = json.loads((tiny_llama_folder / "tokenizer.json").read_bytes())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            short = names[rest.removesuffix(".weight")]
            if short in heads:  # GGUF interleaves the two halves that rotary embeddings turn
                halves = values.reshape(heads[short], 2, -1, values.shape[1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
            name = f"blk.{layer}.{short}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_opened_dense(tiny_gguf: Path, tiny_llama_folder: Path) -> None:
    model, tokenizer = hf.load_model(tiny_gguf)
    expected, other_tokenizer = hf.load_model(tiny_llama_folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))
    assert not hasattr(model.config, "quantization_config")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert tokenizer("said the Cat").input_ids == other_tokenizer("said the Cat").input_ids


def test_a_model_from_gguf_is_saved_as_a_plain_one(tiny_gguf: Path, tmp_path: Path) -> None:
    model, tokenizer = hf.load_model(tiny_gguf)
    before = logits(compress(model))
    path = save(model, tmp_path / "small", tokenizer)
    assert "quantization_config" not in json.loads((path / "config.json").read_bytes())
    assert torch.equal(logits(load(path)), before)
    assert hf.load_tokenizer(path)("said the Cat").input_ids == tokenizer("said the Cat").input_ids


def test_a_truncated_gguf_file_is_refused_before_transformers_sees_it(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"cut\.gguf: the data of tensor .* after the end of the file"):
        hf.load_model(path)


def test_a_gguf_file_without_accelerate(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(InputError, match=r"reading a GGUF file needs the package accelerate: pip install"):
        hf.load_model(tiny_gguf)


# ------------------------------------------------------------------------------------------ native round trip


def test_logits_after_loading_are_bit_equal(native: Path, tiny_llama_folder: Path) -> None:
    model, _ = hf.load_model(tiny_llama_folder)
    loaded = load(native)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded), logits(compress(model)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    tokens = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(IDS[:1], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cast_model_with_its_attention_comes_back_as_it_was(tmp_path: Path, attention: str) -> None:
    """``.to(dtype)`` also casts the rotary frequencies, which ``from_pretrained`` keeps in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    config._attn_implementation = attention
    model = compress(LlamaForCausalLM(config).to(torch.bfloat16).eval())
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    loaded = load(save(model, tmp_path / "small"))
    assert loaded.config._attn_implementation == attention
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_a_compressed_head_is_untied_in_the_configuration(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, _ = hf.load_model(tiny_llama_folder)
    model.lm_head = rounded(model.lm_head)
    path = save(model, tmp_path / "small")
    assert json.loads((path / "config.json").read_bytes())["tie_word_embeddings"] is False
    assert torch.equal(logits(load(path)), logits(model))


def test_where_a_model_came_from_does_not_change_its_files(native: Path, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = hf.load_model(folder)
    again = save(compress(model), tmp_path / "again", tokenizer)
    for path in native.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes() or path.name == "run.json"


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_stock_transformers_fails_loudly(native: Path, cls: Any) -> None:
    with pytest.raises(OSError, match="no file named model.safetensors"):
        cls.from_pretrained(native)


def test_loading_leaves_the_random_state_alone(native: Path) -> None:
    state = torch.get_rng_state()
    load(native)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_of_ones_own_is_a_plain_module(tiny_llama_folder: Path, tmp_path: Path) -> None:
    class MyLlama(LlamaForCausalLM):
        pass

    model = compress(MyLlama.from_pretrained(tiny_llama_folder))
    path = save(model, tmp_path / "small")
    assert not (path / "config.json").exists()
    with pytest.raises(InputError, match="holds a MyLlama, which slimc cannot build by itself"):
        load(path)
    loaded, _ = load_folder(path, model=MyLlama(model.config))
    assert torch.equal(logits(loaded), logits(model))


def test_saved_form_needs_no_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "transformers", missing)
    record, write_extra = hf.saved_form(nn.Linear(2, 2))
    write_extra(tmp_path)
    assert (record.kind, record.architecture) == ("module", "Linear")
    assert not list(tmp_path.iterdir())


NATIVE_REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FormatError, "config.json: cannot be read"),
    "config link": (
        lambda f: ((f / "config.json").rename(f / "x"), (f / "config.json").symlink_to(f / "x")),
        FormatError,
        "is a symbolic link",
    ),
    "absurd layers": (edit_config(num_hidden_layers=10**9), FormatError, "num_hidden_layers is 1000000000, but"),
    "a layer more": (edit_config(num_hidden_layers=3), FormatError, "does not fit LlamaForCausalLM: the folder lacks"),
    "a layer less": (edit_config(num_hidden_layers=1), FormatError, "has no module 'model.layers.1"),
    "absurd width": (edit_config(vocab_size=10**11), FormatError, "does not fit LlamaForCausalLM"),
    "another width": (edit_config(intermediate_size=96), FormatError, "down_proj is 64 x 128 here"),
    "own code": (edit_config(architectures=["MyModel"]), InputError, "needs the class 'MyModel'"),
    "text for a number": (edit_config(hidden_size="x"), FormatError, "config.json: transformers .* cannot open it"),
    "generation settings": (
        lambda f: (f / "generation_config.json").write_text("[1]"),
        FormatError,
        "generation_config.json: is not a JSON object",
    ),
}


@pytest.mark.parametrize("case", NATIVE_REFUSED)
def test_a_native_folder_whose_configuration_does_not_fit(small: Path, case: str) -> None:
    change, error, message = NATIVE_REFUSED[case]
    change(small)
    with pytest.raises(error, match=message):
        load(small)


def test_directives_in_a_configuration_are_not_followed(small: Path) -> None:
    edit_config(
        attn_implementation="someone/kernels",
        _attn_implementation="someone/kernels",
        auto_map={"AutoConfig": "code.Config"},
        quantization_config={"quant_method": "gptq"},
    )(small)
    assert load(small).config._attn_implementation == "sdpa"
    assert checkpoints.without_directives({"text_config": {"auto_map": {}, "a": 1}}) == {"text_config": {"a": 1}}


def test_a_model_that_would_make_huge_tables(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_OWN_BUFFERS", 8)
    with pytest.raises(FormatError, match="would make tables of 64 bytes for itself"):
        load(small)


def test_skeleton_has_meta_parameters_and_real_tables(tiny_llama_folder: Path) -> None:
    built = hf.skeleton(json.loads((tiny_llama_folder / "config.json").read_bytes()))
    assert all(parameter.is_meta for parameter in built.parameters())
    expected = dict(LlamaForCausalLM.from_pretrained(tiny_llama_folder).named_buffers())
    assert dict(built.named_buffers()).keys() == expected.keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in built.named_buffers())


# ------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def opened(tiny_llama_folder: Path) -> tuple[Any, Any]:
    return hf.load_model(tiny_llama_folder)


def test_output_embedding_names_include_tied_ones(opened: tuple[Any, Any]) -> None:
    assert hf.output_embedding_names(opened[0]) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert hf.output_embedding_names(nn.Linear(2, 2)) == set()


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def test_who_can_generate(opened: tuple[Any, Any]) -> None:
    assert hf.can_generate(opened[0])
    assert not hf.can_generate(t5())
    assert not hf.can_generate(nn.Linear(2, 2))
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert not hf.can_generate(BertModel(config))


def test_samples_have_full_length_and_never_end(opened: tuple[Any, Any]) -> None:
    samples = hf.sample_calibration(*opened, samples=5, length=40, seed=0, batch=2)
    ids = torch.stack(samples)
    assert (ids.shape, ids.dtype) == ((5, 40), torch.int64)
    assert bool((ids[:, 0] == 0).all())
    assert not bool((ids == 1).any())
    assert len({tuple(row.tolist()) for row in ids}) == 5


def test_samples_follow_the_model_at_temperature_one(opened: tuple[Any, Any]) -> None:
    """The first token's frequencies against the model's softmax: a chi-square-like bound of five deviations each."""
    model, tokenizer = opened
    count = 600
    drawn = torch.stack(hf.sample_calibration(model, tokenizer, count, 2, 3, batch=count))[:, 1]
    with torch.no_grad():
        scores = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].float()
    scores[1] = -torch.inf
    expected = scores.softmax(0) * count
    observed = torch.bincount(drawn, minlength=len(scores))
    assert bool(((observed - expected).abs() <= 5 * expected.sqrt() + 3).all())


def test_equal_seeds_give_equal_samples_and_nothing_else_changes(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    model.generation_config.repetition_penalty = 3.0
    settings, state = model.generation_config, torch.get_rng_state()
    model.train()
    one = torch.stack(hf.sample_calibration(model, tokenizer, 3, 12, 7))
    torch.rand(5)
    torch.set_rng_state(state)
    two = torch.stack(hf.sample_calibration(model, tokenizer, 3, 12, 7))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.stack(hf.sample_calibration(model, tokenizer, 3, 12, 8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is settings
    assert model.training
    model.eval()
    settings.repetition_penalty = None
    assert torch.equal(one, torch.stack(hf.sample_calibration(model, tokenizer, 3, 12, 7)))


def test_without_a_first_token_a_random_one_is_drawn(opened: tuple[Any, Any]) -> None:
    model, _ = opened
    begin, model.generation_config.bos_token_id = model.generation_config.bos_token_id, None
    try:
        starts = {int(sample[0]) for sample in hf.sample_calibration(model, None, 8, 2, 0)}
    finally:
        model.generation_config.bos_token_id = begin
    assert len(starts) > 4


def test_sampling_progress(opened: tuple[Any, Any]) -> None:
    done: list[int] = []

    class Count:
        def start(self, stage: str, total: int) -> None:
            done.append(-total)

        def advance(self, stage: str, n: int = 1, note: str = "") -> None:
            done.append(n)

        def finish(self, stage: str) -> None:
            assert sum(done) == 0

    hf.sample_calibration(*opened, samples=3, length=5, seed=0, progress=Count(), batch=2)
    assert done == [-12, 2, 2, 2, 2, 1, 1, 1, 1]


def test_a_broken_model_cannot_sample(tiny_llama_folder: Path) -> None:
    model, tokenizer = hf.load_model(tiny_llama_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="logits hold NaN or Inf after 1 tokens"):
        hf.sample_calibration(model, tokenizer, 2, 8, 0)


def test_models_that_cannot_sample(opened: tuple[Any, Any]) -> None:
    with pytest.raises(
        InputError, match="T5ForConditionalGeneration cannot write its own calibration text; pass calib"
    ):
        hf.sample_calibration(t5(), None, 1, 8, 0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    with pytest.raises(InputError, match="17 tokens do not fit this GPT2LMHeadModel, which has 16 positions"):
        hf.sample_calibration(GPT2LMHeadModel(config), None, samples=1, length=17, seed=0)


def test_save_pretrained_of_a_compressed_model_is_refused(native: Path, tmp_path: Path) -> None:
    small = load(native)
    hf.guard_save_pretrained(torch.compile(small, backend="eager"))
    for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with pytest.raises(InputError, match=r"use slimc\.save\(model, path\)"):
            model.save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    assert small.generate(IDS, max_new_tokens=2).shape == (2, 14)
    again = load(save(torch.compile(small, backend="eager"), tmp_path / "again"))
    assert torch.equal(logits(again), logits(small))
    plain = nn.Linear(2, 2)
    hf.guard_save_pretrained(plain)
    assert not hasattr(plain, "save_pretrained")


def test_text_is_cut_into_consecutive_windows(opened: tuple[Any, Any], english: Path) -> None:
    tokenizer, text = opened[1], english.read_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    windows = hf.tokenize_text(tokenizer, text, 3, 50)
    assert (windows.shape, windows.dtype) == ((3, 50), torch.int64)
    assert windows.flatten().tolist() == ids[:150]
    assert len(hf.tokenize_text(tokenizer, text, None, 50)) == len(ids) // 50


def test_texts_are_put_one_after_the_other(opened: tuple[Any, Any]) -> None:
    tokenizer = opened[1]
    texts = ["The Cat said", "nothing at all."]
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    assert hf.tokenize_text(tokenizer, texts, 1, len(ids)).tolist() == [ids]


@pytest.mark.parametrize(
    ("text", "samples", "needed"), [("", 1, "1 x 8 = 8"), ([], None, "1 x 8"), ("Cat", 2, "2 x 8")]
)
def test_too_short_a_text(opened: tuple[Any, Any], text: Any, samples: int | None, needed: str) -> None:
    with pytest.raises(InputError, match=rf"the text has \d tokens, but {needed}.* are needed; give a longer text"):
        hf.tokenize_text(opened[1], text, samples, 8)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        hf.tokenize_text(None, "text", 1, 8)
