"""Decoding in ONNX Runtime on the CPU: compressed folders against the fp32 export and ONNX Runtime's own quantiser.

    python benchmarks/onnx_cpu.py MODEL COMPRESSED... --text test.txt --work DIR

MODEL is the dense model, each COMPRESSED a folder that ``slimc compress`` wrote. All are exported with one graph
(fused attention, norms and rotations), so that only the weights differ; the quantiser gets that graph with the output
embedding as a matrix of its own, which it rounds to 4 bits too. Exports are kept in DIR. Times are taken in rounds,
each variant once a round, so that what else the machine does meets all alike; medians are printed, those of ratios
over the rounds. Of the float16 export only size and perplexity are measured: processors compute in float32.

Bind it to as many cores as it has threads: ``taskset -c 0,1 python benchmarks/onnx_cpu.py ... --threads 2``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnx_quantiser import quantise

import slimc
from slimc.backends import hf
from slimc.backends.onnx.session import OnnxDecoder
from slimc.runtime.files import readable

LEVELS = (0, 4)
"""Accuracy levels of MatMulNBits: products in float32, or of inputs rounded to 8 bits."""


def main() -> None:
    """Export, measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("compressed", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    # Importing the quantiser has every package log what it does.
    logging.getLogger().setLevel(logging.WARNING)

    folders = exported(chosen.model, chosen.compressed, chosen.work)
    tokenizer = hf.load_tokenizer(chosen.compressed[0])
    text = chosen.text.read_text()
    ids = hf.tokenize_text(tokenizer, text, chosen.windows, chosen.length).numpy()
    rows = {}
    for name, folder in folders.items():
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        rows[name] = {"bytes": size, "perplexity": perplexity(OnnxDecoder(folder, threads=chosen.threads), ids)}
    timed = {name: folder for name, folder in folders.items() if name != "fp16"}
    decoders = {name: OnnxDecoder(folder, threads=chosen.threads) for name, folder in timed.items()}
    prompt = ids[0, : chosen.prompt].tolist()
    for decoder in decoders.values():
        measured(decoder, prompt, 4)  # to warm up
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in decoders}
    for _ in range(chosen.rounds):
        for name, decoder in decoders.items():
            prefill, steps = measured(decoder, prompt, chosen.tokens)
            times[name][0].append(prefill)
            times[name][1].append(statistics.median(steps))
    for name, (prefills, steps) in times.items():
        rows[name] |= {"prefill": chosen.prompt / statistics.median(prefills), "decode": 1 / statistics.median(steps)}
        # Each round's own ratio: what else ran then, ran for both.
        for other, label in (("fp32", "over_fp32"), (quantised(level_of(name)), "over_quantiser")):
            rows[name][label] = statistics.median(a / b for a, b in zip(times[other][1], steps, strict=True))
    print(f"{'':34s} {'':>10s} {'':>10s} {'tokens a second':>18s} {'decode over':>20s}")
    print(f"{'':34s} {'size':>10s} {'perplexity':>10s} {'prefill':>9s} {'decode':>8s} {'fp32':>8s} {'quantiser':>11s}")
    for name, row in rows.items():
        speeds = ""
        if name in times:
            speeds = f"{row['prefill']:9.1f} {row['decode']:8.1f} {row['over_fp32']:8.2f} {row['over_quantiser']:11.2f}"
        print(f"{name:34s} {readable(row['bytes']):>10s} {row['perplexity']:10.2f} {speeds}".rstrip())
    if chosen.json is not None:
        settings = {name: value for name, value in vars(chosen).items() if isinstance(value, int)}
        machine = {"cores": len(os.sched_getaffinity(0)), "onnxruntime": onnxruntime.__version__}
        chosen.json.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


def quantised(level: int) -> str:
    """Return the name of the rows of ONNX Runtime's quantiser."""
    return f"ORT's quantiser, level {level}"


def level_of(name: str) -> int:
    """Return the accuracy level of a row; that of fp32, which has none, is the exact one."""
    return int(name[-1]) if "level" in name else 0


def exported(model: str, compressed: Sequence[Path], work: Path) -> dict[str, Path]:
    """Return the folders of all variants, exporting those that ``work`` does not hold yet."""
    folders = {"fp32": work / "fp32", "fp16": work / "fp16"}
    for name, dtype in (("fp32", "float32"), ("fp16", "float16")):
        if not folders[name].exists():
            slimc.export_onnx(hf.load_model(model)[0], folders[name], target="ort", dtype=dtype)
    for level in LEVELS:
        name = quantised(level)
        folders[name] = work / f"quantised-{level}"
        if not folders[name].exists():
            quantise(folders["fp32"], folders[name], accuracy_level=level)
        for folder in compressed:
            name = f"{folder.name}, level {level}"
            folders[name] = work / f"{folder.name}-{level}"
            if not folders[name].exists():
                small = slimc.load(folder)
                slimc.export_onnx(small, folders[name], target="ort", accuracy_level=level, embedding_bits=4)
    return folders


def measured(decoder: OnnxDecoder, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
    """Return the seconds until the first token, and those of each token after it."""
    stamps = [time.perf_counter()]
    decoder.generate([prompt], tokens, on_tokens=lambda _: stamps.append(time.perf_counter()))
    return stamps[1] - stamps[0], np.diff(stamps[1:]).tolist()


def perplexity(decoder: OnnxDecoder, windows: np.ndarray) -> float:
    """Return the perplexity of token ids [windows, length]: each but a window's first is predicted."""
    losses = []
    for window in windows:
        logits = decoder.logits(window[None])[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, window[1:, None], axis=-1)[:, 0]
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
