"""What all tests share: hypothesis without a clock, and a tiny language model that is like a real one in every part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from slimc.runtime.activations import LARGEST, quantize_tokens
from slimc.runtime.packing import PackedLinear, PackedWeight

# Examples run while a compiler or another test holds the processor: a deadline would only make them flaky.
settings.register_profile("slimc", deadline=None, print_blob=True)
settings.load_profile("slimc")


@pytest.fixture(scope="session")
def english() -> Path:
    """A file of English text, about 4,600 tokens of a usual vocabulary."""
    return Path(__file__).parent.parent / "examples" / "alice.txt"


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory, english: Path) -> Path:
    """A Hugging Face folder of a random Llama: 2 layers, hidden 64, grouped keys, tied embeddings, and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(english)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", model_max_length=256
    ).save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _composed_product(packed: PackedLinear, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a layer's result of decoded matrices, and how far from it several products may be, both float64.

    At most, the weight, the factors, t, either product, the bias added and their sum are rounded to the dtype of x.
    """
    unit = torch.finfo(x.dtype).eps / 2
    x = x.double()
    scaled = x if packed.input_scale is None else x * packed.input_scale.double()
    weight = packed.weight.decode().double()
    exact, size = scaled @ weight.T, 4 * scaled.abs() @ weight.abs().T
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        exact = exact + x @ right.T @ left.T
        size = size + 6 * x.abs() @ right.abs().T @ left.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + 2 * bias.double().abs()
    return exact, unit * (2 * exact.abs() + size)


@pytest.fixture(scope="session")
def composed_product() -> Callable[..., tuple[Tensor, Tensor]]:
    """``(packed, x, bias) -> exact, bound`` for layers that are computed by several products."""
    return _composed_product


def _unrounded(packed: PackedWeight) -> Tensor:
    """Decode a weight in float64, where no product of a code and a scale is rounded."""
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in packed.tensors().items()}
    return PackedWeight(replace(packed.format, dtype=torch.float64), **tensors).decode()


def _rounded_product(packed: PackedLinear, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what a layer with rounded activations ideally gives, and how far from it a result may be, both float64.

    The ideal multiplies the exact codes of x by the exact codes of the weight, and rounds nothing. A result may differ

    - by a code of x, where its quotient is so near the middle of two that x * (1 / s) falls on the other side than
      x / s does: both have three roundings to float32 at most, hence 2^-21;
    - by roundings to the dtype of x: the reference rounds s * q, the inner product of the adapters, the product and
      the sum of both (4; one more covers products of roundings), and by roundings of decoded weights to the dtype of
      their scales: one of the weight, two of the factors. A kernel has no more than that;
    - by the roundings of float32 sums, one a term.

    A kernel and the reference are within twice the bound of each other.
    """
    scaled = x if packed.input_scale is None else x * packed.input_scale.to(x.dtype)
    codes, scale = quantize_tokens(scaled, packed.activation)
    q, s = codes.double(), scale.double()
    largest = LARGEST[packed.activation]

    def code_of(quotient: Tensor) -> Tensor:
        quotient = quotient.clamp(-largest, largest)
        return quotient.round() if packed.activation == "int8" else quotient.to(codes.dtype).double()

    quotient = scaled.float() / scale
    other = s * (code_of(quotient * (1 + 2**-21)) - code_of(quotient * (1 - 2**-21))).abs()

    weight = _unrounded(packed.weight)
    ideal, size = (s * q) @ weight.T, (s * q.abs() + other) @ weight.abs().T
    moved = other @ weight.abs().T
    if packed.left is not None and packed.right is not None:
        left, right = _unrounded(packed.left), _unrounded(packed.right)
        read, uncertain = (s * q, other) if packed.input_scale is None else (x.double(), torch.zeros_like(other))
        ideal = ideal + read @ right.T @ left.T
        size = size + (read.abs() + uncertain) @ right.abs().T @ left.abs().T
        moved = moved + uncertain @ right.abs().T @ left.abs().T
    if bias is not None:
        ideal, size = ideal + bias.double(), size + bias.double().abs()
    roundings = 5 * torch.finfo(x.dtype).eps / 2 + 2 * torch.finfo(packed.format.weight.dtype).eps / 2
    terms = packed.format.columns + packed.format.rank + 8
    return ideal, moved + (roundings + terms * 2.0**-24) * size


@pytest.fixture(scope="session")
def rounded_product() -> Callable[..., tuple[Tensor, Tensor]]:
    """``(packed, x, bias) -> ideal, bound`` for layers with rounded activations; kernels and reference keep to it."""
    return _rounded_product
