"""Decoding in ONNX Runtime on a GPU: compressed folders against the dense exports and ONNX Runtime's own quantiser.

    python benchmarks/onnx_gpu.py MODEL COMPRESSED... --text test.txt --work DIR --kernels slim_kernels.so

MODEL is the dense model, each COMPRESSED a folder that ``slimc compress`` wrote. Everything runs in ONNX Runtime's CUDA
provider, with the cache on the card. The quantiser gets the graph of the dense model in float16, with the output
embedding as a matrix of its own, which it rounds to 4 bits too. Exports are kept in DIR. With a library of
``slimc kernels`` the folders of target cuda are run by it as well.

The greedy tokens of each folder are compared with those that PyTorch chooses for the same weights in float32; where
they part, the line says by how little PyTorch preferred its own, as a share of its largest logit. Times are taken in
rounds, each variant once a round; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_quantiser import quantise
from torch import Tensor, nn

import slimc
from slimc.backends import hf
from slimc.backends.onnx.session import OnnxDecoder
from slimc.backends.onnx.tracing import twin
from slimc.runtime.files import readable

DENSE = "dense"
QUANTISED = "ORT's quantiser"
FORMS = (("portable", "float32"), ("portable", "float16"), ("ort", "float16"))
FASTEST_DENSE = f"{DENSE}, ort, float16"


@dataclass(frozen=True)
class Variant:
    """One exported folder, which model its tokens are to be compared with (None: another model's), and its kernels.

    ``replay``: steps are captured as CUDA graphs, where that can be.
    """

    folder: Path
    model: str | None
    kernels: Path | None = None
    replay: bool = True


def main() -> None:
    """Export, compare, measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("compressed", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, help="a library that 'slimc kernels' built for these folders")
    parser.add_argument("--nodes", action="store_true", help="count the operators of each optimised graph, too")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose names contain one of these")
    add_options(parser, batches=[1, 4])
    chosen = parser.parse_args()
    # Importing the quantiser has every package log what it does.
    logging.getLogger().setLevel(logging.WARNING)

    variants = exported(chosen.model, chosen.compressed, chosen.work, chosen.kernels, chosen.only)
    tokenizer = hf.load_tokenizer(chosen.compressed[0])
    windows = hf.tokenize_text(tokenizer, chosen.text.read_text(), max(chosen.batches), chosen.prompt)
    expected = {
        name: {batch: greedy(model, windows[:batch], chosen.tokens) for batch in chosen.batches}
        for name, model in models(chosen.model, chosen.compressed)
    }
    rows: dict[str, dict[str, Any]] = {}
    decoders = {}
    for name, variant in variants.items():
        try:
            decoder = OnnxDecoder(variant.folder, device="cuda", kernels=variant.kernels, replay=variant.replay)
            size = sum(file.stat().st_size for file in variant.folder.glob("model.onnx*"))
            rows[name] = {"bytes": size, "replayed": decoder.replays}
            if chosen.nodes:
                rows[name]["nodes"] = nodes_of(variant, chosen.work)
            for batch in chosen.batches:
                made = decoder.generate(windows[:batch].tolist(), chosen.tokens)
                if variant.model is not None:
                    rows[name][f"tokens, batch {batch}"] = compared(made, *expected[variant.model][batch])
            decoders[name] = decoder
        except Exception as error:
            rows[name] = {"failed": " ".join(str(error).replace(str(chosen.work), "DIR").split())[:400]}
        print(name, json.dumps(rows[name]), flush=True)
    for batch in chosen.batches:
        measure(decoders, windows[:batch].tolist(), chosen.rounds, chosen.tokens, rows)
        save(rows, chosen, compressed=[folder.name for folder in chosen.compressed])
    print_table(rows, chosen.batches)


def add_options(parser: argparse.ArgumentParser, batches: list[int]) -> None:
    """Add what measuring takes: where exports are kept, how often and what is generated, where figures are written."""
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)


def save(rows: dict[str, Any], chosen: argparse.Namespace, **described: Any) -> None:
    """Write the rows, if a file is asked for, with the settings: numbers and lists, and what is ``described``."""
    if chosen.json is None:
        return
    settings = {name: value for name, value in vars(chosen).items() if isinstance(value, int | list)} | described
    machine = {"gpu": torch.cuda.get_device_name(), "onnxruntime": onnxruntime.__version__}
    chosen.json.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


def models(dense: str, compressed: Sequence[Path]) -> Any:
    """Yield each model in float32 on the GPU, by the name of its variants."""
    yield DENSE, twin(hf.load_model(dense)[0], torch.float32).cuda()
    for folder in compressed:
        yield folder.name, twin(slimc.load(folder), torch.float32).cuda()


