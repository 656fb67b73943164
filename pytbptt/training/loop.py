"""The training loop: chunks in stream order, memory carried from one to the next, exactly resumable."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pytbptt.memory
from pytbptt import checkpoint as checkpoints
from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.distributed import Processes, mean_rounded_to, mixed_precision
from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.evaluation.scoring import Interrupted, Score, score
from pytbptt.nn import LossResult
from pytbptt.nn.architectures import Model, build_model
from pytbptt.training.adaptive_bptt import measured_bias
from pytbptt.training.averaging import WeightAverage
from pytbptt.training.config import TrainSettings, flatten
from pytbptt.training.logging import Log
from pytbptt.training.saving import Saver
from pytbptt.training.schedule import learning_rate
from pytbptt.training.truncated_bptt import TruncatedBPTT

SKIPPED_IN_A_ROW = 10
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SENT_AS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a run cannot change halfway: its place in the data and the optimizer's state mean nothing under other values.
OF_THE_STREAMS = ("tokens_per_sample", "bptt_variation", "rotate", "reset_on", "seed")
OF_THE_OPTIMIZER = ("optimizer", "weight_decay", "adam_betas", "adam_eps", "momentum")


@dataclass
class Progress:
    """How far a run has come; everything here goes into the checkpoint."""

    update: int = 0
    tokens: int = 0
    """Targets scored in training so far, over all processes."""
    skipped: int = 0
    """Updates whose gradient was not finite, and which changed no weight."""
    skipped_in_a_row: int = 0
    validated_at: int = -1
    best_loss: float = float("inf")
    without_improvement: int = 0
    bptt_backward: int = 0
    """What --bptt-adaptive has chosen last; 0 without it."""
    stopped: str = ""
    """Why the run has ended; empty while it has not."""


@dataclass
class Interval:
    """What has added up on this process since the last entry of the log, over the updates that were not skipped."""

    nll: Tensor
    """float64 (), on the training device: to read it is to wait for the device, so only the log and checkpoints do."""
    count: Tensor
    """float64 (), there as well."""
    grad_norm: float = 0.0
    updates: int = 0

    def add(self, update: "Interval", grad_norm: float) -> None:
        """One more update."""
        self.nll += update.nll
        self.count += update.count
        self.grad_norm += grad_norm
        self.updates += 1


class Objective(nn.Module):
    """A language model as TruncatedBPTT calls it, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, text: tuple[Tensor, Tensor | None], memory: Any, targets: Tensor | None = None
    ) -> tuple[Tensor | LossResult, Any]:
        tokens, reset = text
        if targets is None:
            return self.model(tokens, memory, reset, detach=False)  # type: ignore[no-any-return]
        return self.model.loss(tokens, targets, memory, reset, detach=False)


