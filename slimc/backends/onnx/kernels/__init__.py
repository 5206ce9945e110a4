"""slimc's CUDA kernels as a library for ONNX Runtime's CUDA provider."""
