"""Measurements of the kernels and the torch path: speed and memory beside eager PyTorch, and the compiled code."""
