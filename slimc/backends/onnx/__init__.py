"""Compressed models as ONNX files. ``import slimc`` imports neither this package nor ``onnx``."""
