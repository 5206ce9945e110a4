"""Linear layers of Llama models on one GPU: slimc's kernels against cuBLAS in bf16 and other people's kernels.

    python benchmarks/gpu_linear.py [--models llama-2-7b,llama-2-70b] [--tokens 1,16,64,128,2048] [--json FILE]

`slimc bench linear` is the same from an installed package; `slimc/bench/linear.py` says what is measured.
"""

from slimc.bench.linear import main

if __name__ == "__main__":
    main()
