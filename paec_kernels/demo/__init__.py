"""The package on a real model: ``python -m paec_kernels.demo``, one GRPO + PAEC step on SmolLM2-135M."""
