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
from pytbptt.checkpoint.writer import Saver
from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.errors import InputError, RunError
from pytbptt.evaluation.scoring import Interrupted, Score, score
from pytbptt.runtime.distributed import Processes, mixed_precision
from pytbptt.training.adaptive_bptt import measured_bias
from pytbptt.training.config import UPDATES, TrainSettings, flatten
from pytbptt.training.logging import Log
from pytbptt.training.metrics import Progress
from pytbptt.training.schedule import Schedule
from pytbptt.training.stopping import Stopping
from pytbptt.training.update import UpdateStep, load_optimizer, out_of_memory_explained

SKIPPED_IN_A_ROW = 10


class Trainer:
    """One run of training.

    Args:
        settings: as the command line gives them, checked.
        train: the tokens to train on.
        valid: the tokens to validate on, or None.
        processes: this process among those of the job.

    Raises:
        InputError: data, model or settings that do not fit together.
    """

    def __init__(
        self, settings: TrainSettings, train: IndexedTokens, valid: IndexedTokens | None, processes: Processes
    ) -> None:
        self.settings, self.train_tokens, self.valid_tokens, self.processes = settings, train, valid, processes
        self.save_dir = Path(settings.checkpoint.save_dir)
        data, run = settings.data, settings.run
        if run.deterministic:
            torch.use_deterministic_algorithms(True)
        self.text_format = train.text_format.with_resets(data.reset_on)
        self.loader = StreamLoader(
            train,
            data.batch_size,
            data.tokens_per_sample,
            rank=processes.rank,
            world_size=processes.world_size,
            update_freq=data.update_freq,
            bptt_variation=None if data.bptt_variation == "none" else data.bptt_variation,
            reset_on=self.text_format.reset_on,
            rotate=data.rotate,
            seed=run.seed,
            copy_to=processes.device if processes.device.type == "cuda" else None,
        )
        vocab_size = settings.model.vocab_size or len(train.vocabulary)
        if vocab_size < len(train.vocabulary):
            raise InputError(f"--vocab-size: found {vocab_size}, expected at least the data's {len(train.vocabulary)}")
        torch.manual_seed(run.seed)
        self.model = settings.model.changed(vocab_size=vocab_size).build().to(processes.device)
        torch.manual_seed(run.seed + 1 + processes.rank)  # each rank draws different dropout masks
        self.step = UpdateStep(self.model, settings, processes)
        per_epoch = math.ceil(len(self.loader) / settings.truncation.bptt_chunks)
        updates = run.max_update or run.max_epoch * per_epoch or UPDATES
        self.schedule = Schedule(self.step.optimizer, settings.optimization, updates)
        self.stopping = Stopping(run, updates, processes)
        self.progress = Progress()
        self.saver = Saver(self.save_dir, settings.checkpoint.keep_last)
        self.saved = time.monotonic()

    # The loop

    def fit(self, log: Log) -> None:
        """Train until the run has ended or is told to stop; progress.stopped says why, or is empty if told to.

        This is truncated backpropagation through time. A chunk continues the chunk before it in each of its streams:
        the model reads it with the memory that the chunk before has left. Gradients flow back to the beginning of the
        chunk and no further, or as far as --bptt-chunks and --bptt-backward say; what comes before is memory alone.
        Where an epoch ends, so do the streams, and memory begins anew.
        """
        self.stopping.started = self.saved = time.monotonic()
        try:
            if self.progress.update and self._validation_is_due():  # a signal interrupted it
                self.validate(log)
            while not self.ended():
                for chunks in self.updates():
                    with out_of_memory_explained(self.settings.data):
                        self._adapt(log)
                        self.update(chunks)
                    self._after_update(log)
                    if self.ended():
                        break
                else:
                    self.step.begin_streams()
                    self._after_epoch(log)
            if self.progress.stopped:
                self.validate(log)
        except Interrupted:
            self.progress.stopped = ""
        self.save(checkpoints.LAST)
        self.saver.wait()
        self.processes.wait()  # until the first process has written what all of them go on to read

    def updates(self) -> Iterator[list[Chunk]]:
        """The rest of the epoch: for every update, --bptt-chunks chunks of each accumulation group."""
        chunks = iter(self.loader)
        while several := list(islice(chunks, self.settings.truncation.bptt_chunks * self.settings.data.update_freq)):
            yield several

    def update(self, chunks: list[Chunk]) -> Tensor:
        """Forward and backward over such chunks, and a step of the optimizer; the gradient's norm, as `UpdateStep`."""
        drawn = 1.0  # a shorter chunk takes a smaller step, as in AWD-LSTM
        if self.settings.data.bptt_variation != "none":
            of_a_group = chunks[:: self.settings.data.update_freq]
            length = sum(chunk.tokens.shape[1] for chunk in of_a_group) / len(of_a_group)
            drawn = length / self.settings.data.tokens_per_sample
        self.schedule.advance(self.progress.update, drawn)
        norm = self.step(chunks)
        self.progress.tokens += self.processes.world_size * sum(chunk.targets.numel() for chunk in chunks)
        self.progress.update += 1
        return norm

    def ended(self) -> bool:
        """Whether to stop, by a signal or because the settings say so; progress.stopped keeps what they say."""
        self.progress.stopped = self.stopping.reason(self.progress, self.loader.epoch)
        return bool(self.progress.stopped) or self.stopping.told()

    # What goes with it

    def _adapt(self, log: Log) -> None:
        """Every --bptt-interval updates: how far back gradients flow from here on, from what truncation costs now."""
        truncation, update, new = self.settings.truncation, self.progress.update, self.step.new_tokens
        if not truncation.bptt_adaptive or update % truncation.bptt_interval:
            return
        bias = measured_bias(
            self.model,
            self.train_tokens,
            new=new,
            longest=truncation.bptt_backward,
            reset_on=self.text_format.reset_on,
            seed=(self.settings.run.seed, update),
        )
        chosen = self.processes.broadcast(bias.shortest(truncation.bptt_tolerance) or truncation.bptt_backward)
        self.progress.bptt_backward, self.step.bptt.context = chosen, chosen - new
        found = bias.bias[bias.lengths.index(chosen)]
        log.say(
            f"update {update}: gradients over {chosen} tokens, which leave out {found.value:.1%} "
            f"({found.low:.1%} to {found.high:.1%}); {truncation.bptt_tolerance:.1%} is tolerated"
        )

    def _after_update(self, log: Log) -> None:
        log.advance()
        logs = self.progress.update % self.settings.logging.log_interval == 0
        if logs or self.processes.device.type == "cpu":
            self.count_skips()
        if logs:
            self._log(log)
        self.saver.check()
        if self.settings.run.validate_interval_updates and self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)
        elif self._saving_is_due():
            self.save(checkpoints.LAST)

    def _after_epoch(self, log: Log) -> None:
        if self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)

    def _validation_is_due(self) -> bool:
        """Every --validate-interval-updates updates or, without it, where an epoch has ended."""
        interval = self.settings.run.validate_interval_updates
        return self.progress.update % interval == 0 if interval else self.loader.index == 0

    def _saving_is_due(self) -> bool:
        """Every --save-interval-updates updates, and every --save-interval-minutes minutes of the first process."""
        choice = self.settings.checkpoint
        updates, minutes = choice.save_interval_updates, choice.save_interval_minutes
        late = bool(minutes) and self.processes.broadcast((time.monotonic() - self.saved) / 60 >= minutes)
        if not late and (not updates or self.progress.update % updates):
            return False
        self.count_skips()
        return not self.progress.skipped_in_a_row  # what is on the disk shall be from before the trouble

    def count_skips(self) -> None:
        """Wait for the device, and learn of the updates that were skipped.

        Raises:
            RunError: SKIPPED_IN_A_ROW of them, or more, were the latest.
        """
        self.progress.skipped, self.progress.skipped_in_a_row = self.step.tally.skips.tolist()
        if self.progress.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {self.progress.skipped_in_a_row} updates in a row, up to update "
                f"{self.progress.update}: lower --lr, --clip-norm or --tokens-per-sample, or raise "
                "--warmup-updates; the last checkpoint is from before that"
            )

    def _log(self, log: Log) -> None:
        since, tally = self.step.tally.state_dict(), self.step.tally
        tally.sums.zero_()
        log.train(
            update=self.progress.update,
            epoch=self.loader.epoch + 1,
            tokens=self.progress.tokens,
            loss=since["nll"] / since["count"] if since["count"] else math.nan,
            lr=self.schedule.rate,
            grad_norm=since["grad_norm"] / since["updates"] if since["updates"] else math.nan,
            skipped=self.progress.skipped,
            bptt_backward=self.progress.bptt_backward,
        )

    def validate(self, log: Log) -> None:
        """Score the validation split, keep the best weights, and tell the schedules that wait for it.

        Raises:
            Interrupted: told to stop before the end; the run goes on with the same validation.
        """
        progress, average = self.progress, self.step.average
        if self.valid_tokens is None or progress.validated_at == progress.update:
            return
        with average.swapped_in():
            result = self.score(self.valid_tokens)
        improved = progress.validated(result.loss)
        if self.settings.optimization.optimizer == "asgd" and average.validated(result.loss):
            log.say(f"averaging of weights begins at update {progress.update}")
        log.valid(
            update=progress.update,
            epoch=self.loader.epoch + (1 if self.loader.index else 0),  # at an epoch's end the loader has moved on
            loss=result.loss,
            best=progress.best_loss,
            seconds=result.seconds,
        )
        if improved:
            self.save(checkpoints.BEST)

    def score(self, tokens: IndexedTokens) -> Score:
        """The model's score of a split, with training's chunk length and the model's own mode restored after."""
        warm_up, bptt = self.settings.run.warm_up_valid, self.settings.data.tokens_per_sample
        with mixed_precision(self.processes.device, self.step.dtype):
            return score(
                self.model,
                tokens,
                streams=self.settings.run.batch_size_valid or self.loader.streams,
                bptt=bptt,
                warm_up=self.model.warm_up(bptt) if warm_up < 0 else warm_up,
                reset_on=self.text_format.reset_on,
                processes=self.processes,
                interrupted=lambda: bool(self.stopping.signal),
                cuda_graph=self.settings.run.cuda_graph != "off",
            )

    # What is saved

    def save(self, name: str) -> None:
        """Write a checkpoint while the run goes on.

        Raises:
            RunError: the checkpoint before this one could not be written; as `count_skips`.
        """
        self.count_skips()
        self.saved = time.monotonic()
        checkpoint = self.state_dict()
        if checkpoint is not None:
            self.saver.save(name, checkpoint)

    def state_dict(self) -> dict[str, Any] | None:
        """Everything that a run needs to go on as if it had not been interrupted, which all processes have to ask for;
        None but on the first."""
        step, gather = self.step, self.processes.gather
        bptt = step.bptt.state_dict()
        memory = gather(pytbptt.memory.to(pytbptt.memory.concatenate(bptt["states"]), "cpu"))
        rng = gather(_rng_state(self.processes.device))
        rooms = gather(None if step.capacity is None else step.capacity.state_dict())
        interval = step.tally.state_dict()
        if memory is None:
            return None
        kept = bptt["kept"][0]
        return {
            "format": checkpoints.FORMAT,
            "model": self.model.state_dict(),
            "average": step.average.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": bptt["scaler"],
            "rng": rng,
            "loader": {**self.loader.state_dict(), "data": self.train_tokens.fingerprint()},
            "validation": self.valid_tokens.fingerprint() if self.valid_tokens else "",
            "memory": pytbptt.memory.state_dict(pytbptt.memory.concatenate(memory)),
            "config": {"model": checkpoints.model_state(self.model.config), "run": flatten(self.settings)},
            "vocabulary": self.train_tokens.vocabulary.state_dict(),
            "text": self.text_format.state(),
            "progress": {
                **dataclasses.asdict(self.progress),
                "interval": interval,
                # How far the memory lies behind the loader's position: these tokens are read again.
                "kept": 0 if kept is None else kept[0].shape[1],
                "rooms": rooms,
            },
        }

    def load_state_dict(self, checkpoint: dict[str, Any], streams: bool = True) -> None:
        """Go on from what `state_dict` gave, on however many processes and groups: every stream where it stood.

        Args:
            checkpoint: of the same model, optimizer and vocabulary.
            streams: of the same streams too; False: begin the streams of its epoch afresh.
        """
        step, processes, settings = self.step, self.processes, self.settings
        self.model.load_state_dict(checkpoint["model"])
        step.average.load_state_dict(checkpoint["average"])
        load_optimizer(step.optimizer, checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["scheduler"])
        progress = dict(checkpoint["progress"])
        interval, kept, rooms = progress.pop("interval"), progress.pop("kept", 0), progress.pop("rooms", [])
        self.progress = Progress(**progress)
        step.tally.load_state_dict(interval, self.progress)
        if not settings.truncation.bptt_adaptive:
            self.progress.bptt_backward = 0
        elif self.progress.bptt_backward:
            chosen = min(self.progress.bptt_backward, settings.truncation.bptt_backward)
            self.progress.bptt_backward = max(chosen, step.new_tokens)
            step.bptt.context = self.progress.bptt_backward - step.new_tokens
        if self.valid_tokens and checkpoint["validation"] != self.valid_tokens.fingerprint():
            # What other text scored is nothing to compare with.
            step.average.losses = []
            self.progress.forget_validations()
        if len(checkpoint["rng"]) == processes.world_size:
            _set_rng_state(processes.device, checkpoint["rng"][processes.rank])
        else:  # other processes draw other dropout masks, and others again after the next change
            torch.manual_seed(settings.run.seed + 1 + processes.rank + 1_000_003 * self.progress.update)
        if step.capacity is not None and len(rooms) == processes.world_size and rooms[processes.rank]:
            step.capacity.load_state_dict(rooms[processes.rank])
        bptt = {**step.bptt.state_dict(), "scaler": checkpoint["scaler"]}
        if not streams:
            self.loader.begin_epoch(checkpoint["loader"]["epoch"])
            step.bptt.load_state_dict(bptt)
            return
        self.loader.load_state_dict({key: value for key, value in checkpoint["loader"].items() if key != "data"})
        own = settings.data.batch_size * settings.data.update_freq
        memory = pytbptt.memory.load(self.model.init_memory(self.loader.streams), checkpoint["memory"])
        mine = pytbptt.memory.select(memory, slice(processes.rank * own, (processes.rank + 1) * own))
        bptt["states"] = pytbptt.memory.split(pytbptt.memory.to(mine, processes.device), settings.data.batch_size)
        if kept:
            chunks = self.loader.read(self.loader.position - kept, self.loader.position)
            bptt["kept"] = [(chunk.tokens, chunk.reset) for chunk in (chunk.to(processes.device) for chunk in chunks)]
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
