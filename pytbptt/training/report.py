"""The report at the end of a run: scores beside compressors', a sample, the curves."""

import json
from pathlib import Path
from typing import Any

import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.data import IndexedTokens, Vocabulary, compressed_bits_per_byte, load, text_size
from pytbptt.evaluation.generation import generate
from pytbptt.evaluation.scoring import perplexity, score
from pytbptt.runtime.atomic import atomic_write_bytes
from pytbptt.runtime.distributed import mixed_precision
from pytbptt.training.metrics_log import Log
from pytbptt.training.plotting import CURVES_FILE, plot_runs
from pytbptt.training.trainer import Trainer

RESULTS_FILE = "results.json"
TEST_STREAMS = 16


def report(trainer: Trainer, log: Log) -> None:
    """Score the best weights, sample from them, draw the curves; write results.json and print it.

    The validation loss is that of training, so that it can be compared with the curve. The test split is scored in
    TEST_STREAMS streams, each warmed up on the text before it.

    Raises:
        Interrupted: a signal stopped the scoring; nothing is written.
    """
    settings, distributed, save_dir = trainer.settings, trainer.distributed, trainer.save_dir
    existing = [
        save_dir / name
        for name in (checkpoints.BEST_CHECKPOINT, checkpoints.LAST_CHECKPOINT)
        if (save_dir / name).exists()
    ]
    path, _ = checkpoints.read_first_undamaged(existing, quiet=not distributed.is_main_process)
    loaded = checkpoints.load_checkpoint(path, distributed.device)
    model = loaded.model
    results: dict[str, Any] = {"stopped": trainer.progress.stopped, "update": trainer.progress.update}
    if trainer.valid_tokens is not None:
        results["valid"] = _results(trainer.progress.best_loss, trainer.valid_tokens)
    if settings.run.test:
        log.info("scoring the test split ...")
        test = load(settings.data.data, "test")
        bptt = settings.data.tokens_per_sample
        with mixed_precision(distributed.device, trainer.step.dtype):
            scored = score(
                model,
                test,
                streams=TEST_STREAMS,
                bptt=bptt,
                warm_up=model.warm_up(bptt),
                reset_on=trainer.text_format.reset_on,
                distributed=distributed,
                should_stop=lambda: bool(trainer.stop_condition.signal),
            )
        results["test"] = _results(scored.loss, test)
        if test.vocabulary.kind == "bytes" and "bits_per_byte" in results["test"]:
            results["test"]["compressors"] = compressed_bits_per_byte(test)
    if not distributed.is_main_process:
        return
    if settings.run.sample_tokens:
        results["sample"] = sample(loaded, settings.run.sample_tokens, settings.run.seed)
    plot_runs([save_dir], save_dir / CURVES_FILE)
    atomic_write_bytes(save_dir / RESULTS_FILE, json.dumps(results, indent=2).encode())
    if settings.logging.log_format != "json":
        print_results(save_dir)


def _results(loss: float, tokens: IndexedTokens) -> dict[str, Any]:
    size = text_size(tokens)
    return {"loss": loss, "tokens": len(tokens), **(size.metrics(loss) if size else {})}


def sample(loaded: checkpoints.LoadedCheckpoint, length: int, seed: int) -> str:
    """Sample the beginning of a document at temperature 0.8."""
    ids = generate(
        loaded.model,
        torch.tensor([Vocabulary.EOS]),
        length,
        vocabulary=loaded.vocabulary,
        text_format=loaded.text_format,
        temperature=0.8,
        generators=[torch.Generator().manual_seed(seed)],
    )
    return loaded.vocabulary.decode(token for (token,) in ids)


def reported_update(save_dir: Path) -> int:
    """The update after which a folder's results.json was written; -1 if there is none."""
    path = save_dir / RESULTS_FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["update"]) if path.exists() else -1


def print_results(save_dir: Path) -> None:
    """Print results.json."""
    results = json.loads((save_dir / RESULTS_FILE).read_text(encoding="utf-8"))
    print(f"\nstopped at {results['stopped']} after update {results['update']}")
    if "sample" in results:
        print(f"\nA sample:\n\n{results['sample']}\n")
    for split in ("valid", "test"):
        if split in results:
            print(f"{split:<12} {_format_result(results[split])}")
    for name, bits in results.get("test", {}).get("compressors", {}).items():
        print(f"  {name:<10} {bits:.3f} bits/byte of the same test files")
    print(f"curves       {save_dir / CURVES_FILE}")


def _format_result(result: dict[str, Any]) -> str:
    per_token = (
        f"loss {result['loss']:.3f}, perplexity {perplexity(result['loss']):.2f} over {result['tokens']:,} tokens"
    )
    if "bits_per_byte" not in result:
        return per_token
    per_text = f"{result['bits_per_byte']:.3f} bits/byte"
    if "ppl_per_word" in result:
        per_text += f", perplexity {result['ppl_per_word']:.6g} per word"
    if "incomparable" in result:
        return f"{per_token}; {per_text}, not comparable with other vocabularies: {result['incomparable']}"
    return f"{per_text}; {per_token}"
