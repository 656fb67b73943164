"""LSTM layers on a GPU beside cuDNN's: python -m benchmarks.gpu_lstm.

Times forward, and forward with backward, of pytbptt's LSTM on the fused op, the same with 3% resets, of torch.nn.LSTM
(cuDNN) and of eager PyTorch; of one layer also FlashRNN, where it is installed (the recurrence alone: it has no input
projection); then an update of the AWD-LSTM recipe with either LSTM. Timed as benchmarks.gpu does it.
`cudnn_persists` says whether torch lets cuDNN keep its weights on chip at that size. What an implementation cannot do
is recorded with its reason. float32 has TF32 products on all sides. Needs torch and numpy only; writes
benchmarks/results/<gpu>-lstm-<date>.json, case by case. `floor_milliseconds` is the least that the GPU could take; see
gpu_floors.
"""

import argparse
import importlib
import itertools
import re
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import gpu_floors, record
from benchmarks.gpu import cannot, gpu_facts, measure, show
from pytbptt.extension import EXTENSION
from pytbptt.nn import AWDLSTM, LSTM, AWDLSTMConfig
from pytbptt.ops import backend

SIZES = [(35, 20, 650), (70, 80, 1150), (70, 20, 1500), (150, 64, 1024), (140, 60, 2048)]  # T, B, H; inputs are H wide
LAYERS = (1, 3)
NAMES = ("fused", "fused, 3% resets", "cudnn", "eager", "flashrnn, recurrence alone")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RECIPE = AWDLSTMConfig(vocab_size=10000)  # Penn Treebank, 20 streams of 70 tokens
Runs = dict[str, Callable[[], Tensor]]


def cudnn_persists(B: int, H: int, layers: int, dtype: str) -> bool:
    """As ATen/native/cudnn/RNN.cpp decides for inputs as wide as H."""
    return dtype == "float16" and layers == 1 and H <= 1024 and H % 128 == 0 and B % 8 == 0 and B <= 128


def layers_of(T: int, B: int, H: int, layers: int, dtype: torch.dtype) -> tuple[Runs, list[Tensor]]:
    """The implementations, each giving its output, and what gradients are wanted for."""
    torch.manual_seed(0)
    ours = LSTM(H, H, layers, device="cuda", dtype=dtype)
    theirs = nn.LSTM(H, H, layers, device="cuda", dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.flatten_parameters()
    input = torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)

    reset = torch.rand(T, B, device="cuda") < 0.03

    def run(which: str, reset: Tensor | None = None) -> Tensor:
        with backend(which):
            return ours(input, reset=reset)[0]

    runs: Runs = {
        "fused": partial(run, "fused"),
        "fused, 3% resets": partial(run, "fused", reset),
        "cudnn": lambda: theirs(input)[0],
        "eager": partial(run, "reference"),
    }
    wanted = [input, *ours.parameters(), *theirs.parameters()]
    if layers == 1:
        # FlashRNN's layouts: gates (B, T, 4, heads, H), recurrent weights (4, heads, H, H), bias (4, heads, H).
        gates = torch.randn(B, T, 4, 1, H, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(4, 1, H, H, device="cuda", dtype=dtype).div(H**0.5).requires_grad_()
        bias = torch.zeros(4, 1, H, device="cuda", dtype=dtype, requires_grad=True)

        def flashrnn() -> Tensor:
            module = importlib.import_module("flashrnn")
            states, _ = module.flashrnn(gates, weight, bias, function="lstm", backend="cuda_fused")
            return states[0]

        runs["flashrnn, recurrence alone"] = flashrnn
        wanted += [gates, weight, bias]
    return runs, wanted


class CudnnLayer(nn.Module):
    """In the place of a layer of AWDLSTM's, with its weight drop, but without resets."""

    def __init__(self, layer: LSTM) -> None:
        super().__init__()
        self.hidden_size, self.weight_drop = layer.hidden_size, layer.weight_drop
        self.lstm = nn.LSTM(layer.input_size, layer.hidden_size)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor], *, reset: None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weights = {"weight_hh_l0": F.dropout(self.lstm.weight_hh_l0, self.weight_drop, self.training)}
        return functional_call(self.lstm, weights, (input, tuple(state.to(input.dtype) for state in hx)))


