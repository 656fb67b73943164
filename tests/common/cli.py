"""The type of conftest.py's fixture run_cli."""

import subprocess
from collections.abc import Callable

RunCli = Callable[..., subprocess.CompletedProcess[str]]
