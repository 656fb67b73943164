"""Their side: transformers' TransfoXL, in the environment of requirements.txt; pytbptt is not there."""

import torch
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.worker import serve


class Theirs:
    """TransfoXLLMHeadModel; "log_prob" asks it for every word's log-probability, the others for its loss.

    "loss-together" reads all chunks of a turn as one, as our side does: with same_length that is its loss too.
    """

    def __init__(self, case: Case) -> None:
        config = TransfoXLConfig(
            vocab_size=case.vocab_size,
            n_layer=case.n_layer,
            d_model=case.d_model,
            d_embed=case.d_model,
            n_head=case.n_head,
            d_head=case.d_head,
            d_inner=case.d_inner,
            dropout=case.dropout,
            dropatt=0.0,
            mem_len=case.mem_len,
            clamp_len=case.clamp_len,
            same_length=case.same_length,
            cutoffs=list(case.cutoffs),
            div_val=1,
        )
        self.model = TransfoXLLMHeadModel(config)
        self.model.train("train" in case.theirs)
        self.memory = None
        if self.model.training:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        with torch.set_grad_enabled(self.model.training):
            together = count if work == "loss-together" else 1
            for _ in range(count // together):
                parts = zip(*(chunks.next() for _ in range(together)), strict=True)
                tokens, targets = (torch.cat(part, dim=1) for part in parts)
                if work == "log_prob":
                    output = self.model(tokens, mems=self.memory)
                    float(-output.prediction_scores.gather(2, targets.unsqueeze(2)).sum())
                else:
                    # It shifts the labels by itself, and so leaves each chunk's last target out.
                    output = self.model(tokens, mems=self.memory, labels=tokens)
                    if self.model.training:
                        self.optimizer.zero_grad(set_to_none=True)
                        output.loss.backward()
                        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                        self.optimizer.step()
                    float(output.loss)
                self.memory = output.mems


if __name__ == "__main__":
    serve(Theirs)
