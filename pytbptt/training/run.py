"""A training run from start to end: data, trainer, log, results."""

import contextlib
import dataclasses
import os
from pathlib import Path

from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint.writer import run_lock
from pytbptt.data import IndexedTokens, load, recorded_size, text_size
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import Interrupted
from pytbptt.nn.architectures import describe_computation
from pytbptt.runtime.atomic import atomic_write_bytes, writable_folder
from pytbptt.runtime.distributed import DistributedContext, distributed_context
from pytbptt.training.config import BUILT_IN_CORPUS, TrainSettings, flatten, to_toml
from pytbptt.training.metrics_log import METRICS_FILE, Log, import_summary_writer
from pytbptt.training.report import RESULTS_FILE, print_results, report, reported_update
from pytbptt.training.resume import changed_regularisation, load_finetune_weights, resume
from pytbptt.training.trainer import Trainer

CONFIG_FILE = "config.toml"
CHECK_CHUNK_TOKENS = 1 << 22
"""Tokens that `_check_ids` reads at a time."""


def train(settings: TrainSettings) -> None:
    """Train with the given settings, or resume the run in their --save-dir.

    Raises:
        InputError: settings, data and checkpoint do not fit together.
        RunError: training failed, or a checkpoint could not be saved.
    """
    with distributed_context(settings.run.device) as distributed, contextlib.ExitStack() as stack:
        distributed.assert_same_across_ranks(
            {f"--{name.replace('_', '-')}": value for name, value in flatten(settings).items()}
        )
        save_dir = Path(settings.checkpoint.save_dir)
        if distributed.is_main_process:
            stack.enter_context(writable_folder(save_dir))
            stack.enter_context(run_lock(save_dir))
        distributed.barrier()  # the folder exists and is locked from here on
        notices: list[str] = []
        trainer = _make_trainer(settings, distributed, notices)
        stack.callback(trainer.checkpoint_writer.close)
        if not _restore(trainer, notices):
            return
        stack.enter_context(trainer.stop_condition.stop_on_signals())
        with contextlib.closing(_make_log(trainer, notices)) as log:
            trainer.fit(log)
        if trainer.progress.stopped:
            with contextlib.suppress(Interrupted):
                report(trainer, log)
                return
        log.info(
            f"stopped by {trainer.stop_condition.signal or 'a signal'} after update {trainer.progress.update}; "
            "run the same command to resume"
        )


def _make_trainer(settings: TrainSettings, distributed: DistributedContext, notices: list[str]) -> Trainer:
    """The trainer of a new run; adds what its data and machine lack to `notices`."""
    if settings.logging.tensorboard_logdir:
        import_summary_writer()  # raises before anything is written if tensorboard is missing
    if settings.optimization.fp16 and distributed.device.type == "cpu":
        notices.append("--fp16: no GPU here, so training in float32")
    train_tokens = load(settings.data.data, "train")
    valid_tokens = load_optional_split(settings.data.data, settings.data.valid_subset)
    if valid_tokens is None:
        notices.append(
            f"{settings.data.data}: no {settings.data.valid_subset} split, so no validation and no "
            f"{checkpoints.BEST_CHECKPOINT}"
        )
    else:
        _check_ids(valid_tokens)
    if settings.run.test:
        test_tokens = load_optional_split(settings.data.data, "test")
        if test_tokens is None:
            notices.append(f"{settings.data.data}: no test split, so --test has no effect")
            settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, test=False))
        else:
            _check_ids(test_tokens)
    distributed.assert_same_across_ranks(
        {f"{tokens.prefix}: contents": tokens.fingerprint() for tokens in (train_tokens, valid_tokens) if tokens}
    )
    trainer = Trainer(settings, train_tokens, valid_tokens, distributed)
    if trainer.step.no_graph_reason and settings.run.cuda_graph == "auto" and distributed.device.type == "cuda":
        notices.append(f"no CUDA graph: {trainer.step.no_graph_reason}")
    return trainer


