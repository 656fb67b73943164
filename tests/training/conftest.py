import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from pytbptt.training.config import read_command_line
from pytbptt.training.run import train
from tests.common.resume_runs import train_arguments


@pytest.fixture(scope="session")
def uninterrupted_run(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains an architecture, with additional flags, without interruption, once per session; returns the folder."""

    @functools.cache
    def run(arch: str, *flags: str) -> Path:
        save_dir = tmp_path_factory.mktemp("uninterrupted") / arch
        train(read_command_line(train_arguments(corpus, arch, save_dir, *flags)))
        return save_dir

    return run
