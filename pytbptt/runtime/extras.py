"""Packages that the programs need and the library does without: the extra [cli]."""

import importlib
from typing import TYPE_CHECKING, Any

from pytbptt.errors import InputError

__all__ = ["FlagCreatePairsOff", "Positional", "import_extra", "progress_bar"]


def import_extra(module: str) -> Any:
    """A module of a package in [cli].

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name != package:
            raise
        raise InputError(f"found no package {package}, expected it: pip install 'pytbptt[cli]'") from None


class _NoBar:
    """Stands in for tqdm where there is none: whatever it is asked, it shows nothing."""

    def __init__(self, **_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None: ...


if TYPE_CHECKING:
    from tqdm import tqdm as progress_bar
    from tyro.conf import FlagCreatePairsOff, Positional
else:
    try:
        from tqdm import tqdm as progress_bar
    except ModuleNotFoundError:
        progress_bar = _NoBar
    try:
        from tyro.conf import FlagCreatePairsOff, Positional
    except ModuleNotFoundError:  # they mean something to the command line alone, which asks for tyro then

        class Positional:
            def __class_getitem__(cls, kind):
                return kind

        FlagCreatePairsOff = Positional
