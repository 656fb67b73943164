"""The kernels compile without warnings with every compiler of tests/checks/cross_compile.py, and their tests pass."""

import pytest

from tests.checks.cross_compile import TARGETS, build_and_test, missing_to_compile, missing_to_run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "here"])  # tested in test_sanitizers.py
def test_kernels_compile_without_warnings_and_their_tests_pass(name, tmp_path):
    target = TARGETS[name]
    if missing := missing_to_compile(target):
        pytest.skip(f"no {missing}")
    build_and_test(target, tmp_path)
    if missing := missing_to_run(target):
        pytest.skip(f"compiled and linked, not run: no {missing}")
