"""Benchmarks of compressed models on a GPU: what the command ``slimc bench`` runs."""
