"""Losses on token statistics: policy losses, PAEC, and the methods that it is compared with."""
