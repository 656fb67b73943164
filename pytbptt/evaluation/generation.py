"""Text generation."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import pytbptt.memory
from pytbptt.data import TextFormat, Vocabulary
from pytbptt.nn.language_model import LanguageModel

PROMPT_CHUNK_LENGTH = 128


def generate(
    model: LanguageModel,
    prompt: Tensor,
    length: int,
    *,
    vocabulary: Vocabulary | None = None,
    text_format: TextFormat | None = None,
    allow_unk: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[list[int]]:
    """Sample continuations of one prompt as a batch.

    Args:
        model: in evaluation mode.
        prompt: int64 (P,), P at least 1; `</s>` starts a new document.
        length: tokens to sample.
        vocabulary: non-text ids and ids outside it are never sampled. None: only <s> and <pad> are excluded.
        text_format: where to reset memory (in the prompt and the generated text), as in training; needs `vocabulary`.
            None: never.
        allow_unk: whether <unk> (or the tokenizer's unk token) may be sampled.
        temperature: divides the log-probabilities; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; 0 for all.
        top_p: sample among the most likely tokens that together have this probability (Holtzman et al., "The
            Curious Case of Neural Text Degeneration", 2020).
        generators: one CPU generator per continuation, so that each is reproducible on its own; None: one continuation,
            from the default generator.

    Yields:
        The next id of every continuation.
    """
    device = next(model.parameters()).device
    sample_generators: Sequence[torch.Generator | None] = generators or [None]
    memory = model.init_evaluation_memory(1)
    suppressed = [Vocabulary.BOS, Vocabulary.PAD] if vocabulary is None else vocabulary.non_text_ids
    if not allow_unk:
        suppressed = [*suppressed, *([Vocabulary.UNK] if vocabulary is None else vocabulary.unknown_ids)]
    input_ids = prompt.to(device).view(1, -1)
    previous_ids = torch.cat([torch.full_like(input_ids[:, :1], Vocabulary.BOS), input_ids[:, :-1]], dim=1)
    for step in range(length):
        reset = text_format.reset_mask(input_ids, previous_ids, vocabulary) if text_format and vocabulary else None
        with torch.no_grad():
            for start in range(0, input_ids.shape[1], PROMPT_CHUNK_LENGTH):
                piece = slice(start, start + PROMPT_CHUNK_LENGTH)
                output, memory = model(input_ids[:, piece], memory, None if reset is None else reset[:, piece])
            log_prob = model.log_prob(output[:, -1:]).squeeze(1).float().cpu()
        log_prob[:, suppressed] = float("-inf")
        if vocabulary is not None:
            log_prob[:, len(vocabulary) :] = float("-inf")
        if step == 0:  # the prompt was read with batch size 1: expand to all samples
            log_prob = log_prob.repeat(len(sample_generators), 1)
            memory = pytbptt.memory.select(
                memory, torch.zeros(len(sample_generators), dtype=torch.int64, device=device)
            )
        next_ids = [
            _sample(row, temperature, top_k, top_p, generator)
            for row, generator in zip(log_prob, sample_generators, strict=True)
        ]
        yield next_ids
        previous_ids = input_ids[:, -1:].expand(len(sample_generators), 1)
        input_ids = torch.tensor(next_ids, device=device).view(-1, 1)


def _sample(log_prob: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0.0:
        return int(log_prob.argmax())
    ordered, ids = ((log_prob - log_prob.max()) / temperature).sort(descending=True)
    if top_k:
        ordered = ordered[:top_k]
    probabilities = ordered.softmax(dim=0)
    if top_p < 1.0:
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities[before < top_p]  # the most likely one always stays
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
