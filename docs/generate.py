"""Writes docs/configuration.md from configs/ and the algorithms: python docs/generate.py"""

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs import default
from diffpo_jax.algorithms import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "configuration.md"
TASK_FILES = ("math", "countdown", "sudoku", "reasoning_gym")
HEAD = """# Configuration

Every field of a run. Set one on the command line with `--config.SECTION.FIELD=VALUE`, in Python with `config.SECTION.FIELD = VALUE`. This
page is made from [configs/default.py](../configs/default.py) by `python docs/generate.py`.

A preset (`--config=configs/TASK.py:PRESET`) is the defaults with some fields written over; `--config.algorithm=NAME` writes that
algorithm's fields over the preset's; what is given beside it on the command line comes last. In Python it is
`dp.set_algorithm(config, NAME)`: to set `config.algorithm` alone changes no other field."""


def meanings() -> dict[str, str]:
    """{field: the comment beside it in configs/default.py}, in the file's order."""
    names, found = {"c": ""}, {}
    source = Path(default.__file__).read_text(encoding="utf-8").split("def preset_config")[0]
    for line in source.splitlines():
        match = re.match(r" {4}(\w+)\.(\w+) = (.*?)(?:  # (.*))?$", line)
        if match is None:
            continue
        owner, name, value, comment = match.groups()
        if value.endswith("ConfigDict()"):
            names[value.split(" = ")[0]] = f"{names[owner]}{name}."
        if comment and not value.endswith("ConfigDict()"):
            found[names[owner] + name] = comment
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.field", value) of every field."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def cell(value: Any) -> str:
    """A value, or a comment, in a table."""
    return str(value).replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{cell(repr(value))}`"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def fields() -> Iterator[str]:
    """A table a section: field, default, meaning."""
    defaults, comments = dict(flatten(default.get_config())), meanings()
    if defaults.keys() != comments.keys():
        raise ValueError(f"configs/default.py: fields without a comment beside them: {sorted(defaults.keys() ^ comments.keys())}")
    sections: dict[str, list[list[str]]] = {}
    for name, comment in comments.items():
        section = name.split(".")[0] if "." in name else ""
        sections.setdefault(section, []).append([f"`{name}`", code(defaults[name]), cell(comment)])
    for section, rows in sections.items():
        yield f"## {section}" if section else "## The run"
        yield table(["field", "default", "meaning"], rows)


def side_by_side(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Fields down, presets or algorithms across; empty where one does not set the field."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[f"`{name}`", *(code(column[name]) if name in column else "" for column in columns.values())] for name in names]
    return table(["field", *(f"`{name}`" for name in columns)], rows)


def presets() -> Iterator[str]:
    """What each preset writes over the defaults."""
    published = default.published({})
    for task in TASK_FILES:
        module = importlib.import_module(f"configs.{task}")
        own = {name: preset for name, preset in module.PRESETS.items() if name not in published}
        if own:
            yield f"### configs/{task}.py"
            yield side_by_side(own)
    yield "### Published models"
    others = {task: ", ".join(f"`{name}={value!r}`" for name, value in _own_fields(task, published).items()) for task in TASK_FILES}
    yield f"Of every task's file; beside them {'; '.join(f'{task}.py {own}' for task, own in others.items())}."
    yield side_by_side(published)


def _own_fields(task: str, published: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Fields that a task's presets of published models have, or have otherwise."""
    preset, common = importlib.import_module(f"configs.{task}").PRESETS["llada_8b"], published["llada_8b"]
    return {name: preset[name] for name in sorted(preset) if common.get(name) != preset[name]}


def markdown() -> str:
    """The page."""
    parts = [HEAD, *fields(), "## Presets", *presets(), "## Algorithms", "`algorithm=NAME` sets", side_by_side(ALGORITHMS)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(markdown(), encoding="utf-8")
