"""From a name to a checkpoint: a folder, a GGUF file, a bundled model, or an id on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from luthier.checkpoint import bundled
from luthier.checkpoint.cache import cache_folder, locked
from luthier.checkpoint.gguf import from_gguf
from luthier.checkpoint.reader import PICKLES, Checkpoint
from luthier.errors import LuthierError, nearest, said
from luthier.kit.paths import there

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def resolve(name: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint `name` stands for. LuthierError with the nearest known name, or with the Hub's answer."""
    path, text = there(name), os.fspath(name)
    if path and path.is_dir():
        return Checkpoint.open(path)
    if path and path.is_file():
        return _from_file(path)
    if text in bundled.MODELS:
        return Checkpoint.open(bundled.MODELS[text]())
    folder = there(os.path.dirname(text) or ".")
    if _HUB_ID.fullmatch(text) and not folder:
        return Checkpoint.open(_from_hub(text))
    beside = [str(p) for p in folder.iterdir() if p.is_dir()] if folder and folder.is_dir() else []
    near = nearest(text, [*bundled.MODELS, *beside])
    do = f"did you mean {near!r}?" if near else f"give a folder, a Hub id (owner/name) or {', '.join(bundled.MODELS)}"
    raise LuthierError(f"no model {said(text, 200)}", do=do)


def _from_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        out = cache_folder("gguf") / f"{path.stem}-{key}"
        with locked(cache_folder("gguf") / f"{key}.lock"):
            return Checkpoint.open(out if out.exists() else from_gguf(path, out))
    if path.suffix in PICKLES:
        what = "is a pickle, which can run any program when it is read: refused"
        raise LuthierError(what, where=str(path), do="convert it to safetensors where you trust it")
    raise LuthierError("is a file, not a model", where=str(path), do="give the folder that holds it, or a .gguf file")


def _from_hub(name: str) -> Path:
    """The folder of the Hub's own cache that holds the repository, fetched if need be; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except GatedRepoError:
        raise LuthierError(
            f"the Hub gives {name!r} only to accounts that asked for it", do="run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise LuthierError(
            f"no model {name!r} here or on the Hub", do="check the spelling, or: hf auth login"
        ) from None
    except LocalEntryNotFoundError:
        do = "give a folder, or fetch it once with a network (HF_HUB_OFFLINE unset)"
        raise LuthierError(f"{name!r} is not in the Hub's cache and the Hub cannot be reached", do=do) from None
    except Exception as error:  # the Hub's client has many; each is one line to the user
        raise LuthierError(f"the Hub did not give {name!r} ({type(error).__name__}: {str(error)[:120]})") from None
