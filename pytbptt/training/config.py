"""The trainer's settings: dataclasses whose field docstrings are the command line's help."""

import argparse
import dataclasses
import json
import math
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pytbptt.errors import InputError
from pytbptt.nn.architectures import ARCHITECTURES, DEFAULT_ARCHITECTURE, Architecture
from pytbptt.nn.language_model import ModelConfig
from pytbptt.runtime.cli import FairseqSettings, as_type, flags, parse, refuse_unknown
from pytbptt.runtime.extras import FlagCreatePairsOff, Positional, import_extra

BUILT_IN_CORPUS = "python-stdlib"
UPDATES = 200_000
"""Updates of a run whose length nobody has said."""
LISTS = ("--adam-betas", "--cutoffs")
PATHS = "surrogateescape"
"""How config.toml holds the bytes of a path that are not UTF-8: as they are."""
PRESETS = Path(__file__).parent / "presets"


@dataclass
class DataSettings:
    data: Positional[str] = BUILT_IN_CORPUS
    """Directory that `python -m pytbptt.prepare` or fairseq-preprocess wrote, or the built-in python-stdlib."""
    tokens_per_sample: int = 150
    """bptt: tokens of every stream that one forward pass sees and gradients flow through."""
    batch_size: int = 15
    """Streams per process and accumulation group."""
    update_freq: int = 1
    """Accumulation groups, each of --batch-size further streams: N of them equal N processes."""
    bptt_variation: Literal["none", "awd"] = "none"
    """awd: draw every chunk's length as AWD-LSTM does and scale the learning rate by it."""
    reset_on: str = "auto"
    """Forget memory at: document, none, or after a token, such as </s>; auto: document where the data has them."""
    valid_subset: str = "valid"
    """The split to validate on."""
    rotate: bool = False
    """Start every stream at another place in every epoch."""


@dataclass
class TruncationSettings:
    bptt_backward: int = 0
    """k2: gradients flow back through so many tokens, of which an update scores the last --tokens-per-sample (k1); 0:
    through those alone."""
    bptt_chunks: int = 1
    """Chunks that gradients flow through before memory is cut; one update for all of them."""
    bptt_adaptive: bool = False
    """Let k2 follow the measured bias of truncation (Aicher et al. 2019), up to --bptt-backward."""
    bptt_tolerance: float = 0.1
    """Relative bias of the gradient that --bptt-adaptive allows."""
    bptt_interval: int = 1000
    """Updates between two measurements of --bptt-adaptive."""


@dataclass
class OptimizationSettings:
    optimizer: Literal["adam", "adamw", "sgd", "asgd"] = "adam"
    """asgd: SGD that starts averaging its weights when validation stops improving (NT-ASGD, Merity et al. 2017)."""
    lr: float = 0.00025
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_scheduler: Literal["cosine", "linear", "inverse_sqrt", "constant", "one_cycle"] = "cosine"
    """Course of the learning rate after the warm-up, over --max-update updates."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises from 0."""
    clip_norm: float = 0.25
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    weight_decay: float = 0.0
    """L2 penalty; decoupled from the gradient with adamw."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.0
    """Momentum of sgd."""
    nonmono: int = 5
    """asgd: validations without improvement before averaging begins."""
    fp16: bool = False
    """Mixed precision in float16 with loss scaling; needs a GPU, trains in float32 without one."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    ddp_comm_hook: Literal["none", "fp16", "bf16"] = "none"
    """Round gradients to 16 bits where processes exchange them, which halves what is sent; none: send them as they
    are."""


