"""Calls that run code, or trust what was given to be read, are few, and each has its reason here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "algorithms", "bridge", "configs")
RUNS_CODE = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execvpe", "pty.spawn")
UNPICKLES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
UNSAFE = ("tempfile.mktemp", "ssl._create_unverified_context", "yaml.unsafe_load", "yaml.full_load")
ALLOWED = {
    # What rank 0 gets from the other ranks of the run, through Ray.
    ("actors/megatron_background.py", "pickle.loads"),
    # A user's own reward functions and environments, given by their path in the config.
    ("algorithms/rewards/loading.py", "exec"),
    ("algorithms/rewards/loading.py", "compile"),
    # From the sandbox's launcher, which is ours, by a pipe that the program in it has not got; and to it.
    ("algorithms/rewards/sandbox.py", "marshal.loads"),
    ("algorithms/rewards/isolation/launcher.py", "marshal.loads"),
    # The program that is to be isolated, when it is.
    ("algorithms/rewards/isolation/program.py", "os.execvpe"),
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> str | None:
    """An argument as it is written."""
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def dangers(name: str, call: ast.Call) -> Iterator[str]:
    """Why a call is not to be made."""
    module, _, function = name.rpartition(".")
    if name in RUNS_CODE or name in UNSAFE:
        yield name
    if module in UNPICKLES and function not in ("dump", "dumps"):
        yield name
    if name == "torch.load" and option(call, "weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "yaml.load" and option(call, "Loader") != "_Loader":
        yield "yaml.load without the safe loader"
    if option(call, "shell") not in (None, "False"):
        yield "a shell"
    if option(call, "trust_remote_code") not in (None, "False"):
        yield "trust_remote_code"
    if option(call, "allow_pickle") not in (None, "False"):
        yield "allow_pickle"
    if option(call, "verify") == "False":
        yield "no verification of certificates"


def found(text: str) -> list[str]:
    tree = ast.parse(text)
    hidden = [
        f"from {node.module} import"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in (*UNPICKLES, "os", "subprocess")
    ]
    return [*hidden, *(danger for name, call in calls(tree) for danger in dangers(name, call))]


def test_the_code_makes_no_dangerous_calls_but_those_with_a_reason() -> None:
    made = {
        (str(path.relative_to(ROOT)), danger)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for danger in found(path.read_text())
    }
    assert made == ALLOWED


@pytest.mark.parametrize(
    ("text", "danger"),
    [
        ("eval(x)", "eval"),
        ("from pickle import loads", "from pickle import"),
        ("pickle.load(file)", "pickle.load"),
        ("marshal.loads(x)", "marshal.loads"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without the safe loader"),
        ("subprocess.run('ls', shell=True)", "a shell"),
        ("os.system('ls')", "os.system"),
        ("AutoModel.from_pretrained(x, trust_remote_code=ask)", "trust_remote_code"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle"),
        ("httpx.get(url, verify=False)", "no verification of certificates"),
    ],
)
def test_each_of_them_would_be_found(text: str, danger: str) -> None:
    assert found(text) == [danger]


def test_yaml_is_read_by_a_loader_that_makes_plain_values_only() -> None:
    import yaml

    from configs.load import _Loader  # pyright: ignore[reportPrivateUsage]

    assert issubclass(_Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=_Loader)
