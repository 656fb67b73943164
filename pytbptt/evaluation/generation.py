"""Text from a model, token by token through its memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pytbptt.data import Vocabulary
from pytbptt.evaluation.scoring import init_memory
from pytbptt.nn.architectures import Model

PROMPT_CHUNK = 128


def generate(
    model: Model,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Sample a continuation.

    Args:
        model: in evaluation mode.
        prompt: int64 (P,), P at least 1; what comes before the first token, end-of-sentence for a new document.
        length: tokens to sample.
        temperature: divides the log-probabilities; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; 0 for all.
        top_p: sample among the most likely tokens that together have this probability (Holtzman et al., "The
            Curious Case of Neural Text Degeneration", 2020).
        generator: source of randomness, on the CPU.

    Yields:
        The sampled ids, one by one. Ids that never are targets (<s> and <pad>) are not sampled.
    """
    device = next(model.parameters()).device
    memory = init_memory(model, 1)
    unread = torch.split(prompt.to(device).view(1, -1), PROMPT_CHUNK, dim=1)
    for _ in range(length):
        with torch.no_grad():
            for piece in unread:
                output, memory = model(piece, memory)
            log_prob = model.log_prob(output[:, -1:]).view(-1).float().cpu()
        token = _sample(log_prob, temperature, top_k, top_p, generator)
        yield token
        unread = (torch.tensor([[token]], device=device),)


def _sample(log_prob: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    log_prob[[Vocabulary.BOS, Vocabulary.PAD]] = float("-inf")
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
