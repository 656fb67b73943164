"""What `python -m pytbptt.advise` does: measure one thing after another, report, recommend."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pytbptt.data import IndexedTokens, load
from pytbptt.errors import InputError, RunError
from pytbptt.nn import TransformerXLConfig
from pytbptt.ops.dispatch import why_not_fused
from pytbptt.runtime.atomic import folder_to_write
from pytbptt.runtime.distributed import choose_device
from pytbptt.runtime.extras import progress_bar
from pytbptt.training.run import split_if_there
from pytbptt.tuning.bias import measure_bias
from pytbptt.tuning.context import FEWEST_HELD_OUT, ContextPoint, effective_context, measure_context
from pytbptt.tuning.gain import Curve, train_each
from pytbptt.tuning.memory import GIB, available, check_measurable, measure_memory
from pytbptt.tuning.picture import draw
from pytbptt.tuning.plan import Plan, make_plan
from pytbptt.tuning.recommendation import recommend, settle
from pytbptt.tuning.report import JSON, PICTURE, Findings, command_line, print_findings, write_json
from pytbptt.tuning.settings import AdviceSettings
from pytbptt.tuning.speed import SpeedPoint, measure_point, survey
from pytbptt.tuning.stability import measure_stability
from pytbptt.tuning.weights import from_checkpoint, from_training

SHARES = {"weights": 25, "context": 5, "bias": 15, "memory": 20, "speed": 20, "stability": 15}
"""Of the whole time, in percent, about."""
BPTTS_TO_TRAIN = 4


class Progress:
    """A bar over all measurements, and the seconds that each took."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.shares, self.seconds = shares, dict.fromkeys(shares, 0.0)
        self.bar = progress_bar(
            total=sum(shares.values()), disable=None, bar_format="{desc:<10}{bar}| {percentage:3.0f}% {elapsed}"
        )

    @contextmanager
    def measuring(self, name: str) -> Iterator[Callable[[float], None]]:
        """While `name` is measured; gives what to call with the share of it that is done since the last call."""
        begun, end, started = self.bar.n, self.bar.n + self.shares[name], time.monotonic()
        self.bar.set_description_str(name)

        def advance(share: float) -> None:
            self.bar.update(min(end - self.bar.n, share * (end - begun)))

        yield advance
        self.bar.update(end - self.bar.n)
        self.seconds[name] = time.monotonic() - started


def advise(settings: AdviceSettings) -> None:
    """Measure, print a table and a command line, write advice.json and advice.png.

    Raises:
        InputError: settings, data or checkpoint that do not fit together; too little data.
        RunError: what was to be measured failed.
    """
    folder = Path(settings.advice.advice_dir)
    with folder_to_write(folder, "--advice-dir"):
        findings = _find(settings)
        write_json(findings, folder / JSON)
        draw(findings, folder / PICTURE)
    print_findings(findings, folder)


def _find(settings: AdviceSettings) -> Findings:
    device = choose_device(settings.run.device)
    check_measurable(device)
    tokens = load(settings.data.data, "train")
    held_out = split_if_there(settings.data.data, settings.data.valid_subset) or tokens
    if isinstance(settings.model, TransformerXLConfig) and len(held_out) < FEWEST_HELD_OUT:
        raise InputError(
            f"DATA: found {len(held_out)} tokens to validate on, expected at least {FEWEST_HELD_OUT} to measure with"
        )
    settings, parameters = _with_sizes(settings, tokens)
    options, data = settings.advice, settings.data
    plan = make_plan(options.minutes, parameters, device.type, len(tokens), data.tokens_per_sample, data.batch_size)
    limit = options.memory_limit * GIB or available(device)
    shares = {name: float(share) for name, share in SHARES.items()}
    if options.train_minutes:
        shares["training"] = BPTTS_TO_TRAIN * options.train_minutes / options.minutes * 100
    progress = Progress(shares)

    with progress.measuring("weights"):
        start = (
            from_checkpoint(Path(options.path), tokens)
            if options.path
            else from_training(settings, tokens, device, plan)
        )
    context: list[ContextPoint] = []
    trained = settings.model
    if isinstance(trained, TransformerXLConfig):
        with progress.measuring("context") as step:
            context = measure_context(
                trained, start, held_out, device, plan, data.tokens_per_sample, data.reset_on, step
            )
        settings = dataclasses.replace(settings, model=dataclasses.replace(trained, mem_len=effective_context(context)))
    with progress.measuring("bias"):
        model = settings.model.build().to(device)
        start.into(model)
        bias = measure_bias(model, tokens, device, plan, data.reset_on, settings.run.seed)
    with progress.measuring("memory") as step:
        quadratic = isinstance(trained, TransformerXLConfig) and bool(
            why_not_fused("rel_attention", device, torch.float32, trained.d_head)
        )
        memory = measure_memory(settings, device, plan, len(tokens), limit, quadratic, step)
    with progress.measuring("speed") as step:
        points = len(plan.bptts) * len(plan.batch_sizes) / 2

        def measured(bptt: int, batch_size: int) -> SpeedPoint:
            step(1 / points)
            return measure_point(settings, tokens, device, bptt, batch_size)

        speed = survey(plan, lambda bptt, batch_size: memory.model.peak(bptt, batch_size) <= limit, measured)
    if not speed:
        raise RunError(f"--memory-limit: found room for no update of any size in {limit / GIB:.2f} GiB: raise it")
    with progress.measuring("stability") as step:
        stability = measure_stability(settings, tokens, device, plan, start, step)
    recommendation = recommend(options.tolerance, bias, stability, speed, memory, context)
    curves: list[Curve] = []
    if options.train_minutes:
        with progress.measuring("training") as step:
            curves = train_each(
                settings,
                tokens,
                held_out,
                device,
                start,
                _bptts_to_train(plan, recommendation.tokens_per_sample),
                recommendation.tokens_per_sample * recommendation.batch_size,
                options.train_minutes,
                step,
            )
        recommendation = settle(recommendation, curves)
    progress.bar.close()
    return Findings(
        arch=settings.arch,
        parameters=parameters,
        data=data.data,
        device=str(device),
        threads=torch.get_num_threads(),
        seed=settings.run.seed,
        weights=start.origin,
        tolerance=options.tolerance,
        context=context,
        bias=bias,
        memory=memory,
        speed=speed,
        stability=stability,
        curves=curves,
        recommendation=recommendation,
        command=command_line(settings, recommendation),
        seconds=progress.seconds,
    )


def _with_sizes(settings: AdviceSettings, tokens: IndexedTokens) -> tuple[AdviceSettings, int]:
    """The settings with the data's vocabulary and, for a Transformer-XL without memory, one of a chunk's length; and
    how many weights the model has."""
    model = dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or len(tokens.vocabulary))
    if isinstance(model, TransformerXLConfig):
        model = dataclasses.replace(model, mem_len=model.mem_len or settings.data.tokens_per_sample)
    with torch.device("meta"):
        parameters = model.build().num_parameters()
    return dataclasses.replace(settings, model=model), parameters


def _bptts_to_train(plan: Plan, recommended: int) -> list[int]:
    """The one recommended, a quarter and four times of it, the plan's longest: BPTTS_TO_TRAIN at most."""
    shortest, longest = plan.bptts[0], plan.bptts[-1]
    around = [recommended, max(shortest, recommended // 4), min(longest, recommended * 4), longest, shortest]
    return sorted(list(dict.fromkeys(around))[:BPTTS_TO_TRAIN])
