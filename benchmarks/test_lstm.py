"""One LSTM layer over one chunk: F.linear and the fused lstm against torch.nn.LSTM and the reference; and
pytbptt.nn.LSTM with weight drop against AWD-LSTM's weight-dropped torch.nn.LSTM.

    pytest benchmarks/test_lstm.py --benchmark-json=lstm.json

All run turn by turn, so that a busy machine slows all alike; `extra_info` has the medians and their ratios.
"""

import statistics
import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from pytbptt.extension import EXTENSION
from pytbptt.nn import LSTM
from pytbptt.ops import lstm, reference

SIZES = {  # name: (T, B, I, H)
    "zaremba-650": (35, 20, 650, 650),
    "awd-1150": (70, 80, 400, 1150),
    "small-256": (64, 16, 256, 256),
    "streams-200": (12, 64, 200, 200),
    "bytes-512": (64, 16, 128, 512),
}
SECONDS = 4.0
pytestmark = pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.why_absent}")


class Layer:
    """The same layer in every implementation."""

    def __init__(self, T, B, I, H):  # noqa: E741  (I is the input's width)
        torch.manual_seed(0)
        self.module = torch.nn.LSTM(I, H)
        self.dropping = LSTM(I, H, weight_drop=0.5)
        self.dropping.load_state_dict(self.module.state_dict())
        self.x = torch.randn(T, B, I, requires_grad=True)
        self.h0, self.c0 = torch.zeros(B, H), torch.zeros(B, H)
        self.grad = torch.randn(T, B, H)

    def nn(self):
        return self.module(self.x, (self.h0[None], self.c0[None]))[0]

    def nn_dropped(self):
        """As AWD-LSTM's WeightDrop: the dropped weight is set into the module at each call."""
        module, raw = self.module, self.module.weight_hh_l0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the weights are no single chunk of memory
            flat = module._flat_weights
            module._flat_weights = [flat[0], F.dropout(raw, 0.5), *flat[2:]]
            output = self.nn()
            module._flat_weights = flat
        return output

    def ours(self):
        return self._projected(lstm, self.module.weight_hh_l0)

    def ours_dropped(self):
        return self.dropping(self.x, (self.h0[None], self.c0[None]))[0]

    def reference(self):
        return self._projected(lambda *inputs: reference.lstm(*inputs, None), self.module.weight_hh_l0)

    def _projected(self, op, weight_hh):
        module = self.module
        gates = F.linear(self.x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0)
        return op(gates, weight_hh, self.h0, self.c0)[0]

    def forward(self, name):
        with torch.no_grad():
            getattr(self, name)()

    def forward_backward(self, name):
        module = self.dropping if name == "ours_dropped" else self.module
        leaves = [self.x, *module.parameters()]
        torch.autograd.grad(getattr(self, name)(), leaves, self.grad)


def interleaved_medians(runs, names):
    times = {name: [] for name in names}
    for name in names:
        runs(name)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[names[0]]) < 5:
        for name in names:
            start = time.perf_counter()
            runs(name)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("size", SIZES)
def test_lstm(benchmark, size, direction):
    benchmark.group = f"lstm {size} {SIZES[size]} {direction}"
    layer = Layer(*SIZES[size])
    run = getattr(layer, direction)
    names = ["ours", "nn", "ours_dropped", "nn_dropped", "reference"]
    median = interleaved_medians(run, names)
    benchmark.extra_info.update({f"{name}_ms": 1e3 * value for name, value in median.items()})
    benchmark.extra_info["torch.nn.LSTM / ours"] = median["nn"] / median["ours"]
    benchmark.extra_info["weight-dropped torch.nn.LSTM / ours"] = median["nn_dropped"] / median["ours_dropped"]
    benchmark.extra_info["reference / ours"] = median["reference"] / median["ours"]
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(run, args=("ours",), rounds=5, warmup_rounds=1)
