"""Whole Llama models on one GPU: tokens a second and memory, compressed, dense and int4.

    python benchmarks/gpu_generate.py [--models llama-2-7b] [--batches 1,16] [--variants "dense,slimc"] [--json FILE]

`slimc bench generate` is the same from an installed package; `slimc/bench/generate.py` says what is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from slimc.bench.generate import MODELS, VARIANTS, Measurement, measure, table


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer layers than the models have, to try things out")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    found: list[Measurement] = []
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    batches = [int(batch) for batch in options.batches.split(",")]
    for model in options.models.split(","):
        for variant in options.variants.split(";"):
            begun = time.perf_counter()
            sizes = {"prompt": options.prompt, "tokens": options.tokens, "layers": options.layers}
            for one in measure(model, variant, batches, **sizes):
                found.append(one)
                print(*table(found).splitlines()[-2:], f"    {time.perf_counter() - begun:.0f} s", sep="\n", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(about | {"rows": [one.to_json() for one in found]}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
