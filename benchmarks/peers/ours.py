"""Our side: pytbptt's TransformerXL, evaluated and trained as pytbptt does it."""

import torch
from torch import Tensor

from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.worker import serve
from pytbptt.data import EvaluationChunk
from pytbptt.evaluation.scoring import Scorer, chunk_length
from pytbptt.nn import TransformerXL, TransformerXLConfig


class Ours:
    """TransformerXL; where it is not trained, with the memory and the scoring of `python -m pytbptt.eval`.

    Its "loss" reads chunks together as that program does, "loss-by-chunk" one after another.
    """

    def __init__(self, case: Case) -> None:
        config = TransformerXLConfig(
            vocab_size=case.vocab_size,
            n_layer=case.n_layer,
            d_model=case.d_model,
            n_head=case.n_head,
            d_head=case.d_head,
            d_inner=case.d_inner,
            dropout=case.dropout,
            mem_len=case.mem_len,
            clamp_len=case.clamp_len,
            same_length=case.same_length,
            cutoffs=case.cutoffs,
        )
        self.model = TransformerXL(config)
        self.trained = "train" in case.theirs
        if self.trained:
            self.memory = self.model.init_memory(case.batch_size)
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        else:
            self.model.eval()
            self.scorer = Scorer(self.model, torch.device("cpu"))

    def parameters(self) -> int:
        return self.model.num_parameters()

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        if work == "train":
            for _ in range(count):
                self._update(*chunks.next())
            return
        together = chunk_length(self.model, chunks.bptt, chunks.batch_size) // chunks.bptt if work == "loss" else 1
        begins = torch.zeros(chunks.batch_size, dtype=torch.bool)
        with torch.no_grad():
            for first in range(0, count, together):
                parts = zip(*(chunks.next() for _ in range(min(together, count - first))), strict=True)
                tokens, targets = (torch.cat(part, dim=1) for part in parts)
                self.scorer.read(EvaluationChunk(tokens, targets, None, begins))
            self.scorer.sums()

    def _update(self, tokens: Tensor, targets: Tensor) -> None:
        result, self.memory = self.model.loss(tokens, targets, self.memory)
        self.optimizer.zero_grad(set_to_none=True)
        result.objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()


if __name__ == "__main__":
    serve(Ours)