@dataclass
class RunSettings:
    max_update: int = 0
    """Updates to make; the schedule's length. 0: as many as --max-epoch takes, and 200,000 without it."""
    max_epoch: int = 0
    """Stop after this many passes over the data; 0: as many as --max-update takes."""
    max_minutes: float = 0.0
    """Stop after this many minutes of wall time; 0: no limit. A run stopped so is not repeatable."""
    patience: int = 0
    """Stop after this many validations without improvement; 0: never."""
    seed: int = 1
    """Seed of weights, dropout, drawn lengths and rotation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU, launch an update as one CUDA graph; auto: where every update has the same shapes and one process makes
    it. The last, shorter chunk of an epoch is launched kernel by kernel."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run (on a GPU; the CPU always does)."""
    validate_interval_updates: int = 0
    """Validate after so many updates; 0: at the end of every epoch. The end of the run always validates."""
    batch_size_valid: int = 0
    """Streams of a validation, over all processes; 0: as many as in training."""
    warm_up_valid: int = -1
    """Tokens that every stream of a validation reads, unscored, before its own; -1: as many as eval, whose number it is
    then; 0: none, which is quicker, and says less of a small split."""
    sample_tokens: int = 0
    """Tokens to generate when the run has ended."""
    test: bool = False
    """Score the test split with the best weights when the run has ended."""


@dataclass
class CheckpointSettings:
    save_dir: str = "checkpoints"
    """Where checkpoints, metrics.jsonl, config.toml and the curves go; a run there is carried on."""
    finetune_from_model: str = ""
    """Begin a new run with the weights of this checkpoint, of a run or converted: with these data, this schedule and
    optimizer. A run that --save-dir already holds goes on instead."""
    restart: bool = False
    """Begin anew although --save-dir holds a run: its files are replaced."""
    save_interval_updates: int = 1000
    """Save checkpoint_last.pt after so many updates, besides after every validation; 0: only then."""
    save_interval_minutes: float = 0.0
    """Save it whenever so many minutes have passed as well; 0: not by the clock."""
    keep_last: int = 1
    """Former last checkpoints to keep, as checkpoint_UPDATE.pt."""
    reset_streams: bool = False
    """If the run in --save-dir had other streams (their number, data, chunk lengths or order), go on with its weights
    and optimizer, and begin the streams afresh; otherwise it is refused."""


@dataclass
class LoggingSettings:
    log_format: Literal["tqdm", "json", "simple"] = "tqdm"
    """tqdm: a progress bar; json: one object a line, as fairseq's; simple: plain lines."""
    log_interval: int = 25
    """Updates between two entries of the log and of metrics.jsonl."""
    tensorboard_logdir: str = ""
    """Also write TensorBoard events here (needs the tensorboard package)."""


@dataclass
class DistributedSettings:
    distributed_world_size: int = 0
    """Processes; 0: one for each GPU that can be seen, or those that torchrun has started."""


@dataclass
class FairseqTrainSettings(FairseqSettings):
    """Flags of fairseq-train that say what is always so here."""

    criterion: Literal["cross_entropy", "adaptive_loss"] = "cross_entropy"
    """Accepted from fairseq's commands: the model's own softmax says which."""
    sample_break_mode: Literal["none"] = "none"
    """Accepted from fairseq's commands: streams are never broken."""
    ddp_backend: Literal["c10d", "pytorch_ddp", "no_c10d", "legacy_ddp"] = "pytorch_ddp"
    """Accepted from fairseq's commands: gradients travel by DistributedDataParallel."""
    num_workers: int = 1
    """Accepted from fairseq's commands: a thread reads ahead, whatever it says."""
    no_progress_bar: FlagCreatePairsOff[bool] = False
    """Plain lines for a progress bar, as --log-format simple."""
    no_epoch_checkpoints: FlagCreatePairsOff[bool] = False
    """Accepted from fairseq's commands: epochs have no checkpoints of their own."""
    skip_invalid_size_inputs_valid_test: FlagCreatePairsOff[bool] = False
    """Accepted from fairseq's commands: no size is invalid."""


