"""Benchmarks of compressed models on a GPU: what the command ``slimc bench`` runs."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable

from slimc.errors import closest

__all__ = ["check_words", "no_gpu"]


def check_words(parser: argparse.ArgumentParser, option: str, words: Iterable[str], known: Collection[str]) -> None:
    """Leave with a message of one line if an option has a word that nothing is called by."""
    for word in words:
        if word not in known:
            parser.error(f"{option} knows no {word!r}{closest(word, known)}; it knows {', '.join(known)}")


def no_gpu() -> str | None:
    """Say why nothing can be measured here, or return ``None``."""
    import torch

    if torch.cuda.is_available():
        return None
    return (
        f"this measures CUDA kernels, and PyTorch {torch.__version__} finds no CUDA GPU here; run it where there is "
        "one (nvidia-smi shows it, and torch.cuda.is_available() is true)"
    )
