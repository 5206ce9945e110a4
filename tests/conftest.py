"""What all tests share: hypothesis without a clock, and a tiny language model that is like a real one in every part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
