"""A run from beginning to end: data, trainer, log, results."""

import contextlib
import dataclasses
import os
from pathlib import Path

from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint.writer import alone_in
from pytbptt.data import IndexedTokens, load, recorded_size, text_size
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import Interrupted
from pytbptt.nn.architectures import describe_computation
from pytbptt.runtime.atomic import folder_to_write, replace_file
from pytbptt.runtime.distributed import Processes, processes
from pytbptt.training.config import BUILT_IN_CORPUS, TrainSettings, flatten, to_toml
from pytbptt.training.logging import METRICS, Log, event_writer_type
from pytbptt.training.report import RESULTS, print_results, report, reported_update
from pytbptt.training.resuming import begin_with_weights, changed_regularisation, resume
from pytbptt.training.trainer import Trainer

CONFIG = "config.toml"
CHECKED_AT_ONCE = 1 << 22  # tokens


def train(settings: TrainSettings) -> None:
    """Train as the settings say, or carry on what their --save-dir holds.

    Raises:
        InputError: settings, data or checkpoint that do not fit together.
        RunError: training failed, or a checkpoint could not be saved.
    """
    with processes(settings.run.device) as job, contextlib.ExitStack() as stack:
        job.agree({f"--{name.replace('_', '-')}": value for name, value in flatten(settings).items()})
        save_dir = Path(settings.checkpoint.save_dir)
        if job.is_first:
            stack.enter_context(folder_to_write(save_dir))
            stack.enter_context(alone_in(save_dir))
        job.wait()  # until the folder is there, and ours
        notices: list[str] = []
        trainer = _make_trainer(settings, job, notices)
        stack.callback(trainer.saver.close)
        if not _begin(trainer, notices):
            return
        stack.enter_context(trainer.stopping.on_signals())
        with contextlib.closing(_make_log(trainer, notices)) as log:
            trainer.fit(log)
        if trainer.progress.stopped:
            with contextlib.suppress(Interrupted):
                report(trainer, log)
                return
        log.say(
            f"stopped by {trainer.stopping.signal or 'a signal'} after update {trainer.progress.update}; "
            "the same command carries on from there"
        )


def _make_trainer(settings: TrainSettings, job: Processes, notices: list[str]) -> Trainer:
    """The trainer of a new run; in notices, what its data and machine lack."""
    if settings.logging.tensorboard_logdir:
        event_writer_type()  # found missing here, nothing is lost
    if settings.optimization.fp16 and job.device.type == "cpu":
        notices.append("--fp16: no GPU here, so training in float32")
    train_tokens = load(settings.data.data, "train")
    valid_tokens = split_if_there(settings.data.data, settings.data.valid_subset)
    if valid_tokens is None:
        notices.append(
            f"{settings.data.data}: no {settings.data.valid_subset} split, so no validation and no {checkpoints.BEST}"
        )
    else:
        _check_ids(valid_tokens)
    if settings.run.test:
        test_tokens = split_if_there(settings.data.data, "test")
        if test_tokens is None:
            notices.append(f"{settings.data.data}: no test split, so --test scores none")
            settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, test=False))
        else:
            _check_ids(test_tokens)
    job.agree({f"{tokens.prefix}: contents": tokens.fingerprint() for tokens in (train_tokens, valid_tokens) if tokens})
    trainer = Trainer(settings, train_tokens, valid_tokens, job)
    if trainer.step.no_graph and settings.run.cuda_graph == "auto" and job.device.type == "cuda":
        notices.append(f"no CUDA graph: {trainer.step.no_graph}")
    return trainer


