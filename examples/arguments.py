"""Arguments of the training scripts: from the command line, and from recipes."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: Sequence[type], description: str, arguments: Sequence[str] | None = None) -> tuple:
    """
    Reads dataclasses of arguments from the recipes of `--recipe` and from the command line, which has the last word.

    A recipe is a YAML file of argument names and values. Of several, behind one `--recipe` or more, the later one has
    precedence.

    Args:
        arguments: By default those of the command line.

    Returns:
        The dataclasses.

    Raises:
        SystemExit: arguments that cannot be, from either source; the message says which.
    """
    parser = HfArgumentParser(dataclass_types, description=description)
    parser.add_argument(
        "--recipe",
        nargs="+",
        action="extend",
        help="YAML files of arguments, such as those in examples/recipes/; the later one wins, and the command line "
        "over all of them.",
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipes = argparse.ArgumentParser(add_help=False)
    recipes.add_argument("--recipe", nargs="+", action="extend", default=[])
    paths = recipes.parse_known_args(arguments)[0].recipe
    try:
        from_recipes = [argument for path in paths for argument in recipe_arguments(path, parser)]
        namespace = parser.parse_args([*from_recipes, *arguments])
        groups = [
            cls(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(cls)})
            for cls in dataclass_types
        ]
    except ValueError as error:
        parser.error(str(error))
    return tuple(groups)


def recipe_arguments(path: str | Path, parser: argparse.ArgumentParser) -> list[str]:
    """
    A recipe as command-line arguments.

    Raises:
        ValueError: the file is missing, is not YAML with names and values, or has a name that the parser does not know.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--recipe {path}: expected a YAML file, {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--recipe {path}: expected names and values of arguments, got {recipe!r:.80}")
    known = {action.dest for action in parser._actions} - {"help", "recipe"}
    unknown = [name for name in recipe if name not in known]
    if unknown:
        raise ValueError(f"--recipe {path}: expected arguments of this script, got {', '.join(map(str, unknown))}")
    arguments: list[str] = []
    for name, value in recipe.items():
        if value is None:
            continue  # as where it is not given
        arguments += [f"--{name}", *_words(value)]
    return arguments


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]


def to_recipe(*arguments: Any) -> str:
    """The values of dataclasses of arguments, those that are None left out, as a recipe of the same run."""
    values = {name: value for group in arguments for name, value in dataclasses.asdict(group).items()}
    recipe = {
        name: value.value if isinstance(value, Enum) else value for name, value in values.items() if value is not None
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
