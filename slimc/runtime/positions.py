"""What text a model can read: how long, where a learned table of positions sets a hard end to it, and which tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimc.errors import InputError

_MARGIN = 8
"""Rows that a table may have beyond its positions (OPT keeps 2, RoBERTa counts its own among the positions)."""


def context_of(model: nn.Module) -> int | None:
    """Return how many tokens ``model`` was made to read at once, ``None`` if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    config = config if getter is None else getter()
    announced = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return announced if isinstance(announced, int) else None


def positions_of(model: nn.Module) -> int | None:
    """Return how many positions ``model`` has, ``None`` if no table limits them (rotary and relative ones do not)."""
    announced = context_of(model)
    if announced is None:
        return None
    usable = [
        min(announced, module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and _is_position_table(name)
        and announced <= module.num_embeddings <= announced + _MARGIN
    ]
    return min(usable, default=None)


def _is_position_table(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return "pos" in leaf or leaf == "wpe"


def check_positions(model: nn.Module, length: int) -> None:
    """Check that ``model`` can read ``length`` tokens at once.

    Only models with a table of positions have such a limit; all others pass.

    Raises:
        InputError: the text is longer than the table.
    """
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise InputError(
            f"{length} tokens do not fit this {type(model).__name__}, which has {positions} positions; use shorter "
            f"texts, {positions} tokens at most"
        )


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """Check that ``model`` has an embedding for each of the token ids; a GPU would not even say which call failed.

    Models that do not tell their table of embeddings pass.

    Raises:
        InputError: an id lies outside the table, as with another model's tokenizer.
    """
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if not isinstance(table, nn.Embedding) or ids.is_floating_point() or not ids.numel():
        return
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= table.num_embeddings:
        raise InputError(
            f"a text holds the token {least if least < 0 else most}, and this {type(model).__name__} knows 0 to "
            f"{table.num_embeddings - 1}; use the tokenizer that belongs to the model"
        )
