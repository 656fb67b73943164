"""Recurrent reinforcement learning: an LSTM over rollouts, of which 3 % of the steps are the first of an episode.

Beside the fused op: a loop over steps (as Stable-Baselines3), splits at every reset of any row (as rl_games), TorchRL's
three backends if it is installed (scan under torch.compile, as intended), and as a bound torch.nn.LSTM without resets.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.harness import Op, Size
from pytbptt.nn import LSTM
from pytbptt.ops import backend

RESETS = 0.03


@dataclass
class Rollout:
    """Two LSTM layers with the same weights, their input (T, B, I), and which steps start an episode."""

    ours: LSTM
    theirs: nn.LSTM
    input: Tensor
    reset: Tensor
    torchrl: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """TorchRL's modules with the same weights by backend, made at their first call."""

    def leaves(self) -> list[Tensor]:
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
    """torch.nn.LSTM on each piece between bounds, with the states of rows reset at the first step of a piece."""
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
    """Splits the whole batch at every reset of any row."""
    cuts = rollout.reset[1:].any(dim=1).nonzero().flatten().add(1).tolist()
    return _pieces(rollout, [0, *cuts, len(rollout.input)])


def torch_lstm_without_resets(rollout: Rollout) -> Tensor:
    # In training mode cuDNN saves tensors for the backward pass, even under no_grad.
    rollout.theirs.train(torch.is_grad_enabled())
    output: Tensor = rollout.theirs(rollout.input)[0]
    return output


def _torchrl(backend_name: str, rollout: Rollout) -> Tensor:
    if backend_name not in rollout.torchrl:
        rollout.torchrl[backend_name] = _make_torchrl(backend_name, rollout)
    return rollout.torchrl[backend_name]()


def _make_torchrl(backend_name: str, rollout: Rollout) -> Callable[[], Tensor]:
    try:
        from tensordict import TensorDict
        from torchrl.modules import LSTMModule
    except ImportError as error:
        raise ImportError(f"TorchRL is not installed ({error}); make bench-rollouts installs it") from None
    T, B, I = rollout.input.shape
    module: Any = LSTMModule(
        input_size=I,
        hidden_size=rollout.theirs.hidden_size,
        in_keys=["input", "hidden", "cell"],
        out_keys=["output", ("next", "hidden"), ("next", "cell")],
        recurrent_backend=backend_name,
        # For triton, the same precision as torch: "auto" computes three TF32 products where torch computes one.
        recurrent_compute_dtype=rollout.input.dtype,
        recurrent_matmul_precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        default_recurrent_mode=True,
        device=rollout.input.device,
    )
    for name, weight in rollout.theirs.named_parameters():
        setattr(module.lstm, name, weight)  # shared, so that the gradients are of the same tensors
    if backend_name == "scan":  # what "auto" uses under torch.compile; without, about ten times slower on a CPU
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
    leaves=Rollout.leaves,
    work=_work,
    bounds=("torch_lstm_without_resets",),
    gpu_only=("torchrl_triton",),
    compiled=("torchrl_scan",),
    dtypes={"cpu": ("float32",), "cuda": ("tf32", "bfloat16")},
)
OPS = {op.name: op for op in (ROLLOUTS,)}
