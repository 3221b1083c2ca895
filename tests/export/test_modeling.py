"""The models that are exported with their weights, `lfm/export/hf/modeling_*.py`, against ours, in float64."""

import ast
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from lfm.export import hf
from lfm.export.huggingface import CLASSES
from lfm.inference.sampling import SamplingConfig, generate
from lfm.models.global_names import global_views
from lfm.models.registry import build, parse
from tests.models.test_every_family import FAMILIES

FOLDER = Path(hf.__file__).parent
SMALL_LFM = {
    **{
        "kind": "lfm",
        "hidden_size": 16,
        "num_layers": 3,
        "seq_length": 64,
        "vocab_size": 40,
        "vocab_size_multiple": 16,
    },
    "attention": {"num_attention_heads": 4, "num_query_groups": 2},
    "liquid": {"kind": "diagonal", "interval": 2},
    "ffn": {"kind": "swiglu", "ffn_hidden_size": 24},
}
OF_LFM = {
    "diagonal_swiglu": SMALL_LFM,
    "liquid_alone": SMALL_LFM | {"attention": None},
    "capacity": SMALL_LFM | {"ffn": {"kind": "moe", "moe_ffn_hidden_size": 12, "moe_capacity_factor": 0.5}},
}
CASES = [(family, variant) for family, of in FAMILIES.items() for variant in (of.variants | of.packed | of.streamed)]
CASES += [("lfm", variant) for variant in OF_LFM]


def model_of(family, variant):
    """Ours, with weights of which every one shows in the logits."""
    if variant not in OF_LFM:
        return FAMILIES[family].model(variant)
    model = build(parse(OF_LFM[variant], source=variant))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.double().eval()


def remote(model):
    """Ours as the exported one."""
    name = CLASSES[model.config.kind]
    module = import_module(f"lfm.export.hf.modeling_{model.config.kind}")
    tree = model.config.model_dump(mode="json")
    theirs = getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**tree)).double().eval()
    if hasattr(model, "plastic"):
        theirs.plastic = model.plastic
    theirs.load_state_dict(global_views(model, lambda _, tensor: tensor))
    return theirs


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()


@pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])
def test_logits_whole_in_parts_and_padded_equal_ours(family, variant):
    ours = model_of(family, variant)
    theirs = remote(ours)
    ids = torch.randint(0, ours.config.vocab_size, (3, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = ours(ids)[0]
        close(theirs(ids).logits, want)
        first = theirs(ids[:, :9])
        parts = [first.logits]
        state = first.state
        for part in (ids[:, 9:10], ids[:, 10:14]):
            found = theirs(part, state=state)
            parts.append(found.logits)
            state = found.state
        close(torch.cat(parts, 1), want)
        assert theirs(ids, use_cache=False).state is None

        if "batch_mean" in variant:
            return  # its rows see each other
        # Padding on the left, on the right and within, of other ids: none of it enters a state.
        mask = torch.ones(3, 18, dtype=torch.long)
        mask[0, :4] = mask[1, 14:] = mask[2, [0, 5, 6, 17]] = 0
        padded = torch.randint(0, ours.config.vocab_size, mask.shape)
        padded[mask.bool()] = ids.flatten()
        found = theirs(padded[:, :11], attention_mask=mask[:, :11])
        rest = theirs(padded[:, 11:], attention_mask=mask, state=found.state)
        close(torch.cat((found.logits, rest.logits), 1)[mask.bool()].view_as(want), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_ours_and_batches_of_unequal_prompts_equal_each_alone(family):
    ours = FAMILIES[family].model(next(iter(FAMILIES[family].variants)))
    theirs = remote(ours)
    theirs.generation_config.pad_token_id = 0
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    steps = generate(ours, prompts, SamplingConfig(greedy=True, max_new_tokens=8), end_of_document=None)
    want = torch.tensor(list(zip(*steps, strict=True)))
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def made(**options):
        options = {"max_new_tokens": 8, "do_sample": False} | options
        return theirs.generate(ids, attention_mask=mask, **options)[:, 5:]

    assert torch.equal(made(), want)
    assert torch.equal(made(use_cache=False), want)
    assert torch.equal(made(num_beams=3), made(num_beams=3, use_cache=False)), "beams take their states with them"
    torch.manual_seed(5)
    sampled = made(do_sample=True, top_k=5)
    torch.manual_seed(5)
    assert torch.equal(sampled, made(do_sample=True, top_k=5, use_cache=False))
    assert not torch.equal(sampled, want)
    # A turn after another, from the state of the first.
    first = theirs.generate(ids[:1], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    again = torch.cat((first.sequences, torch.tensor([[7, 7]])), 1)
    state = theirs(first.sequences[:, :-1]).state
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(theirs.generate(again, state=state, **options), theirs.generate(again, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_of_the_next_token_and_gradients_are_ours(family):
    ours = FAMILIES[family].model(next(iter(FAMILIES[family].variants)))
    theirs = remote(ours)
    ids = torch.randint(0, ours.config.vocab_size, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    found = theirs(ids, labels=labels)
    logits = ours(ids)[0]
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert torch.allclose(found.loss, want.to(found.loss), rtol=1e-5)
    assert isinstance(theirs(ids, labels=labels, return_dict=False), tuple)
    found.logits.square().mean().backward()
    logits.square().mean().backward()
    parameters = dict(ours.named_parameters())
    grads = global_views(ours, lambda name, _: parameters[name].grad if name in parameters else None)
    for name, parameter in theirs.named_parameters():
        want_grad = grads.get(name)
        if parameter.grad is not None and want_grad is not None and want_grad.abs().max() > 1e-9:
            close(parameter.grad, want_grad, 1e-6)
    assert not theirs.supports_gradient_checkpointing
    with pytest.raises(NotImplementedError, match="vocabulary"):
        theirs.resize_token_embeddings(100)


def test_files_stand_alone_and_what_they_share_is_the_same_in_all():
    sources, shared = sorted(FOLDER.glob("modeling_*.py")), defaultdict(dict)
    assert [path.stem.removeprefix("modeling_") for path in sources] == sorted(CLASSES) == sorted(FAMILIES)
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    root = name.partition(".")[0]
                    assert root in ("torch", "transformers") or root in sys.stdlib_module_names, (path.name, name)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                shared[node.name][path.name] = ast.get_source_segment(text, node)
    own = {"Block", "Reservoir"}  # each family's own, whose names are those of its checkpoints' tensors
    for name, found in shared.items():
        assert name in own or len(set(found.values())) == 1, f"{name} differs between {', '.join(found)}"
