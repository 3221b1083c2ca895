"""What every model family offers: the interface that training, generation and their tests are written against."""

import abc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm.config import Config
from lfm.layers.cost import Cost
from lfm.layers.documents import Documents, Rows
from lfm.layers.head import Head
from lfm.models.initialization import initialize
from lfm.models.losses import Losses, Measured, Objective, Term
from lfm.models.state import State

Recompute = Literal["none", "selective", "full"]


class FamilyConfig(Config, abc.ABC):
    """Base of every family's configuration, which adds `kind` and its dimensions, `seq_length` and `vocab_size` among
    them.
    """

    if TYPE_CHECKING:  # fields of every family's own, with its help texts and defaults
        kind: Any
        hidden_size: Any
        num_layers: Any
        seq_length: Any
        vocab_size: Any

    recompute_choices: ClassVar[tuple[Recompute, ...]] = ("none",)
    """Values of training.recompute that the family knows."""
    changeable: ClassVar[frozenset[str]] = frozenset({"seq_length"})
    """Keys, dotted, that a run may change when it goes on from a checkpoint: no tensor depends on them."""

    row_is_one_pass: ClassVar[bool] = True
    """Whether a row's loss is differentiated as a whole, not in parts one after the other."""

    @property
    def lays_out(self) -> frozenset[str]:
        """What the model can be spread over: data, tensor, pipeline, expert, the sizes of a layout."""
        return frozenset({"data"})

    @property
    def has_wide_parameters(self) -> bool:
        """Whether some parameters stay in fp32 where the others are in bf16."""
        return False

    def tensor_divides(self, *, experts_are_whole: bool = False) -> dict[str, int]:
        """What parallel.tensor must divide, by its key or keys; `experts_are_whole`: no expert is cut by width."""
        return {}

    def expert_divides(self) -> dict[str, int]:
        """What parallel.expert must divide, by its key."""
        return {}

    def needs_host(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the device alone can make no training step in `dtype`, as words after "because"; None: it may."""
        return None

    @property
    def context_limit(self) -> int | None:
        """The most tokens that prompt and continuation may reach; None where the state does not grow with them."""
        return None

    @property
    def reservoir_layers(self) -> tuple[int, ...]:
        """Layers whose chunked reservoirs adapt their warm-up while training."""
        return ()

    @property
    def reservoir_warmup(self) -> int:
        """Warm-up of those layers at the first step."""
        return 0

    @property
    def is_tied(self) -> bool:
        """Whether the output projection is the embedding."""
        return True

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as it is stored."""
        return cast(Any, self).vocab_size

    @property
    def terms(self) -> tuple[Term, ...]:
        """Summands of the loss that layers add to an objective's."""
        return ()

    @property
    def measured(self) -> tuple[Measured, ...]:
        """What layers are measured by while they train."""
        return ()

    def lr_multiple(self, name: str) -> float:
        """Of the parameter with this run-time name: its learning rate over `optimizer.lr`."""
        return 1.0

    @property
    def run_name(self) -> str:
        """What `name: auto` means."""
        return getattr(self, "kind", "run")

    @property
    def counts_padding(self) -> bool:
        """Whether counts take the padded rows of the vocabulary for parameters."""
        return False

    @property
    def norm_parameters(self) -> int:
        """Of the final norm."""
        return cast(Any, self).hidden_size

    @property
    def head_parameters(self) -> int:
        """Of an output projection that is not the embedding, without padding."""
        c = cast(Any, self)
        return 0 if self.is_tied else c.vocab_size * c.hidden_size

    @abc.abstractmethod
    def layer_cost(self, layer: int, attended: float | None = None) -> Cost:
        """What one layer takes.

        `attended`: mean number of keys a query sees, for families with attention; by default the causal mean
        (seq_length + 1) / 2 of rows that are one document.
        """

    def count_parameters(self) -> "ParameterCounts":
        """Exact counts, tied tensors once, frozen sparse matrices as dense ones."""
        c = cast(Any, self)
        layers = [self.layer_cost(layer) for layer in range(c.num_layers)]
        embedding = (self.padded_vocab_size if self.counts_padding else c.vocab_size) * c.hidden_size
        padding = 0 if self.counts_padding else (self.padded_vocab_size - c.vocab_size) * c.hidden_size
        vocabulary = embedding + self.head_parameters
        trainable = vocabulary + self.norm_parameters + sum(layer.trainable for layer in layers)
        frozen = sum(layer.frozen for layer in layers)
        active = trainable - sum(layer.idle for layer in layers)
        return ParameterCounts(
            total=trainable + frozen,
            trainable=trainable,
            frozen=frozen,
            active=active,
            active_non_embedding=active - vocabulary,
            padding=padding * (1 if self.is_tied else 2),
        )

    def flops_per_token(self, attended: float | None = None) -> float:
        """Useful FLOPs of a training token, forward and backward: a multiply and an add are two.

        Recomputation is not counted; frozen matrices need no weight gradient.  `attended` as for `layer_cost`.
        """
        layers = range(cast(Any, self).num_layers)
        return sum(self.layer_cost(layer, attended).flops for layer in layers) + self.head_flops

    @property
    def head_flops(self) -> float:
        """The part of `flops_per_token` that the output projection takes."""
        c = cast(Any, self)
        return 6.0 * c.vocab_size * c.hidden_size


@dataclass(frozen=True)
class ParameterCounts:
    """`active` is trainable parameters that one token uses; `padding` (unused vocabulary rows) is in no other count."""

    total: int
    trainable: int
    frozen: int
    active: int
    active_non_embedding: int
    padding: int = 0

    def report(self) -> str:
        return (
            f"parameters: total {self.total:,}  trainable {self.trainable:,}  frozen {self.frozen:,}  "
            f"active {self.active:,} (non-embedding {self.active_non_embedding:,})  "
            f"vocabulary padding {self.padding:,} (not counted)"
        )


class _Initialized(abc.ABCMeta):
    """A model built from its configuration alone is ready to compute; one on the meta device, or in parts, is not."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        if not kwargs and not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            initialize(model, seed=0)
        return model


class LanguageModel(nn.Module, metaclass=_Initialized):
    """A next-token model with functional state.

    Parameters are made on whatever device is current (the meta device included); `initialize` fills them, and every
    buffer, from (seed, name), as building a model does with seed 0.  A buffer is a frozen tensor, never trained and
    saved with every checkpoint; or one of those that its module lists in `moving_buffers`, which training moves between
    steps without a gradient, and which the module's `start()` fills.  What is derived from parameters or buffers is
    neither, and is not kept on the module across steps.
    """

    config: Any
    embedding: nn.Embedding
    head: Head
    evaluation_modes: ClassVar[tuple[str, ...]] = ()
    """Ways to run the same weights that every validation tells apart; see `evaluating`."""
    evaluation_mode: str = ""
    """Which of them training uses now."""

    @abc.abstractmethod
    def advance(
        self, ids: Int[Tensor, "B T"], state: Any = None, documents: Documents | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """Final hidden states of `ids` after the prefix of `state` (None: no prefix), and the state after them.

        `documents` packs documents that do not see each other; it goes with `state=None` only.  Any split of a
        sequence into calls gives the same, whatever stands beside it, in every family and with every backend: where
        training may approximate (chunked reservoirs), this does not.  Raises ValueError for the state of another model
        or batch.
        """

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Of `vocab_size` ids: padded ones have none."""
        return self.head.logits(hidden)

    @abc.abstractmethod
    def empty_state(self, batch: int) -> State | None:
        """The state of the empty prefix, which `state=None` means; None where it cannot be written down."""

    @abc.abstractmethod
    def loss_parts(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Iterator[Losses]:
        """Losses of packed rows in summands, each differentiated before the next is asked for.

        One summand for most families; truncated backpropagation yields one a window, so that memory is a window's.
        """

    @abc.abstractmethod
    def initial_tensor(self, name: str, shape: Sequence[int], seed: int) -> Tensor:
        """The whole initial value of the tensor with this global name, at least fp32 on the CPU, from (seed, name)."""

    @property
    def liquids(self) -> dict[int, Any]:
        """Modules of `config.reservoir_layers` by layer; their `warmup` is set between steps."""
        return {}

    @property
    def balances(self) -> dict[int, Any]:
        """What routers are balanced by, by layer; their buffers move between steps."""
        return {}

    def start_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (0-based) of a run of `total_steps`: phases of training switch here."""

    def evaluating(self, mode: str) -> AbstractContextManager[None]:
        """Within it the model runs in one of `evaluation_modes`."""
        assert not mode, mode
        return nullcontext()

    def forward(
        self, ids: Int[Tensor, "B T"], state: Any = None, doc_lengths: Sequence[Sequence[int]] | None = None
    ) -> tuple[Float[Tensor, "B T V"], Any]:
        """Logits for every position, and the state after the last one.

        `state=None` is the empty prefix.  `doc_lengths` (row by row, summing to T) packs documents that do not see
        each other; it goes with `state=None` only, because a document cannot begin before the row does.
        """
        if state is not None and doc_lengths is not None:
            raise ValueError("doc_lengths and state exclude each other: a streamed sequence is one document")
        documents = Documents.from_lengths(doc_lengths, ids.device) if doc_lengths is not None else None
        hidden, state = self.advance(ids, state, documents)
        return self.logits(hidden), state

    def losses(self, rows: Rows, objective: Objective, *, recompute: Recompute = "none") -> Losses:
        """The sum of `loss_parts` as one value; with gradients, it holds the memory of all of them."""
        parts = list(self.loss_parts(rows, objective, recompute=recompute))
        if len(parts) == 1:
            return parts[0]
        return Losses({name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums})
