"""Runs pytbptt's models: evaluation as `python -m pytbptt.eval`, training with model.loss and Adam."""

import torch
from torch import Tensor, nn

from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.parts import Range
from benchmarks.peers.worker import serve
from pytbptt import ops
from pytbptt.data import EvaluationChunk
from pytbptt.evaluation.scoring import Scorer, chunk_length
from pytbptt.nn import LSTM, AdaptiveEmbedding, AdaptiveSoftmax
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.nn.attention import RelativeAttention
from pytbptt.nn.layer_norm import LayerNorm
from pytbptt.runtime.distributed import mixed_precision

RANGES: list[Range] = [
    (AdaptiveEmbedding, "forward", "embedding"),
    (RelativeAttention, "forward", "projections"),
    (LSTM, "forward", "projections"),
    (ops, "rel_attention", "attention"),
    (ops, "lstm", "lstm"),
    (nn.Sequential, "forward", "feed-forward"),
    (LayerNorm, "forward", "norms"),
    (AdaptiveSoftmax, "forward", "loss"),
]


class PytbpttRunner:
    """In evaluation, "loss" reads several chunks at once as `python -m pytbptt.eval` does; "loss-by-chunk" does not."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        config = ARCHITECTURES[case.arch](vocab_size=case.vocab_size, **case.sizes)
        self.model = config.build().to(self.device)
        if case.trained:
            self.memory = self.model.init_memory(case.batch_size)
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        else:
            self.model.eval()
            self.scorer = Scorer(self.model, self.device)

    def parameters(self) -> int:
        return self.model.num_parameters()

    def ranges(self) -> list[Range]:
        if not self.case.trained:  # the replay of a CUDA graph has no ranges
            self.scorer = Scorer(self.model, self.device, cuda_graph=False)
        return RANGES

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        if work == "train":
            for _ in range(count):
                self._update(*chunks.next())
            return
        chunks_per_read = (
            chunk_length(self.model, chunks.bptt, chunks.batch_size) // chunks.bptt if work == "loss" else 1
        )
        begins = torch.zeros(chunks.batch_size, dtype=torch.bool)
        with torch.no_grad(), mixed_precision(self.device, torch.bfloat16 if self.case.bf16 else torch.float32):
            for first in range(0, count, chunks_per_read):
                parts = zip(*(chunks.next() for _ in range(min(chunks_per_read, count - first))), strict=True)
                tokens, targets = (torch.cat(part, dim=1) for part in parts)
                self.scorer.read(EvaluationChunk(tokens, targets, None, begins))
            self.scorer.totals()

    def _update(self, tokens: Tensor, targets: Tensor) -> None:
        result, self.memory = self.model.loss(tokens, targets, self.memory)
        self.optimizer.zero_grad(set_to_none=True)
        result.objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()


if __name__ == "__main__":
    serve(PytbpttRunner)
