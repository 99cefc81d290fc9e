"""The Dockerfiles as far as they can be tested where nothing builds them."""

import fnmatch
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from actors import manifest_pods
from configs.manifest import KubernetesConfig

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "Dockerfile.cpu"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and argument of every line, continued lines put together."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M))
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, argument) for name, argument in pairs]


@each_file
def test_the_linter_has_nothing_to_say(path: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        assert os.environ.get("CI") != "true", "hadolint is not installed; it is in the extra `test`"
        pytest.skip("hadolint is not installed; it is in the extra `test`")
    done = subprocess.run([linter, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@each_file
def test_what_is_copied_exists_and_is_sent_to_the_builder(path: Path) -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        argument for name, argument in instructions(path) if name == "COPY" and "--from" not in argument
    ]
    sources = [word for argument in copied for word in argument.split()[:-1] if not word.startswith("--")]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    # What a wheel is built from, and what its metadata name.
    assert {*packages, "pyproject.toml", PROJECT["project"]["readme"]} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in sent), source
    assert not {"runs", "models", "tests", ".git"} & set(sent)


@each_file
def test_bases_are_pinned_and_the_last_stage_runs_as_the_user_of_the_pods(path: Path) -> None:
    lines = instructions(path)
    versions = {
        name: value
        for kind, argument in lines
        if kind == "ARG"
        for name, _, value in [argument.partition("=")]
    }
    bases = [argument for name, argument in lines if name == "FROM"]
    assert len(bases) == 2, "a stage with compilers and caches, and one without"
    for base in bases:
        image = re.sub(r"\$\{(\w+)\}", lambda match: versions[match[1]], base.split()[0])
        assert re.search(r":\d+\.\d+\.\d+-", image), image
    last = lines[max(index for index, (name, _) in enumerate(lines) if name == "FROM") :]
    user = manifest_pods._USER
    assert [argument for name, argument in last if name == "USER"] == [f"{user}:{user}"]
    assert [name for name, _ in last][-1] == "CMD"
    # The interpreter that jobs name is in the folder that is carried over.
    python = KubernetesConfig(image="i", claim="c").python
    (copied,) = [argument for name, argument in last if name == "COPY" and "--from" in argument]
    folder = copied.split()[-1]
    assert python.startswith(f"{folder}/bin/")
    assert any(f"-m venv {folder}" in argument for name, argument in lines if name == "RUN")


def test_packages_are_installed_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = instructions(FILES[1])
    (index,) = [
        argument for name, argument in lines if name == "ARG" and argument.startswith("TORCH_CPU_INDEX")
    ]
    assert index.replace("=", " := ", 1) in makefile
    runs = [argument for name, argument in lines if name == "RUN" and " pip " in argument]
    first, second = (part.partition("pip install")[2].split() for part in runs[0].split("||"))
    assert first == ["'.[cpu]'"], "the default index first, as it is"
    assert second == ["--extra-index-url", '"${TORCH_CPU_INDEX}"', "'.[cpu]'"]
    (removed,) = re.findall(r"pip uninstall -q -y (.*);", makefile)
    assert runs[1].endswith(f"pip uninstall -y {removed}"), (
        "what does not match torch's build is taken out again"
    )
    assert runs[2].endswith("pip install --no-deps --force-reinstall ."), "the code, over the same packages"


def test_extras_and_the_entry_point_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for path in FILES:
        named = re.findall(r"\.\[([a-z,]+)\]|EXTRAS=([a-z,-]+)", path.read_text())
        assert {name for pair in named for each in pair for name in each.split(",") if name} <= set(extras)
        assert dict(instructions(path))["CMD"] == '["bascule", "--help"]'
    module, _, function = PROJECT["project"]["scripts"]["bascule"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    # What the entry point of a job names.
    assert importlib.import_module("actors.cli").__name__ == module
