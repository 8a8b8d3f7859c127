"""The pages under docs/ and their neighbours say what is so: their Python runs, their links, names, fields and messages exist."""

import ast
import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys

import pytest

from configs import default
from tests.runs import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
NAME = {"ids": lambda path: path.name}


def text_of(page) -> str:
    """A page; of a notebook its markdown."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def config_fields() -> dict:
    """{"section.field": value, "section": ...} of the defaults."""
    found = {}

    def walk(config, prefix):
        for name, value in config.items():
            found[prefix + name] = value
            if hasattr(value, "items"):
                walk(value, f"{prefix}{name}.")

    walk(default.get_config(), "")
    return found


def test_the_configuration_page_is_made_from_the_configuration():
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))["markdown"]()
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == made, "docs/configuration.md is not what configs/ says: run `python docs/generate.py`"
    fields = [name for name, value in config_fields().items() if not hasattr(value, "items")]
    rows = [row for row in page.split("## Presets")[0].splitlines() if row.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(fields)
    assert "| `rl.importance_cap` | `2.0` | C, the cap of the importance weights |" in page
    assert "| `rl.nfe_penalty` | `1.5` | `1.5` | `1.5` | `1.5` |" in page  # of presets


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in page.read_text(encoding="utf-8")], **NAME)
def test_python_of_a_page_runs(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "assert" in program.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], **NAME)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", outside_code(text_of(page)))
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(file), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {file.name} has no heading {anchor}"


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], **NAME)
def test_fields_on_command_lines_exist(page):
    given = re.findall(r"--config\.([a-z_0-9.]+)=", text_of(page))
    assert not [name for name in given if name not in config_fields()]


def resolves(name: str) -> bool:
    """Whether a dotted name is a field, or something in diffpo_jax or an imported package."""
    name = name.removeprefix("config.")
    if name in config_fields():
        return True
    parts = name.split(".")
    for whole in (["diffpo_jax", *parts], parts):
        for cut in range(len(whole), 0, -1):
            try:
                found = importlib.import_module(".".join(whole[:cut]))
            except ImportError:
                continue
            try:
                functools.reduce(getattr, whole[cut:], found)
                return True
            except AttributeError:
                break
    return False


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != "configuration.md"], **NAME)
def test_names_exist(page):
    names = re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_0-9]+)+)(?:=[^`]*)?`", outside_code(text_of(page)))
    files = (".md", ".py", ".json", ".jsonl", ".npz", ".png", ".ipynb", ".toml", ".yml")
    assert not [name for name in names if not name.endswith(files) and not resolves(name)]
    assert not resolves("likelihood.no_such_name") and not resolves("rl.no_such_field")


@functools.cache
def said() -> str:
    """Every string in the package, a line each, with … for what is filled in."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return None

    files = (ROOT / "diffpo_jax").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return "\n".join(found for node in nodes if (found := text(node)))


def test_messages_in_troubleshooting_are_those_of_the_code():
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(headings) > 15
    assert not [message for message in headings if message not in said()]
