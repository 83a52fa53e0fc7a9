"""The reference training loop: `paec train`, `paec eval` and `paec compare`."""
