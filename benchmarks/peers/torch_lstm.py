"""Runs AWD-LSTM on torch.nn.LSTM, as its authors' implementation does, without pytbptt."""

import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.parts import Range
from benchmarks.peers.worker import serve

States = list[tuple[Tensor, Tensor]]


class TorchAWDLSTM(nn.Module):
    """Embedding, LSTMs with all dropouts, and tied softmax; the layers are time-first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.sizes = sizes = case.sizes
        self.embedding = nn.Embedding(case.vocab_size, sizes["d_embed"])
        last = sizes["d_embed"] if sizes["tie_weights"] else sizes["d_hidden"]
        widths = [sizes["d_embed"], *[sizes["d_hidden"]] * (sizes["n_layer"] - 1), last]
        self.layers = nn.ModuleList(nn.LSTM(*pair) for pair in pairwise(widths))
        self.decoder = nn.Linear(last, case.vocab_size)
        if sizes["tie_weights"]:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, states: States) -> tuple[Tensor, Tensor, States]:
        """The last layer's output before and after dropout, (T, B, E) each, and every layer's state."""
        sizes, next_states = self.sizes, []
        hidden = locked_dropout(self.embed(tokens.t()), sizes["dropouti"], self.training)
        for n, layer in enumerate(self.layers):
            if n > 0:
                hidden = locked_dropout(hidden, sizes["dropouth"], self.training)
            hidden, state = self.lstm(layer, hidden, states[n])
            next_states.append((state[0].detach(), state[1].detach()))
        return hidden, locked_dropout(hidden, sizes["dropout"], self.training), next_states

    def embed(self, tokens: Tensor) -> Tensor:
        weight, p = self.embedding.weight, self.sizes["dropoute"]
        if self.training and p:
            weight = weight * weight.new_empty(len(weight), 1).bernoulli_(1 - p).div_(1 - p)
        return F.embedding(tokens, weight)

    def lstm(
        self, layer: nn.LSTM, hidden: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Applies weight drop by replacing the layer's weights at each call, as WeightDrop does."""
        flat = layer._flat_weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are not contiguous
            layer._flat_weights = [flat[0], F.dropout(flat[1], self.sizes["weight_drop"], self.training), *flat[2:]]
            output, state = layer(hidden, state)
            layer._flat_weights = flat
        return output, state

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.decoder(hidden).flatten(0, 1), targets.t().flatten())


def locked_dropout(hidden: Tensor, p: float, training: bool) -> Tensor:
    if not training or p == 0:
        return hidden
    return hidden * hidden.new_empty(1, *hidden.shape[1:]).bernoulli_(1 - p).div_(1 - p)


class TorchLSTMRunner:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = TorchAWDLSTM(case).to(case.device).train(case.trained)
        self.states: States = [
            (torch.zeros(1, case.batch_size, layer.hidden_size, device=case.device),) * 2 for layer in self.model.layers
        ]
        kind = torch.optim.Adam if case.optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def ranges(self) -> list[Range]:
        return [
            (TorchAWDLSTM, "embed", "embedding"),
            (TorchAWDLSTM, "lstm", "lstm"),  # its input projection included
            (TorchAWDLSTM, "nll", "loss"),
            (self.optimizer, "step", "optimizer"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        ]

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        mixed = torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.bf16)
        for _ in range(count):
            tokens, targets = chunks.next()
            with torch.set_grad_enabled(self.model.training), mixed:
                raw, dropped, self.states = self.model(tokens, self.states)
                loss = self.model.nll(dropped, targets)
                if self.model.training:
                    loss = loss + self.case.sizes["alpha"] * dropped.float().square().mean()
                    loss = loss + self.case.sizes["beta"] * (raw[1:] - raw[:-1]).float().square().mean()
            if self.model.training:
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                self.optimizer.step()
            float(loss)


if __name__ == "__main__":
    serve(TorchLSTMRunner)
