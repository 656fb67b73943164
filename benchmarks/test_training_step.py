"""Whole updates: loss, backward, clipping, the optimizer's step; in mixed precision, launched kernel by kernel.

    pytest benchmarks/test_training_step.py --benchmark-only --results FILE

Transformer-XL with the fused op, with that and padded products, and with eager attention; AWD-LSTM with the fused op,
on torch.nn.LSTM (oneDNN, cuDNN), and with eager recurrence. On a GPU an update's 1,000 launches and more outgrow its
queue, so that its time is also that of launching it, which the trainer's CUDA graph does not pay.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness import Op, Row, Size
from pytbptt.nn import AWDLSTM, LSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig, aligned
from pytbptt.ops import backend


@dataclass
class Training:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokens: Tensor
    targets: Tensor
    memory: object
    dtype: torch.dtype
    """Of autocast; none in float32."""

    def update(self, which: str = "fused") -> Tensor:
        device = self.tokens.device.type
        reduced = self.dtype != torch.float32
        with backend(which), torch.autocast(device, self.dtype if reduced else None, enabled=reduced):
            result, _ = self.model.loss(self.tokens, self.targets, self.memory)
        result.objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self.optimizer.step()
        self.optimizer.zero_grad()
        objective: Tensor = result.objective.detach()
        return objective


def _drawn(vocab_size: int, streams: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and targets by Zipf's law, so that the adaptive softmax's tails run."""
    drawn = torch.rand(2, streams, length, device=device)
    tokens, targets = drawn.mul(math.log(vocab_size)).exp().long().sub(1).clamp(max=vocab_size - 1)
    return tokens, targets


def make_transformer_xl(
    B: int, T: int, M: int, L: int, E: int, H: int, D: int, inner: int, V: int, device: str, dtype: torch.dtype
) -> Training:
    config = TransformerXLConfig(
        vocab_size=V, n_layer=L, d_model=E, n_head=H, d_head=D, d_inner=inner, mem_len=M, dropout=0.1
    )
    with torch.device(device):
        model = TransformerXL(config)
    tokens, targets = _drawn(V, B, T, device)
    with torch.no_grad():
        _, memory = model(tokens)
    return Training(model, torch.optim.Adam(model.parameters(), fused=True), tokens, targets, memory, dtype)


def padded(training: Training) -> Tensor:
    with aligned.padded_products():
        return training.update()


def _transformer_xl(B: int, T: int, E: int, H: int, D: int, inner: int, V: int, *devices: str, L: int = 16) -> Size:
    shape = {"B": B, "T": T, "M": T, "L": L, "E": E, "H": H, "D": D, "inner": inner, "V": V}
    return Size(shape, devices, modes=("update",), default="cuda" in devices)


DTYPES = {"cpu": ("bfloat16",), "cuda": ("bfloat16",)}
TRANSFORMER_XL = Op(
    module=__name__,
    name="Transformer-XL's update",
    sizes={
        "seed": _transformer_xl(15, 150, 410, 10, 41, 2100, 267_744, "cuda"),
        "nvidia-base": _transformer_xl(32, 192, 512, 8, 64, 2048, 267_735, "cuda"),
        "tiny": _transformer_xl(2, 5, 16, 2, 8, 16, 50, "cpu", L=2),
    },
    make=make_transformer_xl,
    implementations={"fused": Training.update, "fused_padded": padded, "eager": lambda one: one.update("reference")},
    dtypes=DTYPES,
)


class TorchLayer(nn.Module):
    """torch.nn.LSTM in the place of a layer of AWDLSTM's, with its weight drop, but without resets."""

    def __init__(self, layer: LSTM) -> None:
        super().__init__()
        self.hidden_size, self.weight_drop = layer.hidden_size, layer.weight_drop
        self.lstm = nn.LSTM(layer.input_size, layer.hidden_size)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor], *, reset: None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weights = {"weight_hh_l0": F.dropout(self.lstm.weight_hh_l0, self.weight_drop, self.training)}
        return functional_call(self.lstm, weights, (input, tuple(state.to(input.dtype) for state in hx)))


@dataclass
class TrainingTwice:
    ours: Training
    theirs: Training


def make_awd_lstm(
    B: int, T: int, L: int, embed: int, hidden: int, V: int, device: str, dtype: torch.dtype
) -> TrainingTwice:
    tokens, targets = torch.randint(V, (2, B, T), device=device)

    def training(model: AWDLSTM) -> Training:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=30.0, weight_decay=1.2e-6)
        return Training(model, optimizer, tokens, targets, model.init_memory(B), dtype)

    config = AWDLSTMConfig(vocab_size=V, n_layer=L, d_embed=embed, d_hidden=hidden)
    with torch.device(device):
        ours, theirs = AWDLSTM(config), AWDLSTM(config)
        theirs.layers = nn.ModuleList(TorchLayer(layer) for layer in theirs.layers)
    return TrainingTwice(training(ours), training(theirs))


def _awd_lstm(B: int, T: int, L: int, embed: int, hidden: int, V: int, *devices: str) -> Size:
    shape = {"B": B, "T": T, "L": L, "embed": embed, "hidden": hidden, "V": V}
    return Size(shape, devices, modes=("update",), default="cuda" in devices)


AWD_LSTM = Op(
    module=__name__,
    name="AWD-LSTM's update",
    sizes={
        "awd-lstm-ptb": _awd_lstm(20, 70, 3, 400, 1150, 10_000, "cuda"),
        "tiny": _awd_lstm(2, 5, 2, 8, 16, 50, "cpu"),
    },
    make=make_awd_lstm,
    implementations={
        "fused": lambda both: both.ours.update(),
        "torch_lstm": lambda both: both.theirs.update(),
        "eager": lambda both: both.ours.update("reference"),
    },
    dtypes=DTYPES,
)
OPS = {op.name: op for op in (TRANSFORMER_XL, AWD_LSTM)}


@pytest.mark.parametrize("row", [*TRANSFORMER_XL.rows(), *AWD_LSTM.rows()], ids=lambda row: f"{row.op}-{row}")
def test_training_step(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
