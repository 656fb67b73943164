"""For pytest on a GPU: python -m pytest -p tests.dead_gpu …

After an illegal access or a trap no test of the same process passes any more. This plugin then lets a new process go on
with the tests that are left, and the exit status say that something failed.
"""

import json
import os
import sys
from collections.abc import Generator

import pytest
import torch

RUN_BEFORE = "PYTBPTT_TESTS_RUN_BEFORE"  # in the environment, by a process that lost the GPU: its tests, as JSON
_run: list[str] = json.loads(os.environ.get(RUN_BEFORE, "[]"))
_failures: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = set(_run)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
    items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failures.append(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    result = yield
    _run.append(item.nodeid)
    error = _error()
    if error is not None:
        _failures.append(f"{item.nodeid} lost the GPU: {error}\n")
        os.environ[RUN_BEFORE] = json.dumps(_run)
        if nextitem is not None and not hasattr(item.config, "workerinput"):  # nor one of xdist's, which it waits for
            _go_on(item.config)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RUN_BEFORE in os.environ:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _error() -> str | None:
    """What the GPU says to whatever one does with it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _go_on(config: pytest.Config) -> None:
    """In a new process, which has this one's number."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # the new process writes where this one was told to
    print("", *_failures, "A new process goes on.", sep="\n", flush=True)
    sys.stderr.flush()
    os.chdir(config.invocation_params.dir)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *map(str, config.invocation_params.args)])
