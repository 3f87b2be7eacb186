"""Variants of one recipe: a TOML file with what differs from it.

``base`` names the recipe, ``[common]`` holds the keys that change in all of them, the base
included, and ``[variants.NAME]`` those of one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.errors import RecipeError
from export.recipe import Recipe
from export.recipe_file import read_document, recipe_from

BASE = "base"


def read_variants(path: Path) -> tuple[Path, dict[str, Recipe]]:
    """Read the recipes of such a file.

    Returns:
        The file of the base, and the recipes by name: "base" first, then the variants.

    Raises:
        RecipeError: A file cannot be read, a key is unknown, or a variant changes nothing.
    """
    document = read_document(path)
    unknown = document.keys() - {"base", "common", "variants"}
    if unknown or not isinstance(document.get("base"), str) or not document.get("variants"):
        raise RecipeError(
            f"{path}: allowed are base = FILE, [common] and [variants.NAME], got {[*document]}"
        )
    file = path.parent / document["base"]
    base = merged(read_document(file), document.get("common", {}))
    found = {BASE: recipe_from(base, path)}
    for name, changes in document["variants"].items():
        found[name] = recipe_from(merged(base, changes), path)
        if found[name] == found[BASE]:
            raise RecipeError(f"{path}: variant {name!r} is the base; change a key in it")
    return file, found


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a TOML document with some keys changed, tables within tables included."""
    result = dict(document)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inner, value) if both else value
    return result
