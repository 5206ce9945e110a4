"""The README of a folder for stock transformers: how to open it, and what not to leave out."""

from __future__ import annotations

from slimc.backends.stock.scheme import Scheme

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``--max-lora-rank`` that vLLM (0.33) knows."""


def model_card(architecture: str, scheme: Scheme | None, *, most: int) -> str:
    """Return the text.

    Args:
        architecture: the class of the model.
        scheme: of the codes, None if there are none.
        most: the largest rank of an adapter, 0 if there are none.
    """
    packages = ["transformers", *["compressed-tensors"] * (scheme is not None), *["peft"] * (most > 0)]
    lines = [
        "# A model that slimc compressed",
        "",
        f"    pip install {' '.join(packages)}",
        "",
        f"    from transformers import {architecture}",
        f'    model = {architecture}.from_pretrained("this folder")',
        "",
    ]
    if scheme is not None:
        lines += [
            f"Its weights are {scheme} codes (compressed-tensors, pack-quantized). transformers decodes them,",
            "so in memory the model is as large, and as fast, as the dense one.",
            "",
        ]
    if most:
        lines += [
            f"Low-rank adapters (PEFT LoRA, rank up to {most}) are part of the model. **Without the package peft",
            "transformers leaves them out and does not say so**, and what remains is far worse.",
            "",
        ]
    if architecture.endswith("ForCausalLM"):
        lines += ["With vLLM:", "", f'    vllm serve "this folder"{_lora_options(most)}', ""]
    if architecture.endswith("ForCausalLM") and most:
        lines += ["and ask for the model `slimc`: no adapters are used for a request that does not name it.", ""]
    return "\n".join(lines)


def _lora_options(most: int) -> str:
    if not most:
        return ""
    room = next((rank for rank in _RANKS if rank >= most), most)
    return f' --enable-lora --max-lora-rank {room} --lora-modules slimc="this folder"'
