"""The model card: what a model is made of, by which recipe, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def model_card(
    recipe_yaml: str,
    methods: Iterable[str],
    base: str | None,
    notes: Iterable[str] = (),
    license: str | None = None,
) -> str:
    """README.md with a YAML header, in the Hub's form.

    recipe_yaml: the recipe that made the model, whole.  methods: ids, such as merge.ties.  base: name
    of the base model.  notes: one line each, such as what the weights were dequantised from.
    """
    methods, notes = list(methods), list(notes)
    tags = ["luthier", *methods, *(["merge"] if any(m.startswith("merge.") for m in methods) else [])]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if base:
        head["base_model"] = base
    if license:
        head["license"] = license
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# A model made with Luthier {_version()}", ""]
    lines += [f"Base: {base}", ""] if base else []
    lines += ["Methods: " + ", ".join(f"`{m}`" for m in methods), ""] if methods else []
    lines += [*(f"- {' '.join(note.split())}" for note in notes), ""] if notes else []
    if recipe_yaml:
        fence = "`" * max(3, 1 + _longest_fence(recipe_yaml))
        lines += ["The recipe:", "", f"{fence}yaml", recipe_yaml.rstrip(), fence, ""]
    lines += [
        "Load it with plain transformers:", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _longest_fence(text: str) -> int:
    runs = [len(part) for part in "".join(c if c == "`" else " " for c in text).split()]
    return max(runs, default=0)


def _version() -> str:
    try:
        return version("luthier")
    except PackageNotFoundError:
        return "(source)"
