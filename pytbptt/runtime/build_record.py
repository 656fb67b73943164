"""The record that setup.py writes of the build, and the command to rebuild; does not import torch."""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pytbptt.errors import RunError

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class BuildRecord:
    """
    Attributes:
        why_no_extension, why_no_cuda: None if pytbptt._C, or pytbptt._cuda, was built.
    """

    why_no_extension: str | None
    why_no_cuda: str | None


def read_build_record() -> BuildRecord:
    """
    Raises:
        RunError: the file is damaged.
    """
    path = PACKAGE / "build.json"
    if not path.exists():
        reason = "it has not been built in this source tree"
        return BuildRecord(reason, reason)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return BuildRecord(record["why_no_extension"], record["why_no_cuda"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: found no record of a build; to build again: {build_command()}") from None


def build_command() -> str:
    """The command that rebuilds the extension from the package's source, against the installed torch."""
    source = f"--editable {PACKAGE.parent}" if (PACKAGE.parent / "setup.py").exists() else _install_source()
    return f"pip install --no-build-isolation --force-reinstall --no-deps {source}"


def _install_source() -> str:
    """The folder or URL that pip installed from, or else the version."""
    from pytbptt import __version__

    try:
        installed = distribution("pytbptt")
    except PackageNotFoundError:
        installed = None
    direct_url = None
    if installed is not None and Path(str(installed.locate_file("pytbptt"))) == PACKAGE:
        direct_url = installed.read_text("direct_url.json")  # pip's own record, PEP 610
    if direct_url is None:
        return f"--no-binary pytbptt pytbptt=={__version__}"
    record = json.loads(direct_url)
    vcs = record.get("vcs_info")
    return f"{vcs['vcs']}+{record['url']}@{vcs['commit_id']}" if vcs else str(record["url"])
