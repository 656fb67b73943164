"""Recurrent reinforcement learning: an LSTM over rollouts whose episodes end within a chunk, 3 % of the steps being the
first of one.

    pytest benchmarks/test_rollouts.py --benchmark-only --results FILE
    make bench-rollouts                                                    # with TorchRL beside them

Beside the fused op: a step at a time (Stable-Baselines3's way), pieces between resets of any row (rl_games' way),
TorchRL's three backends where it is installed (scan compiled, as it is meant to run), and as a bound torch.nn.LSTM,
which resets nothing.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.harness import Op, Row, Size
from pytbptt.nn import LSTM
from pytbptt.ops import backend

RESETS = 0.03


@dataclass
class Rollout:
    """One layer twice, its input (T, B, I), and which of its steps begin an episode."""

    ours: LSTM
    theirs: nn.LSTM
    input: Tensor
    reset: Tensor
    torchrl: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """TorchRL's modules with the same weights, by backend, made when they are called first."""

    def wanted(self) -> list[Tensor]:
        return [self.input, *self.ours.parameters(), *self.theirs.parameters()]


def make(B: int, T: int, I: int, H: int, device: str, dtype: torch.dtype) -> Rollout:
    ours = LSTM(I, H, device=device, dtype=dtype)
    theirs = nn.LSTM(I, H, device=device, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.flatten_parameters()
    input = torch.randn(T, B, I, device=device, dtype=dtype, requires_grad=True)
    return Rollout(ours, theirs, input, torch.rand(T, B, device=device) < RESETS)


def fused(rollout: Rollout) -> Tensor:
    with backend("fused"):
        return rollout.ours(rollout.input, reset=rollout.reset)[0]


def eager(rollout: Rollout) -> Tensor:
    with backend("reference"):
        return rollout.ours(rollout.input, reset=rollout.reset)[0]


def _pieces(rollout: Rollout, bounds: list[int]) -> Tensor:
    """torch.nn.LSTM on each piece between bounds; rows that begin an episode at a piece's first step begin at 0."""
    shape = 1, rollout.input.shape[1], rollout.theirs.hidden_size
    states = rollout.input.new_zeros(shape), rollout.input.new_zeros(shape)
    outputs = []
    for first, end in itertools.pairwise(bounds):
        kept = (~rollout.reset[first]).to(rollout.input.dtype)[None, :, None]
        output, states = rollout.theirs(rollout.input[first:end], (states[0] * kept, states[1] * kept))
        outputs.append(output)
    return torch.cat(outputs)


def per_step_loop(rollout: Rollout) -> Tensor:
    return _pieces(rollout, list(range(len(rollout.input) + 1)))


def split_at_every_reset(rollout: Rollout) -> Tensor:
    """The whole batch is cut where any of its rows is reset."""
    cuts = rollout.reset[1:].any(dim=1).nonzero().flatten().add(1).tolist()
    return _pieces(rollout, [0, *cuts, len(rollout.input)])


def torch_lstm_without_resets(rollout: Rollout) -> Tensor:
    rollout.theirs.train(torch.is_grad_enabled())  # cuDNN saves for a backward pass by this alone
    output: Tensor = rollout.theirs(rollout.input)[0]
    return output


def _torchrl(which: str, rollout: Rollout) -> Tensor:
    if which not in rollout.torchrl:
        rollout.torchrl[which] = _make_torchrl(which, rollout)
    return rollout.torchrl[which]()


def _make_torchrl(which: str, rollout: Rollout) -> Callable[[], Tensor]:
    try:
        from tensordict import TensorDict
        from torchrl.modules import LSTMModule
    except ImportError as error:
        raise ImportError(f"TorchRL is not installed here ({error}); make bench-rollouts brings it") from None
    T, B, I = rollout.input.shape
    module: Any = LSTMModule(
        input_size=I,
        hidden_size=rollout.theirs.hidden_size,
        in_keys=["input", "hidden", "cell"],
        out_keys=["output", ("next", "hidden"), ("next", "cell")],
        recurrent_backend=which,
        # For triton: what torch's products are allowed. "auto" takes three products in TF32 where torch takes one.
        recurrent_compute_dtype=rollout.input.dtype,
        recurrent_matmul_precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        default_recurrent_mode=True,
        device=rollout.input.device,
    )
    for name, weight in rollout.theirs.named_parameters():
        setattr(module.lstm, name, weight)  # the same, so that gradients are the same tensors'
    if which == "scan":  # what "auto" is under torch.compile, and on a CPU some ten times as slow without
        module = torch.compile(module, dynamic=False)
    states = rollout.input.new_zeros(B, T, 1, rollout.theirs.hidden_size)
    is_init = rollout.reset.T[..., None].contiguous()

    def call() -> Tensor:
        batch_first = rollout.input.transpose(0, 1)
        rows = {"input": batch_first, "hidden": states, "cell": states, "is_init": is_init}
        output: Tensor = module(TensorDict(rows, [B, T]))["output"]
        return output.transpose(0, 1)

    return call


def _work(B: int, T: int, I: int, H: int, *, mode: str) -> floors.Work:
    return floors.lstm(T, B, I, H, mode=mode)


def _size(B: int, T: int, I: int, H: int, default: bool = True) -> Size:
    return Size({"B": B, "T": T, "I": I, "H": H}, default=default)


ROLLOUTS = Op(
    module=__name__,
    name="rollouts",
    sizes={
        "observations-32": _size(128, 128, 32, 256),
        "observations-256": _size(128, 128, 256, 256),
        "4096-environments": _size(4096, 32, 256, 256),
        "tiny": _size(3, 20, 8, 8, default=False),
    },
    make=make,
    implementations={
        "fused": fused,
        "eager": eager,
        "per_step_loop": per_step_loop,
        "split_at_every_reset": split_at_every_reset,
        "torch_lstm_without_resets": torch_lstm_without_resets,
        "torchrl_pad": partial(_torchrl, "pad"),
        "torchrl_scan": partial(_torchrl, "scan"),
        "torchrl_triton": partial(_torchrl, "triton"),
    },
    wanted=Rollout.wanted,
    work=_work,
    bounds=("torch_lstm_without_resets",),
    gpu_only=("torchrl_triton",),
    compiled=("torchrl_scan",),
    dtypes={"cpu": ("float32",), "cuda": ("tf32", "bfloat16")},
)
OPS = {op.name: op for op in (ROLLOUTS,)}


@pytest.mark.parametrize("row", ROLLOUTS.rows(), ids=str)
def test_rollouts(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
