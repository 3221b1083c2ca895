"""A checkpoint that is served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lfm.checkpoint.manifest import read_manifest
from lfm.data.tokenizer import Tokenizer
from lfm.inference.load import open_model
from lfm.medical.asking import MedicalMode
from lfm.medical.config import MedicalConfig
from lfm.models.language_model import LanguageModel


@dataclass(frozen=True)
class Served:
    name: str
    """What requests call it: of its run, with the step where several checkpoints of a run are served."""
    step: int
    model: LanguageModel
    tokenizer: Tokenizer
    medical: MedicalMode | None = None
    """Answers in place of the model: with a calibrated probability, or not at all."""

    @property
    def kind(self) -> str:
        return self.model.config.kind

    @property
    def context_limit(self) -> int | None:
        return self.model.config.context_limit

    @property
    def num_parameters(self) -> int:
        return self.model.config.count_parameters().total

    @property
    def description(self) -> str:
        context = "any length" if self.context_limit is None else f"context of {self.context_limit:,} tokens"
        return f"{self.kind}, step {self.step:,}, {self.num_parameters:,} parameters, {context}"


def open_served(
    checkpoints: Sequence[Path | str],
    *,
    device: Literal["auto", "cpu", "cuda"],
    int8: bool = False,
    medical_of: Callable[[Path], MedicalConfig] = lambda checkpoint: MedicalConfig(),
) -> dict[str, Served]:
    """The models by the names that requests give.  Raises UserError as `open_model` and `MedicalMode` do."""
    found = []
    for path in checkpoints:
        model, tokenizer, checkpoint = open_model(path, device=device, int8=int8)
        manifest, config = read_manifest(checkpoint, warn=False), medical_of(checkpoint)  # open_model has warned
        medical = MedicalMode(model, tokenizer, checkpoint, config, {"text"}) if config.mode else None
        found.append(Served(str(manifest["config"]["name"]), manifest["step"], model, tokenizer, medical))
    served: dict[str, Served] = {}
    for each in found:
        name = each.name
        if sum(other.name == name for other in found) > 1:
            name = f"{name}-step{each.step}"
        number = 2
        while name in served:  # runs of one name in several folders
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        served[name] = replace(each, name=name)
    return served
