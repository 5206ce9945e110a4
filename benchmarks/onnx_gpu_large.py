"""Layers of a large language model in ONNX Runtime on a GPU: slimc's kernels against dense float16 and MatMulNBits.

    python benchmarks/onnx_gpu_large.py --work DIR [--layers 2] [--batches 1 16] [--json FILE]

A Llama of a few layers of Llama-2-7B's size with random weights, which changes nothing of the time: dense, and as
``slim-w4-2x4`` makes it (2:4 int4 with one scale a tensor, 4-bit adapters of rank 0.1); both keep a dense output
embedding. Beside them, ONNX Runtime's own quantiser on the dense graph, which rounds the output embedding, too. The
library of kernels is built first. Exports are kept in DIR; ``--export NAME`` makes one that others need nothing of, and
ends, so that several may be made at once. Steps are captured as CUDA graphs; times are medians over rounds.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from onnx_gpu import FASTEST_DENSE, QUANTISED, add_options, measure, print_table, save
from onnx_quantiser import quantise

import slimc
from slimc.backends.onnx.kernels.build import build_library, forms_of
from slimc.backends.onnx.session import OnnxDecoder
from slimc.bench.generate import MODELS, VARIANTS, build

KERNELS = "slimc, slimc's kernels"
FORMS = {FASTEST_DENSE: ("dense", "ort"), "slimc, ort, float16": ("slimc", "ort"), KERNELS: ("slimc", "cuda")}


def main() -> None:
    """Export, measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", choices=[f"{variant}-{target}" for variant, target in FORMS.values()])
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=2)
    add_options(parser, batches=[1, 16])
    chosen = parser.parse_args()
    # Importing the quantiser has every package log what it does.
    logging.getLogger().setLevel(logging.WARNING)

    if chosen.export:
        export(*chosen.export.split("-"), chosen.model, chosen.layers, chosen.work)
        return
    folders, library = exported(chosen.model, chosen.layers, chosen.work)
    rows: dict[str, dict[str, Any]] = {}
    decoders = {}
    for name, folder in folders.items():
        rows[name] = {"bytes": sum(file.stat().st_size for file in folder.glob("model.onnx*"))}
        try:
            kernels = library if name == KERNELS else None
            decoders[name] = OnnxDecoder(folder, device="cuda", kernels=kernels, replay=True)
            rows[name]["replayed"] = decoders[name].replays
            decoders[name].generate([[1] * chosen.prompt], 4)  # to warm up
        except Exception as error:
            rows[name]["failed"] = " ".join(str(error).replace(str(chosen.work), "DIR").split())[:400]
            decoders.pop(name, None)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(MODELS[chosen.model]["vocab_size"])
    for batch in chosen.batches:
        prompts = torch.randint(0, vocabulary, (batch, chosen.prompt), generator=generator).tolist()
        measure(decoders, prompts, chosen.rounds, chosen.tokens, rows)
    print_table(rows, chosen.batches)
    save(rows, chosen, model=chosen.model)


def exported(model: str, layers: int, work: Path) -> tuple[dict[str, Path], Path]:
    """Return the folders of all variants and the library of kernels, making those that ``work`` does not hold yet."""
    folders = {name: export(*form, model, layers, work) for name, form in FORMS.items()}
    quantised = f"{QUANTISED}, float16"
    folders[quantised] = work / "quantised"
    if not folders[quantised].exists():
        quantise(folders[FASTEST_DENSE], folders[quantised])
    library = work / "slim_kernels.so"
    if not library.exists():
        build_library(forms_of(folders[KERNELS]), library)
    return folders, library


def export(variant: str, target: str, model: str, layers: int, work: Path) -> Path:
    """Return the folder of one variant, making it if ``work`` does not hold it yet."""
    folder = work / f"{variant}-{target}"
    if not folder.exists():
        torch.manual_seed(0)
        made = build(MODELS[model] | {"num_hidden_layers": layers}, VARIANTS[variant], torch.device("cpu"))
        slimc.export_onnx(made, folder, target=target, dtype="float16")
    return folder


if __name__ == "__main__":
    main()
