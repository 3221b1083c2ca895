"""README.md of an exported model: what the run's records say of it, and how it is used."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfm.export.source import Source
from lfm.files import exists, read_file, shown

_PRACTICE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
prompts = tokenizer(["Once upon a time"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=50)))
```"""


def card(source: Source, *, dtype: str, licence: str | None) -> str:
    """Markdown with the head that the hub reads."""
    name = source.manifest["config"]["name"]
    head = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{source.kind}]"]
    if licence is not None:
        head.insert(0, f"license: {json.dumps(licence)}")
    return "\n".join(
        [
            *("---", *head, "---", "", f"# {shown(name)}", ""),
            f"A language model of family `{source.kind}` with {parameters(source)}.",
            *("", "## Use", "", _PRACTICE.format(place="PATH_OR_NAME"), ""),
            f"`modeling_{source.kind}.py` is the model's code; it needs torch and transformers. "
            f"Trained weights are in {dtype}; frozen ones are in float32. Prompts of several lengths may be padded on "
            "either side.",
            *("", "## Training", "", *training(source)),
            *("", "## Limits", "", *limits(source)),
            *("", "## Licence", "", licence or "None is stated."),
            "",
        ]
    )


def parameters(source: Source) -> str:
    counts = source.config.count_parameters()
    found = f"{counts.total:,} parameters"
    if counts.frozen:
        found += f", {counts.frozen:,} of them frozen"
    return found if counts.active == counts.trainable else f"{found}; a token uses {counts.active:,}"


def training(source: Source) -> Iterator[str]:
    """A list of what was trained on, how long, and to which loss."""
    config, progress = source.manifest["config"], source.manifest["progress"]
    data, steps = config.get("data") or {}, config.get("training") or {}
    if data.get("path"):
        yield f"- data: `{named(str(data['path']))}`"
    for stream in data.get("streams") or ():
        yield f"- data: `{shown(str(stream.get('name')))}`, proportion {stream.get('proportion')}"
    yield f"- {progress['step']:,} steps, {progress['tokens']:,} tokens"
    if "global_batch_size" in steps:
        yield f"- {steps['global_batch_size']} rows of {source.config.seq_length} tokens a step"
    optimizer = config.get("optimizer") or {}
    if "lr" in optimizer:
        yield f"- optimizer {optimizer.get('kind')}, learning rate {optimizer['lr']:g}"
    loss = last_loss(source.path.parent.parent / "metrics.jsonl", progress["step"])
    if loss is not None:
        yield f"- training loss at the last record: {loss:.4f} nats per token"
    best = progress["best_validation"]
    if best is not None:
        yield f"- best validation loss: {best:.4f} nats per token"


def named(path: str) -> str:
    """The last part of a path or URL: the rest is this machine's, and may hold names and keys of users."""
    _, is_url, behind = path.partition("://")
    if is_url:
        path = re.split("[?#]", behind.partition("/")[2])[0]
    return shown(Path(path).name)


def limits(source: Source) -> Iterator[str]:
    limit = source.config.context_limit
    if limit is not None:
        yield f"- Context: {limit:,} tokens; it was trained on no more."
    else:
        yield f"- Its state has no limit; it was trained on rows of {source.config.seq_length:,} tokens."
    yield "- It continues text. It was not evaluated beyond the losses above, and may say what is false or harmful."
    if getattr(source.config, "moe", None) is not None:
        yield "- The exported code trains without the routers' balance losses; experts are dropless."


def last_loss(file: Path, step: int) -> float | None:
    """The cross entropy of the last record of a metrics.jsonl up to this step."""
    if not exists(file):
        return None
    found: Any = None
    for line in read_file(file).decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError, TypeError):
            record = json.loads(line)
            if "cross_entropy" in record and record["step"] <= step:
                found = float(record["cross_entropy"])
    return found
