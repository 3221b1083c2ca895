"""The models as a library, with the names and calls of their publications: what `from lfm import ...` gives.

Each class holds a model of `lfm.models` and computes nothing itself.  A configuration takes the published names of its
arguments, and the keys of `model:` in a run file.
"""

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lfm.checkpoint.manifest import read_manifest
from lfm.config import Config
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.inference.load import open_model
from lfm.inference.sampling import SamplingConfig, check_prompts, generate
from lfm.inference.text import Continuation, continuations
from lfm.layers.documents import IGNORED_LABEL, Counts
from lfm.medical.asking import MedicalMode
from lfm.medical.config import MedicalConfig
from lfm.medical.questions import Task
from lfm.models import laerc, liquidlm, liquidnet, liquidnn, lstm, transformer
from lfm.models import lfm as lfm_family
from lfm.models.initialization import initialize, materialize
from lfm.models.language_model import FamilyConfig, LanguageModel
from lfm.models.losses import weighted
from lfm.models.registry import build, parse
from lfm.models.state import State
from lfm.objectives.next_token import NEXT_TOKEN


class PublishedConfig(FamilyConfig):
    """A family's configuration whose arguments may have their published names; they can be read by them too.

    Raises UserError, in one sentence, for an argument of no name, with the nearest, and for one of no legal value.
    """

    own: ClassVar[type[FamilyConfig]]
    """The family's configuration itself."""
    published: ClassVar[Mapping[str, str]] = {}
    """Published name -> key, dotted; `not key` where the one is true when the other is false."""
    settled: ClassVar[Mapping[str, Any]] = {}
    """Published name of what cannot be chosen -> the only value."""
    start: ClassVar[Mapping[str, Any]] = {}
    """Values, by dotted key, in place of the family's own defaults."""

    def __init__(self, **arguments: Any) -> None:
        """Each class below repeats this: type checkers would take its fields for the arguments otherwise."""
        super().__init__(**self._tree(arguments))

    def __getattr__(self, name: str) -> Any:
        if name in self.settled:
            return self.settled[name]
        if name not in self.published:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        opposite, key = _split(self.published[name])
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part, None)
        return not value if opposite else value

    @classmethod
    def _tree(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as a tree of the family's own keys."""
        fields, given = cls.own.model_fields, _shown(arguments)
        known = [*cls.published, *cls.settled, *fields]
        tree: dict[str, Any] = {}
        for key, value in cls.start.items():
            _put(tree, key, value, cls.own)
        for name, value in arguments.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                way_out = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
                raise UserError(f"{cls.__name__} has no argument {name} (value {reprlib.repr(value)}); {way_out}")
            if name in cls.settled:
                if value != cls.settled[name]:
                    raise UserError(
                        f"{cls.__name__}: {name}={reprlib.repr(value)} is not provided, only "
                        f"{name}={cls.settled[name]!r}; leave it out"
                    )
            elif name in fields or value is not None:
                opposite, key = _split(cls.published.get(name, name))
                flipped = not value if opposite and isinstance(value, bool) else value
                _put(tree, key, value.model_dump() if isinstance(value, Config) else flipped, cls.own)
        cls.own.from_tree(tree, source=f"{cls.__name__}({given})")
        return tree


def _split(key: str) -> tuple[bool, str]:
    """Whether a key is told by its opposite, and the key."""
    return key.startswith("not "), key.removeprefix("not ")


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in arguments.items())


def _put(tree: dict[str, Any], key: str, value: Any, config: type[FamilyConfig]) -> None:
    """Set a dotted key; of a section that is not there yet, its defaults come first."""
    first, *path = key.split(".")
    if not path:
        tree[first] = value
        return
    if not isinstance(tree.get(first), dict):
        default = config.model_fields[first].default
        tree[first] = default.model_dump() if isinstance(default, Config) else {}
    section = tree[first]
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = value


