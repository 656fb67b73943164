"""Score a split of the data under a trained model: python -m pytbptt.eval DATA --path CHECKPOINT ...

Like fairseq-eval-lm, but every token is scored.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

from pytbptt.checkpoint import load_checkpoint
from pytbptt.data import IndexedTokens, TextFormat, load, text_size
from pytbptt.data.text_format import RESET_AT_DOCUMENTS
from pytbptt.errors import InputError
from pytbptt.evaluation.overrides import parse_overrides, resolve_text_format
from pytbptt.evaluation.scoring import score
from pytbptt.nn.architectures import describe_computation
from pytbptt.runtime.cli import FairseqSettings, run
from pytbptt.runtime.distributed import compute_dtype, distributed_context, mixed_precision
from pytbptt.runtime.extras import Positional


@dataclass
class EvaluationSettings:
    data: Positional[str]
    """Directory of the data, or python-stdlib."""
    path: str
    """The checkpoint."""
    gen_subset: str = "test"
    """The split to score."""
    batch_size: int = 1
    """Number of streams the text is split into, over all processes."""
    tokens_per_sample: int = 0
    """Tokens per stream in one forward pass; 0: as in training. Chunks are merged where that cannot change the loss
    (with same_length, and for LSTMs)."""
    model_overrides: str = "{}"
    """Settings of the model to change, as a Python dict: '{"mem_len":640,"clamp_len":400,"same_length":True}'."""
    warm_up: int = -1
    """Unscored context tokens read before each stream; -1: enough to give the same loss as a single stream
    (approximately, for an LSTM)."""
    reset_on: str = "auto"
    """When to reset memory: document, none, or after a token; auto: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    fp16: bool = False
    """Mixed precision in float16; float32 without a GPU."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Launch a chunk's forward pass as one CUDA graph; auto: if there is a GPU."""
    fairseq: FairseqSettings = field(default_factory=FairseqSettings)


def evaluate(settings: EvaluationSettings) -> None:
    """Score a split and print what fairseq-eval-lm prints.

    Raises:
        InputError: checkpoint, data and settings that do not fit together.
    """
    overrides = parse_overrides(settings.model_overrides)
    for name in ("batch_size", "tokens_per_sample", "warm_up"):
        minimum = {"batch_size": 1, "tokens_per_sample": 0, "warm_up": -1}[name]
        if getattr(settings, name) < minimum:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: found {getattr(settings, name)}, expected at least {minimum}")
    with distributed_context(settings.device) as distributed:
        if settings.cuda_graph == "on" and distributed.device.type != "cuda":
            raise InputError("--cuda-graph: found on, but there is no GPU; expected auto or off")
        loaded = load_checkpoint(settings.path, distributed.device, overrides)
        model, vocabulary = loaded.model, loaded.vocabulary
        tokens = load(settings.data, settings.gen_subset)
        if tokens.vocabulary.fingerprint() != vocabulary.fingerprint():
            found = f"{len(tokens.vocabulary)} types"
            raise InputError(
                f"{settings.data}: found another vocabulary ({found}), expected that of {settings.path} "
                f"({len(vocabulary)} types); prepare the data with its dict.txt (--srcdict)"
            )
        text_format = resolve_text_format(loaded, settings.reset_on, quiet=not distributed.is_main_process)
        bptt = settings.tokens_per_sample or loaded.run["tokens_per_sample"]
        warm_up = model.warm_up(bptt) if settings.warm_up < 0 else settings.warm_up
        dtype = compute_dtype(distributed.device, fp16=settings.fp16, bf16=settings.bf16)
        if distributed.is_main_process:
            computation = describe_computation(model.config, distributed.device, dtype)
            print(f"num. model params: {model.num_parameters()}, {computation}")
            if settings.fp16 and dtype != torch.float16:
                print("--fp16: found no GPU, evaluating in float32")
            for mismatch in text_format_mismatches(loaded.text_format, tokens):
                print(f"warning: {mismatch}", file=sys.stderr)
            if settings.batch_size > 1:
                approximate = "" if model.warm_up_is_exact else ", which is approximate"
                print(f"warm-up: up to {warm_up} tokens before each of {settings.batch_size} streams{approximate}")
        with mixed_precision(distributed.device, dtype):
            result = score(
                model,
                tokens,
                streams=settings.batch_size,
                bptt=bptt,
                warm_up=warm_up,
                reset_on=text_format.reset_on,
                distributed=distributed,
                progress=distributed.is_main_process,
                cuda_graph=settings.cuda_graph != "off",
            )
        if distributed.is_main_process:
            speed = result.count / result.seconds
            print(f"Evaluated {result.count} tokens in {result.seconds:.1f}s ({speed:.2f} tokens/s)")
            print(f"Loss (base 2): {result.bits:.4f}, Perplexity: {result.perplexity:.2f}")
            if size := text_size(tokens):
                print(size.describe(result.loss))


def text_format_mismatches(trained: TextFormat, tokens: IndexedTokens) -> list[str]:
    """Warnings where the data's text format differs from that of the training data, if both are known."""
    found = tokens.text_format
    warnings = []
    if None not in (trained.documents, found.documents) and trained.documents != found.documents:
        expected = f"expected {trained.documents} as in training: the results are not comparable"
        warnings.append(f"{tokens.prefix}: found data with --documents {found.documents}, {expected}")
    if trained.reset_on == RESET_AT_DOCUMENTS and not tokens.has_document_index:
        warnings.append(f"{tokens.prefix}: found no document index; in training, memory was reset at documents")
    return warnings


if __name__ == "__main__":
    run("python -m pytbptt.eval", EvaluationSettings, evaluate, __doc__)
