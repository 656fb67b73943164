"""Settings and trainers of small models on the CPU."""

from pathlib import Path

import torch

from pytbptt.data import load
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import TrainSettings, read_command_line
from pytbptt.training.trainer import Trainer

SIZE_FLAGS = {
    "awd_lstm": "--d-embed 12 --d-hidden 16 --n-layer 2".split(),
    "transformer_xl": "--d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9".split(),
}
NO_DROPOUT_FLAGS = {
    "awd_lstm": "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --weight-drop 0".split(),
    "transformer_xl": [],
}
DROPOUT_AND_CUTOFF_FLAGS = {
    "awd_lstm": "--dropout 0.3 --dropouth 0.2 --dropouti 0.3 --dropoute 0.2 --weight-drop 0.4 --cutoffs 8 20".split(),
    "transformer_xl": "--dropout 0.2 --dropatt 0.2 --cutoffs 8 20 --div-val 2".split(),
}


def make_settings(corpus: str, save_dir: Path, arch: str, *flags: object) -> TrainSettings:
    """Settings without dropout; later flags override earlier ones."""
    common = ["--save-dir", save_dir, "--tokens-per-sample", 7, "--batch-size", 4, "--lr", "0.01", "--device", "cpu"]
    model = ["--arch", arch, *SIZE_FLAGS[arch], *NO_DROPOUT_FLAGS[arch]]
    arguments = [corpus, *model, *common, "--log-format", "json", *flags]
    return read_command_line([str(argument) for argument in arguments])


def make_trainer(settings: TrainSettings) -> Trainer:
    data = settings.data.data
    Path(settings.checkpoint.save_dir).mkdir(exist_ok=True)
    return Trainer(settings, load(data, "train"), load(data, "valid"), DistributedContext(0, 1, torch.device("cpu")))


def flat_weights(trainer: Trainer) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
