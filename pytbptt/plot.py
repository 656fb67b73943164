"""Plot the curves of runs: python -m pytbptt.plot RUN [RUN ...] [--output FILE]"""

from dataclasses import dataclass
from pathlib import Path

from pytbptt.errors import InputError
from pytbptt.runtime.cli import run
from pytbptt.runtime.extras import Positional
from pytbptt.training.plotting import CURVES_FILE, plot_runs


@dataclass
class PlotSettings:
    runs: Positional[tuple[str, ...]] = ("runs/python-stdlib",)
    """Directories of runs (their --save-dir)."""
    output: str = CURVES_FILE
    """Path of the PNG to write."""


def plot(settings: PlotSettings) -> None:
    """Plot the curves and print the path of the PNG."""
    if Path(settings.output).is_dir():
        raise InputError(f"--output: {settings.output}: found a folder, expected a file's name")
    plot_runs([Path(folder) for folder in settings.runs], Path(settings.output))
    print(settings.output)


if __name__ == "__main__":
    run("python -m pytbptt.plot", PlotSettings, plot, __doc__)
