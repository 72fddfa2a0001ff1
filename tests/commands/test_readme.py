"""The docs list every file, and the commands of README and the docs compose."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import distilkit

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")
COMMAND = re.compile(
    r"python -m distilkit\.(train|prepare|trim|plan|export|dashboard|evaluate|report)\b((?:\\\n|[^\n`#])*)"
)
FOUND = [
    (name, shlex.split(rest.replace("\\\n", " ")))
    for name, rest in COMMAND.findall(README + (DOCS / "running.md").read_text("utf-8"))
]
COMMANDS = [each for each in FOUND if not {"--help", "--config-dir"} & set(each[1])]  # what has overrides


def test_the_tree_names_every_file() -> None:
    tree = (DOCS / "files.md").read_text("utf-8").split("```")[1]
    source = Path(distilkit.__file__).parent
    rooms = re.split(r"\n  (data|runs|watch|trim|export|plan|evaluate|report)/ .*", tree)
    listed = {"": rooms[0], **dict(zip(rooms[1::2], rooms[2::2], strict=True))}
    missing = [
        str(file.relative_to(source))
        for file in source.rglob("*.py")
        if file.name not in listed["" if file.parent == source else file.parent.name].split()
        and (file.name != "__init__.py" or file.parent == source)
        and f"{file.name}," not in listed["" if file.parent == source else file.parent.name].split()
    ]
    assert missing == []
    named = {f"{room}/{name}".lstrip("/") for room, text in listed.items() for name in re.findall(r"\b\w+\.py\b", text)}
    named -= {"report/draw.py"}  # in docs/, named on the last line
    assert [name for name in sorted(named) if not (source / name).is_file()] == []


@pytest.mark.parametrize(
    ("name", "arguments"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_commands_compose(name: str, arguments: list[str]) -> None:
    overrides = [each for each in arguments if each != "-m"]
    overrides = [re.sub(r"^([^\[{]+=[^,\[{]+),.*", r"\1", each) for each in overrides]  # the first value of a sweep
    room = "evaluate" if name in ("evaluate", "report") else "train"
    with initialize_config_module(f"distilkit.conf.{room}", version_base="1.3"):
        compose(name, overrides=overrides)


def test_all_commands_are_found() -> None:
    assert len(COMMANDS) >= 22
