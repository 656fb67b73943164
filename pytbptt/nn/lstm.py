"""A drop-in for torch.nn.LSTM with resets, weight drop and locked dropout."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pytbptt import ops
from pytbptt.errors import InputError
from pytbptt.nn.dropout import dropout
from pytbptt.nn.unscriptable import UnscriptableModule
from pytbptt.runtime.device import autocast_dtype
from pytbptt.runtime.renamed import Renamed


class LSTM(UnscriptableModule):
    """Drop-in for torch.nn.LSTM: the same parameters, state_dict, initialisation, arguments, attributes and results.

    Weights changed by torch.nn.utils (parametrizations, weight_norm, spectral_norm, prune) are used as changed.

    It adds `reset` to the call, `weight_drop` and `locked_dropout`. The cell state of 16-bit inputs stays float32.
    Bidirectional layers, projections (proj_size) and packed sequences are not supported.

    Source: Merity et al., "Regularizing and Optimizing LSTM Language Models" (2018), sections 2 and 4.2, for weight
    drop (DropConnect on the recurrent weights) and locked (variational) dropout.
    """

    mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_drop: float = 0.0,
        locked_dropout: float = 0.0,
    ) -> None:
        """
        Args:
            input_size, hidden_size, num_layers, bias, batch_first, dropout, device, dtype: as for torch.nn.LSTM.
            bidirectional, proj_size: only False and 0 are accepted.
            weight_drop: probability that a weight of weight_hh is dropped in training, drawn once per call.
            locked_dropout: probability that a unit between layers is dropped in training, for the whole call.

        Warns:
            UserWarning: dropout or locked_dropout with one layer, where it has no effect.

        Raises:
            InputError: a bidirectional or projected LSTM, a size below 1, or a probability outside [0, 1].
        """
        super().__init__()
        if bidirectional or proj_size:
            found = "bidirectional=True" if bidirectional else f"proj_size={proj_size}"
            raise InputError(f"LSTM: found {found}, expected one direction and no projection")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise InputError(f"LSTM: {name}: found {size}, expected at least 1")
        for name, p in (("dropout", dropout), ("weight_drop", weight_drop), ("locked_dropout", locked_dropout)):
            if not 0.0 <= p <= 1.0:
                raise InputError(f"LSTM: {name}: found {p}, expected a probability")
        for name, p in (("dropout", dropout), ("locked_dropout", locked_dropout)):
            if p and num_layers == 1:
                message = f"LSTM: {name}: found {p} with one layer: it applies between layers, so it has no effect"
                warnings.warn(message, stacklevel=2)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bool(bidirectional)
        self.proj_size = proj_size
        self.weight_drop = weight_drop
        self.locked_dropout = locked_dropout
        gates = 4 * hidden_size
        for n in range(num_layers):
            width = input_size if n == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{n}", _empty(gates, width, device=device, dtype=dtype))
            self.register_parameter(f"weight_hh_l{n}", _empty(gates, hidden_size, device=device, dtype=dtype))
            if bias:
                self.register_parameter(f"bias_ih_l{n}", _empty(gates, device=device, dtype=dtype))
                self.register_parameter(f"bias_hh_l{n}", _empty(gates, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter uniformly within ± 1 / sqrt(hidden_size), in torch.nn.LSTM's order."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Each layer's weight_ih, weight_hh and, if it has them, bias_ih and bias_hh."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        return [[getattr(self, f"{name}_l{n}") for name in names] for n in range(self.num_layers)]

    def flatten_parameters(self) -> None:
        """Does nothing; here so that code written for torch.nn.LSTM runs unchanged."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Read one chunk.

        Args:
            input: (T, B, input_size), (B, T, input_size) if batch_first, or (T, input_size) for a single stream.
            hx: h0 and c0, (num_layers, B, hidden_size) each, or (num_layers, hidden_size); zeros by default.
            reset: bool of the input's shape without its last dimension; where true, h and c are zeroed before that
                step, in every layer.

        Returns:
            The last layer's output, shaped as the input, and (h_n, c_n), shaped as hx. c_n is float32 for 16-bit
            inputs.

        Raises:
            InputError: a packed sequence, or shapes or dtypes that do not fit; the message names the argument.
        """
        if isinstance(input, PackedSequence):
            raise InputError("LSTM: input: found a PackedSequence, expected a tensor (reset= separates sequences)")
        weights = self.all_weights  # read once: a parametrization computes them, and spectral_norm iterates, each time
        self._check(input, hx, reset, weights[0][0].dtype)
        unbatched, transposed = input.dim() == 2, self.batch_first and input.dim() == 3
        if unbatched:
            input, reset = input.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        elif transposed:
            input, reset = input.transpose(0, 1), None if reset is None else reset.t()
        h0, c0 = self._zeros(input) if hx is None else hx

        hidden, h_n, c_n = input, [], []
        for n, layer in enumerate(weights):
            if n > 0:
                hidden = dropout(hidden, self.dropout, self.training)
                hidden = locked_dropout(hidden, self.locked_dropout, self.training, time_dim=0)
            hidden, h, c = self.forward_layer(layer, hidden, h0[n], c0[n], reset)
            h_n.append(h)
            c_n.append(c)
        h, c = torch.stack(h_n), torch.stack(c_n)
        if unbatched:
            return hidden.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return hidden.transpose(0, 1) if transposed else hidden, (h, c)

    run_layer = Renamed("forward_layer")

    def extra_repr(self) -> str:
        """Sizes and non-default arguments, as torch.nn.LSTM prints them."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        defaults |= {"weight_drop": 0.0, "locked_dropout": 0.0}
        changed = [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([str(self.input_size), str(self.hidden_size), *changed])

    def forward_layer(
        self, weights: list[Tensor], hidden: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over one chunk, from its weights as in `all_weights`: (output, h_n, c_n)."""
        weight_ih, weight_hh, *biases = weights
        gates = F.linear(hidden, weight_ih, biases[0] + biases[1] if biases else None)
        # Not assigned to the module: state_dict, optimizer and DistributedDataParallel keep the raw parameter.
        weight_hh = dropout(weight_hh, self.weight_drop, self.training)
        c0 = c0 if gates.dtype == torch.float64 else c0.float()
        return ops.lstm(gates, weight_hh, h0, c0, reset=reset)

    def _zeros(self, input: Tensor) -> tuple[Tensor, Tensor]:
        h0 = input.new_zeros(self.num_layers, input.shape[1], self.hidden_size)
        return h0, h0

    def _check(self, input: Tensor, hx: tuple[Tensor, Tensor] | None, reset: Tensor | None, dtype: torch.dtype) -> None:
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            shape = "(B, T, {})" if self.batch_first else "(T, B, {})"
            found = f"found shape {tuple(input.shape)}"
            raise InputError(f"LSTM: input: {found}, expected {shape.format(self.input_size)}")
        autocast = input.is_floating_point() and dtype != torch.float64 and autocast_dtype(input) is not None
        if input.dtype != dtype and not autocast:
            raise InputError(f"LSTM: input: found {input.dtype}, expected {dtype} as its weights")
        streams = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        expected = (self.num_layers, *streams, self.hidden_size)
        if hx is not None and (not isinstance(hx, tuple | list) or len(hx) != 2):
            found = f"{len(hx)} states" if isinstance(hx, tuple | list) else type(hx).__name__
            raise InputError(f"LSTM: hx: found {found}, expected a pair of h0 and c0")
        for name, state in zip(("h0", "c0"), () if hx is None else hx, strict=False):
            if tuple(state.shape) != expected:
                raise InputError(f"LSTM: {name}: found shape {tuple(state.shape)}, expected {expected}")
        if reset is not None and (reset.shape != input.shape[:-1] or reset.dtype != torch.bool):
            found = f"{reset.dtype} {tuple(reset.shape)}"
            raise InputError(f"LSTM: reset: found {found}, expected torch.bool {tuple(input.shape[:-1])}")


def locked_dropout(hidden: Tensor, p: float, training: bool, time_dim: int) -> Tensor:
    """Dropout with the same mask at every step, drawn per stream and unit (variational dropout).

    Source: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016).
    """
    if not training or p == 0.0:
        return hidden
    mask_shape = list(hidden.shape)
    mask_shape[time_dim] = 1
    return hidden * dropout(hidden.new_ones(mask_shape), p)


def _empty(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