@dataclass
class TrainSettings:
    program: ClassVar[str] = "python -m pytbptt.train"
    description: ClassVar[str] = (
        "Train a language model with truncated backpropagation through time, or carry on what --save-dir holds. "
        f"Without DATA: on the built-in corpus {BUILT_IN_CORPUS}, with the preset of that name."
    )

    preset: str = ""
    """Settings by name: python-stdlib, python-stdlib-xl, wt103-base, wt103-large, enwik8-base, awd-lstm-ptb,
    awd-lstm-wt2."""
    config: str = ""
    """Settings from a TOML file: keys are the flags' names, one of them may be preset; flags go before it."""
    arch: Architecture = DEFAULT_ARCHITECTURE
    """The model, some settings of which are its own: --arch NAME --help shows that one's."""
    data: DataSettings = field(default_factory=DataSettings)
    truncation: TruncationSettings = field(default_factory=TruncationSettings)
    model: ModelConfig = field(default_factory=ARCHITECTURES[DEFAULT_ARCHITECTURE])
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    fairseq: FairseqTrainSettings = field(default_factory=FairseqTrainSettings)

    def check(self) -> None:
        """Raise InputError, by the flag's name, for a value outside its range."""
        least = {
            "tokens_per_sample": 1,
            "batch_size": 1,
            "update_freq": 1,
            "bptt_backward": 0,
            "bptt_chunks": 1,
            "bptt_tolerance": 0,
            "bptt_interval": 1,
            "warmup_updates": 0,
            "nonmono": 1,
            "max_update": 0,
            "distributed_world_size": 0,
            "batch_size_valid": 0,
            "warm_up_valid": -1,
            "validate_interval_updates": 0,
            "save_interval_updates": 0,
            "log_interval": 1,
            "lr": 0,
            "min_lr": 0,
            "clip_norm": 0,
            "weight_decay": 0,
            "momentum": 0,
            "adam_eps": 0,
            "max_epoch": 0,
            "max_minutes": 0,
            "save_interval_minutes": 0,
            "keep_last": 0,
            "patience": 0,
            "sample_tokens": 0,
            "seed": 0,
        }
        values = flatten(self)
        for name, bound in least.items():
            if not bound <= values[name] < math.inf:  # NaN is not, either
                raise InputError(f"--{name.replace('_', '-')}: found {values[name]}, expected at least {bound}")
        new, backward = self.data.tokens_per_sample * self.truncation.bptt_chunks, self.truncation.bptt_backward
        if 0 < backward < new:
            raise InputError(
                f"--bptt-backward: found {backward}, expected at least the {new} tokens of an update, or 0"
            )
        if self.truncation.bptt_adaptive and backward <= new:
            raise InputError(
                f"--bptt-adaptive: found --bptt-backward {backward}, expected the longest that fits into memory, more "
                f"than the {new} tokens of an update"
            )
        if self.run.seed >= 1 << 63:
            raise InputError(f"--seed: found {self.run.seed}, expected less than 2**63")
        if not all(0 <= beta < 1 for beta in self.optimization.adam_betas):
            raise InputError(
                f"--adam-betas: found {self.optimization.adam_betas}, expected each at least 0 and below 1"
            )
        if self.optimization.fp16 and self.optimization.bf16:
            raise InputError("--fp16 and --bf16: found both, expected one")


Settings = TypeVar("Settings", bound=TrainSettings)


def read_command_line(arguments: Sequence[str] | None = None) -> TrainSettings:
    """The settings of `python -m pytbptt.train`: defaults, then preset, then config file, then flags.

    On the built-in corpus, which no data argument means, the preset of the architecture applies unless another or a
    config is named.

    Raises:
        InputError: unknown flags, keys or presets (naming the nearest), or values that are none.
    """
    return read_settings(TrainSettings, arguments)


