"""The training loop: chunks in stream order, memory carried from one to the next, exactly resumable."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint.writer import Saver
from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.evaluation.scoring import Interrupted, Score, score, warm_up_tokens
from pytbptt.nn import LossResult, aligned
from pytbptt.nn.adaptive import TailCapacity
from pytbptt.nn.architectures import Model, build_model
from pytbptt.runtime.cuda_graph import Graphed
from pytbptt.runtime.distributed import Processes, mean_rounded_to, mixed_precision, products_dtype
from pytbptt.training import resuming
from pytbptt.training.adaptive_bptt import measured_bias
from pytbptt.training.averaging import WeightAverage
from pytbptt.training.config import UPDATES, TrainSettings
from pytbptt.training.logging import Log
from pytbptt.training.metrics import Progress, Tally
from pytbptt.training.schedule import learning_rate
from pytbptt.training.signals import handle_signals
from pytbptt.truncated_bptt import TruncatedBPTT

Capacity = tuple[int, ...] | None
Text = tuple[Tensor, Tensor | None, Tensor]  # tokens, resets and targets of a chunk
Step = Callable[[list[Any], list[Text], Capacity], tuple[list[Any], Tensor]]

SKIPPED_IN_A_ROW = 10
SENT_AS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Objective(nn.Module):
    """A language model as TruncatedBPTT calls it, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, text: tuple[Tensor, Tensor | None], memory: Any, wanted: tuple[Tensor, Capacity] | None = None
    ) -> tuple[Tensor | LossResult, Any]:
        tokens, reset = text
        if wanted is None:
            return self.model(tokens, memory, reset, detach=False)  # type: ignore[no-any-return]
        targets, capacity = wanted
        return self.model.loss(tokens, targets, memory, reset, detach=False, capacity=capacity)


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
            seed=settings.run.seed,
            copy_to=self.device if self.device.type == "cuda" else None,
        )
        run, chunks = settings.run, settings.truncation.bptt_chunks
        self.schedule_updates = run.max_update or run.max_epoch * math.ceil(len(self.loader) / chunks) or UPDATES
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
        if processes.exchanges_gradients:
            # Gradients travel in buckets while the backward pass goes on; a tied weight is one parameter, sent once.
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
            if settings.optimization.ddp_comm_hook != "none":
                self.objective.register_comm_hook(SENT_AS[settings.optimization.ddp_comm_hook], mean_rounded_to)
        self.optimizer = self._make_optimizer()
        self.average = WeightAverage(self.model, settings.optimization.nonmono)
        self.dtype = products_dtype(self.device, fp16=settings.optimization.fp16, bf16=settings.optimization.bf16)
        self.progress, self.tally = Progress(), Tally(self.device)
        self.new_tokens = data.tokens_per_sample * settings.truncation.bptt_chunks
        self.bptt = TruncatedBPTT(
            self.objective,
            self.optimizer,
            loss=None,
            context=max(0, settings.truncation.bptt_backward - self.new_tokens),
            groups=data.update_freq,
            time_dim=1,
            clip_norm=settings.optimization.clip_norm,
            autocast=mixed_precision(self.device, self.dtype),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
        )
        # Every epoch begins from these very tensors, as a captured update does after one that was skipped.
        self.initial_memory = [self.model.init_memory(data.batch_size)] * data.update_freq
        self.bptt.begin(self.initial_memory)
        self.capacity = None if self.device.type == "cpu" else TailCapacity(self.model.softmax)
        self.no_graph = _why_no_graph(settings, processes)
        self.step: Step = self._step if self.no_graph else Graphed(self._step, self.device)
        self.stop_signal = ""
        self.started = self.saved = time.monotonic()
        self.saver = Saver(self.save_dir, settings.checkpoint.keep_last)

    # The update step

    def update(self, chunks: list[Chunk]) -> Tensor:
        """One step of the optimizer: forward and backward over the chunks of every group, clip, step.

        Returns:
            The norm of the gradient before it was clipped, (); where it is not finite, no weight was changed.
        """
        self.set_learning_rate(self._learning_rate(chunks[:: self.settings.data.update_freq]))
        # The host has the targets, and need not ask the device how many of them are rare.
        capacity = None if self.capacity is None else self.capacity.of([chunk.targets for chunk in chunks])
        read = [(chunk.tokens, chunk.reset, chunk.targets) for chunk in (chunk.to(self.device) for chunk in chunks)]
        self.bptt.states, norm = self.step(self.bptt.states, read, capacity)
        self.average.update(norm.isfinite())
        self.progress.tokens += self.processes.world_size * sum(chunk.targets.numel() for chunk in chunks)
        self.progress.update += 1
        return norm

    def _step(self, states: list[Any], chunks: list[Text], capacity: Capacity) -> tuple[list[Any], Tensor]:
        """What an update does on the device, where nobody waits for it: the states after it, and the gradient's norm.

        A CUDA graph repeats it without Python: whatever changes is a tensor that stays where it is.
        """
        groups, self.bptt.states = self.settings.data.update_freq, states
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros_like(nll)
        for group in range(groups):
            pairs = [((tokens, reset), (targets, capacity)) for tokens, reset, targets in chunks[group::groups]]
            with self._synchronised(group == groups - 1), aligned.padded_products(not self.no_graph):
                forward = self.bptt.accumulate(*pairs, group=group)
            for result in forward.outputs:
                nll += result.nll
                count += result.count
        norm = self.bptt.step()
        self.tally.add(nll, count, norm)
        return self.bptt.states, norm

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next step of the optimizer."""
        self.learning_rate = rate
        for parameters in self.optimizer.param_groups:
            if isinstance(parameters["lr"], Tensor):
                parameters["lr"].fill_(self.learning_rate)
            else:
                parameters["lr"] = self.learning_rate

    def _learning_rate(self, chunks: list[Chunk]) -> float:
        rate = learning_rate(self.settings.optimization, self.progress.update, self.schedule_updates)
        if self.settings.data.bptt_variation != "none":
            drawn = sum(chunk.tokens.shape[1] for chunk in chunks) / len(chunks)
            rate *= drawn / self.settings.data.tokens_per_sample
        return rate

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients in the last group's backward pass alone."""
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return contextlib.nullcontext()

    def _count_skips(self) -> None:
        """Wait for the device, and learn of the updates that were skipped.

        Raises:
            RunError: SKIPPED_IN_A_ROW of them, or more, were the latest.
        """
        self.progress.skipped, self.progress.skipped_in_a_row = self.tally.skips.tolist()
        if self.progress.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {self.progress.skipped_in_a_row} updates in a row, up to update "
                f"{self.progress.update}: lower --lr, --clip-norm or --tokens-per-sample, or raise "
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
            reset_on=self.text_format.reset_on,
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
        logs = update % settings.logging.log_interval == 0
        if logs or self.device.type == "cpu":
            self._count_skips()
        if logs:
            self._log(log)
        self.saver.check()
        if settings.run.validate_interval_updates and self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)
        elif self._saving_is_due():
            self.save(checkpoints.LAST)

    def _end_epoch(self, log: Log) -> None:
        self.bptt.begin(self.initial_memory)
        if self._validation_is_due():
            self.validate(log)
            self.save(checkpoints.LAST)

    def _saving_is_due(self) -> bool:
        """Every --save-interval-updates updates, and every --save-interval-minutes minutes of the first process."""
        updates, minutes = (
            self.settings.checkpoint.save_interval_updates,
            self.settings.checkpoint.save_interval_minutes,
        )
        late = bool(minutes) and self.processes.broadcast((time.monotonic() - self.saved) / 60 >= minutes)
        if not late and (not updates or self.progress.update % updates):
            return False
        self._count_skips()
        return not self.progress.skipped_in_a_row  # what is on the disk shall be from before the trouble

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
        if (run.max_update or not run.max_epoch) and progress.update >= self.schedule_updates:
            return f"update {self.schedule_updates} (--max-update)"
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
        """Signals end the run after the update or within the scoring that they find it in; a second one, at once."""

        def stop(number: int, frame: Any) -> None:
            self.stop_signal = signal.Signals(number).name
            signal.signal(number, signal.SIG_DFL)

        with handle_signals(stop):
            yield

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
        nll, count, grad_norm, updates = self.sums()
        self.tally.sums.zero_()
        log.train(
            update=self.progress.update,
            epoch=self.loader.epoch + 1,
            tokens=self.progress.tokens,
            loss=nll / count if count else math.nan,
            lr=self.learning_rate,
            grad_norm=grad_norm / updates if updates else math.nan,
            skipped=self.progress.skipped,
            bptt_backward=self.progress.bptt_backward,
        )

    def sums(self) -> list[float]:
        """Since the last entry of the log: negative log-likelihood, targets, gradients' norms and updates, of all."""
        nll, count = self.processes.sum(self.tally.sums[:2]).tolist()
        return [nll, count, *self.tally.sums[2:].tolist()]

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
        warm_up, bptt = self.settings.run.warm_up_valid, self.settings.data.tokens_per_sample
        with mixed_precision(self.device, self.dtype):
            return score(
                self.model,
                tokens,
                streams=self.settings.run.batch_size_valid or self.loader.streams,
                bptt=bptt,
                warm_up=warm_up_tokens(self.model, bptt) if warm_up < 0 else warm_up,
                reset_on=self.text_format.reset_on,
                processes=self.processes,
                interrupted=lambda: bool(self.stop_signal),
                cuda_graph=self.settings.run.cuda_graph != "off",
            )

    def save(self, name: str) -> None:
        """Write a checkpoint while the run goes on.

        Raises:
            RunError: the checkpoint before this one could not be written; as `_count_skips`.
        """
        self._count_skips()
        self.saved = time.monotonic()
        checkpoint = resuming.state(self)
        if checkpoint is not None:
            self.saver.save(name, checkpoint)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        choice, on_gpu = self.settings.optimization, self.device.type == "cuda"
        parameters = list(self.model.parameters())
        # On a GPU the rate is a tensor there, so that a captured update finds the present one.
        rate = torch.tensor(choice.lr, device=self.device) if on_gpu else choice.lr
        self.learning_rate = choice.lr
        if choice.optimizer in ("sgd", "asgd"):
            sgd = torch.optim.SGD(
                parameters, lr=rate, momentum=choice.momentum, weight_decay=choice.weight_decay, fused=True
            )
            if choice.momentum:  # there from the beginning: a captured update, unlike a first step, makes no state
                sgd.state.update({weight: {"momentum_buffer": torch.zeros_like(weight)} for weight in parameters})
            return sgd
        kind = torch.optim.AdamW if choice.optimizer == "adamw" else torch.optim.Adam
        return kind(
            parameters,
            lr=rate,
            betas=choice.adam_betas,
            eps=choice.adam_eps,
            weight_decay=choice.weight_decay,
            fused=True,
            capturable=on_gpu,
        )


def _why_no_graph(settings: TrainSettings, processes: Processes) -> str:
    """Why updates are not captured in a CUDA graph, or nothing if they are.

    Raises:
        InputError: --cuda-graph on where they cannot be.
    """
    data, truncation = settings.data, settings.truncation
    if settings.run.cuda_graph == "off":
        return "--cuda-graph off"
    reason = ""
    if processes.device.type != "cuda":
        reason = "there is no GPU"
    elif processes.exchanges_gradients:
        reason = "processes exchange gradients in the middle of an update"
    elif data.bptt_variation != "none":
        reason = f"--bptt-variation {data.bptt_variation} draws another length for every chunk"
    elif truncation.bptt_backward > data.tokens_per_sample * truncation.bptt_chunks:
        reason = "--bptt-backward reads tokens again, first fewer and then more"
    if reason and settings.run.cuda_graph == "on":
        raise InputError(f"--cuda-graph: found on, but {reason}; expected auto or off")
    return reason
