"""From a command line to a recipe: `recipe=NAME` finds the YAML, and each `key=value` overrides one dotted path.

All that is wrong is reported at once, a sentence each, in words derived from the models of `slimplus.recipe.schema`.
"""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from slimplus.recipe.schema import Recipe, keys
from slimplus.recipe.section import RecipeError, Section


def _shorthands(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each section that a plain value may stand for, and of the key that the value sets."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if field.annotation.shorthand:
                yield prefix + name, f"{prefix}{name}.{field.annotation.shorthand}"
            yield from _shorthands(field.annotation, f"{prefix}{name}.")


_SHORTHANDS = dict(_shorthands(Recipe))


def describe_type(field: FieldInfo) -> str:
    """Return the type of a key in words, such as `integer >= 1`, `auto | never`, `text | null`, `[integer, ...]`."""
    unions = (Union, UnionType)
    kinds = get_args(field.annotation) if get_origin(field.annotation) in unions else (field.annotation,)
    options: list[str] = []
    for kind in kinds:
        literals = get_args(kind) if get_origin(kind) is Literal else ()
        options += map(str, literals) if literals else [_kind(kind)]
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    limits = [(limit, name, sign) for limit in field.metadata for name, sign in signs if hasattr(limit, name)]
    bounds = [f"{sign} {getattr(limit, name)}" for limit, name, sign in limits]
    if bounds:
        options[0] += f" {' and '.join(bounds)}"  # the type with bounds comes before null
    return " | ".join(options)


def _kind(kind: Any) -> str:
    """Return a type in words, without bounds; lists and mappings are written as in YAML."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is list:
        return f"[{_kind(inner[0])}, ...]"
    if origin is Literal:
        return " | ".join(map(str, inner))
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"{{{', '.join(f'{name}: {describe_type(field)}' for name, field in kind.model_fields.items())}}}"
    if origin is dict:
        return f"{{{_kind(inner[0])}: {_kind(inner[1])}, ...}}"
    names: dict[Any, str] = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true | false",
        NoneType: "null",
        Any: "any",
    }
    return names[kind]


def _suggestion(path: str) -> str:
    """Return what to do about an unknown key, in words."""
    known = [*keys(), *_SHORTHANDS]
    # Users often forget the section, so the ends of keys are compared as well.
    ends = difflib.get_close_matches(_end(path), dict.fromkeys(map(_end, known)), n=1)
    close = (
        difflib.get_close_matches(path, known, n=1, cutoff=0.8)
        or [key for key in known if _end(key) in ends]
        or difflib.get_close_matches(path, known, n=1)
    )
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the keys"


def _end(path: str) -> str:
    """Return the last part of a dotted path."""
    return path.rpartition(".")[2]


def _leaves(path: str, value: object) -> Iterator[str]:
    """Yield the dotted path of every value in nested mappings that lie at `path`."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path


def _sentences(error: ErrorDetails, document: dict[str, Any]) -> Iterator[str]:
    """Yield sentences for users on one pydantic error in `document`."""
    path, got = ".".join(map(str, error["loc"])), reprlib.repr(error["input"])
    known = keys()
    key, field = next((item for item in known.items() if f"{path}.".startswith(f"{item[0]}.")), ("", None))
    inside = next((key for key in known if key.startswith(f"{path}.")), None)
    if error["type"] == "value_error" and field is None:
        yield str(error["ctx"]["error"])  # from a validator of a section or the recipe, which names the key itself
    elif field is None and inside is None:
        for leaf in _leaves(path, error["input"]):
            yield f"{leaf}: unknown key; {_suggestion(leaf)}"
    elif field is None:
        yield f"{path}: expected keys such as {inside}, got {got}"
    elif error["type"] == "missing":
        yield f"{path}: missing; give {path}=VALUE, {describe_type(field)} ({field.description})"
    elif error["type"] == "value_error":
        yield f"{path}: {error['ctx']['error']}"
    elif path != key and error["type"] == "string_type" and isinstance(error["input"], list):
        return  # a list that is wrong inside, where a text may stand as well: another error says what is wrong
    elif error["type"] == "extra_forbidden":  # of a section in a list
        yield f"{key}: {_end(path)!r} is no key that its elements have"
    elif path != key:  # inside a list or mapping, where YAML may have read something else, as in {1:0.5}
        whole = reprlib.repr(reduce(dict.__getitem__, key.split("."), document))
        yield f"{key}: expected {describe_type(field)}, got {whole} ({field.description})"
    else:
        hint = f"; quote it to keep it text: {path}='\"VALUE\"'" if error["type"] == "string_type" else ""
        yield f"{path}: expected {describe_type(field)}, got {got}{hint} ({field.description})"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, those of methods last."""
    recipes = importlib.resources.files("slimplus.recipes")
    return [*_recipes_in(recipes), *(f"methods/{name}" for name in _recipes_in(recipes / "methods"))]


def _recipes_in(folder: Traversable) -> list[str]:
    """Return the names of the recipes in a folder, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_file(name: str) -> Traversable:
    """Return the YAML file of a recipe, given its name or a path that ends in .yaml.

    Raises:
        RecipeError: if no recipe has that name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1) or [known for known in names if name in known]
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        raise RecipeError(f"recipe: {name!r} is none of {', '.join(names)}, nor a file whose name ends in .yaml{guess}")
    return importlib.resources.files("slimplus.recipes") / f"{name}.yaml"


def _read_document(file: Traversable) -> dict[str, Any]:
    """Return the keys and values of a YAML file."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"recipe: {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"recipe: {file} must hold keys and values, such as `seed: 0`")
    return document


def _override(document: dict[str, Any], key: str, value: object) -> str | None:
    """Set one dotted path in the document; return what is wrong, if anything is."""
    if not isinstance(value, dict):
        key = _SHORTHANDS.get(key, key)
    node, parts = document, key.split(".")
    for depth, part in enumerate(parts[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return f"{key}: {'.'.join(parts[:depth])} holds {node!r}, which has no keys inside"
    node[parts[-1]] = value
    return None


def _parent(document: dict[str, Any], path: str) -> Any:
    """Return what the document holds where the last part of a dotted path belongs, None if it is not there."""
    parent: Any = document
    for part in path.split(".")[:-1]:
        parent = parent.get(part) if isinstance(parent, dict) else None
    return parent


def _wrap_single_values(document: dict[str, Any]) -> None:
    """Make lists of single values that stand where lists belong, as in `trainer.logger=csv`."""
    for key, field in keys().items():
        parent, name = _parent(document, key), _end(key)
        if get_origin(field.annotation) is list and isinstance(parent, dict) and isinstance(parent.get(name), str):
            parent[name] = [parent[name]]


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Read `recipe=NAME key=value ...`: the values, read as YAML, override the recipe's, and all of it is checked.

    Raises:
        RecipeError: everything that is wrong, a sentence a line.
    """
    problems: list[str] = []
    overrides: dict[str, Any] = {}
    name = ""
    for argument in arguments:
        key, _, text = argument.partition("=")
        if not key or key == argument:
            problems.append(f"{argument!r} is not of the form key=value, such as seed=1")
        elif key == "recipe":
            name = text
        else:
            try:
                overrides[key] = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):  # ValueError: such as the date 2024-99-99
                key = _SHORTHANDS.get(key, key)
                problems.append(f"{key}: {text!r} is not valid YAML; quote it to keep it text: {key}='\"VALUE\"'")
    if not name:
        names = ", ".join(recipe_names())
        raise RecipeError("\n".join([*problems, f"recipe: missing; give recipe=NAME, one of {names}"]))
    return resolve_recipe(name, overrides, problems=problems)


def resolve_recipe(
    source: str | Recipe, overrides: Mapping[str, Any], model: str | None = None, problems: Sequence[str] = ()
) -> Recipe:
    """Return a recipe some of whose keys are overridden, after checking all of it.

    Args:
        source: name of a recipe, path of a YAML file, or a recipe.
        overrides: values by dotted path.
        model: what to quantize instead of the recipe's model. All of the recipe's section `model`, its GGUF file, its
            revision, its dtype, is about that one and does not count then.
        problems: what is wrong already, to be said with the rest.

    Raises:
        RecipeError: everything that is wrong, a sentence a line.
    """
    if isinstance(source, Recipe):
        document = source.model_dump()
    else:
        document = _read_document(recipe_file(source))
        name = Path(source).stem if source.endswith((".yaml", ".yml")) else source
        document.setdefault("run_dir", f"runs/{name}")
    for section, key in _SHORTHANDS.items():
        parent, name = _parent(document, section), _end(section)
        if isinstance(parent, dict) and name in parent and not isinstance(parent[name], dict | None):
            parent[name] = {key.removeprefix(f"{section}."): parent[name]}
    own = document.get("model")
    if model is not None and not (isinstance(own, dict) and own.get("path") == model):
        document["model"] = {"path": model}
    found = [*problems, *filter(None, [_override(document, key, value) for key, value in overrides.items()])]
    own = document.get("model")
    if "model.path" in overrides and isinstance(own, dict) and not any(k.startswith("model.config") for k in overrides):
        own.pop("config", None)  # it is that of the recipe's own model
    for section, field in Recipe.model_fields.items():
        # An absent or empty section, so that what is said to be missing is the key inside it.
        if field.annotation in Section.__subclasses__() and document.get(section) is None:
            document[section] = {}
    _wrap_single_values(document)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found += [sentence for details in error.errors() for sentence in _sentences(details, document)]
    if found:
        raise RecipeError("\n".join(dict.fromkeys(found)))
    return recipe
