"""Text generation through the user's own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimc.backends import hf
from slimc.errors import InputError, NumericsError
from slimc.runtime.generate import CheckFinite, generate_text


@pytest.fixture(scope="module")
def opened(tiny_llama_folder: Path) -> tuple[Any, Any]:
    return hf.load_model(tiny_llama_folder)


def test_greedy_text_is_what_generate_gives(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    made = generate_text(model, tokenizer, "Alice was", max_new_tokens=12)
    ids = tokenizer("Alice was", return_tensors="pt").input_ids
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert made.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert made.tokens == expected.shape[1] - ids.shape[1]
    assert made.seconds > 0


def test_pieces_add_up_to_the_text(opened: tuple[Any, Any]) -> None:
    pieces: list[str] = []
    made = generate_text(*opened, "Alice was", max_new_tokens=20, temperature=1.0, seed=4, write=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == made.text


def test_the_seed_decides_and_the_random_state_is_left_alone(opened: tuple[Any, Any]) -> None:
    state = torch.get_rng_state()
    texts = [generate_text(*opened, "Alice", max_new_tokens=16, temperature=1.0, seed=s).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_chat_needs_a_template(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    with pytest.raises(InputError, match="has no chat template; leave chat mode off"):
        generate_text(model, tokenizer, "Hello", chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} said: {{ m.content }}{% endfor %} Alice said:"
    try:
        chatted = generate_text(model, tokenizer, "Hello", chat=True, max_new_tokens=8)
    finally:
        tokenizer.chat_template = None
    assert chatted.text == generate_text(model, tokenizer, "user said: Hello Alice said:", max_new_tokens=8).text


def test_what_cannot_generate(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    with pytest.raises(InputError, match="a Linear cannot generate text"):
        generate_text(nn.Linear(2, 2), tokenizer, "x")
    with pytest.raises(InputError, match=r"this model has no tokenizer.*copy tokenizer\.json .* with tokenizer="):
        generate_text(model, None, "x")
    with pytest.raises(InputError, match="the prompt is empty"):
        generate_text(model, tokenizer, "")


def test_a_broken_model_is_noticed(tiny_llama_folder: Path) -> None:
    model, tokenizer = hf.load_model(tiny_llama_folder)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(NumericsError, match="logits hold NaN or Inf"):
        generate_text(model, tokenizer, "Alice")


def test_forbidden_tokens_are_not_an_error() -> None:
    scores = torch.tensor([[0.0, -torch.inf]])
    assert CheckFinite()(torch.zeros(1, 3), scores) is scores
    with pytest.raises(NumericsError, match="after 3 tokens"):
        CheckFinite()(torch.zeros(1, 3), torch.full((1, 2), -torch.inf))
