"""Continue a text with a trained model: python -m pytbptt.generate --path CHECKPOINT [--prompt TEXT] ..."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from pytbptt.checkpoint import load_checkpoint
from pytbptt.data import Vocabulary
from pytbptt.errors import InputError
from pytbptt.evaluation.generation import generate
from pytbptt.evaluation.overrides import parse_overrides, resolve_text_format
from pytbptt.runtime.cli import run
from pytbptt.runtime.distributed import choose_device

MIN_TEMPERATURE = 1e-6
"""Minimum temperature other than 0; below it, logits / temperature overflows float32."""


@dataclass
class GenerationSettings:
    path: str
    """The checkpoint."""
    prompt: tuple[str, ...] = ("",)
    """Prompt, or several prompts; empty: start a new document."""
    length: int = 500
    """Tokens to generate."""
    temperature: float = 0.8
    """Divides the log-probabilities: below 1 sharpens, above 1 flattens the distribution; 0: greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability (nucleus sampling)."""
    stop: str = ""
    """Stop a continuation after this symbol, such as </s>; empty: after --length tokens."""
    unk: bool = True
    """Whether <unk> may be generated."""
    reset_on: str = "auto"
    """When to reset memory: none, document, or after a symbol; auto: as in training."""
    num_samples: int = 1
    """Continuations of each prompt, sampled as a batch and printed one after another; a single one is printed while it
    is sampled."""
    seed: int = 1
    """Seed of the sampling; sample n uses seed + n - 1, so it equals a single sample with that seed, up to rounding."""
    model_overrides: str = "{}"
    """Settings of the model to change, as a Python dict, such as '{"mem_len":640}'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""


def generate_text(settings: GenerationSettings) -> None:
    """Print the prompt and its continuations.

    Raises:
        InputError: settings out of range, or a checkpoint that cannot be read.
    """
    for flag, value in (("--length", settings.length), ("--top-k", settings.top_k)):
        if value < 0:
            raise InputError(f"{flag}: found {value}, expected at least 0")
    if not 0 < settings.top_p <= 1:
        raise InputError(f"--top-p: found {settings.top_p}, expected more than 0 and at most 1")
    if settings.temperature != 0 and not MIN_TEMPERATURE <= settings.temperature < float("inf"):
        raise InputError(f"--temperature: found {settings.temperature}, expected 0 or at least {MIN_TEMPERATURE}")
    if settings.num_samples < 1:
        raise InputError(f"--num-samples: found {settings.num_samples}, expected at least 1")
    overrides = parse_overrides(settings.model_overrides)
    loaded = load_checkpoint(settings.path, choose_device(settings.device), overrides)
    vocabulary = loaded.vocabulary
    text_format = resolve_text_format(loaded, settings.reset_on)
    if settings.stop and settings.stop not in vocabulary:
        raise InputError(f"--stop: found {settings.stop}, expected a symbol of the vocabulary")
    seeds = [(settings.seed + n) % 2**63 for n in range(settings.num_samples)]
    for text in settings.prompt:
        prompt = [Vocabulary.EOS, *vocabulary.encode(text).tolist()]
        ids = generate(
            loaded.model,
            torch.tensor(prompt),
            settings.length,
            vocabulary=vocabulary,
            text_format=text_format,
            allow_unk=settings.unk,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        samples = _truncate_at_stop(ids, len(seeds), vocabulary.index(settings.stop) if settings.stop else None)
        if len(seeds) == 1:
            _stream_output(vocabulary, prompt[1:], samples)
            continue
        texts: list[list[int]] = [[] for _ in seeds]
        for next_ids in samples:
            for sample, token in zip(texts, next_ids, strict=True):
                sample += [] if token is None else [token]
        for n, (seed, sample) in enumerate(zip(seeds, texts, strict=True), start=1):
            print(f"--- sample {n} of {settings.num_samples} (--seed {seed})")
            print(vocabulary.decode([*prompt[1:], *sample]))


def _truncate_at_stop(ids: Iterator[list[int]], samples: int, stop: int | None) -> Iterator[list[int | None]]:
    """The next id of every sample, None after its first `stop`; ends when all samples have."""
    ended = [False] * samples
    for next_ids in ids:
        yield [None if end else token for token, end in zip(next_ids, ended, strict=True)]
        ended = [end or token == stop for token, end in zip(next_ids, ended, strict=True)]
        if all(ended):
            return


def _stream_output(vocabulary: Vocabulary, prompt: list[int], samples: Iterator[list[int | None]]) -> None:
    decoder = vocabulary.decoder()
    for token in prompt:
        sys.stdout.write(decoder.add(token))
    for (next_id,) in samples:
        sys.stdout.write("" if next_id is None else decoder.add(next_id))
        sys.stdout.flush()
    print(decoder.flush())


if __name__ == "__main__":
    run("python -m pytbptt.generate", GenerationSettings, generate_text, __doc__)
