"""LSTM layers: pytbptt, torch.nn.LSTM (oneDNN, cuDNN) and eager PyTorch; with weight drop, AWD-LSTM's WeightDrop.

On a GPU also FlashRNN if it is installed, for a single layer. It has no input projection, so it is a bound.
`cudnn_persists` in the results says whether torch uses cuDNN's persistent algorithm at that size.
"""

import functools
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.harness import Op, Row, Size
from pytbptt.nn import LSTM
from pytbptt.ops import backend


@dataclass
class Layers:
    """Two LSTMs with the same weights, their input, and resets of 3 % of the steps."""

    ours: LSTM
    theirs: nn.LSTM
    input: Tensor
    reset: Tensor
    flashrnn: list[Tensor] = field(default_factory=list)
    """FlashRNN's gates (B, T, 4, heads, H), recurrent weights (4, heads, H, H) and bias (4, heads, H)."""

    def leaves(self) -> list[Tensor]:
        return [self.input, *self.ours.parameters(), *self.theirs.parameters(), *self.flashrnn]


def make(T: int, B: int, I: int, H: int, layers: int, device: str, dtype: torch.dtype, drop: float = 0.0) -> Layers:
    ours = LSTM(I, H, layers, weight_drop=drop, device=device, dtype=dtype)
    theirs = nn.LSTM(I, H, layers, device=device, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.flatten_parameters()
    input = torch.randn(T, B, I, device=device, dtype=dtype, requires_grad=True)
    problem = Layers(ours, theirs, input, torch.rand(T, B, device=device) < 0.03)
    if device == "cuda" and layers == 1:
        gates = torch.randn(B, T, 4, 1, H, device=device, dtype=dtype)
        weight = torch.randn(4, 1, H, H, device=device, dtype=dtype).div(H**0.5)
        problem.flashrnn = [gates, weight, torch.zeros(4, 1, H, device=device, dtype=dtype)]
        for tensor in problem.flashrnn:
            tensor.requires_grad_()
    return problem


def fused(problem: Layers) -> Tensor:
    with backend("fused"):
        return problem.ours(problem.input)[0]


def fused_with_resets(problem: Layers) -> Tensor:
    with backend("fused"):
        return problem.ours(problem.input, reset=problem.reset)[0]


def torch_lstm(problem: Layers) -> Tensor:
    # In training mode cuDNN saves tensors for the backward pass, even under no_grad.
    problem.theirs.train(torch.is_grad_enabled())
    output: Tensor = problem.theirs(problem.input)[0]
    return output


def eager(problem: Layers) -> Tensor:
    with backend("reference"):
        return problem.ours(problem.input)[0]


@functools.partial(torch.compile, dynamic=False)
def _step(gates: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + hidden @ weight_hh.T).chunk(4, dim=1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def compiled_eager(problem: Layers) -> Tensor:
    """Only the step is compiled: compiling the loop over steps takes minutes."""
    output = problem.input
    for layer in range(problem.theirs.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(problem.theirs, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates = F.linear(output, weight_ih, bias_ih + bias_hh)
        hidden = cell = gates.new_zeros(gates.shape[1], weight_hh.shape[1])
        outputs = []
        for gates_of_step in gates.unbind():
            hidden, cell = _step(gates_of_step, hidden, cell, weight_hh)
            outputs.append(hidden)
        output = torch.stack(outputs)
    return output


def flashrnn(problem: Layers) -> Tensor:
    if not problem.flashrnn:
        raise ValueError("FlashRNN is timed with one layer")
    states, _ = importlib.import_module("flashrnn").flashrnn(*problem.flashrnn, function="lstm", backend="cuda_fused")
    output: Tensor = states[0]
    return output


def torch_lstm_dropped(problem: Layers) -> Tensor:
    """As AWD-LSTM's WeightDrop, which replaces the module's weights at each call."""
    module, flat = problem.theirs, problem.theirs._flat_weights
    dropped = [
        F.dropout(weight, 0.5) if name.startswith("weight_hh") else weight
        for name, weight in zip(module._flat_weights_names, flat, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not contiguous
        module._flat_weights = dropped
        try:
            output: Tensor = module(problem.input)[0]
        finally:
            module._flat_weights = flat
    return output


def cudnn_persists(row: Row, size: Size) -> dict[str, Any]:
    """The conditions of ATen/native/cudnn/RNN.cpp."""
    if row.device != "cuda" or row.name != "torch_lstm":
        return {}
    shape: Mapping[str, int] = size.shape
    persists = (
        row.dtype == "float16"
        and shape["layers"] == 1
        and shape["H"] <= 1024
        and shape["H"] % 128 == shape["I"] % 128 == shape["B"] % 8 == 0
        and shape["B"] <= 128
    )
    return {"cudnn_persists": persists}


def facts(row: Row, size: Size) -> dict[str, Any]:
    """cudnn_persists, and the fused op's launch plan for this size and GPU."""
    if row.device != "cuda" or row.name != "fused":
        return cudnn_persists(row, size)
    gpu = torch.cuda.get_device_properties()
    limits = {
        "multiprocessors": gpu.multi_processor_count,
        "shared_bytes": gpu.shared_memory_per_block_optin,
        "registers": gpu.regs_per_multiprocessor,
    }
    plan = importlib.import_module("pytbptt._C").lstm_plan
    return {"plan": plan(size.shape["H"], size.shape["B"], row.dtype, limits)}


def _size(T: int, B: int, I: int, H: int, *devices: str, layers: int = 1, default: bool = True) -> Size:
    return Size({"T": T, "B": B, "I": I, "H": H, "layers": layers}, devices or ("cpu", "cuda"), default=default)


ON_CPU = {
    "zaremba-650": _size(35, 20, 650, 650),
    "awd-first-layer": _size(70, 80, 400, 1150, "cpu"),
    "small-256": _size(64, 16, 256, 256, "cpu"),
    "streams-200": _size(12, 64, 200, 200, "cpu"),
    "bytes-512": _size(64, 16, 128, 512, "cpu"),
    "tiny": _size(3, 2, 8, 8, default=False),
}
ON_GPU = {
    "awd-1150": _size(70, 80, 1150, 1150, "cuda"),
    "zaremba-1500": _size(70, 20, 1500, 1500, "cuda"),
    "wide-1024": _size(150, 64, 1024, 1024, "cuda"),
    "wide-2048": _size(140, 60, 2048, 2048, "cuda"),
}
STACKED = {
    f"{name}-3-layers": _size(*list(size.shape.values())[:4], "cuda", layers=3, default=False)
    for name, size in {"zaremba-650": ON_CPU["zaremba-650"], **ON_GPU}.items()
}
LSTM_LAYERS = Op(
    module=__name__,
    name="lstm",
    sizes={**ON_CPU, **ON_GPU, **STACKED},
    make=make,
    implementations={
        "fused": fused,
        "fused_with_resets": fused_with_resets,
        "torch_lstm": torch_lstm,
        "eager": eager,
        "compiled_eager": compiled_eager,
        "flashrnn": flashrnn,
    },
    leaves=Layers.leaves,
    work=floors.lstm,
    facts=facts,
    bounds=("flashrnn",),
    compiled=("compiled_eager",),
    dtypes={"cpu": ("float32",), "cuda": ("bfloat16", "float16", "tf32")},
    gpu_only=("flashrnn",),
)
WEIGHT_DROP = Op(
    module=__name__,
    name="lstm with weight drop",
    sizes=ON_CPU,
    make=lambda **sizes: make(**sizes, drop=0.5),
    implementations={"fused": fused, "torch_lstm": torch_lstm_dropped},
    leaves=Layers.leaves,
    work=floors.lstm,
)
OPS = {op.name: op for op in (LSTM_LAYERS, WEIGHT_DROP)}