class LFM3BConfig(PublishedConfig, lfm_family.LFMConfig):
    """LFM-3B, 3,041,788,416 parameters, unless arguments say otherwise.

    As published, there are as many key/value heads as heads where the latter alone are given.
    """

    own: ClassVar[type[FamilyConfig]] = lfm_family.LFMConfig
    start: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 3072,
        "num_layers": 20,
        "untie_embeddings_and_output_weights": True,
        "attention.num_attention_heads": 24,
        "attention.num_query_groups": 8,
        "liquid.kind": "reservoir",
        "ffn.kind": "moe",
        "ffn.moe_ffn_hidden_size": 1152,
    }
    published: ClassVar[Mapping[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "attention.num_attention_heads",
        "num_key_value_heads": "attention.num_query_groups",
        "head_dim": "head_size",
        "intermediate_size": "ffn.moe_ffn_hidden_size",
        "use_liquid_layers": "liquid",
        "liquid_num_reservoirs": "liquid.num_reservoirs",
        "liquid_reservoir_size": "liquid.reservoir_size",
        "liquid_leak_rate": "liquid.leak_rate",
        "liquid_spectral_radius": "liquid.spectral_radius",
        "liquid_input_scaling": "liquid.input_scaling",
        "liquid_sparse_connectivity": "liquid.connectivity",
        "liquid_update_interval": "liquid.interval",
        "liquid_train_reservoir": "liquid.train_reservoir",
        "liquid_norm": "liquid.norm",
        "num_experts": "ffn.num_moe_experts",
        "num_experts_per_token": "ffn.moe_router_topk",
        "expert_capacity_factor": "ffn.moe_capacity_factor",
        "router_aux_loss_coef": "ffn.balance.coeff",
        "max_position_embeddings": "seq_length",
        "rope_theta": "attention.rotary_base",
        "rms_norm_eps": "layernorm_epsilon",
        "initializer_range": "init_method_std",
        "tie_word_embeddings": "not untie_embeddings_and_output_weights",
        "medical_mode": "medical.mode",
        "medical_safety_threshold": "medical.safety_threshold",
    }
    settled: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rope_scaling": None,
        "use_rms_norm": True,
        "use_cache": True,
    }
    medical: MedicalConfig = Field(default=MedicalConfig(), exclude=True)
    """Of what answers with the model; no part of its architecture."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @property
    def use_liquid_layers(self) -> bool:
        return self.liquid is not None

    @classmethod
    def _tree(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(arguments)
        names = {"medical_mode": "mode", "medical_safety_threshold": "safety_threshold"}
        medical = {key: given.pop(name) for name, key in names.items() if name in given}
        medical = {key: value for key, value in medical.items() if value is not None}
        head_dim, has_liquid = given.pop("head_dim", None), given.pop("use_liquid_layers", True)
        if not isinstance(has_liquid, bool):
            raise UserError(f"{cls.__name__}: use_liquid_layers={has_liquid!r} is neither True nor False")
        if not has_liquid:
            given = {name: value for name, value in given.items() if not name.startswith("liquid_")} | {"liquid": None}
        if "num_attention_heads" in given and given.get("num_key_value_heads") is None and "attention" not in given:
            given["num_key_value_heads"] = given["num_attention_heads"]
        tree = super()._tree(given)
        size = lfm_family.LFMConfig.model_validate(tree).head_size if tree["attention"] is not None else None
        if head_dim not in (None, size):
            raise UserError(f"{cls.__name__}: head_dim={head_dim!r} is hidden_size / num_attention_heads = {size}")
        # Of a configuration that says so nothing may be answered as if it did not.
        source = f"{cls.__name__}({_shown(arguments)}) under medical"
        return {**tree, "medical": MedicalConfig.from_tree(medical, source=source).model_dump()}


class LiquidNetConfig(PublishedConfig, liquidnet.LiquidNetConfig):
    own: ClassVar[type[FamilyConfig]] = liquidnet.LiquidNetConfig
    published: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "d_ff": "ffn.ffn_hidden_size",
        "n_layers": "num_layers",
        "max_seq_len": "seq_length",
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class LAERCConfig(PublishedConfig, laerc.LAERCConfig):
    own: ClassVar[type[FamilyConfig]] = laerc.LAERCConfig
    published: ClassVar[Mapping[str, str]] = {
        "vocab": "vocab_size",
        "seq": "seq_length",
        "emb": "hidden_size",
        "layers": "num_layers",
        "resv_mult": "reservoir_multiple",
        "res_mlp_mult": "reservoir_mlp_multiple",
        "ffn_mult": "ffn_multiple",
        "res_radius": "spectral_norm",
        "res_scale_mode": "reservoir_scaling",
        "no_reservoir": "not use_reservoir",
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class LiquidLMConfig(PublishedConfig, liquidlm.LiquidLMConfig):
    own: ClassVar[type[FamilyConfig]] = liquidlm.LiquidLMConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class LiquidNNConfig(PublishedConfig, liquidnn.LiquidNNConfig):
    own: ClassVar[type[FamilyConfig]] = liquidnn.LiquidNNConfig
    published: ClassVar[Mapping[str, str]] = {
        "embed_dim": "hidden_size",
        "max_seq": "max_positions",
        "chunk": "bptt_window",
        "phase_split": "plastic_from",
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class TransformerConfig(PublishedConfig, transformer.TransformerConfig):
    own: ClassVar[type[FamilyConfig]] = transformer.TransformerConfig
    published: ClassVar[Mapping[str, str]] = {
        "num_attention_heads": "attention.num_attention_heads",
        "num_query_groups": "attention.num_query_groups",
        "ffn_hidden_size": "ffn.ffn_hidden_size",
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class LSTMConfig(PublishedConfig, lstm.LSTMConfig):
    own: ClassVar[type[FamilyConfig]] = lstm.LSTMConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class CausalLM(nn.Module):
    """A model of one family: `logits, states = model(ids)`, then `model(more_ids, states=states)`.

    Built from a configuration, or from its arguments, it is initialised, with a seed that torch's generator gives:
    after `torch.manual_seed` it is the same again.  It is made on torch's default device, the meta device included.
    """

    config_class: ClassVar[type[PublishedConfig]]
    eos_token_id: int | None = None
    """What ends a row of `generate`, unless it is told otherwise."""

    def __init__(self, config: FamilyConfig | None = None, **arguments: Any) -> None:
        super().__init__()
        if config is None:
            config = self.config_class(**arguments)
        elif arguments:
            raise UserError(f"{type(self).__name__} takes a configuration or its arguments, not both")
        if not isinstance(config, self.config_class.own):
            name = type(config).__name__
            raise UserError(f"{type(self).__name__} takes a {self.config_class.__name__}, and this is a {name}")
        self.medical: MedicalConfig = getattr(config, "medical", MedicalConfig())
        self.model = _fresh(config)

    @classmethod
    def holding(cls, model: LanguageModel) -> "CausalLM":
        """One that holds this model, in place of a fresh one."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.model, made.medical = model, MedicalConfig()
        return made

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def num_parameters(self) -> int:
        """Trained and frozen, tied ones once, without the padding of the vocabulary."""
        return self.config.count_parameters().total

    def forward(self, input_ids: Any, states: State | None = None) -> tuple[Tensor, Any]:
        """Logits `[B, T, V]` of integer ids `[B, T]` after the prefix of `states`, and the states after them.

        Raises UserError for ids that are none of the vocabulary, and states of another model or batch.
        """
        ids = self._ids(input_ids)
        with _states_that_fit(states):
            return self.model(ids, _states(states))

    def generate(
        self,
        input_ids: Any,
        max_length: int | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        pad_token_id: int = 0,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Ids `[B, T]` and what follows them, `[B, up to max_length]`, on the model's device.

        `max_length` (100 unless something is given) counts the prompt, `max_new_tokens` does not.  A row ends with
        `eos_token_id` (None: the model's own; -1: rows do not end), and is filled up with `pad_token_id`; with the
        model's context all rows end.  Draws follow `torch.manual_seed`.

        Raises UserError for ids that are none of the vocabulary, and values out of range.
        """
        _check_not_medical(self.medical)
        ids = self._ids(input_ids)
        if self.device.type == "meta" or ids.is_meta:
            raise UserError("a model on the meta device has no weights to generate with; build it on cpu or cuda")
        whole = {"max_length": max_length, "max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}
        for name, value in whole.items():
            _check_whole(name, value, may_be_none=True)
        _check_whole("pad_token_id", pad_token_id)
        if not isinstance(do_sample, bool):
            raise UserError(f"do_sample={do_sample!r} is neither True nor False")
        check_prompts(ids.tolist(), self.config.context_limit)
        if max_length is not None and max_new_tokens is not None:
            raise UserError(f"max_length={max_length} and max_new_tokens={max_new_tokens} exclude each other; give one")
        if max_new_tokens is None:
            max_length, prompt = 100 if max_length is None else max_length, ids.shape[1]
            if max_length <= prompt:
                raise UserError(
                    f"max_length={max_length} counts the prompt, which has {prompt} ids; give {prompt + 1} or more, or "
                    "max_new_tokens"
                )
            max_new_tokens = max_length - prompt
        tree = {"max_new_tokens": max_new_tokens, "greedy": not do_sample, "temperature": temperature, "top_k": top_k}
        tree |= {"top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
        tree["seed"] = int(torch.randint(2**40, (), device="cpu")) if do_sample else 0
        sampling = SamplingConfig.from_tree(tree, source="generate()")
        end = self.eos_token_id if eos_token_id is None else eos_token_id
        was_training = self.model.training
        self.model.eval()
        try:
            steps = list(generate(self.model, ids.tolist(), sampling, end_of_document=end))
        finally:
            self.model.train(was_training)
        new = [[pad_token_id if token is None else token for token in step] for step in steps]
        return torch.cat([ids, torch.tensor(new, device=ids.device).T], dim=1)

    def _ids(self, given: Any, name: str = "input_ids") -> Tensor:
        """Integer ids `[B, T]` on the model's device.  Raises UserError for what is none."""
        try:
            ids = torch.as_tensor(given)
        except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, texts
            raise UserError(f"{name} are no rows of ids ({error}); give integers [batch, length]") from None
        if ids.numel() == 0:
            raise UserError(f"{name} of shape {list(ids.shape)} hold no id: the prompt is empty; give one or more")
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UserError(f"{name} are {ids.dtype} of shape {list(ids.shape)}; give integers [batch, length]")
        if not ids.is_meta:
            low, high, size = int(ids.min()), int(ids.max()), self.config.vocab_size
            if low < 0 or high >= size:
                raise UserError(
                    f"{name} hold {low if low < 0 else high}, and the vocabulary has {size} ids, 0 to {size - 1}"
                )
        return ids.to(self.device, torch.long)


def _check_whole(name: str, value: Any, *, may_be_none: bool = False) -> None:
    if not (may_be_none and value is None) and (type(value) is not int or not -1 <= value < 2**63):
        raise UserError(f"{name}={reprlib.repr(value)} is no whole number of that size; give an int")


def _fresh(config: FamilyConfig) -> LanguageModel:
    """The initialised model of a configuration, on the default device."""
    own = parse(config.model_dump(), source=type(config).__name__)
    device = torch.get_default_device()
    if device.type == "meta":
        return build(own)
    with torch.device("cpu"):
        model = materialize(lambda: build(own), device=device, dtype=torch.get_default_dtype())
        initialize(model, seed=int(torch.randint(2**62, ())))
    return model


@contextmanager
def _states_that_fit(given: Any) -> Iterator[None]:
    """Raises UserError for states of another model or batch."""
    try:
        yield
    except ValueError as error:
        if given is None:
            raise
        raise UserError(f"states do not go with these ids and this model ({error}); give what they led to") from None


def _states(given: Any) -> State | None:
    if given is not None and not isinstance(given, State):
        raise UserError(f"states={reprlib.repr(given)} are none; give what the model returned with the ids before")
    return given


@dataclass
class LFM3BOutput:
    """What LFM3BForCausalLM computes."""

    logits: Tensor
    """`[B, T, V]`."""
    loss: Tensor | None
    """With labels: mean cross entropy in nats, and the balance and z losses of the routers."""
    states: Any
    """After the last id, for the ids that follow."""


class LFM3BForCausalLM(CausalLM):
    """LFM of any dimensions; those of LFM-3B are `LFM3BConfig()`."""

    config_class: ClassVar[type[PublishedConfig]] = LFM3BConfig
    eos_token_id = 2

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Any, attention_mask: Any = None, labels: Any = None, states: State | None = None
    ) -> LFM3BOutput:
        """Of integer ids `[B, T]` after the prefix of `states`.

        `labels [B, T]` are the ids again, -100 where one is no label; each is predicted from those before it in the
        same call.  Rows have no filling: an `attention_mask` is of ones.  Raises UserError for ids or labels that are
        none of the vocabulary, and a mask that hides some.
        """
        ids = self._ids(input_ids)
        if attention_mask is not None and not torch.as_tensor(attention_mask).bool().all():
            raise UserError("attention_mask hides some ids, and rows have no filling here; give each row by itself")
        assert isinstance(self.model, lfm_family.LFM)
        with _states_that_fit(states):
            hidden, after, found = self.model.advance_and_diagnose(ids, _states(states))
        loss = None
        if labels is not None:
            labels = self._labels(labels).to(ids.device)
            is_label = labels != IGNORED_LABEL
            if labels.shape != ids.shape or not is_label[:, 1:].any():
                raise UserError(
                    f"labels of shape {list(labels.shape)} with {int(is_label.sum())} ids hold none to predict; give "
                    f"the {list(ids.shape)} input_ids, -100 where one is no label"
                )
            self._ids(labels.where(is_label, 0), "labels")
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
            sums = {"cross_entropy": self.model.head.cross_entropy(hidden, labels)}
            sums |= found.sums(self.config.num_layers)
            counts = Counts(labels=int(is_label[:, 1:].sum()), rows=len(ids), documents=len(ids))
            loss = weighted((*NEXT_TOKEN.terms, *self.config.terms), sums, counts)
        return LFM3BOutput(self.model.logits(hidden), loss, after)

    def _labels(self, given: Any) -> Tensor:
        """Integers.  Raises UserError for what is none."""
        try:
            labels = torch.as_tensor(given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"labels are no rows of ids ({error}); give integers [batch, length]") from None
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise UserError(f"labels are {labels.dtype}; give integers, -100 where one is no label")
        return labels.long()


class LiquidNet(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = LiquidNetConfig


class LAERC(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = LAERCConfig


class LiquidLM(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = LiquidLMConfig


class MiniLiquidGPT(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = LiquidNNConfig


class Transformer(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = TransformerConfig


class LSTM(CausalLM):
    config_class: ClassVar[type[PublishedConfig]] = LSTMConfig


_CLASSES: tuple[type[CausalLM], ...] = (LFM3BForCausalLM, LiquidNet, LAERC, LiquidLM, MiniLiquidGPT, Transformer, LSTM)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model with its tokenizer; see `load`."""

    model: CausalLM
    """In evaluation mode."""
    tokenizer: Tokenizer
    checkpoint: Path

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompts: str | Sequence[int], **sampling: Any
    ) -> Continuation: ...
    @overload
    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **sampling: Any) -> list[Continuation]: ...
    def generate(self, prompts: Any, **sampling: Any) -> Any:
        """Continue a prompt, or several: texts or ids; `text`, `tokens` and `finish_reason` of what follows each.

        `sampling` are the keys of SamplingConfig; prompt i takes the seed after i others, and what it becomes does not
        depend on them.  Raises UserError for a prompt that is empty, or an illegal value, and in medical mode.
        """
        _check_not_medical(self.model.medical)
        config = SamplingConfig.from_tree(sampling, source="generate()")
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        if not isinstance(prompts, (str, list, tuple)):
            raise UserError(
                f"prompts={reprlib.repr(prompts)} are neither text nor ids; give a text, ids, or a list of either"
            )
        is_one = isinstance(prompts, str) or not prompts or isinstance(prompts[0], int)
        several = [prompts] if is_one else prompts
        ids = [self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in several]
        check_prompts(ids, self.model.config.context_limit)
        ids = [self.model._ids([prompt])[0].tolist() for prompt in ids]
        each = [config.of_prompt(number) for number in range(len(ids))]
        *_, found = continuations(self.model.model, self.tokenizer, ids, each)
        return found[0] if is_one else found

    def ask(self, prompts: str | Sequence[str], options: Sequence[str] = ()) -> Any:
        """In medical mode, a `Reply` to a prompt, or several: an answer with its probability, or None and a reason.

        `options` are answers to choose from; without them the answer is free.  Raises UserError unless the mode is on
        and the checkpoint has calibrated heads for such answers.
        """
        if not self.model.medical.mode:
            raise UserError("ask() is of medical mode; load the checkpoint with medical_mode=True, or use generate()")
        task: Task = "choice" if options else "text"
        mode = MedicalMode(self.model.model, self.tokenizer, self.checkpoint, self.model.medical, {task})
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        found = mode.ask(several, [options if isinstance(options, str) else tuple(options)] * len(several))
        return found[0] if isinstance(prompts, str) else found


def _check_not_medical(medical: MedicalConfig) -> None:
    if medical.mode:
        raise UserError(
            "medical_mode=True: text without a calibrated probability is not given; train the model, fit and calibrate "
            "its heads (lfm medical fit, calibrate), and use load(run, medical_mode=True).ask(prompt)"
        )


def load(
    path: Path | str,
    device: str | torch.device = "auto",
    *,
    medical_mode: bool | None = None,
    medical_safety_threshold: float | None = None,
) -> Loaded:
    """The model of a run's newest checkpoint, or of a checkpoint: `load("runs/NAME")`.

    `medical_mode` and its threshold are those of the run's configuration unless they are given.

    `device` is auto (a GPU if one is visible), cpu or cuda; weights are in `working_dtype` of it.  Raises UserError,
    naming the file, for a folder without a checkpoint or one that is damaged.
    """
    if not isinstance(path, (str, Path)):
        raise UserError(f"{path!r} is no path; give a run or checkpoint folder, as in load('runs/NAME')")
    name = str(device)
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r} is none of auto, cpu, cuda")
    model, tokenizer, checkpoint = open_model(path, device=name)
    (family,) = [family for family in _CLASSES if isinstance(model.config, family.config_class.own)]
    holder = family.holding(model)
    holder.eos_token_id = tokenizer.eod_id
    tree = dict(read_manifest(checkpoint, warn=False)["config"].get("medical") or {})
    given = {"mode": medical_mode, "safety_threshold": medical_safety_threshold}
    tree |= {key: value for key, value in given.items() if value is not None}
    holder.medical = MedicalConfig.from_tree(tree, source="load() under medical")
    return Loaded(holder.eval(), tokenizer, checkpoint)