def _begin(trainer: Trainer, notices: list[str]) -> bool:
    """Go on from the last checkpoint, or from the weights of another run, or anew. False where nothing is left to do,
    and the results are printed."""
    settings, job, save_dir = trainer.settings, trainer.processes, trainer.save_dir
    restart = settings.checkpoint.restart and not _begun_again()
    latest = None if restart else checkpoints.read_latest(save_dir, quiet=not job.is_first)
    if latest is not None and latest[1]["progress"] is None:
        raise InputError(f"{latest[0]}: found converted weights, expected a run to carry on: choose another --save-dir")
    job.agree({f"{save_dir}: checkpoint": latest and (latest[0].name, latest[1]["progress"]["update"])})
    if latest is None:
        if job.is_first:
            trainer.saver.remove_all()
            for name in (METRICS, RESULTS):
                (save_dir / name).unlink(missing_ok=True)
        if settings.checkpoint.finetune_from_model:
            begin_with_weights(trainer, settings.checkpoint.finetune_from_model)
            notices.append(f"a new run with the weights of {settings.checkpoint.finetune_from_model}")
        return True
    path, checkpoint = latest
    resume(trainer, checkpoint)
    if job.is_first:
        trainer.saver.goes_on_from(path, trainer.progress.update)
    if trainer.ended() and reported_update(save_dir) == trainer.progress.update:
        if job.is_first:
            print_results(save_dir)
            print(f"\nThis run has ended. To start afresh: the same command with --restart, or delete {save_dir}.")
        return False
    if changed := changed_regularisation(trainer, checkpoint):
        notices.append(changed)
    notices.append(f"carrying on from update {trainer.progress.update} in {save_dir} (--restart begins anew)")
    return True


def _make_log(trainer: Trainer, notices: list[str]) -> Log:
    """The log, which has said the notices and what is trained on what; in the folder, the settings of the run."""
    settings, job, save_dir, progress = trainer.settings, trainer.processes, trainer.save_dir, trainer.progress
    sizes = {"valid": text_size(trainer.valid_tokens)} if trainer.valid_tokens else {}
    sizes["train"] = recorded_size(trainer.train_tokens)
    if sizes["train"] is None and trainer.train_tokens.vocabulary.kind == "bytes":
        # As many tokens a byte as in the validation split: to count bytes is to read all of a split, perhaps a big one.
        sizes["train"] = sizes.get("valid") or text_size(trainer.train_tokens)
    for split, size in sizes.items():
        if size and size.incomparable:
            notices.append(f"{split}: numbers per byte and per word are not comparable: {size.incomparable}")
    log = Log(
        settings.logging,
        save_dir,
        first=job.is_first,
        update=progress.update,
        validated_at=progress.validated_at,
        max_update=trainer.schedule.updates,
        tokens=progress.tokens,
        sizes=sizes,
    )
    try:
        if job.is_first:
            (save_dir / RESULTS).unlink(missing_ok=True)  # whatever they were of, it was not of what follows
            replace_file(save_dir / CONFIG, to_toml(settings))
        computation = describe_computation(trainer.model.config, job.device, trainer.step.dtype)
        for notice in [*notices, _summary(trainer), f"training {computation}"]:
            log.say(notice)
    except BaseException:
        log.close()
        raise
    return log


def _begun_again() -> bool:
    """Whether torchrun or Slurm has started this job before: then --restart has been obeyed."""
    return any(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def split_if_there(data: str, split: str) -> IndexedTokens | None:
    """A split of the data, if they have it."""
    if data != BUILT_IN_CORPUS and not (Path(data) / f"{split}.idx").exists():
        return None
    return load(data, split)


def _check_ids(tokens: IndexedTokens) -> None:
    """Find out before the work, not after it, that a split holds ids outside the vocabulary."""
    for start in range(0, len(tokens), CHECKED_AT_ONCE):
        tokens.check(tokens[start : start + CHECKED_AT_ONCE], start)


def _summary(trainer: Trainer) -> str:
    settings, loader = trainer.settings, trainer.loader
    tokens = len(trainer.train_tokens)
    return (
        f"{settings.arch}, {trainer.model.num_parameters():,} parameters; {tokens:,} tokens in {loader.streams} "
        f"streams of {loader.tokens_per_stream:,}, chunks of {settings.data.tokens_per_sample}"
    )
