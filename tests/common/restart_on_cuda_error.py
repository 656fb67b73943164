"""A pytest plugin for GPU tests: python -m pytest -p tests.common.restart_on_cuda_error …

After an illegal memory access or a trap every further CUDA call of the process fails. The plugin then restarts pytest
in a new process with the remaining tests, and the session's exit status says that tests failed.
"""

import json
import os
import sys
from collections.abc import Generator

import pytest
import torch

TESTS_DONE_VARIABLE = "PYTBPTT_TESTS_DONE"  # node ids as JSON, set when a CUDA error has occurred
_tests_done: list[str] = json.loads(os.environ.get(TESTS_DONE_VARIABLE, "[]"))
_failures: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(_tests_done)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failures.append(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    result = yield
    _tests_done.append(item.nodeid)
    error = _cuda_error()
    if error is not None:
        _failures.append(f"CUDA error after {item.nodeid}: {error}\n")
        os.environ[TESTS_DONE_VARIABLE] = json.dumps(_tests_done)
        # Not in xdist's workers: the controller talks to the process that it started.
        if nextitem is not None and not hasattr(item.config, "workerinput"):
            _restart_pytest(item.config)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if TESTS_DONE_VARIABLE in os.environ:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _cuda_error() -> str | None:
    """The pending error of a kernel, if any."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _restart_pytest(config: pytest.Config) -> None:
    """Replaces this process, so that the parent waits for the new one: execv keeps the process id."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # restores stdout and stderr for the new process
    print("", *_failures, "Restarting pytest in a new process.", sep="\n", flush=True)
    sys.stderr.flush()
    os.chdir(config.invocation_params.dir)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *map(str, config.invocation_params.args)])
