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
from pytbptt.runtime.cli import FairseqSettings, as_type, flag_names, parse, reject_unknown
from pytbptt.runtime.extras import FlagCreatePairsOff, Positional, import_extra

BUILT_IN_CORPUS = "python-stdlib"
DEFAULT_MAX_UPDATE = 200_000
"""Length of a run if neither --max-update nor --max-epoch is given."""
LIST_FLAGS = ("--adam-betas", "--cutoffs")
PATH_ERRORS = "surrogateescape"
"""How config.toml encodes paths: bytes that are not UTF-8 stay as they are."""
PRESETS = Path(__file__).parent / "presets"


@dataclass
class DataSettings:
    data: Positional[str] = BUILT_IN_CORPUS
    """Directory written by python -m pytbptt.prepare or fairseq-preprocess, or python-stdlib, the built-in corpus."""
    tokens_per_sample: int = 150
    """Chunk length (bptt): tokens of every stream in one forward pass, through which gradients flow."""
    batch_size: int = 15
    """Streams per process and accumulation group."""
    update_freq: int = 1
    """Accumulation groups per update, each with its own --batch-size streams: N groups equal N processes."""
    bptt_variation: Literal["none", "awd"] = "none"
    """awd: draw the length of every chunk at random and scale the learning rate by it, as AWD-LSTM does."""
    reset_on: str = "auto"
    """Where to reset memory: none, document, or a token such as </s> (after each one); auto: document if the data has
    documents."""
    valid_subset: str = "valid"
    """The split to validate on."""
    rotate: bool = False
    """Start every stream at another position in every epoch."""


@dataclass
class TruncationSettings:
    bptt_backward: int = 0
    """k2: tokens that gradients flow back through, of which an update scores the last k1 (--tokens-per-sample times
    --bptt-chunks); 0: k2 equals k1."""
    bptt_chunks: int = 1
    """Chunks in one update; gradients flow through all of them before memory is detached."""
    bptt_adaptive: bool = False
    """Choose k2, up to --bptt-backward, from the measured bias of truncation (Aicher et al. 2019)."""
    bptt_tolerance: float = 0.1
    """Relative bias of the gradient that --bptt-adaptive allows."""
    bptt_interval: int = 1000
    """Updates between two measurements for --bptt-adaptive."""


@dataclass
class OptimizationSettings:
    optimizer: Literal["adam", "adamw", "sgd", "asgd"] = "adam"
    """asgd: SGD that averages its weights once validation stops improving (NT-ASGD, Merity et al. 2017)."""
    lr: float = 0.00025
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_scheduler: Literal["cosine", "linear", "inverse_sqrt", "constant", "one_cycle"] = "cosine"
    """Learning rate schedule after the warm-up, over --max-update updates."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises from 0; 0: none, except one_cycle: a quarter of the run."""
    clip_norm: float = 0.25
    """Clip the gradient to this norm, over all parameters; 0: no clipping."""
    weight_decay: float = 0.0
    """L2 penalty; with adamw, decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.0
    """Momentum of sgd and asgd."""
    nonmono: int = 5
    """asgd: validations without improvement before averaging starts."""
    fp16: bool = False
    """Mixed precision in float16 with loss scaling; float32 without a GPU."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    ddp_comm_hook: Literal["none", "fp16", "bf16"] = "none"
    """Round gradients to 16 bits for the exchange between processes, which halves the traffic; none: send float32."""


@dataclass
class RunSettings:
    max_update: int = 0
    """Number of updates, and length of the learning rate schedule; 0: as many as --max-epoch needs, or 200,000."""
    max_epoch: int = 0
    """Stop after this many passes over the data; 0: no limit."""
    max_minutes: float = 0.0
    """Stop after this many minutes of wall time, at a different update in every run; 0: no limit."""
    patience: int = 0
    """Stop after this many validations without improvement; 0: never."""
    seed: int = 1
    """Seed of initial weights, dropout, --bptt-variation and --rotate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Launch an update as one CUDA graph (on a GPU); auto: if there is one process and all updates have the same
    shapes. The last, shorter chunk of an epoch is never captured."""
    deterministic: bool = False
    """Use only deterministic algorithms on a GPU; on the CPU all are."""
    validate_interval_updates: int = 0
    """Validate every N updates; 0: at the end of every epoch. A run always validates at its end."""
    batch_size_valid: int = 0
    """Streams for validation, over all processes; 0: as many as for training."""
    warm_up_valid: int = -1
    """Tokens that every validation stream reads before the first one that is scored; -1: as many as pytbptt.eval, which
    gives its exact loss; 0: none, which is faster but worse for small splits."""
    sample_tokens: int = 0
    """Tokens to generate at the end of the run; 0: none."""
    test: bool = False
    """Score the test split with the best weights at the end of the run."""


