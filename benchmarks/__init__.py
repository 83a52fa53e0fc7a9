"""Measurements: ``python -m benchmarks.sweep`` for all of them, ``pytest benchmarks`` for pytest-benchmark's cases.

logits, workload, smollm2   what is measured on
implementations, rivals     what is measured: this package, and what a user would pick instead
floors                      what cannot be beaten, in the same turns
check, harness              right first, then time and memory, by peak_memory on a CPU
rows, provenance            one row a measurement
parts, sweep                which measurements, and their run
step, trl_step              whole optimiser steps of the reference loop, and of TRL's trainer
page, plots                 bench_results/README.md and its pictures, from the rows alone
compiled_code               registers and instructions, with no GPU
exchanges                   what threads pass on through memory, with no GPU
recompiles                  what a new shape compiles, with no GPU
cost_model                  from these the time to expect on a GPU, written down before it is measured
"""
