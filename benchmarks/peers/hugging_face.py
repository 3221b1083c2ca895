"""Hugging Face transformers at LFM's shape: `python benchmarks/peers/hugging_face.py [key.path=value ...]`.

A Mixtral (a Llama where the config has no experts) of the same hidden size, layers, heads, experts and vocabulary, from
random weights, on the same rows: weights and AdamW's moments in bf16, torch's SDPA, the fused AdamW, a loop of plain
PyTorch on one device.  What differs favours the peer: it has no liquid layers, keeps no fp32 masters, accumulates
gradients in bf16, and takes a row as one document, without masks between documents.  MFU counts its own arithmetic, all
pairs of a row included.

transformers is no dependency of this repository: `pip install transformers`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

import torch

from benchmarks.model.measure import rows_of
from benchmarks.peers.loop import parse, record, timed_steps
from lfm.errors import UserError
from lfm.exits import command
from lfm.layers.moe import MoEConfig
from lfm.models.lfm import LFMConfig


def peer_config(model: LFMConfig) -> Any:
    """The configuration of transformers with this shape; what it has no counterpart for is left out."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers") from None
    if model.attention is None:
        raise UserError("model.attention=null: the peer is made of attention layers; give a config that has them")
    shape: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_attention_heads,
        "num_key_value_heads": model.attention.num_query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.is_tied,
        "use_cache": False,
    }
    if not isinstance(model.ffn, MoEConfig):
        return transformers.LlamaConfig(**shape, intermediate_size=model.ffn.ffn_hidden_size)
    return transformers.MixtralConfig(
        **shape,
        intermediate_size=model.ffn.moe_ffn_hidden_size,
        num_local_experts=model.ffn.num_moe_experts,
        num_experts_per_tok=model.ffn.moe_router_topk,
        output_router_logits=True,  # its balance loss trains too
    )


@command
def main() -> None:
    run, flags = parse("Train a transformers model of LFM's shape, and time it.")
    if not isinstance(run.model, LFMConfig):
        raise UserError(
            f"model.kind={run.model.kind}: the peer has the shape of an LFM; give a config of model.kind=lfm"
        )
    config = peer_config(run.model)
    import transformers

    device = run.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(run.seed)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    stream = rows_of(run, slice(0, run.training.global_batch_size), random_ids=flags.random_ids)
    size, clip = run.training.micro_batch_size, run.optimizer.clip_grad

    def step() -> float:
        ids = stream.next().ids.to(device)
        parts = ids.split(size)
        losses = []
        for part in parts:
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            losses.append(loss.detach())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    timed = timed_steps(step, flags, device)
    stream.close()
    shape = run.model.model_copy(update={"liquid": None})
    record(
        f"transformers {transformers.__version__}, {type(model).__name__}",
        run,
        timed,
        flags,
        flops_per_token=shape.flops_per_token(),
        world=1,
        parameters=sum(p.numel() for p in model.parameters()),
        experts_implementation=getattr(model.config, "_experts_implementation", None),
    )


if __name__ == "__main__":
    main()