def exported(
    model: str, compressed: Sequence[Path], work: Path, kernels: Path | None, only: Sequence[str]
) -> dict[str, Variant]:
    """Return the variants that are asked for, exporting those that ``work`` does not hold yet."""
    variants, sources = {}, {}
    for name, source in [(DENSE, None), *((folder.name, folder) for folder in compressed)]:
        for target, dtype in FORMS if source is None else (*FORMS, ("cuda", "float16")):
            folder = work / f"{name}-{target}-{dtype}"
            sources[folder] = source
            variants[f"{name}, {target}, {dtype}"] = Variant(folder, name)
            if (target, dtype) == ("ort", "float16"):
                variants[f"{name}, {target}, {dtype}, no graphs"] = Variant(folder, name, replay=False)
        if source is not None and kernels is not None:
            variants[f"{name}, slimc's kernels"] = Variant(folder, name, kernels)
            variants[f"{name}, slimc's kernels, no graphs"] = Variant(folder, name, kernels, replay=False)
    variants[f"{QUANTISED}, float16"] = Variant(work / "quantised-float16", None)
    variants = {name: one for name, one in variants.items() if any(part in name for part in only)}
    for variant in variants.values():
        if not variant.folder.exists() and variant.model is None:
            quantise(work / f"{DENSE}-ort-float16", variant.folder)
        elif not variant.folder.exists():
            source = sources[variant.folder]
            *_, target, dtype = variant.folder.name.split("-")
            opened = hf.load_model(model)[0] if source is None else slimc.load(source)
            slimc.export_onnx(opened, variant.folder, target=target, dtype=dtype)
    return variants


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return PyTorch's likeliest tokens [batch, tokens], and all logits [batch, tokens, vocabulary] they came from."""
    ids, scores = prompts.cuda(), []
    for _ in range(tokens):
        scores.append(model(ids).logits[:, -1].float())
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :].cpu(), torch.stack(scores, dim=1).cpu()


def compared(made: Sequence[Sequence[int]], expected: Tensor, scores: Tensor) -> dict[str, Any]:
    """Count the equal tokens; for each text that parts, say where and by how much PyTorch preferred its own token."""
    found = torch.tensor(made)
    parted = []
    for row in range(len(found)):
        different = (found[row] != expected[row]).nonzero()
        if len(different):
            place = int(different[0])
            here = scores[row, place]
            margin = (here.max() - here[found[row, place]]) / here.abs().max()
            parted.append({"text": row, "token": place, "margin": round(float(margin), 6)})
    return {"equal": int((found == expected).sum()), "of": found.numel(), "parted": parted}


def nodes_of(variant: Variant, work: Path) -> dict[str, int]:
    """Return how many nodes of the products' and attention's operators ONNX Runtime makes of a graph on the GPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.optimized_model_filepath = str(work / "optimised.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    path = str(variant.folder / "model.onnx")
    if variant.kernels is not None:
        options.register_custom_ops_library(str(variant.kernels.absolute()))
    onnxruntime.InferenceSession(path, options, providers=providers, disabled_optimizers=["ConstantSharing"])
    graph = onnx.load(work / "optimised.onnx", load_external_data=False).graph
    counted = Counter(node.op_type for node in graph.node)
    wanted = (
        *("MatMulNBits", "MatMul", "FusedMatMul", "DequantizeLinear", "linear", "GroupQueryAttention"),
        *("MemcpyToHost", "MemcpyFromHost"),
    )
    return {name: counted[name] for name in wanted if counted[name]} | {"all": len(graph.node)}


def measure(
    decoders: dict[str, OnnxDecoder], prompts: list[list[int]], rounds: int, tokens: int, rows: dict[str, Any]
) -> None:
    """Add to each row the tokens a second of reading ``prompts`` and of continuing them."""
    batch = len(prompts)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            stamps = [time.perf_counter()]
            decoder.generate(prompts, tokens, on_tokens=lambda _, to=stamps: to.append(time.perf_counter()))
            times[name][0].append(stamps[1] - stamps[0])
            times[name][1].append(statistics.median(np.diff(stamps[1:])))
    for name, (prefills, steps) in times.items():
        read = batch * len(prompts[0]) / statistics.median(prefills)
        rows[name][f"batch {batch}"] = {"prefill": read, "decode": batch / statistics.median(steps)}
        if FASTEST_DENSE in times:
            # Each round's own ratio: what else ran then, ran for both.
            ratios = (a / b for a, b in zip(times[FASTEST_DENSE][1], steps, strict=True))
            rows[name][f"batch {batch}"]["over dense float16"] = statistics.median(ratios)


def print_table(rows: dict[str, Any], batches: Sequence[int]) -> None:
    """Print a line a variant."""
    heads = "".join(f" | batch {batch}: decode  ratio  prefill  tokens" for batch in batches)
    print(f"{'':36s} {'size':>9s}{heads}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:36s} failed: {row['failed']}")
            continue
        line = f"{name:36s} {readable(row['bytes']):>9s}"
        for batch in batches:
            times, tokens = row[f"batch {batch}"], row.get(f"tokens, batch {batch}")
            equal = f"{tokens['equal']}/{tokens['of']}" if tokens else "-"
            ratio = times.get("over dense float16", float("nan"))
            line += f" | {times['decode']:15.1f} {ratio:6.2f} {times['prefill']:8.0f} {equal:>7s}"
        print(line)


if __name__ == "__main__":
    main()
