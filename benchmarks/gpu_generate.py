"""Whole Llama models on one GPU: tokens a second and memory, compressed, dense and int4.

    python benchmarks/gpu_generate.py [--models llama-2-7b] [--batches 1,16] [--variants "dense;slimc"]
        [--together 6] [--json FILE]

`slimc bench generate` is the same from an installed package; `slimc/bench/generate.py` says what is measured.
"""

from slimc.bench.generate import main

if __name__ == "__main__":
    main()