def _restore(trainer: Trainer, notices: list[str]) -> bool:
    """Resume from the last checkpoint, or load the weights to fine-tune, if there are any. False if the run had already
    ended: its results are printed."""
    settings, distributed, save_dir = trainer.settings, trainer.distributed, trainer.save_dir
    restart = settings.checkpoint.restart and not _is_relaunch()
    latest = None if restart else checkpoints.read_latest(save_dir, quiet=not distributed.is_main_process)
    if latest is not None and latest[1]["progress"] is None:
        raise InputError(f"{latest[0]}: found converted weights, expected a run to resume: choose another --save-dir")
    distributed.assert_same_across_ranks(
        {f"{save_dir}: checkpoint": latest and (latest[0].name, latest[1]["progress"]["update"])}
    )
    if latest is None:
        if distributed.is_main_process:
            trainer.checkpoint_writer.remove_all()
            for name in (METRICS_FILE, RESULTS_FILE):
                (save_dir / name).unlink(missing_ok=True)
        if settings.checkpoint.finetune_from_model:
            load_finetune_weights(trainer, settings.checkpoint.finetune_from_model)
            notices.append(f"a new run with the weights of {settings.checkpoint.finetune_from_model}")
        return True
    path, checkpoint = latest
    resume(trainer, checkpoint)
    if distributed.is_main_process:
        trainer.checkpoint_writer.resume_from(path, trainer.progress.update)
    if trainer.should_stop() and reported_update(save_dir) == trainer.progress.update:
        if distributed.is_main_process:
            print_results(save_dir)
            print(f"\nThis run has ended. To start from scratch: add --restart, or delete {save_dir}.")
        return False
    if changed := changed_regularisation(trainer, checkpoint):
        notices.append(changed)
    notices.append(f"resuming from update {trainer.progress.update} in {save_dir} (--restart starts from scratch)")
    return True


def _make_log(trainer: Trainer, notices: list[str]) -> Log:
    """Open the log, print the notices and a summary of the run, and write config.toml."""
    settings, distributed, save_dir, progress = (
        trainer.settings,
        trainer.distributed,
        trainer.save_dir,
        trainer.progress,
    )
    sizes = {"valid": text_size(trainer.valid_tokens)} if trainer.valid_tokens else {}
    sizes["train"] = recorded_size(trainer.train_tokens)
    if sizes["train"] is None and trainer.train_tokens.vocabulary.kind == "bytes":
        # Estimated by the validation split: counting the bytes of the training split would mean reading all of it.
        sizes["train"] = sizes.get("valid") or text_size(trainer.train_tokens)
    for split, size in sizes.items():
        if size and size.incomparable_reason:
            notices.append(f"{split}: numbers per byte and per word are not comparable: {size.incomparable_reason}")
    log = Log(
        settings.logging,
        save_dir,
        enabled=distributed.is_main_process,
        update=progress.update,
        validated_at=progress.validated_at,
        max_update=trainer.schedule.max_update,
        tokens=progress.tokens,
        sizes=sizes,
    )
    try:
        if distributed.is_main_process:
            (save_dir / RESULTS_FILE).unlink(missing_ok=True)  # results of an earlier end of this run
            atomic_write_bytes(save_dir / CONFIG_FILE, to_toml(settings))
        computation = describe_computation(trainer.model.config, distributed.device, trainer.step.dtype)
        for notice in [*notices, _summary(trainer), f"training {computation}"]:
            log.info(notice)
    except BaseException:
        log.close()
        raise
    return log


def _is_relaunch() -> bool:
    """Whether torchrun or Slurm restarted this job: --restart must not discard what it has trained since."""
    return any(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def load_optional_split(data: str, split: str) -> IndexedTokens | None:
    """A split of the data; None if the data has no such split."""
    if data != BUILT_IN_CORPUS and not (Path(data) / f"{split}.idx").exists():
        return None
    return load(data, split)


def _check_ids(tokens: IndexedTokens) -> None:
    """Raise InputError, before any training, if a split has ids outside the vocabulary."""
    for start in range(0, len(tokens), CHECK_CHUNK_TOKENS):
        tokens.check_ids(tokens[start : start + CHECK_CHUNK_TOKENS], start)


def _summary(trainer: Trainer) -> str:
    settings, loader = trainer.settings, trainer.loader
    tokens = len(trainer.train_tokens)
    return (
        f"{settings.arch}, {trainer.model.num_parameters():,} parameters; {tokens:,} tokens in {loader.streams} "
        f"streams of {loader.tokens_per_stream:,}, chunks of {settings.data.tokens_per_sample}"
    )
