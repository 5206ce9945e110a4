"""Perplexity: the exponential of the mean next-token loss, in nats, over windows of text."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimc.errors import InputError, NumericsError
from slimc.progress import Progress, SilentProgress
from slimc.runtime.positions import check_positions, check_tokens


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of ``model`` (the CPU if it has neither)."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Run ``model`` on token ids [windows, length] and return its logits [windows, length, vocabulary].

    The model may return a tensor, a tuple that starts with one, or an object with a ``logits`` field. A
    model that can keep a key/value cache is asked not to.
    """
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(ids, **options)
    if isinstance(output, tuple):
        output = output[0]
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(
            f"perplexity needs logits [windows, length, vocabulary] from token ids {list(ids.shape)}, but "
            f"{type(model).__name__} returned {found}: pass a causal language model"
        )
    return logits


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the summed loss of each window over its tokens 2 .. length, float64 [windows].

    The log-softmax runs in float32 on one window at a time, so that the widest temporary is
    [length - 1, vocabulary] whatever the number of windows.
    """
    logits = logits_of(model, ids)
    losses = [
        F.cross_entropy(scores[:-1].float(), tokens[1:].to(scores.device), reduction="none").double().sum()
        for scores, tokens in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses).cpu()


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, batch: int = 1, progress: Progress | None = None) -> float:
    """Return ``exp(mean loss)`` of ``model`` on token ids [windows, length], int64.

    Each window is judged on its own: its tokens 2 .. length are predicted from those before them in the
    window. ``batch`` windows go through the model at once. The model keeps its training flag.

    Raises:
        InputError: there is no window, a window is shorter than two tokens or longer than the model's
            positions, a token is none of the model's, or the model gives no logits.
        NumericsError: the loss of a window is NaN or infinite.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(f"perplexity needs token ids [windows >= 1, length >= 2], not {list(ids.shape)}")
    check_positions(model, ids.shape[1])
    check_tokens(model, ids)
    progress = progress or SilentProgress()
    device, training = model_device(model), model.training
    total = 0.0
    progress.start("perplexity", ids.shape[0])
    model.eval()
    try:
        for start in range(0, ids.shape[0], batch):
            losses = window_losses(model, ids[start : start + batch].to(device))
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                raise NumericsError(
                    f"the model's loss is {losses[bad[0]].item()} on window {start + int(bad[0])}: its weights or "
                    "activations hold NaN or Inf, or overflow in its dtype"
                )
            total += losses.sum().item()
            progress.advance("perplexity", len(losses))
    finally:
        model.train(training)
    progress.finish("perplexity")
    mean = total / (ids.shape[0] * (ids.shape[1] - 1))
    return torch.tensor(mean, dtype=torch.float64).exp().item()