def read_settings(
    kind: type[Settings], arguments: Sequence[str] | None = None, base: Mapping[str, Any] | None = None
) -> Settings:
    """`read_command_line` for a program that takes training's flags and more.

    Args:
        kind: the program's settings.
        arguments: the command line; default sys.argv[1:].
        base: settings by name, as `flatten` gives them, in place of preset and config file.
    """
    arguments = _spread(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--arch"):
        first.add_argument(name, default="")
    try:
        named, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if base is not None:
        return _read(kind, arguments, base, "", "", named.arch)
    if named.preset or named.config or {"-h", "--help"} & set(arguments):
        return _read(kind, arguments, {}, named.preset, named.config, named.arch)
    mistake = None
    try:
        settings = _read(kind, arguments, {}, built_in_preset(named.arch), "", named.arch)
        if settings.data.data == BUILT_IN_CORPUS:
            return settings
    except InputError as error:  # a mistake, or a flag of the other architecture beside a data argument
        mistake = error
    try:
        settings = _read(kind, arguments, {}, "", "", named.arch)
    except InputError as error:
        raise mistake or error from None
    if settings.data.data == BUILT_IN_CORPUS and mistake is not None:
        raise mistake
    return settings


def built_in_preset(arch: str) -> str:
    """The preset for the built-in corpus that is of an architecture, or else the one of the corpus's name."""
    names = sorted(path.stem for path in PRESETS.glob(f"{BUILT_IN_CORPUS}*.toml"))
    return next((name for name in names if _read_preset(name)["arch"] == arch), BUILT_IN_CORPUS)


def _spread(arguments: Sequence[str]) -> list[str]:
    """A list that stands in one word, as fairseq takes it ('(0.9, 0.98)' or 20,30), in one word for each element."""
    spread: list[str] = []
    for before, word in zip([None, *arguments], arguments, strict=False):
        is_list = before in LISTS and re.fullmatch(r"[\[(]?[^()\[\],]+(,[^()\[\],]+)*,?[\])]?", word)
        spread += re.findall(r"[^()\[\],\s]+", word) if is_list else [word]
    return spread


def _read(
    kind: type[Settings], arguments: Sequence[str], base: Mapping[str, Any], preset: str, config: str, arch: str
) -> Settings:
    values = {**base, **(_read_toml(Path(config)) if config else {})}
    preset = preset or str(values.pop("preset", ""))
    values = {**(_read_preset(preset) if preset else {}), **values}
    source = config or f"--preset {preset}"
    chosen = arch or values.get("arch", DEFAULT_ARCHITECTURE)
    if not isinstance(chosen, str) or chosen not in ARCHITECTURES:
        where = "--arch" if arch else f"{source}: arch"
        raise InputError(f"{where}: found {chosen}, expected one of {', '.join(ARCHITECTURES)}")
    defaults = {name: kind(model=make()) for name, make in ARCHITECTURES.items()}
    # What a file says of the model is read for every architecture: it is a known key, even if --arch names another.
    unknown = [
        key for key in values if not any([_set(settings, key, values, source) for settings in defaults.values()])
    ]
    refuse_unknown(unknown, [flag[2:] for settings in defaults.values() for flag in flags(settings)], f"{source}: ")
    if values.get("arch", chosen) != chosen:
        defaults[chosen].model = ARCHITECTURES[chosen]()
    defaults[chosen].arch = chosen
    defaults[chosen].preset = preset
    settings = parse(kind.program, kind, arguments, defaults[chosen], kind.description)
    settings.check()
    if settings.fairseq.no_progress_bar and settings.logging.log_format == "tqdm":
        settings.logging.log_format = "simple"
    return settings


def _set(settings: Any, key: str, values: Mapping[str, Any], source: str) -> bool:
    """Set the field that is called `key` in a dataclass or one within it, if there is such a field."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            if _set(value, key, values, source):
                return True
        elif entry.name == key.replace("-", "_") and key != "config":
            kind = typing.get_type_hints(type(settings))[entry.name]
            setattr(settings, entry.name, as_type(kind, values[key], f"{source}: {key}"))
            return True
    return False


def to_toml(settings: TrainSettings) -> bytes:
    """Every setting as a line of TOML, in the form that --config reads."""
    flat = flatten(settings)
    for name in ("config", "preset", "restart", "reset_streams"):
        flat.pop(name)
    # JSON's scalars and lists are TOML's as well, if no character is written as two surrogates.
    values = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in flat.items()}
    lines = "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in values.items())
    return lines.encode("utf-8", PATHS)


def flatten(settings: Any) -> dict[str, Any]:
    """Every setting by its flag's name (with underscores), nested dataclasses included."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {entry.name: value})
    return flat


def _read_preset(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        there = sorted(p.stem for p in PRESETS.glob("*.toml"))
        refuse_unknown([name], there, source="--preset ")
    return _read_toml(path)


def _read_toml(path: Path) -> dict[str, Any]:
    tomllib = import_extra("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8", PATHS))
    except OSError as error:
        raise InputError(f"--config: {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config: {path}: not TOML: {error}") from None
    return {key.replace("_", "-"): value for key, value in values.items()}
