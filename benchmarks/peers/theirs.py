"""Runs transformers' TransfoXL, in the environment of requirements.txt, which has no pytbptt."""

import torch
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.parts import Range
from benchmarks.peers.worker import serve

CHUNKS_PER_READ = 8


class TransfoXLRunner:
    """TransfoXLLMHeadModel: "log_prob" computes the log-probabilities of all words, the others the loss.

    "loss-together" reads CHUNKS_PER_READ chunks at once, as pytbptt does. With same_length the loss is the same.
    """

    def __init__(self, case: Case) -> None:
        names = ("n_layer", "d_model", "n_head", "d_head", "d_inner", "dropout", "mem_len", "clamp_len", "same_length")
        config = TransfoXLConfig(
            vocab_size=case.vocab_size,
            d_embed=case.sizes["d_model"],
            dropatt=0.0,
            cutoffs=list(case.sizes["cutoffs"]),
            div_val=1,
            **{name: case.sizes[name] for name in names},
        )
        self.case = case
        self.model = TransfoXLLMHeadModel(config).to(case.device)
        self.model.train(case.trained)
        self.memory = None
        if self.model.training:
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def ranges(self) -> list[Range]:
        transformer = self.model.transformer
        ranges: list[Range] = [
            (type(transformer.word_emb), "forward", "embedding"),
            (type(transformer.layers[0].dec_attn), "forward", "attention"),
            (type(transformer.layers[0].pos_ff), "forward", "feed-forward"),
            (torch.nn.LayerNorm, "forward", "norms"),
            (type(self.model.crit), "forward", "loss"),
        ]
        for layer in transformer.layers:
            attention = layer.dec_attn
            ranges += [(net, "forward", "projections") for net in (attention.qkv_net, attention.r_net, attention.o_net)]
        if self.model.training:
            ranges += [(self.optimizer, "step", "optimizer"), (torch.nn.utils, "clip_grad_norm_", "optimizer")]
        return ranges

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        mixed = torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.bf16)
        with torch.set_grad_enabled(self.model.training), mixed:
            chunks_per_read = CHUNKS_PER_READ if work == "loss-together" else 1
            for first in range(0, count, chunks_per_read):
                parts = zip(*(chunks.next() for _ in range(min(chunks_per_read, count - first))), strict=True)
                tokens, targets = (torch.cat(part, dim=1) for part in parts)
                if work == "log_prob":
                    output = self.model(tokens, mems=self.memory)
                    float(-output.prediction_scores.gather(2, targets.unsqueeze(2)).sum())
                else:
                    # The model shifts the labels itself, so that the last target of each chunk is not scored.
                    output = self.model(tokens, mems=self.memory, labels=tokens)
                    if self.model.training:
                        self.optimizer.zero_grad(set_to_none=True)
                        output.loss.backward()
                        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                        self.optimizer.step()
                    float(output.loss)
                self.memory = output.mems


if __name__ == "__main__":
    serve(TransfoXLRunner)