@dataclass
class CheckpointSettings:
    save_dir: str = "checkpoints"
    """Folder for checkpoints, metrics.jsonl, config.toml, results.json and curves.png; if it holds a run, that run is
    resumed."""
    finetune_from_model: str = ""
    """Start a new run from the weights of this checkpoint, whether trained or converted; empty: from random weights.
    Has no effect if --save-dir already holds a run."""
    restart: bool = False
    """Start from scratch even if --save-dir holds a run: its files are replaced."""
    save_interval_updates: int = 1000
    """Save checkpoint_last.pt every N updates, besides after every validation; 0: only after validations."""
    save_interval_minutes: float = 0.0
    """Save checkpoint_last.pt every N minutes as well; 0: not by time."""
    keep_last: int = 1
    """Earlier versions of checkpoint_last.pt to keep, as checkpoint_UPDATE.pt."""
    reset_streams: bool = False
    """Resume a run whose streams differ (in number, data, chunk lengths or order): keep its weights and optimizer, but
    start the streams from their beginning."""


@dataclass
class LoggingSettings:
    log_format: Literal["tqdm", "json", "simple"] = "tqdm"
    """tqdm: a progress bar; json: one object per line, as in fairseq; simple: plain lines."""
    log_interval: int = 25
    """Log, and write an entry of metrics.jsonl, every N updates."""
    tensorboard_logdir: str = ""
    """Also write TensorBoard events to this directory (needs the tensorboard package); empty: none."""


@dataclass
class DistributedSettings:
    distributed_world_size: int = 0
    """Number of processes; 0: as many as torchrun started, or else one per visible GPU."""


@dataclass
class FairseqTrainSettings(FairseqSettings):
    """Flags of fairseq-train that ask for what pytbptt always does."""

    criterion: Literal["cross_entropy", "adaptive_loss"] = "cross_entropy"
    """Accepted for fairseq compatibility; the model decides between a plain and an adaptive softmax."""
    sample_break_mode: Literal["none"] = "none"
    """Accepted for fairseq compatibility; streams are never split into samples."""
    ddp_backend: Literal["c10d", "pytorch_ddp", "no_c10d", "legacy_ddp"] = "pytorch_ddp"
    """Accepted for fairseq compatibility; it is always DistributedDataParallel."""
    num_workers: int = 1
    """Accepted for fairseq compatibility; one thread always prefetches."""
    no_progress_bar: FlagCreatePairsOff[bool] = False
    """Print plain lines instead of a progress bar, as --log-format simple."""
    no_epoch_checkpoints: FlagCreatePairsOff[bool] = False
    """Accepted for fairseq compatibility; there are no checkpoints per epoch."""
    skip_invalid_size_inputs_valid_test: FlagCreatePairsOff[bool] = False
    """Accepted for fairseq compatibility; every size is valid."""


