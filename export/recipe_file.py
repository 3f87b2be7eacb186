"""The file of a recipe: TOML, every key accounted for, every value of the type that is declared."""

import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from export.errors import RecipeError
from export.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: The file is missing or not TOML; a key is unknown or missing; a value has the
            wrong type or lies outside what is allowed.
    """
    return recipe_from(read_document(path), path)


def read_document(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        RecipeError: It is missing or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"recipe {str(path)!r} cannot be read ({exc.strerror})") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise RecipeError(f"recipe {str(path)!r} is not TOML ({exc})") from exc


def recipe_from(document: dict[str, Any], path: Path) -> Recipe:
    """Return the recipe that a document holds.

    Args:
        document: As `read_document` returns it.
        path: The file that errors name.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    try:
        recipe: Recipe = _table(Recipe, document, "")
    except RecipeError as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    return recipe


def _table(cls: type, table: dict[str, Any], where: str) -> Any:
    """Build a dataclass from a TOML table, every key accounted for."""
    known = {f.name: f for f in fields(cls)}
    for key in table:
        if key not in known:
            raise RecipeError(f"unknown key {where + key!r}; allowed: {', '.join(known)}")
    for key, f in known.items():
        if key not in table and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"key {where + key!r} is missing")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(hints[key], value, where + key) for key, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a TOML value as the type that the dataclass declares."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if is_dataclass(hint) and isinstance(value, dict):
        return _table(hint, value, where + ".")  # type: ignore[arg-type]
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        kinds = [arms[0]] * len(value) if arms[-1] is Ellipsis else list(arms)
        if len(kinds) == len(value):
            return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arms[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise RecipeError(f"{where} = {value!r}; allowed is {name}")
