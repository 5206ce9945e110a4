"""Text in, text out: an ONNX folder with a tokenizer of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from slimc.backends.onnx.session import OnnxDecoder, end_tokens
from slimc.runtime.generate import Generation, TextStreamer, encode_prompt, without_tokenizer

__all__ = ["continue_text"]


def continue_text(
    decoder: OnnxDecoder,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt``; the arguments are those of `slimc.runtime.generate.generate_text`.

    Raises:
        InputError: there is no tokenizer, or the prompt is empty or too long.
        NumericsError: NaN or Inf in the logits.
    """
    if tokenizer is None:
        raise without_tokenizer(decoder.folder)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    streamer = None if write is None else TextStreamer(tokenizer, write)
    if streamer is not None:
        streamer.put(ids)
    started = time.perf_counter()
    (new,) = decoder.generate(
        [ids[0].tolist()],
        max_new_tokens,
        stop=end_tokens(decoder.folder),
        temperature=temperature,
        seed=seed,
        on_tokens=None if streamer is None else lambda tokens: streamer.put(torch.tensor(tokens)),
    )
    seconds = time.perf_counter() - started
    if streamer is not None:
        streamer.end()
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)
