"""Our data as tasks of lm-evaluation-harness, so that its users and its models can be measured on them.

    from lm_eval import simple_evaluate
    simple_evaluate(model="hf", model_args="pretrained=runs/bakeoff/merged", tasks=[harness_task(data)],
                    apply_chat_template=True)

Prompts, order, answer extraction and scores are those of `eval.accuracy`.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError
from luthier.flows import Data


def harness_task(data: Data, *, chat: bool = True, max_new_tokens: int = 32, max_items: int | None = None) -> Any:
    """A task object for `lm_eval.simple_evaluate(tasks=[...])` that generates an answer and scores it.

    chat: the model has a chat template and is run with `apply_chat_template=True`; else the prompt
    ends with a line break, as in `kit.encode.prompt_ids`.  LuthierError if the data has no answers.
    """
    if not data.scored:
        raise LuthierError(f"{data.name} has no scored answers", do="give gym: data, or prompts with answers")
    try:
        from datasets import Dataset  # lm-eval brings it
        from lm_eval.api.task import ConfigurableTask
    except ImportError:
        raise LuthierError("the harness is not installed", do="pip install 'luthier[harness]'") from None
    items = {item.id: item for item in data.test[:max_items]}
    end = "" if chat else "\n"
    rows = [{"id": id_, "prompt": f"{item.prompt}{end}", "answer": item.answer or ""} for id_, item in items.items()]

    return ConfigurableTask(config={
        "task": data.name, "output_type": "generate_until", "test_split": "test",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "doc_to_text": lambda doc: doc["prompt"], "doc_to_target": lambda doc: doc["answer"],
        "process_results": lambda doc, said: {"accuracy": float(data.score(items[doc["id"]], said[0]) >= 1.0)},
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
    })  # fmt: skip
