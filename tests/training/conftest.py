import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from pytbptt.training.config import read_command_line
from pytbptt.training.run import train
from tests.training.resumable import arguments


@pytest.fixture(scope="session")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of an architecture, with further flags perhaps, that nothing interrupted."""

    @functools.cache
    def run(arch: str, *more: str) -> Path:
        save_dir = tmp_path_factory.mktemp("alone") / arch
        train(read_command_line(arguments(corpus, arch, save_dir, *more)))
        return save_dir

    return run
