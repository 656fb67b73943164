"""Optional dependencies of the command-line programs (extra [cli])."""

import importlib
from typing import TYPE_CHECKING, Any

from pytbptt.errors import InputError

__all__ = ["FlagCreatePairsOff", "Positional", "import_extra", "progress_bar"]


def import_extra(module: str) -> Any:
    """Import a module that the extra [cli] installs.

    Raises:
        InputError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name != package:
            raise
        raise InputError(f"package {package} is not installed: pip install 'pytbptt[cli]'") from None


class _NullProgressBar:
    """Replaces tqdm where it is not installed: accepts every call and shows nothing."""

    def __init__(self, **_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> "_NullProgressBar":
        return self

    def __exit__(self, *_: object) -> None: ...


if TYPE_CHECKING:
    from tqdm import tqdm as progress_bar
    from tyro.conf import FlagCreatePairsOff, Positional
else:
    try:
        from tqdm import tqdm as progress_bar
    except ModuleNotFoundError:
        progress_bar = _NullProgressBar
    try:
        from tyro.conf import FlagCreatePairsOff, Positional
    except ModuleNotFoundError:  # only the command line parser uses them, and that requires tyro

        class Positional:
            def __class_getitem__(cls, kind):
                return kind

        FlagCreatePairsOff = Positional
