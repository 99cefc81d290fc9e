"""What the documentation quotes exists: messages in the source, options in the schemas, TRL's in TRL."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.export import ExportConfig
from configs.load import load_config, load_settings
from configs.manifest import ManifestConfig
from configs.options import list_options, resolve_key
from configs.schema import RunConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("actors", "algorithms", "bridge", "configs")
QUOTES = re.findall(r"^> `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.M)
FOREIGN = ("http://", "https://", "#")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every text of the source, with NUL for what is filled in."""
    found: list[str] = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def says(text: str, quote: str) -> bool:
    """Whether the text, filled in, can contain the quote, whose dots stand for anything."""
    parts = [re.escape(part) for part in quote.split("...")]
    # A part that is filled in is where the quote has its dots, and nowhere else.
    return re.search(r"[^\0]*\0[^\0]*".join(parts) if len(parts) > 1 else parts[0], text) is not None


def test_a_quote_is_found_only_where_the_text_is_the_same() -> None:
    assert says("data: the \0 are gone", "data: the ... are gone")
    assert not says("data: the \0 are gone", "data: the ... are there")
    assert not says("data: the rows are gone", "data: the ... are gone")


@pytest.mark.parametrize("quote", QUOTES)
def test_messages_in_troubleshooting_are_those_of_the_source(quote: str, texts: list[str]) -> None:
    assert any(says(text, quote) for text in texts)


def rows(name: str) -> Iterator[tuple[str, list[str]]]:
    """Rows of a page's tables without their heads, each with the heading that it is under."""
    heading = ""
    lines = (DOCS / name).read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| ") and not following.startswith("|---"):
            yield heading, [cell.strip() for cell in line.strip("|").split(" | ")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


MIGRATION = list(rows("migration.md"))


def test_our_options_in_migration_exist() -> None:
    checked = 0
    for heading, cells in MIGRATION:
        options = list_options(ExportConfig if heading.endswith("export") else RunConfig)
        ours = cells[2 if heading.startswith("slime") else 1]
        assert quoted(ours) or ours == "-", cells
        for name in quoted(ours):
            _, option = resolve_key(name, options)
            assert option.dotted.replace(".N.", ".0.") == name, f"{name} lacks its section"
            checked += 1
    assert checked > 150
    with pytest.raises(ConfigError, match="is not an option"):
        resolve_key("grpo.num_generation", list_options(RunConfig))


def fields(package: str, *files: str) -> set[str]:
    """Fields of the dataclasses in these files of an installed package, which takes 20 s to import."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    trees = [ast.parse((Path(spec.origin).parent / file).read_text()) for file in files]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        item.target.id
        for each in classes
        for item in each.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def test_options_of_trl_in_migration_exist() -> None:
    theirs = fields("transformers", "training_args.py") | fields(
        "trl", *(f"trainer/{name}_config.py" for name in ("base", "grpo", "sft", "model"))
    )
    named = [name for heading, cells in MIGRATION if heading == "TRL" for name in quoted(cells[0])]
    assert len(named) > 40
    assert set(named) <= theirs


def test_commands_of_getting_started_take_their_options() -> None:
    text = (DOCS / "getting-started.md").read_text()
    commands = [
        shlex.split(line.split("  #")[0].split(" > ")[0])
        for line in re.findall(r"^bascule (.+)$", text, re.M)
    ]
    assert {words[0] for words in commands} >= {
        "make-model",
        "sft",
        "grpo",
        "status",
        "view",
        "infer",
        "submit",
    }
    for words in commands:
        if "--config" not in words:
            continue
        path = ROOT / words[words.index("--config") + 1]
        rest = [word for word in words[1:] if word not in ("--config", words[words.index("--config") + 1])]
        if words[0] == "manifest":
            load_settings(ManifestConfig, path, rest)
            continue
        if words[0] == "submit":
            at = rest.index("--address")
            rest = rest[:at] + rest[at + 2 :]
        load_config(path, rest, yaml.safe_load(path.read_text())["algorithm"])
    (own,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    RunConfig.model_validate(yaml.safe_load(own))


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(FOREIGN):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