def recipe() -> tuple[dict[str, Callable[[], None]], int]:
    """An update of the AWD-LSTM recipe with either LSTM, under autocast, and the tokens that it reads."""
    streams, length = 20, 70

    def step_of(model: AWDLSTM) -> Callable[[], None]:
        model.cuda().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=30.0, weight_decay=1.2e-6)
        tokens, targets = torch.randint(RECIPE.vocab_size, (2, streams, length), device="cuda")
        memory = model.init_memory(streams)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                result, _ = model.loss(tokens, targets, memory)
            result.objective.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()

        return step

    ours, theirs = AWDLSTM(RECIPE), AWDLSTM(RECIPE)
    theirs.layers = nn.ModuleList(CudnnLayer(layer) for layer in theirs.layers)
    return {"fused": step_of(ours), "cudnn": step_of(theirs)}, streams * length


def forward(run: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        run()


def forward_and_backward(run: Callable[[], Tensor], wanted: list[Tensor]) -> None:
    out = run()
    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)


MODES = ("forward", "forward+backward")


def runs_of(T: int, B: int, H: int, layers: int, dtype: torch.dtype, mode: str) -> dict[str, Callable[[], None]]:
    runs, wanted = layers_of(T, B, H, layers, dtype)
    if mode == "forward":
        return {name: partial(forward, run) for name, run in runs.items()}
    return {name: partial(forward_and_backward, run, wanted) for name, run in runs.items()}


def plan_of(B: int, H: int, dtype: str) -> dict[str, Any]:
    """How the fused op runs at that size on the GPU at hand."""
    gpu = torch.cuda.get_device_properties()
    limits = {
        "multiprocessors": gpu.multi_processor_count,
        "shared_bytes": gpu.shared_memory_per_block_optin,
        "registers": gpu.regs_per_multiprocessor,
    }
    found: dict[str, Any] = importlib.import_module("pytbptt._C").lstm_plan(
        H, B, "tf32" if dtype == "float32" else dtype, limits
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_lstm", description="Time LSTM layers on a GPU.")
    parser.add_argument("--output", help="file for the results, by default benchmarks/results/<gpu>-lstm-<date>.json")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES), help="none: the recipe alone")
    parser.add_argument("--layers", nargs="*", type=int, default=list(LAYERS))
    parser.add_argument("--without", nargs="*", choices=NAMES, default=[])
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not EXTENSION.serves("cuda"):
        raise SystemExit("python -m benchmarks.gpu_lstm: needs a GPU and an extension built with CUDA kernels")
    machine = record.describe() | gpu_facts()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = arguments.output or f"benchmarks/results/{slug}-lstm-{date.today()}.json"
    results: list[dict[str, Any]] = []
    torch.backends.cuda.matmul.allow_tf32 = True  # torch lets cuDNN use TF32 as it is: the same for the fused op
    rates: dict[str, dict[str, float]] = {}
    for dtype, layers, (T, B, H), mode in itertools.product(arguments.dtype, arguments.layers, SIZES, MODES):
        if dtype not in rates:
            rates[dtype] = gpu_floors.rates(DTYPES[dtype])
        plan = plan_of(B, H, dtype)
        floor = gpu_floors.lstm(T, B, H, layers, mode=mode, rates=rates[dtype])
        try:
            runs = runs_of(T, B, H, layers, DTYPES[dtype], mode)
            measured = measure({name: run for name, run in runs.items() if name not in arguments.without})
        except Exception as error:  # out of memory, say: the other cases go on
            measured = {"fused": cannot(error)}
        results.append({
            "T,B,H": (T, B, H), "layers": layers, "dtype": dtype, "mode": mode, "floor_milliseconds": floor,
            "cudnn_persists": cudnn_persists(B, H, layers, dtype), "plan": plan, "rates": rates[dtype],
            "measured": measured,
        })  # fmt: skip
        show(f"{(T, B, H)}, {layers} layers, {dtype}, {mode}, floor {floor:.3f} ms", measured)
        record.write(path, "gpu_lstm", machine, results)  # as they come: a run that is stopped keeps them
    steps, tokens = recipe()
    measured = measure(steps)
    for one in measured.values():
        if "milliseconds" in one:
            one["tokens_per_second"] = 1000 * tokens / one["milliseconds"]
    results.append({"recipe": "awd-lstm-ptb", "dtype": "bfloat16", "mode": "update", "measured": measured})
    show("AWD-LSTM recipe, update", measured)
    record.write(path, "gpu_lstm", machine, results)


if __name__ == "__main__":
    main()
