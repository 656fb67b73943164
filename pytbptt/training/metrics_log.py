"""The log of a run: metrics.jsonl, and a progress bar, JSON or plain lines on the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from pytbptt.data import TextSize
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import bits, perplexity
from pytbptt.runtime.atomic import atomic_write_bytes
from pytbptt.runtime.extras import progress_bar
from pytbptt.training.config import LoggingSettings

METRICS_FILE = "metrics.jsonl"


def peak_memory() -> int | None:
    """Peak memory in bytes: allocated on the GPU if there is one, else resident in the process; None on Windows without
    a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Log:
    """Writes metrics.jsonl and prints; does nothing on ranks other than 0.

    Args:
        settings: format and interval.
        save_dir: folder of metrics.jsonl.
        enabled: whether this is rank 0.
        update: updates made so far; later training entries of metrics.jsonl are removed.
        validated_at: the last update that was validated; later validation entries are removed.
        max_update: length of the run, for the progress bar.
        tokens: tokens seen so far.
        sizes: text sizes of the splits "train" and "valid", None if unknown.
    """

    def __init__(
        self,
        settings: LoggingSettings,
        save_dir: Path,
        *,
        enabled: bool,
        update: int,
        validated_at: int,
        max_update: int,
        tokens: int,
        sizes: Mapping[str, TextSize | None],
    ) -> None:
        self.format, self.stdout_closed = settings.log_format, False
        self.enabled = enabled
        self.sizes = sizes
        self.last_time, self.last_tokens = time.monotonic(), tokens
        self.bar: Any = None
        self.summary_writer: Any = None
        self.metrics: TextIO | None = None
        if not enabled:
            return
        path = save_dir / METRICS_FILE
        truncate_after(path, update, validated_at)
        self.metrics = path.open("a", encoding="utf-8", newline="\n")
        if settings.tensorboard_logdir:
            self.summary_writer = import_summary_writer()(settings.tensorboard_logdir, purge_step=update + 1)
        if self.format == "tqdm":
            self.bar = progress_bar(
                total=max_update,
                initial=update,
                unit="update",
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            )

    def advance(self) -> None:
        """Count one update in the progress bar."""
        if self.bar is not None:
            self.bar.update()

    def train(
        self,
        *,
        update: int,
        epoch: int,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float,
        skipped: int,
        bptt_backward: int,
    ) -> None:
        """Log an entry on training; loss in nats per token. bptt_backward is left out if it is 0."""
        now = time.monotonic()
        speed = (tokens - self.last_tokens) / max(1e-9, now - self.last_time)
        self.last_time, self.last_tokens = now, tokens
        entry = {
            **self._entry("train", update, epoch, loss),
            "tokens": tokens,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(speed, 1),
            "peak_memory_bytes": peak_memory(),
            "skipped": skipped,
            **({"bptt_backward": bptt_backward} if bptt_backward else {}),
        }
        self._write(entry)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{_format_loss(entry)}, {speed:,.0f} tokens/s")
        elif self.format == "simple":
            self.info(f"epoch {epoch} update {update}: {_format_loss(entry)}, lr {lr:.3g}, {speed:,.0f} tokens/s")

    def valid(self, *, update: int, epoch: int, loss: float, best: float, seconds: float) -> None:
        """Log an entry on a validation; its `seconds` do not count for the training speed."""
        entry = {**self._entry("valid", update, epoch, loss), "best_loss": best}
        self._write(entry)
        if self.format != "json":
            self.info(f"update {update}: valid {_format_loss(entry, per_word=True)} (best loss {best:.3f})")
        self.last_time += seconds

    def info(self, line: str) -> None:
        """Print a line, above the progress bar if there is one; to standard error in the json format."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.clear()
        self._print(line, sys.stderr if self.format == "json" else sys.stdout)

    def close(self) -> None:
        """Close the progress bar, the TensorBoard events and metrics.jsonl."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.summary_writer is not None:
            self.summary_writer.close()
        if self.metrics is not None:
            self.metrics.close()

    def _print(self, line: str, stream: TextIO) -> None:
        if self.stdout_closed:
            return
        try:
            print(line, file=stream, flush=True)
        except BrokenPipeError:  # the reader is gone, but training continues
            self.stdout_closed = True

    def _entry(self, split: str, update: int, epoch: int, loss: float) -> dict[str, Any]:
        size = self.sizes.get(split)
        return {
            "split": split,
            "step": update,
            "epoch": epoch,
            "loss": loss,
            "bits": bits(loss),
            "ppl": perplexity(loss),
            **(size.metrics(loss) if size else {}),
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        # JSON has no inf and nan.
        line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()})
        self.metrics.write(line + "\n")
        self.metrics.flush()
        if self.format == "json":
            self._print(line, sys.stdout)
        if self.summary_writer is not None:
            for key, value in entry.items():
                if key not in ("split", "step") and isinstance(value, int | float):
                    self.summary_writer.add_scalar(f"{entry['split']}/{key}", value, entry["step"])


def _format_loss(entry: Mapping[str, Any], per_word: bool = False) -> str:
    """The loss of an entry per token, per byte and optionally per word, the latter two if vocabularies are
    comparable."""
    text = f"loss {entry['loss']:.3f}, ppl {entry['ppl']:.1f}"
    if "bits_per_byte" in entry and "incomparable" not in entry:
        text += f", {entry['bits_per_byte']:.3f} bits/byte"
        if per_word and "ppl_per_word" in entry:
            text += f", {entry['ppl_per_word']:.6g} ppl/word"
    return text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, without a last line that is incomplete because the run was killed."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def truncate_after(path: Path, update: int, validated_at: int) -> None:
    """Remove entries that were written after the checkpoint that the run resumes from."""
    if not path.exists():
        return
    last = {"train": update, "valid": validated_at}
    entries = [entry for entry in read_metrics(path) if entry["step"] <= last[entry["split"]]]
    atomic_write_bytes(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def import_summary_writer() -> Any:
    """TensorBoard's SummaryWriter.

    Raises:
        InputError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard-logdir: found no tensorboard package; pip install tensorboard") from None
    return SummaryWriter
