"""What a run says while it goes: metrics.jsonl always, and a progress bar, JSON or plain lines on the terminal."""

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
from pytbptt.runtime.atomic import replace_file
from pytbptt.runtime.extras import progress_bar
from pytbptt.training.config import LoggingSettings

METRICS = "metrics.jsonl"


def peak_memory() -> int | None:
    """Most bytes in use so far: of the GPU if there is one in use, else of the process; None on Windows, which Python
    cannot ask."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Log:
    """The log of one process; only the first process's says anything.

    Args:
        settings: format and interval.
        save_dir: where metrics.jsonl is.
        first: whether this is the first process.
        update: updates made before; entries of metrics.jsonl beyond it are cut off.
        validated_at: the last update that was validated; a validation beyond it is cut off as well.
        max_update: updates that the run shall make.
        tokens: tokens seen before.
        sizes: how much text the splits of train and valid are made of, where that is known.
    """

    def __init__(
        self,
        settings: LoggingSettings,
        save_dir: Path,
        *,
        first: bool,
        update: int,
        validated_at: int,
        max_update: int,
        tokens: int,
        sizes: Mapping[str, TextSize | None],
    ) -> None:
        self.format, self.deaf = settings.log_format, False
        self.first = first
        self.sizes = sizes
        self.last_time, self.last_tokens = time.monotonic(), tokens
        self.bar: Any = None
        self.events: Any = None
        self.metrics: TextIO | None = None
        if not first:
            return
        path = save_dir / METRICS
        _cut_back(path, update, validated_at)
        self.metrics = path.open("a", encoding="utf-8", newline="\n")
        if settings.tensorboard_logdir:
            self.events = event_writer_type()(settings.tensorboard_logdir, purge_step=update + 1)
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
        """One more update has been made."""
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
        """An entry on training; loss in nats per token, as everywhere in metrics.jsonl; bptt_backward 0: as ever."""
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
            self.bar.set_postfix_str(f"{_in_words(entry)}, {speed:,.0f} tokens/s")
        elif self.format == "simple":
            self.say(f"epoch {epoch} update {update}: {_in_words(entry)}, lr {lr:.3g}, {speed:,.0f} tokens/s")

    def valid(self, *, update: int, epoch: int, loss: float, best: float, seconds: float) -> None:
        """An entry on a validation, whose time is not counted as training's."""
        entry = {**self._entry("valid", update, epoch, loss), "best_loss": best}
        self._write(entry)
        if self.format != "json":
            self.say(f"update {update}: valid {_in_words(entry, per_word=True)} (best loss {best:.3f})")
        self.last_time += seconds

    def say(self, line: str) -> None:
        """A line for the reader, beside the progress bar if there is one; standard error in the json format."""
        if not self.first:
            return
        if self.bar is not None:
            self.bar.clear()
        self._print(line, sys.stderr if self.format == "json" else sys.stdout)

    def close(self) -> None:
        """End the bar, the events and metrics.jsonl."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.events is not None:
            self.events.close()
        if self.metrics is not None:
            self.metrics.close()

    def _print(self, line: str, to: TextIO) -> None:
        if self.deaf:
            return
        try:
            print(line, file=to, flush=True)
        except BrokenPipeError:  # whoever listened has gone; that is no reason to end a run
            self.deaf = True

    def _entry(self, split: str, update: int, epoch: int, loss: float) -> dict[str, Any]:
        size = self.sizes.get(split)
        return {
            "split": split,
            "step": update,
            "epoch": epoch,
            "loss": loss,
            "bits": bits(loss),
            "ppl": perplexity(loss),
            **(size.numbers(loss) if size else {}),
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        # inf and nan are no JSON; null is what a reader can take.
        line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()})
        self.metrics.write(line + "\n")
        self.metrics.flush()
        if self.format == "json":
            self._print(line, sys.stdout)
        if self.events is not None:
            for key, value in entry.items():
                if key not in ("split", "step") and isinstance(value, int | float):
                    self.events.add_scalar(f"{entry['split']}/{key}", value, entry["step"])


def _in_words(entry: Mapping[str, Any], per_word: bool = False) -> str:
    """The loss of an entry; of a text's bytes, and its words if wanted, where other vocabularies' can be compared."""
    said = f"loss {entry['loss']:.3f}, ppl {entry['ppl']:.1f}"
    if "bits_per_byte" in entry and "incomparable" not in entry:
        said += f", {entry['bits_per_byte']:.3f} bits/byte"
        if per_word and "ppl_per_word" in entry:
            said += f", {entry['ppl_per_word']:.6g} ppl/word"
    return said


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that a kill cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _cut_back(path: Path, update: int, validated_at: int) -> None:
    """Take off what a run wrote after the checkpoint that it goes on from."""
    if not path.exists():
        return
    last = {"train": update, "valid": validated_at}
    kept = [entry for entry in read_metrics(path) if entry["step"] <= last[entry["split"]]]
    replace_file(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def event_writer_type() -> Any:
    """TensorBoard's SummaryWriter.

    Raises:
        InputError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard-logdir: found no tensorboard package; pip install tensorboard") from None
    return SummaryWriter
