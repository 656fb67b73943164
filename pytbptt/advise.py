"""Recommend bptt, batch size and mem_len: python -m pytbptt.advise [DATA] [--arch …] [--path CHECKPOINT] ..."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.data import IndexedTokens, load
from pytbptt.errors import InputError, RunError
from pytbptt.ops.dispatch import fused_unsupported_reason
from pytbptt.runtime.atomic import writable_folder
from pytbptt.runtime.cli import run_with_parser
from pytbptt.runtime.distributed import choose_device
from pytbptt.runtime.extras import progress_bar
from pytbptt.training.config import BUILT_IN_CORPUS, TrainSettings, read_settings
from pytbptt.training.run import load_optional_split
from pytbptt.tuning.context import MIN_HELD_OUT, ContextPoint, effective_context, measure_context
from pytbptt.tuning.cost import GIB, check_measurable, default_memory_limit, grid_search, measure_memory, measure_speed
from pytbptt.tuning.gradient import measure_bias, measure_stability
from pytbptt.tuning.plan import make_plan
from pytbptt.tuning.recommendation import recommend
from pytbptt.tuning.report import JSON_FILE, PLOT_FILE, Findings, command_line, plot, print_findings, write_json
from pytbptt.tuning.trial import from_checkpoint, train_from_scratch


@dataclass
class AdviceOptions:
    path: str = ""
    """Measure with this checkpoint's weights; its settings are the defaults for flags that are not given. Empty: train
    briefly from scratch, which gives weights that use less long-range context."""
    tolerance: float = 0.1
    """Largest accepted bias of the truncated gradient, relative to the full gradient; below 1."""
    memory_limit: float = 0.0
    """Memory limit in GiB; 0: 80% of what is free now."""
    minutes: float = 3.0
    """Approximate time budget. The number of measurements depends only on this and the model's size, so runs are
    repeatable; a slow machine takes longer than this."""
    advice_dir: str = "advice"
    """Output directory for advice.json and advice.png."""


@dataclass
class AdviceSettings(TrainSettings):
    program: ClassVar[str] = "python -m pytbptt.advise"
    description: ClassVar[str] = (
        "Measure which bptt, batch size and memory length suit a model, its data and this machine. It accepts the "
        f"flags of python -m pytbptt.train. Without DATA, it measures on the built-in corpus {BUILT_IN_CORPUS}."
    )

    advice: AdviceOptions = field(default_factory=AdviceOptions)

    def check(self) -> None:
        """Raise InputError, naming the flag, for a value outside its range."""
        super().check()
        options = self.advice
        if not 0 < options.tolerance < 1:
            raise InputError(f"--tolerance: found {options.tolerance}, expected more than 0 and less than 1")
        if not 0 <= options.memory_limit < math.inf:
            raise InputError(f"--memory-limit: found {options.memory_limit}, expected at least 0")
        if not 0 < options.minutes < math.inf:
            raise InputError(f"--minutes: found {options.minutes}, expected more than 0")


def read_advice_command_line(arguments: Sequence[str] | None = None) -> AdviceSettings:
    """The command line's settings; with --path, the checkpoint's settings are the defaults.

    Raises:
        InputError: as `read_settings`, or an unreadable checkpoint.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    pre_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    pre_parser.add_argument("--path", default="")
    try:
        path = pre_parser.parse_known_args(arguments)[0].path
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if not path:
        return read_settings(AdviceSettings, arguments)
    config = checkpoints.read(Path(path))["config"]
    known = {**config["model"], **config["run"]}  # a converted checkpoint has model settings but no run settings
    return read_settings(AdviceSettings, arguments, {key: known[key] for key in known if key != "config"})


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Show what is being measured and record the time it took."""
    started = time.monotonic()
    with progress_bar(desc=f"measuring {name}", bar_format="{desc} {elapsed}", disable=None, leave=False):
        yield
    seconds[name] = time.monotonic() - started


def advise(settings: AdviceSettings) -> None:
    """Measure, print a table and a command line, write advice.json and advice.png.

    Raises:
        InputError: incompatible settings, data or checkpoint, or too little data.
        RunError: a measurement failed, or nothing fits into memory.
    """
    folder = Path(settings.advice.advice_dir)
    with writable_folder(folder, "--advice-dir"):
        findings = _run_measurements(settings)
        write_json(findings, folder / JSON_FILE)
        plot(findings, folder / PLOT_FILE)
    print_findings(findings, folder)


def _run_measurements(settings: AdviceSettings) -> Findings:
    device = choose_device(settings.run.device)
    check_measurable(device)
    tokens = load(settings.data.data, "train")
    held_out = load_optional_split(settings.data.data, settings.data.valid_subset) or tokens
    if settings.model.has_mem_len and len(held_out) < MIN_HELD_OUT:
        raise InputError(
            f"DATA: found {len(held_out)} tokens to validate on, expected at least {MIN_HELD_OUT} to measure with"
        )
    settings, parameters = _resolve_model_sizes(settings, tokens)
    options, data = settings.advice, settings.data
    plan = make_plan(options.minutes, parameters, device.type, len(tokens), data.tokens_per_sample, data.batch_size)
    limit = options.memory_limit * GIB or default_memory_limit(device)
    seconds: dict[str, float] = {}
    with _timed(seconds, "weights"):
        start = (
            from_checkpoint(Path(options.path), tokens)
            if options.path
            else train_from_scratch(settings, tokens, device, plan)
        )
    context: list[ContextPoint] = []
    trained = settings.model
    if trained.has_mem_len:
        with _timed(seconds, "context"):
            context = measure_context(trained, start, held_out, device, plan, data.tokens_per_sample, data.reset_on)
        settings = dataclasses.replace(settings, model=trained.replace(mem_len=effective_context(context)))
    with _timed(seconds, "bias"):
        model = settings.model.build().to(device)
        start.load_into(model)
        bias = measure_bias(model, tokens, device, plan, data.reset_on, settings.run.seed)
    with _timed(seconds, "memory"):
        quadratic = trained.has_mem_len and bool(
            fused_unsupported_reason(trained.op, device, torch.float32, trained.op_size)
        )
        memory = measure_memory(settings, device, plan, limit, quadratic)
    with _timed(seconds, "speed"):
        speed = grid_search(
            plan,
            lambda bptt, batch_size: memory.model.peak(bptt, batch_size) <= limit,
            lambda bptt, batch_size: measure_speed(settings, tokens, device, bptt, batch_size),
        )
    if not speed:
        raise RunError(f"--memory-limit: no update of any size fits into {limit / GIB:.2f} GiB: raise the limit")
    with _timed(seconds, "stability"):
        stability = measure_stability(settings, tokens, device, plan, start)
    recommendation = recommend(options.tolerance, bias, stability, speed, memory, context)
    return Findings(
        arch=settings.arch,
        parameters=parameters,
        data=data.data,
        device=str(device),
        threads=torch.get_num_threads(),
        seed=settings.run.seed,
        weights=start.source,
        tolerance=options.tolerance,
        context=context,
        bias=bias,
        memory=memory,
        speed=speed,
        stability=stability,
        recommendation=recommendation,
        command=command_line(settings, recommendation, {entry.name for entry in dataclasses.fields(options)}),
        seconds=seconds,
    )


def _resolve_model_sizes(settings: AdviceSettings, tokens: IndexedTokens) -> tuple[AdviceSettings, int]:
    """The settings with vocab_size taken from the data and, if mem_len is 0, mem_len set to tokens_per_sample; and the
    number of parameters."""
    model = settings.model.replace(vocab_size=settings.model.vocab_size or len(tokens.vocabulary))
    if model.has_mem_len:
        model = model.replace(mem_len=model.memory_length or settings.data.tokens_per_sample)
    with torch.device("meta"):
        parameters = model.build().num_parameters()
    return dataclasses.replace(settings, model=model), parameters


if __name__ == "__main__":
    run_with_parser("python -m pytbptt.advise", read_advice_command_line, advise)
