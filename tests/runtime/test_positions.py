"""The end of a learned table of positions: found where a model has one, and told before the model fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import slimc
from slimc.backends import hf
from slimc.errors import InputError
from slimc.passes import Quantize
from slimc.runtime.evaluate import perplexity
from slimc.runtime.generate import generate_text
from slimc.runtime.positions import check_positions, check_tokens, positions_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}


def gpt2(positions: int = 16, vocab_size: int = 24) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=vocab_size, n_positions=positions, n_embd=8, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


LIMITED: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "bert": lambda: BertModel(BertConfig(**SMALL, intermediate_size=8, max_position_embeddings=16)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, word_embed_proj_dim=8, ffn_dim=8, max_position_embeddings=16)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=18)),
}


@pytest.mark.parametrize("kind", LIMITED)
def test_the_limit_is_where_the_model_itself_fails(kind: str) -> None:
    model = LIMITED[kind]().eval()
    assert positions_of(model) == 16
    check_positions(model, 16)
    model(torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))
    with pytest.raises(InputError, match="17 tokens do not fit this .*, which has 16 positions; use shorter texts"):
        check_positions(model, 17)


@pytest.mark.parametrize("token", [24, -1])
def test_tokens_of_another_vocabulary_are_refused_before_the_model_fails(token: int) -> None:
    model = gpt2()
    ids = torch.full((2, 8), 23)
    check_tokens(model, ids)
    ids[1, 3] = token
    with pytest.raises(IndexError):
        model(ids)
    message = f"holds the token {token}, and this GPT2LMHeadModel knows 0 to 23; use the tokenizer"
    for attempt in (check_tokens, perplexity, lambda model, ids: slimc.compile(model, ids, [Quantize()])):
        with pytest.raises(InputError, match=message):
            attempt(model, ids)


def test_plain_modules_tell_no_vocabulary() -> None:
    check_tokens(nn.Embedding(4, 2), torch.tensor([9]))


def test_rotary_models_and_plain_modules_have_no_limit() -> None:
    """Also if the vocabulary happens to be as large as the number of positions."""
    config = LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=8, max_position_embeddings=24)
    assert positions_of(LlamaForCausalLM(config)) is None
    assert positions_of(nn.Sequential(nn.Embedding(4, 4))) is None


def test_perplexity_tells_that_windows_are_too_long() -> None:
    with pytest.raises(InputError, match="17 tokens do not fit this GPT2LMHeadModel"):
        perplexity(gpt2(), torch.ones(1, 17, dtype=torch.int64))


def test_the_last_new_token_needs_no_position(tiny_llama_folder: Path) -> None:
    tokenizer = hf.load_tokenizer(tiny_llama_folder)
    model = gpt2(vocab_size=384)
    model.generation_config.eos_token_id = None
    prompt = "Alice"
    fits = 17 - len(tokenizer(prompt).input_ids)
    assert generate_text(model, tokenizer, prompt, max_new_tokens=fits).tokens == fits
    with pytest.raises(InputError, match="17 tokens do not fit this GPT2LMHeadModel"):
        generate_text(model, tokenizer, prompt, max_new_tokens=fits + 1)
