import time

import torch

import paec_kernels as pk
from paec_kernels.train.operator_clock import OperatorClock


def test_counts_the_operator_both_ways_and_nothing_else():
    clock = OperatorClock(torch.device("cpu"))
    source = torch.randn(20, 500, requires_grad=True) * 1
    with clock.forward():
        stats = pk.token_stats(source, torch.zeros(20, dtype=torch.long))
        time.sleep(0.3)  # a slow operator
    clock.watch_backward(source, stats)
    loss = stats.logp.sum() + stats.entropy.sum()
    loss.register_hook(lambda gradient: time.sleep(2))  # ahead of the statistics' gradients: not the operator's
    source.register_hook(lambda gradient: time.sleep(2))  # behind the source's
    loss.backward()
    assert 0.3 < clock.seconds() < 2
    assert clock.seconds() == 0


def test_backward_is_counted():
    clock = OperatorClock(torch.device("cpu"))
    source = torch.randn(300, 20_000, requires_grad=True) * 1
    stats = pk.token_stats(source, torch.zeros(300, dtype=torch.long))
    clock.watch_backward(source, stats)
    stats.entropy.sum().backward()
    assert clock.seconds() > 1e-3
