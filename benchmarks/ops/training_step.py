"""Whole updates in mixed precision: loss, backward, clipping and the optimizer's step, without CUDA graphs.

Transformer-XL with the fused op, with the fused op and padded products, and with eager attention; AWD-LSTM with the
fused op, with torch.nn.LSTM (oneDNN, cuDNN), and with eager recurrence. On a GPU the more than 1,000 launches of an
update do not fit into the launch queue, so times include launch overhead, which the trainer's CUDA graph avoids.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.harness import Op, Size
from pytbptt.nn import AWDLSTM, LSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig, padded_linear
from pytbptt.ops import backend


@dataclass
class Training:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokens: Tensor
    targets: Tensor
    memory: object
    dtype: torch.dtype
    """Of autocast, which is off for float32."""

    def update(self, backend_name: str = "fused") -> Tensor:
        device = self.tokens.device.type
        reduced = self.dtype != torch.float32
        with backend(backend_name), torch.autocast(device, self.dtype if reduced else None, enabled=reduced):
            result, _ = self.model.loss(self.tokens, self.targets, self.memory)
        result.objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self.optimizer.step()
        self.optimizer.zero_grad()
        objective: Tensor = result.objective.detach()
        return objective


def _zipf_tokens(vocab_size: int, streams: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and targets by Zipf's law, so that the tails of the adaptive softmax are used."""
    uniform = torch.rand(2, streams, length, device=device)
    tokens, targets = uniform.mul(math.log(vocab_size)).exp().long().sub(1).clamp(max=vocab_size - 1)
    return tokens, targets


def make_transformer_xl(
    B: int, T: int, M: int, L: int, E: int, H: int, D: int, inner: int, V: int, device: str, dtype: torch.dtype
) -> Training:
    config = TransformerXLConfig(
        vocab_size=V, n_layer=L, d_model=E, n_head=H, d_head=D, d_inner=inner, mem_len=M, dropout=0.1
    )
    with torch.device(device):
        model = TransformerXL(config)
    tokens, targets = _zipf_tokens(V, B, T, device)
    with torch.no_grad():
        _, memory = model(tokens)
    return Training(model, torch.optim.Adam(model.parameters(), fused=True), tokens, targets, memory, dtype)


def padded(training: Training) -> Tensor:
    with padded_linear.padded_matmuls():
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
    implementations={
        "fused": Training.update,
        "fused_padded": padded,
        "eager": lambda training: training.update("reference"),
    },
    dtypes=DTYPES,
)


class TorchLayer(nn.Module):
    """torch.nn.LSTM as a layer of AWDLSTM, with weight drop but without resets."""

    def __init__(self, layer: LSTM) -> None:
        super().__init__()
        self.hidden_size, self.weight_drop = layer.hidden_size, layer.weight_drop
        self.lstm = nn.LSTM(layer.input_size, layer.hidden_size)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor], *, reset: None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weights = {"weight_hh_l0": F.dropout(self.lstm.weight_hh_l0, self.weight_drop, self.training)}
        return functional_call(self.lstm, weights, (input, tuple(state.to(input.dtype) for state in hx)))


@dataclass
class TrainingPair:
    ours: Training
    theirs: Training


def make_awd_lstm(
    B: int, T: int, L: int, embed: int, hidden: int, V: int, device: str, dtype: torch.dtype
) -> TrainingPair:
    tokens, targets = torch.randint(V, (2, B, T), device=device)

    def training(model: AWDLSTM) -> Training:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=30.0, weight_decay=1.2e-6)
        return Training(model, optimizer, tokens, targets, model.init_memory(B), dtype)

    config = AWDLSTMConfig(vocab_size=V, n_layer=L, d_embed=embed, d_hidden=hidden)
    with torch.device(device):
        ours, theirs = AWDLSTM(config), AWDLSTM(config)
        theirs.layers = nn.ModuleList(TorchLayer(layer) for layer in theirs.layers)
    return TrainingPair(training(ours), training(theirs))


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
        "fused": lambda pair: pair.ours.update(),
        "torch_lstm": lambda pair: pair.theirs.update(),
        "eager": lambda pair: pair.ours.update("reference"),
    },
    dtypes=DTYPES,
)
OPS = {op.name: op for op in (TRANSFORMER_XL, AWD_LSTM)}
