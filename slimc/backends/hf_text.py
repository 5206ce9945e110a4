"""Text for Hugging Face models: cut into windows of tokens, or written by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimc.backends.hf_library import quiet, transformers
from slimc.errors import InputError
from slimc.progress import Progress, SilentProgress, counted
from slimc.runtime.evaluate import model_device
from slimc.runtime.generate import CheckFinite, private_random_state
from slimc.runtime.positions import check_positions


def can_generate(model: Any) -> bool:
    """Tell whether ``model`` continues text by itself: a causal language model with a ``generate`` method."""
    answer = getattr(model, "can_generate", None)
    return callable(answer) and bool(answer()) and not getattr(model.config, "is_encoder_decoder", False)


def tokenize_text(
    tokenizer: Any,
    text: str | Sequence[str],
    samples: int | None,
    length: int,
    *,
    options: str = "fewer or shorter ones",
) -> Tensor:
    """Cut a text into consecutive windows of tokens, int64 [samples, length].

    The whole text is tokenised as one string, without special tokens. Of a sequence of texts each is tokenised
    on its own and the tokens are put one after the other, with nothing between them.

    Args:
        tokenizer: the model's tokenizer.
        text: the text or texts.
        samples: how many windows to take from the start; ``None`` takes all whole ones.
        length: tokens a window.
        options: what to ask for if the text is too short, for the message.

    Raises:
        InputError: the text gives too few tokens; the message says how many there are and are needed.
    """
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so text cannot be used; pass batches of its inputs instead")
    texts = [text] if isinstance(text, str) else list(text)
    ids = [token for part in texts for token in tokenizer(part, add_special_tokens=False, verbose=False).input_ids]
    windows = len(ids) // length if samples is None else samples
    needed = max(windows, 1) * length
    if len(ids) < needed:
        raise InputError(
            f"the text has {counted(len(ids), 'token')}, but {max(windows, 1)} x {length} = {needed} are needed; "
            f"give a longer text, or ask for {options}"
        )
    return torch.tensor(ids[:needed], dtype=torch.int64).view(windows, length)


def sample_calibration(
    model: Any,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    *,
    batch: int | None = None,
) -> list[Tensor]:
    """Let ``model`` write its own calibration text: ``samples`` tensors of token ids, int64 [length], on the CPU.

    Each sample starts with the begin-of-text token (a random token if there is none), which counts, and goes
    on by sampling at temperature 1 from all tokens but those that end a text, so that all have full length.
    Equal seeds give equal samples on the same device, thread count and versions; the global random state and
    the model's generation settings are left as they were. ``batch`` samples are written at once; left out, as
    many as keep the cache of keys and values at about 16,000 tokens.

    Raises:
        InputError: the model cannot generate, or ``length`` is more than its positions.
        NumericsError: its logits hold NaN or Inf.
    """
    if not can_generate(model):
        raise InputError(
            f"a {type(model).__name__} cannot write its own calibration text; pass calibration=... (texts or batches)"
        )
    check_positions(model, length)
    batch = batch or max(1, min(32, 16_384 // length))
    starts = _first_tokens(model, tokenizer, samples, seed)
    ends = _ending_tokens(model, tokenizer)
    settings = transformers().GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        suppress_tokens=ends or None,
        use_cache=True,
    )
    progress = progress or SilentProgress()
    device, training, own = model_device(model), model.training, model.generation_config
    progress.start("sample", samples * (length - 1))

    def count(input_ids: Tensor, scores: Tensor) -> Tensor:
        progress.advance("sample", len(input_ids))
        return scores

    rows: list[Tensor] = []
    model.eval()
    # The model's own settings (repetition penalties, end tokens) would otherwise be merged into these.
    model.generation_config = settings
    try:
        with quiet(), torch.no_grad(), private_random_state(seed, device):
            for first in range(0, samples, batch):
                ids = starts[first : first + batch].to(device)
                if length > 1:
                    processors = [CheckFinite(), count]
                    ids = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=processors)
                rows.extend(ids.cpu())
    finally:
        model.generation_config = own
        model.train(training)
    progress.finish("sample")
    return [row.clone() for row in rows]


def _first_tokens(model: Any, tokenizer: Any, samples: int, seed: int) -> Tensor:
    """Return what each sample starts with, int64 [samples, 1]."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        begin = model.generation_config.bos_token_id
    if begin is not None:
        return torch.full((samples, 1), begin, dtype=torch.int64)
    vocabulary = model.config.get_text_config().vocab_size if tokenizer is None else len(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (samples, 1), generator=generator)


def _ending_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends or pads a text."""
    named = [model.generation_config.eos_token_id, model.generation_config.pad_token_id]
    named += [getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "pad_token_id", None)]
    flat = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    return sorted({token for token in flat if token is not None})
