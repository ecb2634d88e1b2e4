"""Write the recipes and their keys into `recipes.md`, from the models that check them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from slimplus.recipe.parsing import describe_type, recipe_file, recipe_names
from slimplus.recipe.schema import Recipe, keys

RECIPES, KEYS = "<!-- recipes -->", "<!-- keys -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with both markers replaced."""
    for marker, lines in ((RECIPES, _recipes), (KEYS, _keys)):
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(lines()))
    return markdown


def _recipes() -> Iterator[str]:
    """Yield a heading, what the recipe is for, its command, and its YAML, folded."""
    for name in recipe_names():
        text = recipe_file(name).read_text(encoding="utf-8")
        command, about, *content = text.splitlines()
        needs = f" It {content.pop(0).lstrip('# ')}." if content[0].startswith("# needs") else ""
        yield f"### {name}\n\n{about.lstrip('# ')}.{needs}\n\n```bash\n{command.lstrip('# ')}\n```\n"
        yield f'??? note "recipes/{name}.yaml"\n\n    ```yaml'
        yield from (f"    {line}".rstrip() for line in content)
        yield "    ```\n"


def _keys() -> Iterator[str]:
    """Yield a section for each part of a recipe, and a definition for each of its keys."""
    sections: dict[str, dict[str, FieldInfo]] = {}
    for key, field in keys().items():
        sections.setdefault(key.rpartition(".")[0], {})[key] = field
    places = [*Recipe.model_fields, ""]
    for section in sorted(sections, key=lambda name: (places.index(name.partition(".")[0]), name)):
        yield f"### {section or 'The run'}\n\n{_about(section)}\n"
        for key, field in sections[section].items():
            meaning = _plain(field.description or "")
            yield f"[`{key}`](#{key}){{ #{key} .key }} {_taken(field)}\n\n:   {meaning}\n"


def _about(section: str) -> str:
    """Return the docstring of the model behind a section; for keys outside every section, what they are."""
    model: Any = Recipe
    for part in filter(None, section.split(".")):
        model = model.model_fields[part].annotation
    return "Keys of the run as a whole." if model is Recipe else str(model.__doc__).split("\n\n")[0]


def _taken(field: FieldInfo) -> str:
    default = "set by the recipe" if field.is_required() else f"default {_yaml(field.default)}"
    return f'<span class="type">{_plain(describe_type(field))}</span> <span class="default">{default}</span>'


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    return f"<code>{_plain(text)}</code>"


def _plain(text: str) -> str:
    """Return a text in which neither HTML nor Markdown reads anything: braces would be attributes."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("*", "&#42;").replace("_", "&#95;")
