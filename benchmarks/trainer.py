"""Tokens a second of the trainer, of transformers' Trainer, and of a bare loop that does nothing but train.

    python benchmarks/trainer.py [--steps 15] [--rounds 3]

One Llama of 8 million parameters in fp32, 16 sequences of 256 tokens a step, AdamW, clipping. The bare
loop is given tensors that are ready; the others encode text as they go. Each round runs all three
anew; a ratio is the median over rounds of ratios within a round. CPU seconds stand beside wall
seconds because other work on the machine disturbs them less. Goal: at least 0.85 of the bare loop.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
import transformers

from luthier.engine.feed import Feed
from luthier.engine.trainer import TrainSpec, train
from luthier.kit.context import Context
from luthier.kit.encode import encode
from luthier.objective.next_token import NextToken
from luthier.optim.adamw import AdamW
from luthier.testing import tiny
from luthier.tune.full import Full

BATCH, LENGTH, LR = 16, 256, 1e-4
TOKENIZER = tiny.tokenizer()
SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip


def texts(count: int) -> tiny.TinyData:
    """Texts of more than LENGTH tokens each, so that every row is full."""
    items = [tiny.item(text=" ".join(str((i * 7919 + j * 104729) % 9973) for j in range(LENGTH))) for i in range(count)]
    return tiny.TinyData("numbers", items, ())


def bare(steps: int) -> Callable[[], None]:
    data = texts(BATCH * 4)
    feed = Feed([data], TOKENIZER, TrainSpec(steps=steps, batch=BATCH, max_length=LENGTH), Context())
    batches = [feed.batches(step)[0] for step in range(steps)]
    model = tiny.llama(**SIZES).train()

    def loop() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return loop


def luthier(steps: int) -> Callable[[], None]:
    model, data = tiny.llama(**SIZES), texts(BATCH * 4)
    spec = TrainSpec(steps=steps, batch=BATCH, max_length=LENGTH, lr=LR)

    def loop() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(model, TOKENIZER, data, Full(), NextToken(), AdamW(), spec, Context(), Path(folder))

    return loop


def stock(steps: int) -> Callable[[], None]:
    """transformers' Trainer over a dataset that encodes on demand."""
    model, items = tiny.llama(**SIZES), texts(BATCH * 4).train

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(items)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            row = encode(items[i], TOKENIZER, LENGTH)
            return {"input_ids": torch.tensor(row.input_ids), "labels": torch.tensor(row.labels)}

    folder = tempfile.mkdtemp()
    args = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type="constant",
        weight_decay=0.0, optim="adamw_torch_fused", save_strategy="no", report_to="none", logging_steps=1,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=Rows())
    trainer.remove_callback(transformers.PrinterCallback)
    return lambda: trainer.train() and None


def measured(make: Callable[[int], Callable[[], None]], steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of the loop alone; models and data are made before."""
    loop = make(steps)
    wall, cpu = time.perf_counter(), time.process_time()
    loop()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    loops = {"bare loop": bare, "luthier": luthier, "transformers Trainer": stock}
    for make in loops.values():
        measured(make, 1)  # first calls set up kernels and caches
    rounds = [{name: measured(make, args.steps) for name, make in loops.items()} for _ in range(args.rounds)]
    tokens = args.steps * BATCH * LENGTH
    rows = []
    for name in loops:
        wall = statistics.median(r["bare loop"][0] / r[name][0] for r in rounds)
        cpu = statistics.median(r["bare loop"][1] / r[name][1] for r in rounds)
        speed = statistics.median(tokens / r[name][0] for r in rounds)
        rows.append({"loop": name, "tokens_per_second": round(speed), "of_bare_wall": wall, "of_bare_cpu": cpu})
        print(f"{name:22}{speed:8.0f} tokens/s   {wall:6.3f} of bare (wall)   {cpu:6.3f} (CPU)")
    write(rows, args, sum(p.numel() for p in tiny.llama(**SIZES).parameters()))


def write(rows: list[dict], args: argparse.Namespace, parameters: int) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)} | {
        "python": platform.python_version()
    }
    told = {
        "benchmark": "trainer", "command": "python " + " ".join(sys.argv), "date": f"{datetime.date.today()}",
        "versions": versions, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "parameters": parameters, "batch": BATCH, "length": LENGTH, "steps": args.steps, "rounds": args.rounds,
        "rows": rows, "goal": "luthier of_bare_wall >= 0.85",
    }  # fmt: skip
    out = Path(__file__).parent / "results" / "trainer.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
