"""Text from a language model, through the ``generate`` method of the user's own class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimc.errors import InputError, NumericsError
from slimc.runtime.evaluate import model_device
from slimc.runtime.positions import check_positions, check_tokens


@dataclass(frozen=True)
class Generation:
    """A continuation: its text without the prompt, its number of tokens, and the seconds it took."""

    text: str
    tokens: int
    seconds: float


class CheckFinite:
    """A logits processor that changes nothing and stops at the first NaN, or when no token is possible.

    Minus infinity is how other processors forbid a token, so a few of those are fine.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` [batch, vocabulary] as they are, or raise a NumericsError."""
        if scores.isnan().any() or scores.isposinf().any() or scores.isneginf().all(dim=-1).any():
            raise NumericsError(
                f"the model's logits hold NaN or Inf after {input_ids.shape[1]} tokens: its weights are damaged or its "
                "activations overflow in their dtype"
            )
        return scores


def without_tokenizer(model: object) -> InputError:
    """Return the error that a model, or a folder, cannot be given text."""
    return InputError(
        f"{model} has no tokenizer, so it cannot read text; copy tokenizer.json and tokenizer_config.json of the dense "
        "model (or what its tokenizer is made of) into its folder, or write that again with tokenizer=, as "
        "slimc.save(model, folder, tokenizer=tokenizer, overwrite=True)"
    )


@contextmanager
def private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of ``device`` inside the block, and put them back after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


class TextStreamer:
    """Hands text to ``write`` as soon as tokens have come that complete it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._written = ""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens.extend(value.flatten().tolist())
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A replacement character at the end is a letter whose last bytes are still to come.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._flush(text)

    def end(self) -> None:
        """Write what is left."""
        self._flush(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """Return the token ids of ``prompt``, int64 [1, length]; with ``chat`` as a user's turn in a conversation.

    Raises:
        InputError: the prompt has no tokens, or the tokenizer knows no conversations.
    """
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("this model's tokenizer has no chat template; leave chat mode off")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    if not ids:
        raise InputError("the prompt is empty; give at least one word")
    return torch.tensor([ids])


@torch.inference_mode()
def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt``.

    Args:
        model: a model with a ``generate`` method, as Hugging Face causal language models have.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        max_new_tokens: stop after so many tokens, if the model does not end the text earlier.
        temperature: 0 takes the likeliest token each time; otherwise tokens are sampled.
        seed: of the sampling; the global random state is left alone.
        chat: treat the prompt as a user's turn, with the tokenizer's chat template.
        write: called with each piece of text as it appears.

    Raises:
        InputError: the model cannot generate, the prompt has no tokens, or it and ``max_new_tokens`` exceed the
            model's positions, or a token is none of the model's.
        NumericsError: NaN or Inf in the logits.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise InputError(f"a {type(model).__name__} cannot generate text; use a causal language model")
    if tokenizer is None:
        raise without_tokenizer("this model")
    device = model_device(model)
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(device)
    # The last new token is never read.
    check_positions(model, ids.shape[1] + max_new_tokens - 1)
    check_tokens(model, ids)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options["pad_token_id"] = tokenizer.eos_token_id
    started = time.perf_counter()
    with private_random_state(seed, device):
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            logits_processor=[CheckFinite()],
            streamer=None if write is None else TextStreamer(tokenizer, write),
            **options,
        )
    new = output[0, ids.shape[1] :]
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - started)
