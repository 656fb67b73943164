"""The source distribution is complete, and a wheel built from it works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging import metadata

from pytbptt import __version__
from tests.common.source_tree import ROOT, SOURCE_FOLDERS, copy_source_tree

VERSION_PATTERN = re.compile(
    r"""^version\s*[:=]\s*["']?(\d[^"'\s]*)"""  # metadata, CITATION.cff, pyproject.toml
    r"""|^project\(.*\bVERSION\s+(\d[^)\s]*)"""  # CMakeLists.txt
    r"""|\bpytbptt(?:==|[ -]\s*v?)(\d+\.\d+\.\d+)""",  # prose and commands
    re.MULTILINE | re.IGNORECASE,
)
LINKS = (  # Markdown's inline links and pictures, its reference definitions, and HTML's
    re.compile(r"\]\(<?([^)>\s]+)"),
    re.compile(r"^ {0,3}\[[^\]]+\]: *<?([^>\s]+)", re.MULTILINE),
    re.compile(r"""(?:href|src)=["']([^"']+)"""),
)


def relative_links(text: str) -> list[str]:
    """Relative links and pictures in a Markdown text, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = [link for pattern in LINKS for link in pattern.findall(prose)]
    return [link for link in links if not link.startswith(("https://", "#"))]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, built from a copy of the source tree."""
    folder = tmp_path_factory.mktemp("distribution")
    copy_source_tree(folder / "tree")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"pytbptt-{__version__}.tar.gz"
    shutil.unpack_archive(archive, folder)
    return folder / f"pytbptt-{__version__}"


def test_sdist_is_complete(sdist: Path) -> None:
    tree = sdist.parent / "tree"
    for folder in SOURCE_FOLDERS:
        expected = {path.relative_to(tree) for path in (tree / folder).rglob("*")}
        missing = sorted(str(path) for path in expected if not (sdist / path).exists())
        assert missing == []
    names = "setup.py pyproject.toml README.md LICENSE Makefile constraints.txt CMakeLists.txt CONTRIBUTING.md"
    names += " CITATION.cff CHANGELOG.md .clang-format"
    for name in names.split():
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_metadata_is_valid_for_pypi(sdist: Path) -> None:
    fields = metadata.Metadata.from_email((sdist / "PKG-INFO").read_bytes(), validate=True)
    assert str(fields.version) == __version__
    assert fields.license_expression == "Apache-2.0"
    assert fields.license_files == ["LICENSE"]
    releases = [
        c.rpartition(" ")[2] for c in fields.classifiers if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert fields.requires_python == f">={releases[0]}"
    assert fields.description_content_type == "text/markdown"
    assert fields.description.startswith("# pytbptt\n")
    assert relative_links(fields.description) == []


def test_classifiers_are_valid(sdist: Path) -> None:
    known = pytest.importorskip("trove_classifiers", reason="trove-classifiers is missing: pip install 'pytbptt[test]'")
    fields = metadata.Metadata.from_email((sdist / "PKG-INFO").read_bytes())
    assert set(fields.classifiers) - known.classifiers == set()
    assert set(fields.classifiers) & set(known.deprecated_classifiers) == set()
    assert [c for c in fields.classifiers if c.startswith("License ::")] == []  # refused beside a license expression


def test_all_files_state_the_same_version(sdist: Path) -> None:
    files = [path for folder in (".", "docs", "pytbptt.egg-info") for path in (sdist / folder).iterdir()]
    stated = [
        (path.name, version)
        for path in files
        if path.is_file()
        for versions in VERSION_PATTERN.findall(path.read_text(encoding="utf-8"))
        for version in versions
        if version
    ]
    assert stated.count(("PKG-INFO", __version__)) == 2  # the sdist's and the egg-info's
    assert [(name, version) for name, version in stated if version != __version__] == []


def test_linked_files_are_in_the_sdist(sdist: Path) -> None:
    links = [(path, link) for path in sdist.rglob("*.md") for link in relative_links(path.read_text(encoding="utf-8"))]
    assert len({path for path, _ in links}) > 2
    assert [(path.name, link) for path, link in links if not (path.parent / link.partition("#")[0]).exists()] == []


def test_pypi_readme_code_runs(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another corpus and a smaller model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin").mkdir()
    shutil.copytree(corpus, "data-bin/mine")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pypi.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace("n_layer=4", "n_layer=2, d_model=12, d_inner=16"), names)
        assert "result" in names or float(names["loss"]) > 0


@pytest.mark.slow
def test_wheel_from_the_sdist_has_kernels_and_no_sources(sdist: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, sdist], env=environment, check=True, capture_output=True)
    installed = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert installed == {"pytbptt", f"pytbptt-{__version__}.dist-info"}
    program = (
        "import pytbptt, torch; from pytbptt.ops import backend, lstm\n"
        "with backend('fused'): lstm(*(torch.zeros(s) for s in ((2, 3, 8), (8, 2), (3, 2), (3, 2))))\n"
        "print(pytbptt.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'pytbptt' / '__init__.py'}\n"), done.stderr
