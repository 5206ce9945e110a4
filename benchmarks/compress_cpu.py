"""Time and peak memory of ``slimc compress`` on the CPU, in a process of its own.

    python benchmarks/compress_cpu.py MODEL OUTPUT --calibration valid.txt [--recipe NAME] [--json results/...]

The SLiM authors' code takes 47.4 s for its row with 4-bit adapters on an H100 ("slim-lora-q w4 2:4").
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from slimc import recipes

REFERENCE_SECONDS_ON_AN_H100 = 47.4


def main() -> None:
    """Compress once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--recipe", default=recipes.DEFAULT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    command = [sys.executable, "-m", "slimc", "compress", options.model, "-o", options.output, "--device", "cpu"]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--calibration", options.calibration, "--recipe", options.recipe, "--overwrite"], check=True
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{seconds:.0f} s, {peak:.0f} MiB at the peak, on {os.cpu_count()} cores")
    if options.json:
        record = {
            "command": "python benchmarks/compress_cpu.py MODEL OUTPUT --calibration valid.txt",
            "recipe": options.recipe,
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "seconds": seconds,
            "peak_memory_mib": peak,
            "reference_seconds_on_an_h100": REFERENCE_SECONDS_ON_AN_H100,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