@dataclass
class TrainSettings:
    program: ClassVar[str] = "python -m pytbptt.train"
    description: ClassVar[str] = (
        "Train a language model with truncated backpropagation through time, or resume the run in --save-dir. "
        f"Without DATA, it trains on the built-in corpus {BUILT_IN_CORPUS} with the preset of that name."
    )

    preset: str = ""
    """Named settings: python-stdlib, python-stdlib-xl, wt103-base, wt103-large, enwik8-base, awd-lstm-ptb or
    awd-lstm-wt2; empty: none, except on the built-in corpus."""
    config: str = ""
    """TOML file whose keys are flags' names, preset among them; flags override it; empty: none."""
    arch: Architecture = DEFAULT_ARCHITECTURE
    """The model; --arch NAME --help lists the flags of that model."""
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
        """Raise InputError, naming the flag, for a value outside its range."""
        minimum = {
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
        for name, bound in minimum.items():
            if not bound <= values[name] < math.inf:  # false for NaN too
                raise InputError(f"--{name.replace('_', '-')}: found {values[name]}, expected at least {bound}")
        k1, k2 = self.data.tokens_per_sample * self.truncation.bptt_chunks, self.truncation.bptt_backward
        if 0 < k2 < k1:
            raise InputError(f"--bptt-backward: found {k2}, expected at least the {k1} tokens of an update, or 0")
        if self.truncation.bptt_adaptive and k2 <= k1:
            raise InputError(
                f"--bptt-adaptive: found --bptt-backward {k2}, expected more than the {k1} tokens of an update: "
                "the longest length that fits into memory"
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
    """The settings of `python -m pytbptt.train`: flags override the config file, which overrides the preset, which
    overrides the defaults.

    On the built-in corpus (the default), the preset for it and the architecture applies unless --preset or --config is
    given.

    Raises:
        InputError: unknown flags, keys or presets (names the nearest), or invalid values.
    """
    return read_settings(TrainSettings, arguments)


def read_settings(
    settings_type: type[Settings], arguments: Sequence[str] | None = None, base: Mapping[str, Any] | None = None
) -> Settings:
    """`read_command_line` for a program that has the flags of training and more.

    Args:
        settings_type: the class of the program's settings.
        arguments: the command line; default sys.argv[1:].
        base: settings by name, as `flatten` returns them, instead of preset and config file.
    """
    arguments = split_list_arguments(sys.argv[1:] if arguments is None else arguments)
    pre_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--arch"):
        pre_parser.add_argument(name, default="")
    try:
        named, _ = pre_parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if base is not None:
        return _merge_sources(settings_type, arguments, base, "", "", named.arch)
    if named.preset or named.config or {"-h", "--help"} & set(arguments):
        return _merge_sources(settings_type, arguments, {}, named.preset, named.config, named.arch)
    preset_error = None
    try:
        settings = _merge_sources(settings_type, arguments, {}, built_in_preset(named.arch), "", named.arch)
        if settings.data.data == BUILT_IN_CORPUS:
            return settings
    except InputError as error:  # an invalid flag, or, with a data argument, one that the preset's architecture lacks
        preset_error = error
    try:
        settings = _merge_sources(settings_type, arguments, {}, "", "", named.arch)
    except InputError as error:
        raise preset_error or error from None
    if settings.data.data == BUILT_IN_CORPUS and preset_error is not None:
        raise preset_error
    return settings


def built_in_preset(arch: str) -> str:
    """The preset for the built-in corpus and an architecture, or else the one with the corpus's name."""
    names = sorted(path.stem for path in PRESETS.glob(f"{BUILT_IN_CORPUS}*.toml"))
    return next((name for name in names if _read_preset(name)["arch"] == arch), BUILT_IN_CORPUS)


def split_list_arguments(arguments: Sequence[str]) -> list[str]:
    """Split a list given as one argument, as fairseq accepts it ('(0.9, 0.98)' or 20,30), into one per element."""
    split: list[str] = []
    for before, word in zip([None, *arguments], arguments, strict=False):
        is_list = before in LIST_FLAGS and re.fullmatch(r"[\[(]?[^()\[\],]+(,[^()\[\],]+)*,?[\])]?", word)
        split += re.findall(r"[^()\[\],\s]+", word) if is_list else [word]
    return split


def _merge_sources(
    settings_type: type[Settings],
    arguments: Sequence[str],
    base: Mapping[str, Any],
    preset: str,
    config: str,
    arch: str,
) -> Settings:
    """The settings of preset, `base`, config file and command line, where each overrides those before it."""
    values = {**base, **(_read_toml(Path(config)) if config else {})}
    preset = preset or str(values.pop("preset", ""))
    values = {**(_read_preset(preset) if preset else {}), **values}
    source = config or f"--preset {preset}"
    chosen = arch or values.get("arch", DEFAULT_ARCHITECTURE)
    if not isinstance(chosen, str) or chosen not in ARCHITECTURES:
        flag = "--arch" if arch else f"{source}: arch"
        raise InputError(f"{flag}: found {chosen}, expected one of {', '.join(ARCHITECTURES)}")
    defaults = {name: settings_type(model=make()) for name, make in ARCHITECTURES.items()}
    # A file's keys are valid if any architecture has them: --arch may choose another one than the file's.
    unknown = [
        key for key in values if not any([_set_field(settings, key, values, source) for settings in defaults.values()])
    ]
    reject_unknown(
        unknown, [flag[2:] for settings in defaults.values() for flag in flag_names(settings)], f"{source}: "
    )
    if values.get("arch", chosen) != chosen:
        defaults[chosen].model = ARCHITECTURES[chosen]()
    defaults[chosen].arch = chosen
    defaults[chosen].preset = preset
    settings = parse(settings_type.program, settings_type, arguments, defaults[chosen], settings_type.description)
    settings.check()
    if settings.fairseq.no_progress_bar and settings.logging.log_format == "tqdm":
        settings.logging.log_format = "simple"
    return settings


def _set_field(settings: Any, key: str, values: Mapping[str, Any], source: str) -> bool:
    """Set the field named `key` of a dataclass or one nested in it; False if there is no such field."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            if _set_field(value, key, values, source):
                return True
        elif entry.name == key.replace("-", "_") and key != "config":
            field_type = typing.get_type_hints(type(settings))[entry.name]
            setattr(settings, entry.name, as_type(field_type, values[key], f"{source}: {key}"))
            return True
    return False


def to_toml(settings: TrainSettings) -> bytes:
    """Every setting as a line of TOML, for --config."""
    flat = flatten(settings)
    for name in ("config", "preset", "restart", "reset_streams"):
        flat.pop(name)
    # JSON's scalars and lists are valid TOML, except for characters escaped as two surrogates.
    values = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in flat.items()}
    lines = "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in values.items())
    return lines.encode("utf-8", PATH_ERRORS)


def flatten(settings: Any) -> dict[str, Any]:
    """Every setting by its flag's name (with underscores), including those of nested dataclasses."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {entry.name: value})
    return flat


def _read_preset(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        presets = sorted(p.stem for p in PRESETS.glob("*.toml"))
        reject_unknown([name], presets, source="--preset ")
    return _read_toml(path)


def _read_toml(path: Path) -> dict[str, Any]:
    tomllib = import_extra("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8", PATH_ERRORS))
    except OSError as error:
        raise InputError(f"--config: {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config: {path}: not TOML: {error}") from None
    return {key.replace("_", "-"): value for key, value in values.items()}
