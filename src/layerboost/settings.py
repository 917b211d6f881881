"""The settings of a recipe with default and meaning, for the terminal and docs/reference/recipe.md."""

from __future__ import annotations

from layerboost.recipe import Recipe, Section, known_keys

PAGE = """# Recipe

A recipe is a YAML file with the settings of every stage. Each source of values overrides the ones before it:

1. the defaults in the tables below;
2. `recipe.yaml` in the run folder, which holds the settings of the last command there;
3. the file or name given with `--config`;
4. the command line: `--set section.key=value`, MODEL, `--text` and other options.

The resolved recipe is saved in the run folder. An unknown key is an error that names the nearest known one.

```console
$ layerboost ls recipes
$ layerboost ls settings
$ layerboost run --config qwen3-4b --run runs/qwen3 --set heal.lr=1e-4 --set 'measure.windows=[256, 512]'
```

| recipe | for |
|---|---|
| `demo` | SmolLM2-135M-Instruct from PyPI on two CPU cores, in minutes; shows every part, too small to judge by |
| `smollm2-135m` | the same model, overnight |
| `qwen3-4b` | the paper's model on one GPU; not run by us |
| `llama-3.1-8b` | a larger model on one GPU; not run by us |

This page is generated from the fields in `src/layerboost/recipe.py`: `pytest tests/test_recipe.py --update-golden`.
"""


def described_settings() -> dict[str, dict[str, str]]:
    """Return default and meaning of each setting, by dotted key."""
    described = {}
    for key in known_keys():
        section, _, name = key.rpartition(".")
        model = Recipe.model_fields[section].annotation if section else Recipe
        assert isinstance(model, type)
        assert issubclass(model, Section)
        field = model.model_fields[name]
        value = field.default
        shown = "" if value is None else f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
        described[key] = {"default": shown, "meaning": field.description or ""}
    return described


def settings_page() -> str:
    """Return docs/reference/recipe.md: a table per section of the recipe."""
    groups: dict[str, list[str]] = {}
    for key, cells in described_settings().items():
        section = key.partition(".")[0] if "." in key else ""
        groups.setdefault(section, []).append(f"| `{key}` | {cells['default']} | {cells['meaning']} |\n")
    page = PAGE
    for section, rows in groups.items():
        about = Recipe.model_fields[section].annotation.__doc__ if section else "Settings that every stage reads."
        page += f"\n## {section or 'General'}\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n"
        page += "".join(rows)
    return page
