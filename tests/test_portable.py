"""The C++ tests by other compilers and for other processors and systems: python -m tests.portable, target by target."""

import pytest

from tests.portable import TARGETS, build_and_test, missing_to_compile, missing_to_run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "here"])  # test_sanitizers.py is of here
def test_kernels_compile_without_warnings_and_their_tests_pass(name, tmp_path):
    target = TARGETS[name]
    if missing := missing_to_compile(target):
        pytest.skip(f"no {missing}")
    build_and_test(target, tmp_path)
    if missing := missing_to_run(target):
        pytest.skip(f"compiled and linked, not run: no {missing}")
