"""`--format hf`: a folder that transformers loads with `trust_remote_code=True`, and lfm without running its code.

model.safetensors (above 5 GB several, and their index)      weights by global name
config.json                                                  the `model` section of the run's configuration
modeling_KIND.py                                             the model, of torch and transformers alone
tokenizer.json tokenizer_config.json special_tokens_map.json
generation_config.json README.md
"""

import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lfm.checkpoint.manifest import TOKENIZER_NAME
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.export.card import card
from lfm.export.incoming import Incoming
from lfm.export.packages import require
from lfm.export.source import Source, expected_tensors
from lfm.export.tensor_files import holdings, save
from lfm.files import exists, read_file, shown, write_durably

CLASSES = {
    "lfm": "LFM",
    "laerc": "LAERC",
    "liquidlm": "LiquidLM",
    "liquidnn": "LiquidNN",
    "liquidnet": "LiquidNet",
    "transformer": "Transformer",
    "lstm": "LSTM",
}
"""Kind -> how the names of its classes in `modeling_KIND.py` begin."""

MODEL_TYPE = "lfm_training_"
"""Before the kind: transformers has families of similar names."""
SHARD_SIZE = "5GB"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(source: Source, out: Path, settings: Any) -> None:
    if source.kind not in CLASSES:
        raise UserError(
            f"{shown(source.path)} is of kind {source.kind}, which has no model code for transformers (kinds: "
            f"{', '.join(CLASSES)}); take --format safetensors"
        )
    write_weights(source, out, settings.dtype)
    tokenizer = source.tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.eod_id}
    name = code_name(source.kind)
    shutil.copyfile(Path(__file__).parent / "hf" / name, out / name)
    _write_json(out / "config.json", config_of(source, settings.dtype) | ids)
    _write_json(out / "generation_config.json", ids | generation_of(source))
    write_durably(out / TOKENIZER_NAME, tokenizer.definition)
    _write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer, source.config.context_limit))
    _write_json(out / "special_tokens_map.json", special_tokens(tokenizer))
    text = card(source, dtype=_name(settings.dtype), licence=settings.licence)
    write_durably(out / "README.md", text.encode())


def write_weights(source: Source, out: Path, dtype: torch.dtype, shard_size: str = SHARD_SIZE) -> None:
    """One shard at a time, so that memory holds no more than one."""
    hub = require("huggingface_hub", purpose="--format hf")
    tensors = {name: of.tensor for name, of in expected_tensors(source.config, dtype).items()}
    shards = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for name, names in shards.filename_to_tensors.items():
        save(source.read(names, dtype), out / name)
    if shards.is_sharded:
        _write_json(out / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def code_name(kind: str) -> str:
    return f"modeling_{kind}.py"


def config_of(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    module, name = code_name(source.kind).removesuffix(".py"), CLASSES[source.kind]
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {"AutoConfig": f"{module}.{name}Config", "AutoModelForCausalLM": f"{module}.{name}ForCausalLM"},
        "model_type": MODEL_TYPE + source.kind,
        "dtype": _name(dtype),
        "tie_word_embeddings": False,
        **{key: value for key, value in source.tree.items() if key != "kind"},
        "lfm": source.record(),
    }


def generation_of(source: Source) -> dict[str, Any]:
    """Sampling as in the run's own samples."""
    sampling = ((source.manifest["config"].get("samples") or {}).get("sampling")) or {}
    found: dict[str, Any] = {"do_sample": not sampling.get("greedy", False)}
    if found["do_sample"]:
        found |= {key: sampling[key] for key in ("temperature", "top_k", "top_p") if key in sampling}
    for key, none in (("min_p", 0.0), ("repetition_penalty", 1.0)):
        if sampling.get(key, none) != none:
            found[key] = sampling[key]
    return found


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    end = tokenizer.token_of(tokenizer.eod_id)
    begin = {} if tokenizer.bos_id is None else {"bos_token": tokenizer.token_of(tokenizer.bos_id)}
    return {**begin, "eos_token": end, "pad_token": end}


def tokenizer_config(tokenizer: Tokenizer, context_limit: int | None) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(tokenizer),
        "padding_side": "left",  # generation goes on at the right
        "split_special_tokens": True,  # what spells a control token in a text is text, as in training
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **({} if context_limit is None else {"model_max_length": context_limit}),
    }


