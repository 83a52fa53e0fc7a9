"""How long the operator takes inside a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from paec_kernels.types import TokenStats


class OperatorClock:
    """Seconds between the operator's input and its output, forward and backward.

    Backward's time runs from the first gradient that reaches the statistics to the input's gradient. On a GPU both
    are events on its stream, and only ``seconds`` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def watch_backward(self, source: Tensor, stats: TokenStats) -> None:
        """Have backward timed, from the statistics to their source (the logits or the hidden states)."""
        started: list = []

        def arrived(gradient: Tensor) -> None:
            if not started:
                started.append(self._now())

        for value in stats:
            if value is not None and value.requires_grad:
                value.register_hook(arrived)
        source.register_hook(lambda gradient: self._spans.append((started[0], self._now())))

    def seconds(self) -> float:
        """Of all spans since the last call."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - start for start, end in spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