class Trainer:
    """One run of training.

    Args:
        settings: as the command line gives them, checked.
        train: the tokens to train on.
        valid: the tokens to validate on, or None.
        processes: this process among those of the job.

    Raises:
        InputError: data, model or checkpoint that do not fit together.
    """

    def __init__(
        self, settings: TrainSettings, train: IndexedTokens, valid: IndexedTokens | None, processes: Processes
    ) -> None:
        self.settings, self.train_tokens, self.valid_tokens, self.processes = settings, train, valid, processes
        self.device = processes.device
        self.save_dir = Path(settings.checkpoint.save_dir)
        if settings.run.deterministic:
            torch.use_deterministic_algorithms(True)

        data = settings.data
        self.loader = StreamLoader(
            train,
            data.batch_size,
            data.tokens_per_sample,
            rank=processes.rank,
            world_size=processes.world_size,
            update_freq=data.update_freq,
            bptt_variation=None if data.bptt_variation == "none" else data.bptt_variation,
            reset_on=None if data.reset_on == "auto" else data.reset_on,
            rotate=data.rotate,
            seed=settings.run.seed,
            pin_memory=self.device.type == "cuda",
        )
        torch.manual_seed(settings.run.seed)
        self.model_config = dataclasses.replace(
            settings.model, vocab_size=settings.model.vocab_size or len(train.vocabulary)
        )
        if self.model_config.vocab_size < len(train.vocabulary):
            found, expected = self.model_config.vocab_size, len(train.vocabulary)
            raise InputError(f"--vocab-size: found {found}, expected at least the data's {expected}")
        self.model = build_model(self.model_config).to(self.device)
        torch.manual_seed(settings.run.seed + 1 + processes.rank)  # every process drops out otherwise
        self.objective: nn.Module = Objective(self.model)
        if processes.world_size > 1:
            # Gradients travel in buckets while the backward pass goes on; a tied weight is one parameter, sent once.
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
            if settings.optimization.ddp_comm_hook != "none":
                self.objective.register_comm_hook(SENT_AS[settings.optimization.ddp_comm_hook], mean_rounded_to)
        self.optimizer = self._make_optimizer()
        self.average = WeightAverage(self.model, settings.optimization.nonmono)
        self.use_fp16 = settings.optimization.fp16 and self.device.type == "cuda"
        self.progress, self.interval = Progress(), self._interval()
        self.new_tokens = data.tokens_per_sample * settings.truncation.bptt_chunks
        self.bptt = TruncatedBPTT(
            self.objective,
            self.optimizer,
            loss=None,
            context=max(0, settings.truncation.bptt_backward - self.new_tokens),
            groups=data.update_freq,
            time_dim=1,
            clip_norm=settings.optimization.clip_norm,
            autocast=mixed_precision(self.device, fp16=self.use_fp16, bf16=settings.optimization.bf16),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.use_fp16),
        )
        self.bptt.begin(self._initial_memory())
        self.stop_signal = ""
        self.started = self.saved = time.monotonic()
        self.saver = Saver(self.save_dir, settings.checkpoint.keep_last)

    # The update step

    def update(self, chunks: list[Chunk]) -> None:
        """One step of the optimizer: forward and backward over the chunks of every group, clip, step."""
        groups = self.settings.data.update_freq
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._learning_rate(chunks[::groups])
        interval = self._interval()
        for group in range(groups):
            read = [chunk.to(self.device) for chunk in chunks[group::groups]]
            with self._synchronised(group == groups - 1):
                forward = self.bptt.accumulate(*[((c.tokens, c.reset), c.targets) for c in read], group=group)
            for result in forward.outputs:
                interval.nll += result.nll
                interval.count += result.count
        norm = self.bptt.step()
        if norm < float("inf"):
            self.average.update()
            self.progress.skipped_in_a_row = 0
            self.interval.add(interval, norm)
        else:
            self._skip()
        self.progress.tokens += self.processes.world_size * sum(chunk.targets.numel() for chunk in chunks)
        self.progress.update += 1

    def _learning_rate(self, chunks: list[Chunk]) -> float:
        rate = learning_rate(self.settings.optimization, self.progress.update, self.settings.run.max_update)
        if self.settings.data.bptt_variation != "none":
            drawn = sum(chunk.tokens.shape[1] for chunk in chunks) / len(chunks)
            rate *= drawn / self.settings.data.tokens_per_sample
        return rate

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients in the last group's backward pass alone."""
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return contextlib.nullcontext()

    def _skip(self) -> None:
        """A gradient that is not finite changes no weight, and what it left in memory is not carried on."""
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        for group, memory in enumerate(self.bptt.states):
            if memory is None:
                self.bptt.states[group] = self._initial_memory()[group]
        if self.progress.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {SKIPPED_IN_A_ROW} updates in a row, up to update "
                f"{self.progress.update + 1}: lower --lr, --clip-norm or --tokens-per-sample, or raise "
                "--warmup-updates; the last checkpoint is from before that"
            )

    # The loop around it

    def run(self, log: Log) -> None:
        """Train until the run has ended or is told to stop; progress.stopped says why, or is empty if told to.

        Within `heeding_signals`, it is told to stop by signals.
        """
        self.started = self.saved = time.monotonic()
        try:
            self._run(log)
        except Interrupted:
            self.progress.stopped = ""
        self.save(checkpoints.LAST)
        self.saver.wait()
        self.processes.wait()  # until the first process has written what all of them go on to read

    def _run(self, log: Log) -> None:
        if self.progress.update and self._validation_is_due():  # a signal interrupted it
            self.validate(log)
        while not self.ended():
            for chunks in self._updates():
                with self._naming_what_did_not_fit():
                    self._adapt(log)
                    self.update(chunks)
                self._after_update(log)
                if self.ended():
                    break
            else:
                self._end_epoch(log)
        if self.progress.stopped:
            self.validate(log)

    def _updates(self) -> Iterator[list[Chunk]]:
        """The rest of the epoch: for every update, --bptt-chunks chunks of each accumulation group."""
        chunks = iter(self.loader)
        while several := list(islice(chunks, self.settings.truncation.bptt_chunks * self.settings.data.update_freq)):
            yield several

    def _adapt(self, log: Log) -> None:
        """Every --bptt-interval updates: how far back gradients flow from here on, from what truncation costs now."""
        truncation, update = self.settings.truncation, self.progress.update
        if not truncation.bptt_adaptive or update % truncation.bptt_interval:
            return
        bias = measured_bias(
            self.model,
            self.train_tokens,
            new=self.new_tokens,
            longest=truncation.bptt_backward,
            reset_on=self.settings.data.reset_on,
            seed=(self.settings.run.seed, update),
        )
        chosen = self.processes.broadcast(bias.shortest(truncation.bptt_tolerance) or truncation.bptt_backward)
        self.progress.bptt_backward, self.bptt.context = chosen, chosen - self.new_tokens
        found = bias.bias[bias.lengths.index(chosen)]
        log.say(
            f"update {update}: gradients over {chosen} tokens, which leave out {found.value:.1%} "
            f"({found.low:.1%} to {found.high:.1%}); {truncation.bptt_tolerance:.1%} is tolerated"
        )

    def _after_update(self, log: Log) -> None:
        update, settings = self.progress.update, self.settings
        log.advance()
        if update % settings.logging.log_interval == 0:
            self._log(log)
        self.saver.check()
        if settings.run.validate_interval_updates and self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)
        elif self._saving_is_due():
            self.save(checkpoints.LAST)

    def _end_epoch(self, log: Log) -> None:
        self.bptt.begin(self._initial_memory())
        if self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)

    def _saving_is_due(self) -> bool:
        """Every --save-interval-updates updates, and every --save-interval-minutes minutes of the first process."""
        updates, minutes = (
            self.settings.checkpoint.save_interval_updates,
            self.settings.checkpoint.save_interval_minutes,
        )
        if self.progress.skipped_in_a_row:  # what is on the disk shall be from before the trouble
            return False
        late = bool(minutes) and self.processes.broadcast((time.monotonic() - self.saved) / 60 >= minutes)
        return late or bool(updates and self.progress.update % updates == 0)

    def _validation_is_due(self) -> bool:
        """Every --validate-interval-updates updates or, without it, where an epoch has ended."""
        interval = self.settings.run.validate_interval_updates
        return self.progress.update % interval == 0 if interval else self.loader.index == 0

    def ended(self) -> bool:
        """Whether to stop, by a signal or because the settings say so; progress.stopped keeps what they say."""
        self.progress.stopped = self._reason_to_stop()
        return bool(self.progress.stopped) or self.processes.any(bool(self.stop_signal))

    def _reason_to_stop(self) -> str:
        run, progress = self.settings.run, self.progress
        if progress.update >= run.max_update:
            return f"update {run.max_update} (--max-update)"
        if run.max_epoch and self.loader.epoch >= run.max_epoch:
            return f"the end of epoch {run.max_epoch} (--max-epoch)"
        if run.patience and progress.without_improvement >= run.patience:
            return f"{run.patience} validations without improvement (--patience)"
        minutes = self.processes.broadcast((time.monotonic() - self.started) / 60) if run.max_minutes else 0.0
        if run.max_minutes and minutes >= run.max_minutes:
            return f"{run.max_minutes:g} minutes (--max-minutes)"
        return ""

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """STOP_SIGNALS end the run after the update or within the scoring that they find it in; a second one, at once.

        One that is ignored from the beginning, as SIGHUP under nohup, stays so.
        """

        def stop(number: int, frame: Any) -> None:
            self.stop_signal = signal.Signals(number).name
            signal.signal(number, signal.SIG_DFL)

        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _naming_what_did_not_fit(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            data = self.settings.data
            parts = next((n for n in range(2, data.batch_size + 1) if data.batch_size % n == 0), 0)
            advice = (
                f"--batch-size {data.batch_size // parts} --update-freq {data.update_freq * parts} computes the same "
                f"with 1/{parts} of the activations"
                if parts
                else "a smaller --tokens-per-sample or model takes less"
            )
            raise RunError(
                f"out of memory: --batch-size {data.batch_size} x --tokens-per-sample {data.tokens_per_sample} did "
                f"not fit: {advice}; the last checkpoint is intact"
            ) from None

    def _log(self, log: Log) -> None:
        interval, self.interval = self.interval, self._interval()
        nll, count = self.processes.sum(torch.stack([interval.nll, interval.count])).tolist()
        log.train(
            update=self.progress.update,
            epoch=self.loader.epoch + 1,
            tokens=self.progress.tokens,
            loss=nll / count if count else math.nan,
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=interval.grad_norm / interval.updates if interval.updates else math.nan,
            skipped=self.progress.skipped,
            bptt_backward=self.progress.bptt_backward,
        )

    def validate(self, log: Log) -> None:
        """Score the validation split, keep the best weights, and tell the schedules that wait for it.

        Raises:
            Interrupted: told to stop before the end; the run goes on with the same validation.
        """
        progress = self.progress
        if self.valid_tokens is None or progress.validated_at == progress.update:
            return
        with self.average.swapped_in():
            result = self.score(self.valid_tokens)
        progress.validated_at = progress.update
        improved = result.loss < progress.best_loss
        progress.best_loss = min(progress.best_loss, result.loss)
        progress.without_improvement = 0 if improved else progress.without_improvement + 1
        if self.settings.optimization.optimizer == "asgd" and self.average.validated(result.loss):
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
        with mixed_precision(self.device, fp16=self.use_fp16, bf16=self.settings.optimization.bf16):
            return score(
                self.model,
                tokens,
                streams=self.settings.run.batch_size_valid or self.loader.streams,
                bptt=self.settings.data.tokens_per_sample,
                warm_up=0,
                reset_on=self.settings.data.reset_on,
                processes=self.processes,
                interrupted=lambda: bool(self.stop_signal),
            )

    # Checkpoints

    def save(self, name: str) -> None:
        """Write everything the run needs to go on as if it had not been interrupted, while the run goes on.

        Raises:
            RunError: the checkpoint before this one could not be written.
        """
        self.saved = time.monotonic()
        memory = self.processes.gather(pytbptt.memory.to(pytbptt.memory.concatenate(self.bptt.states), "cpu"))
        rng = self.processes.gather(self._rng_state())
        nll, count = self.processes.sum(torch.stack([self.interval.nll, self.interval.count])).tolist()
        if memory is None:
            return
        kept = self.bptt.kept[0]
        interval = {"nll": nll, "count": count, "grad_norm": self.interval.grad_norm, "updates": self.interval.updates}
        self.saver.save(
            name,
            {
                "format": checkpoints.FORMAT,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                # The learning rate is a function of progress.update: nothing else is the scheduler's.
                "scheduler": {"lr": self.optimizer.param_groups[0]["lr"]},
                "scaler": self.bptt.scaler.state_dict(),
                "rng": rng,
                "loader": {**self.loader.state_dict(), "data": self.train_tokens.fingerprint()},
                "validation": self.valid_tokens.fingerprint() if self.valid_tokens else "",
                "memory": pytbptt.memory.state_dict(pytbptt.memory.concatenate(memory)),
                "config": {"model": checkpoints.model_state(self.model_config), "run": flatten(self.settings)},
                "vocabulary": self.train_tokens.vocabulary.state_dict(),
                "progress": {
                    **dataclasses.asdict(self.progress),
                    "interval": interval,
                    # How far the memory lies behind the loader's position: these tokens are read again.
                    "kept": 0 if kept is None else kept[0].shape[1],
                },
            },
        )

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint's contents: every stream where it stood, however processes and groups share them.

        Raises:
            InputError: a checkpoint of another model, vocabulary or optimizer; of other streams without
                --reset-streams.
        """
        self._check_belongs(checkpoint)
        other_streams = self._other_streams(checkpoint)
        if other_streams and not self.settings.checkpoint.reset_streams:
            raise InputError(
                f"{self.save_dir}: holds a run {other_streams}: --reset-streams goes on with its weights and begins "
                "the streams afresh, --restart begins anew; or choose another --save-dir"
            )
        self.model.load_state_dict(checkpoint["model"])
        self.average.load_state_dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] and self.use_fp16:  # a run that had no scaler begins with a new one
            self.bptt.scaler.load_state_dict(checkpoint["scaler"])
        progress = dict(checkpoint["progress"])
        interval, kept = progress.pop("interval"), progress.pop("kept", 0)
        self.interval = self._interval(grad_norm=interval["grad_norm"], updates=interval["updates"])
        if self.processes.is_first:  # what all processes had added up is the first one's now
            self.interval.nll += interval["nll"]
            self.interval.count += interval["count"]
        self.progress = Progress(**progress)
        if not self.settings.truncation.bptt_adaptive:
            self.progress.bptt_backward = 0
        elif self.progress.bptt_backward:
            chosen = min(self.progress.bptt_backward, self.settings.truncation.bptt_backward)
            self.progress.bptt_backward = max(chosen, self.new_tokens)
            self.bptt.context = self.progress.bptt_backward - self.new_tokens
        if self.valid_tokens and checkpoint["validation"] != self.valid_tokens.fingerprint():
            # What other text scored is nothing to compare with.
            self.average.losses = []
            self.progress = dataclasses.replace(
                self.progress, validated_at=-1, best_loss=float("inf"), without_improvement=0
            )
        if len(checkpoint["rng"]) == self.processes.world_size:
            self._set_rng_state(checkpoint["rng"][self.processes.rank])
        else:  # other processes drop out otherwise, and otherwise again after the next change
            torch.manual_seed(self.settings.run.seed + 1 + self.processes.rank + 1_000_003 * self.progress.update)
        if other_streams:
            self.loader.begin_epoch(checkpoint["loader"]["epoch"])
            return
        self.loader.load_state_dict({key: value for key, value in checkpoint["loader"].items() if key != "data"})
        own = self.settings.data.batch_size * self.settings.data.update_freq
        streams = pytbptt.memory.load(self.model.init_memory(self.loader.streams), checkpoint["memory"])
        mine = pytbptt.memory.select(streams, slice(self.processes.rank * own, (self.processes.rank + 1) * own))
        self.bptt.begin(pytbptt.memory.split(pytbptt.memory.to(mine, self.device), self.settings.data.batch_size))
        if kept:
            chunks = self.loader.read(self.loader.position - kept, self.loader.position)
            self.bptt.kept = [(chunk.tokens, chunk.reset) for chunk in (chunk.to(self.device) for chunk in chunks)]

    def _check_belongs(self, checkpoint: dict[str, Any]) -> None:
        advice = "begin anew with --restart, or choose another --save-dir"
        found = checkpoint["config"]["model"]
        for key, expected in checkpoints.model_state(self.model_config).items():
            if found.get(key) != expected:
                raise InputError(
                    f"{self.save_dir}: holds a run with {key} {found.get(key)}, the settings say {expected}: {advice}"
                )
        run, settings = checkpoint["config"]["run"], flatten(self.settings)
        for key in OF_THE_OPTIMIZER:
            if run[key] != settings[key]:
                flag = "--" + key.replace("_", "-")
                raise InputError(
                    f"{self.save_dir}: holds a run with {flag} {run[key]}, the settings say {settings[key]}: {advice}"
                )
        if checkpoint["vocabulary"] != self.train_tokens.vocabulary.state_dict():
            raise InputError(f"{self.save_dir}: holds a run with another vocabulary than the data's: {advice}")

    def _other_streams(self, checkpoint: dict[str, Any]) -> str:
        """What is different about the checkpoint's streams; empty if nothing is."""
        run, settings, loader = checkpoint["config"]["run"], flatten(self.settings), checkpoint["loader"]
        for key in OF_THE_STREAMS:
            if run[key] != settings[key]:
                return f"with --{key.replace('_', '-')} {run[key]}, the settings say {settings[key]}"
        if loader["data"] != self.train_tokens.fingerprint():
            return f"on other data than {self.settings.data.data}"
        if loader["streams"] != self.loader.streams:
            return (
                f"of {loader['streams']} streams, --batch-size x --update-freq x processes makes {self.loader.streams}"
            )
        return ""

    def _interval(self, grad_norm: float = 0.0, updates: int = 0) -> Interval:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return Interval(zero, zero.clone(), grad_norm, updates)

    def _initial_memory(self) -> list[Any]:
        data = self.settings.data
        return [self.model.init_memory(data.batch_size) for _ in range(data.update_freq)]

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        choice = self.settings.optimization
        parameters = list(self.model.parameters())
        if choice.optimizer in ("sgd", "asgd"):
            return torch.optim.SGD(
                parameters, lr=choice.lr, momentum=choice.momentum, weight_decay=choice.weight_decay, fused=True
            )
        kind = torch.optim.AdamW if choice.optimizer == "adamw" else torch.optim.Adam
        return kind(
            parameters,
            lr=choice.lr,
            betas=choice.adam_betas,
            eps=choice.adam_eps,
            weight_decay=choice.weight_decay,
            fused=True,
        )
