"""The training loop: chunks in stream order, memory carried from one to the next, exactly resumable."""

import dataclasses
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pytbptt.memory
from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint.writer import AsyncCheckpointWriter
from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import Interrupted, Score, score
from pytbptt.runtime.distributed import DistributedContext, mixed_precision
from pytbptt.training.adaptive_bptt import measure_truncation_bias
from pytbptt.training.config import DEFAULT_MAX_UPDATE, TrainSettings, flatten
from pytbptt.training.metrics import Progress
from pytbptt.training.metrics_log import Log
from pytbptt.training.schedule import Schedule
from pytbptt.training.stopping import StopCondition, raise_if_too_many_skipped
from pytbptt.training.update import UpdateStep, explain_oom, load_optimizer


class Trainer:
    """One run of training.

    Args:
        settings: checked settings.
        train: the tokens to train on.
        valid: the tokens to validate on, or None.
        distributed: rank, world size and device.

    Raises:
        InputError: data, model and settings do not fit together.
    """

    def __init__(
        self,
        settings: TrainSettings,
        train: IndexedTokens,
        valid: IndexedTokens | None,
        distributed: DistributedContext,
    ) -> None:
        self.settings, self.train_tokens, self.valid_tokens, self.distributed = settings, train, valid, distributed
        self.save_dir = Path(settings.checkpoint.save_dir)
        data, run = settings.data, settings.run
        if run.deterministic:
            torch.use_deterministic_algorithms(True)
        self.text_format = train.text_format.with_reset_on(data.reset_on)
        self.loader = StreamLoader(
            train,
            data.batch_size,
            data.tokens_per_sample,
            rank=distributed.rank,
            world_size=distributed.world_size,
            update_freq=data.update_freq,
            bptt_variation=None if data.bptt_variation == "none" else data.bptt_variation,
            reset_on=self.text_format.reset_on,
            rotate=data.rotate,
            seed=run.seed,
            copy_to=distributed.device if distributed.device.type == "cuda" else None,
        )
        vocab_size = settings.model.vocab_size or len(train.vocabulary)
        if vocab_size < len(train.vocabulary):
            raise InputError(f"--vocab-size: found {vocab_size}, expected at least the data's {len(train.vocabulary)}")
        torch.manual_seed(run.seed)
        self.model = settings.model.replace(vocab_size=vocab_size).build().to(distributed.device)
        torch.manual_seed(run.seed + 1 + distributed.rank)  # each rank draws different dropout masks
        self.step = UpdateStep(self.model, settings, distributed)
        per_epoch = math.ceil(len(self.loader) / settings.truncation.bptt_chunks)
        max_update = run.max_update or run.max_epoch * per_epoch or DEFAULT_MAX_UPDATE
        self.schedule = Schedule(self.step.optimizer, settings.optimization, max_update)
        self.stop_condition = StopCondition(run, max_update, distributed)
        self.progress = Progress()
        self.checkpoint_writer = AsyncCheckpointWriter(self.save_dir, settings.checkpoint.keep_last)
        self.last_save_time = time.monotonic()

    # The loop

    def fit(self, log: Log) -> None:
        """Train until the run has ended or a signal stops it; progress.stopped says why, and is empty after a signal.

        This is truncated backpropagation through time. A chunk continues the previous chunk in each of its streams: the
        model reads it with the memory that it returned for the previous chunk. Gradients flow back to the start of the
        chunk and no further, or as far as --bptt-chunks and --bptt-backward say; everything earlier is only seen
        through memory. At the end of an epoch the streams end, and memory is reset.
        """
        self.stop_condition.started = self.last_save_time = time.monotonic()
        try:
            if self.progress.update and self._validation_is_due():  # a signal had interrupted it
                self.validate(log)
            while not self.should_stop():
                for chunks in self.updates():
                    with explain_oom(self.settings.data):
                        self._adapt_backward_length(log)
                        self.update(chunks)
                    self._after_update(log)
                    if self.should_stop():
                        break
                else:
                    self.step.reset_streams()
                    self._after_epoch(log)
            if self.progress.stopped:
                self.validate(log)
        except Interrupted:
            self.progress.stopped = ""
        self.save(checkpoints.LAST_CHECKPOINT)
        self.checkpoint_writer.wait()
        self.distributed.barrier()  # rank 0 has written the checkpoints, which all ranks read next

    def updates(self) -> Iterator[list[Chunk]]:
        """The rest of the epoch: for every update, --bptt-chunks chunks of each accumulation group."""
        chunks = iter(self.loader)
        while chunks_of_update := list(
            islice(chunks, self.settings.truncation.bptt_chunks * self.settings.data.update_freq)
        ):
            yield chunks_of_update

    def update(self, chunks: list[Chunk]) -> Tensor:
        """Forward and backward over one update's chunks, and an optimizer step; returns the norm as `UpdateStep`
        does."""
        lr_scale = 1.0  # a shorter chunk takes a smaller step, as in AWD-LSTM
        if self.settings.data.bptt_variation != "none":
            one_group = chunks[:: self.settings.data.update_freq]
            length = sum(chunk.tokens.shape[1] for chunk in one_group) / len(one_group)
            lr_scale = length / self.settings.data.tokens_per_sample
        self.schedule.step_update(self.progress.update, lr_scale)
        norm = self.step(chunks)
        self.progress.tokens += self.distributed.world_size * sum(chunk.targets.numel() for chunk in chunks)
        self.progress.update += 1
        return norm

    def should_stop(self) -> bool:
        """Whether the run should stop, because of a signal or of a limit; sets progress.stopped to the limit."""
        self.progress.stopped = self.stop_condition.stop_reason(self.progress, self.loader.epoch)
        return bool(self.progress.stopped) or self.stop_condition.signal_received()

    # Measurements, logging, validation

    def _adapt_backward_length(self, log: Log) -> None:
        """Every --bptt-interval updates, choose the backward length from the bias of truncation measured now."""
        truncation, update, k1 = self.settings.truncation, self.progress.update, self.step.new_tokens
        if not truncation.bptt_adaptive or update % truncation.bptt_interval:
            return
        bias = measure_truncation_bias(
            self.model,
            self.train_tokens,
            k1=k1,
            max_k2=truncation.bptt_backward,
            reset_on=self.text_format.reset_on,
            seed=(self.settings.run.seed, update),
        )
        chosen = self.distributed.broadcast(bias.shortest(truncation.bptt_tolerance) or truncation.bptt_backward)
        self.progress.bptt_backward, self.step.bptt.context = chosen, chosen - k1
        interval = bias.bias[bias.lengths.index(chosen)]
        log.info(
            f"update {update}: gradients over {chosen} tokens, relative bias {interval.value:.1%} "
            f"({interval.low:.1%} to {interval.high:.1%}), --bptt-tolerance {truncation.bptt_tolerance:.1%}"
        )

    def _after_update(self, log: Log) -> None:
        log.advance()
        logging_is_due = self.progress.update % self.settings.logging.log_interval == 0
        if logging_is_due or self.distributed.device.type == "cpu":
            self.raise_if_too_many_skipped()
        if logging_is_due:
            self._log(log)
        self.checkpoint_writer.raise_if_failed()
        if self.settings.run.validate_interval_updates and self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST_CHECKPOINT)
        elif self._saving_is_due():
            self.save(checkpoints.LAST_CHECKPOINT)

    def _after_epoch(self, log: Log) -> None:
        if self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST_CHECKPOINT)

    def _validation_is_due(self) -> bool:
        """Every --validate-interval-updates updates or, without it, at the end of an epoch."""
        interval = self.settings.run.validate_interval_updates
        return self.progress.update % interval == 0 if interval else self.loader.index == 0

    def _saving_is_due(self) -> bool:
        """Every --save-interval-updates updates, and every --save-interval-minutes minutes on rank 0's clock."""
        settings = self.settings.checkpoint
        updates, minutes = settings.save_interval_updates, settings.save_interval_minutes
        overdue = bool(minutes) and self.distributed.broadcast((time.monotonic() - self.last_save_time) / 60 >= minutes)
        if not overdue and (not updates or self.progress.update % updates):
            return False
        self.raise_if_too_many_skipped()  # sets skipped_in_a_row
        # Keep the checkpoint from before the gradients became infinite or NaN.
        return not self.progress.skipped_in_a_row

    def raise_if_too_many_skipped(self) -> None:
        """Wait for the device, and read how many updates were skipped because their gradient was not finite.

        Raises:
            RunError: too many in a row were.
        """
        self.progress.skipped, self.progress.skipped_in_a_row = self.step.metrics.skips.tolist()
        raise_if_too_many_skipped(self.progress)

    def _log(self, log: Log) -> None:
        interval, metrics = self.step.metrics.state_dict(), self.step.metrics
        metrics.sums.zero_()
        log.train(
            update=self.progress.update,
            epoch=self.loader.epoch + 1,
            tokens=self.progress.tokens,
            loss=interval["nll"] / interval["count"] if interval["count"] else math.nan,
            lr=self.schedule.lr,
            grad_norm=interval["grad_norm"] / interval["updates"] if interval["updates"] else math.nan,
            skipped=self.progress.skipped,
            bptt_backward=self.progress.bptt_backward,
        )

    def validate(self, log: Log) -> None:
        """Score the validation split, save the best weights, and update what depends on it (NT-ASGD, --patience).

        Raises:
            Interrupted: a signal stopped the scoring; a resumed run starts with the same validation.
        """
        progress, average = self.progress, self.step.average
        if self.valid_tokens is None or progress.validated_at == progress.update:
            return
        with average.use_averaged_weights():
            result = self.score(self.valid_tokens)
        improved = progress.record_validation(result.loss)
        if self.settings.optimization.optimizer == "asgd" and average.record_validation(result.loss):
            log.info(f"averaging of weights starts at update {progress.update}")
        log.valid(
            update=progress.update,
            epoch=self.loader.epoch + (1 if self.loader.index else 0),  # at its end the loader is in the next epoch
            loss=result.loss,
            best=progress.best_loss,
            seconds=result.seconds,
        )
        if improved:
            self.save(checkpoints.BEST_CHECKPOINT)

    def score(self, tokens: IndexedTokens) -> Score:
        """The model's score on a split, with training's chunk length; its training mode is restored afterwards."""
        warm_up, bptt = self.settings.run.warm_up_valid, self.settings.data.tokens_per_sample
        with mixed_precision(self.distributed.device, self.step.dtype):
            return score(
                self.model,
                tokens,
                streams=self.settings.run.batch_size_valid or self.loader.streams,
                bptt=bptt,
                warm_up=self.model.warm_up(bptt) if warm_up < 0 else warm_up,
                reset_on=self.text_format.reset_on,
                distributed=self.distributed,
                should_stop=lambda: bool(self.stop_condition.signal),
                cuda_graph=self.settings.run.cuda_graph != "off",
            )

    # Checkpoints

    def save(self, name: str) -> None:
        """Start writing a checkpoint in the background.

        Raises:
            RunError: the previous checkpoint could not be written; as `raise_if_too_many_skipped`.
        """
        self.raise_if_too_many_skipped()
        self.last_save_time = time.monotonic()
        checkpoint = self.state_dict()
        if checkpoint is not None:
            self.checkpoint_writer.save(name, checkpoint)

    def state_dict(self) -> dict[str, Any] | None:
        """Everything that a run needs to resume as if it had not been interrupted; None on ranks other than 0.

        Every rank must call this.
        """
        step, gather = self.step, self.distributed.gather
        bptt = step.bptt.state_dict()
        memory = gather(pytbptt.memory.to(pytbptt.memory.concatenate(bptt["states"]), "cpu"))
        rng = gather(_rng_state(self.distributed.device))
        capacities = gather(None if step.capacity is None else step.capacity.state_dict())
        interval = step.metrics.state_dict()
        if memory is None:
            return None
        kept = bptt["kept"][0]
        return {
            "format": checkpoints.FORMAT_VERSION,
            "model": self.model.state_dict(),
            "average": step.average.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": bptt["scaler"],
            "rng": rng,
            "loader": {**self.loader.state_dict(), "data": self.train_tokens.fingerprint()},
            "validation": self.valid_tokens.fingerprint() if self.valid_tokens else "",
            "memory": pytbptt.memory.state_dict(pytbptt.memory.concatenate(memory)),
            "config": {"model": checkpoints.model_config_to_dict(self.model.config), "run": flatten(self.settings)},
            "vocabulary": self.train_tokens.vocabulary.state_dict(),
            "text": self.text_format.state_dict(),
            "progress": {
                **dataclasses.asdict(self.progress),
                "interval": interval,
                # Tokens between the memory and the loader's position: --bptt-backward reads them again.
                "kept": 0 if kept is None else kept[0].shape[1],
                "capacities": capacities,
            },
        }

    def load_state_dict(self, checkpoint: dict[str, Any], streams: bool = True) -> None:
        """Restore what `state_dict` returned, on any number of ranks and groups: every stream at its position.

        Args:
            checkpoint: of the same model, optimizer and vocabulary.
            streams: whether it is of the same streams; False: start at the beginning of its epoch.
        """
        step, distributed, settings = self.step, self.distributed, self.settings
        self.model.load_state_dict(checkpoint["model"])
        step.average.load_state_dict(checkpoint["average"])
        load_optimizer(step.optimizer, checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["scheduler"])
        progress = dict(checkpoint["progress"])
        interval, kept = progress.pop("interval"), progress.pop("kept", 0)
        capacities = progress.pop("capacities", progress.pop("rooms", []))  # "rooms" until 0.1.0
        self.progress = Progress(**progress)
        step.metrics.load_state_dict(interval, self.progress)
        if not settings.truncation.bptt_adaptive:
            self.progress.bptt_backward = 0
        elif self.progress.bptt_backward:
            chosen = min(self.progress.bptt_backward, settings.truncation.bptt_backward)
            self.progress.bptt_backward = max(chosen, step.new_tokens)
            step.bptt.context = self.progress.bptt_backward - step.new_tokens
        if self.valid_tokens and checkpoint["validation"] != self.valid_tokens.fingerprint():
            # Losses of another validation text cannot be compared.
            step.average.losses = []
            self.progress.reset_validation()
        if len(checkpoint["rng"]) == distributed.world_size:
            _set_rng_state(distributed.device, checkpoint["rng"][distributed.rank])
        else:  # another world size: new dropout masks, which also differ between repeated changes
            torch.manual_seed(settings.run.seed + 1 + distributed.rank + 1_000_003 * self.progress.update)
        if step.capacity is not None and len(capacities) == distributed.world_size and capacities[distributed.rank]:
            step.capacity.load_state_dict(capacities[distributed.rank])
        bptt = {**step.bptt.state_dict(), "scaler": checkpoint["scaler"]}
        if not streams:
            self.loader.begin_epoch(checkpoint["loader"]["epoch"])
            step.bptt.load_state_dict(bptt)
            return
        self.loader.load_state_dict({key: value for key, value in checkpoint["loader"].items() if key != "data"})
        per_rank = settings.data.batch_size * settings.data.update_freq
        memory = pytbptt.memory.load(self.model.init_memory(self.loader.streams), checkpoint["memory"])
        local = pytbptt.memory.select(memory, slice(distributed.rank * per_rank, (distributed.rank + 1) * per_rank))
        bptt["states"] = pytbptt.memory.split(pytbptt.memory.to(local, distributed.device), settings.data.batch_size)
        if kept:
            chunks = self.loader.read(self.loader.position - kept, self.loader.position)
            bptt["kept"] = [(chunk.tokens, chunk.reset) for chunk in (chunk.to(distributed.device) for chunk in chunks)]
        step.bptt.load_state_dict(bptt)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
