"""The README's commands against the real ones."""

import re
import shlex
from typing import Any

import typer.main

from hpo.cli import app
from tests.packaging_tests.project import CHECKOUT


def real_commands() -> dict[str, set[str]]:
    group: Any = typer.main.get_command(app)
    return {
        name: {
            option
            for parameter in command.params
            if parameter.param_type_name == "option"
            for option in parameter.opts
            if option != "--help"
        }
        for name, command in group.commands.items()
    }


def test_each_command_in_the_readme_can_be_typed() -> None:
    text = (CHECKOUT / "README.md").read_text()
    lines = re.findall(r"^ {4}(hpo .*)$", text, re.M) + re.findall(r"`(hpo [^`]*)`", text)
    assert len(lines) > 10
    real = real_commands()
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[1] in real or words[1].startswith("--"), line
        unknown = {word for word in words[2:] if word.startswith("--")} - real.get(words[1], set())
        assert not unknown, f"{line}: no {unknown}"


def test_the_readme_names_each_command() -> None:
    text = (CHECKOUT / "README.md").read_text()
    missing = [name for name in real_commands() if f"hpo {name}" not in text]
    assert not missing
