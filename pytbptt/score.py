"""Log-probabilities of a text under a model, by line or token: python -m pytbptt.score TEXT --path CHECKPOINT ..."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytbptt.checkpoint import load_checkpoint
from pytbptt.data import Vocabulary
from pytbptt.errors import InputError
from pytbptt.evaluation.log_probs import encode_lines, find_resets, log_probs
from pytbptt.evaluation.overrides import parse_overrides, resolve_text_format
from pytbptt.evaluation.scoring import perplexity
from pytbptt.nn.adaptive import MASKED_BIAS
from pytbptt.runtime.cli import run
from pytbptt.runtime.distributed import choose_device
from pytbptt.runtime.extras import Positional


@dataclass
class ScoreSettings:
    text: Positional[str]
    """Text file in the same format as the training data."""
    path: str
    """The checkpoint."""
    per: Literal["line", "token"] = "line"
    """Granularity of the output."""
    format: Literal["tsv", "json"] = "tsv"
    """tsv: a table with a heading; json: one object for every line of the text."""
    tokens_per_sample: int = 0
    """Tokens in one forward pass; 0: as in training."""
    documents: Literal["auto", "file", "line", "blank"] = "auto"
    """What counts as a document, as for python -m pytbptt.prepare; auto: as in training."""
    reset_on: str = "auto"
    """When to reset memory: none, document, or after a token, such as </s>; auto: as in training."""
    model_overrides: str = "{}"
    """Settings of the model to change, as a Python dict, such as '{"mem_len":640}'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""


def score_text(settings: ScoreSettings) -> None:
    """Print the log-probabilities in nats; on standard error, their sum and perplexity, and bits per byte and character
    and perplexity per word.

    The text is read as one stream starting after </s>, tokenised as by prepare: </s> after each line (words) or
    document (bytes, BPE), unless the model never predicts </s> (e.g. converted character models).

    Raises:
        InputError: settings out of range, or an unreadable text or checkpoint.
    """
    if settings.tokens_per_sample < 0:
        raise InputError(f"--tokens-per-sample: found {settings.tokens_per_sample}, expected at least 0")
    overrides = parse_overrides(settings.model_overrides)
    loaded = load_checkpoint(settings.path, choose_device(settings.device), overrides)
    model, vocabulary = loaded.model, loaded.vocabulary
    text_format = resolve_text_format(loaded, settings.reset_on)
    documents = text_format.documents if settings.documents == "auto" else settings.documents
    append_eos = float(model.softmax.biases[0].detach()[Vocabulary.EOS]) > MASKED_BIAS
    lines, ends, size = encode_lines(Path(settings.text), vocabulary, documents or "file", append_eos)
    resets = find_resets(lines, ends, text_format.reset_on, vocabulary)
    if settings.format == "tsv":
        heading = "line token log_prob" if settings.per == "token" else "line tokens log_prob perplexity"
        print(*heading.split(), sep="\t")
    total = 0.0
    bptt = settings.tokens_per_sample or loaded.run["tokens_per_sample"]
    log_probs_of_lines = log_probs(model, lines, bptt, resets)
    for number, (ids, values) in enumerate(zip(lines, log_probs_of_lines, strict=True), start=1):
        total += math.fsum(values)
        _print_line(number, [vocabulary.symbol(int(token)) for token in ids], values, settings)
    count = sum(len(ids) for ids in lines)
    result = f"log-probability {total:.4f}, perplexity {perplexity(-total / count):.2f}"
    print(f"{count} tokens in {len(lines)} lines: {result}\n{size.describe(-total / count)}", file=sys.stderr)


def _print_line(number: int, symbols: list[str], values: list[float], settings: ScoreSettings) -> None:
    log_prob = math.fsum(values)
    per_token = perplexity(-log_prob / max(1, len(values)))
    if settings.format == "json":
        finite = per_token if math.isfinite(per_token) else None  # JSON has no infinity
        row = {"line": number, "tokens": len(symbols), "log_prob": log_prob, "perplexity": finite}
        per_token_row = {"symbols": symbols, "log_probs": values} if settings.per == "token" else {}
        print(json.dumps({**row, **per_token_row}, ensure_ascii=False))
    elif settings.per == "token":
        for symbol, value in zip(symbols, values, strict=True):
            print(number, symbol, f"{value:.6f}", sep="\t")
    else:
        print(number, len(symbols), f"{log_prob:.6f}", f"{per_token:.4f}", sep="\t")


if __name__ == "__main__":
    run("python -m pytbptt.score", ScoreSettings, score_text, __doc__)
