"""What people do with an exported model: a step of transformers' Trainer, a LoRA of peft."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lfm.data.tokenizer import train_bpe
from lfm.export import formats, huggingface
from lfm.export.source import Source
from tests.export.checkpoints import TREES, checkpoint_of


@pytest.fixture(scope="module", params=["lfm", "liquidlm", "liquidnn"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_bpe(["to be, or not to be " * 20], 300, allow_smaller=True)
    run = checkpoint_of(TREES[request.param], tokenizer, folder / "own")
    (folder / "hf").mkdir()
    huggingface.write(Source(run), folder / "hf", formats.Settings())
    return AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)


def a_step(model, folder):
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    where = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(**where, per_device_train_batch_size=2, max_steps=1, learning_rate=1e-2)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_lora_and_the_trainer_take_a_step(model, tmp_path):
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=sorted(names))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    a_step(adapted, tmp_path / "lora")
    made = adapted.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, eos_token_id=None)
    assert made.shape == (1, 5)
    plain = adapted.unload().requires_grad_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())

    a_step(plain, tmp_path / "all")
    changed = [name for name, parameter in plain.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) > 5
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, before[name]), name