def compare(source: Source, out: Path, settings: Any) -> Iterator[str]:
    """Load the folder as transformers does, and hold its logits against ours: of rows whole, and token by token.

    Raises RuntimeError where float32 differs by more than rounding.
    """
    require("transformers", purpose="comparing the exported model")
    module = import_module(f"lfm.export.hf.modeling_{source.kind}")
    theirs = getattr(module, f"{CLASSES[source.kind]}ForCausalLM").from_pretrained(str(out), dtype=settings.dtype)
    ours, length = source.model(torch.float32), min(48, source.config.seq_length)
    ids = torch.randint(0, source.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = ours(ids)[0]
        whole = theirs.eval()(ids).logits.float()
        state, steps = None, []
        for column in ids.split(1, dim=1):
            found = theirs(column, state=state)
            state = found.state
            steps.append(found.logits.float())
    worst = max(float((found - want).abs().max()) for found in (whole, torch.cat(steps, 1)))
    largest = float(want.abs().max())
    yield f"logits differ from the checkpoint's by at most {worst:.1e} (the largest is {largest:.1f})"
    if settings.dtype == torch.float32 and not worst <= 1e-4 * max(1.0, largest):
        raise RuntimeError(f"the exported model of {source.path} computes something else: {worst:.1e} off")


def remote_model(source: Source) -> Any:
    """The checkpoint in the code that is exported, in float32 and in evaluation mode."""
    require("transformers", purpose="the exported model's code")
    module, name = import_module(f"lfm.export.hf.modeling_{source.kind}"), CLASSES[source.kind]
    model = getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**source.tree))
    model.load_state_dict(source.read(expected_tensors(source.config), torch.float32))
    return model.eval()


def read(place: Path) -> Incoming:
    """Weights and configuration of the folder; its code is not run."""
    tree = read_config(place / "config.json")
    tokenizer = read_file(place / TOKENIZER_NAME) if exists(place / TOKENIZER_NAME) else None
    record = tree.get("lfm")
    return Incoming(place, tree, _files(place), tokenizer, record if isinstance(record, dict) else {})


def read_config(file: Path) -> dict[str, Any]:
    """A config.json with its `kind`.  Raises UserError for one that is not of this project's models."""
    config = _read_json(file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE):
        raise UserError(
            f"{shown(file)} is of model_type {model_type!r}; lfm imports what `lfm export` wrote, "
            f"whose model_type begins with {MODEL_TYPE}"
        )
    return {**config, "kind": model_type.removeprefix(MODEL_TYPE)}


def _files(place: Path) -> dict[str, Path]:
    """Tensor by name -> its file.  Raises UserError for a file that is not in the folder, or a tensor in two."""
    names: list[Any] = [WEIGHTS]
    if exists(place / INDEX):
        shards = _read_json(place / INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{shown(place / INDEX)} is no index of files in its folder; export the model again")
    elif not exists(place / WEIGHTS):
        raise UserError(f"{shown(place)} has no {WEIGHTS}; give a folder that `lfm export --format hf` wrote")
    files: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        for tensor in holdings(place / name)[0]:
            if tensor in files:
                raise UserError(
                    f"{shown(place)} has the tensor {shown(tensor)} twice, in {files[tensor].name} and {shown(name)}; "
                    "export the model again"
                )
            files[tensor] = place / name
    return files


def _read_json(path: Path) -> dict[str, Any]:
    if not exists(path):
        raise UserError(f"{shown(path)} does not exist; give a folder that `lfm export --format hf` wrote")
    content = read_file(path)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{shown(path)} is no JSON object; export the model again")
    return tree


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_durably(path, json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
