"""CUDA kernels that ship as source: NVRTC compiles them when they are first needed and a cubin is kept on disk.

``compiler`` finds and calls NVRTC, ``cache`` keeps what it made, ``driver`` loads and launches it. Nothing of CUDA is
touched at import: libraries are opened through ctypes by the first call that needs them, so that this package imports
on machines without a GPU, and no extension has to be built for any combination of Python, PyTorch and CUDA.
"""
