"""The reference training loop: `paec train`, `paec eval`, `paec compare` and `paec inspect`."""
