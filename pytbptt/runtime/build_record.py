"""What setup.py recorded of the build, and the command to build again; imports no torch."""

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
        why_no_extension, why_no_cuda: None where pytbptt._C, and pytbptt._cuda, were built.
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
        why = "it has not been built in this source tree"
        return BuildRecord(why, why)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return BuildRecord(record["why_no_extension"], record["why_no_cuda"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: found no record of a build; to build again: {build_command()}") from None


def build_command() -> str:
    """The command that builds the extension again, from what this package was installed from, against this torch."""
    source = f"--editable {PACKAGE.parent}" if (PACKAGE.parent / "setup.py").exists() else _installed_from()
    return f"pip install --no-build-isolation --force-reinstall --no-deps {source}"


def _installed_from() -> str:
    """The folder or URL that pip installed from, or else the version."""
    from pytbptt import __version__

    try:
        installed = distribution("pytbptt")
    except PackageNotFoundError:
        installed = None
    given = None
    if installed is not None and Path(str(installed.locate_file("pytbptt"))) == PACKAGE:
        given = installed.read_text("direct_url.json")  # pip's own record, PEP 610
    if given is None:
        return f"--no-binary pytbptt pytbptt=={__version__}"
    record = json.loads(given)
    vcs = record.get("vcs_info")
    return f"{vcs['vcs']}+{record['url']}@{vcs['commit_id']}" if vcs else str(record["url"])
