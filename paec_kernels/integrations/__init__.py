"""PAEC in other people's trainers, one module for each."""
