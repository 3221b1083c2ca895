"""Model chunks under megatron-core's pipeline schedules."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfm.layers.documents import UNITS, Rows
from lfm.models.decoder import Decoder
from lfm.models.language_model import LanguageModel, Recompute
from lfm.models.losses import Losses, Objective, Term
from lfm.objectives.next_token import NEXT_TOKEN
from lfm.parallel.transfers import Transfers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # The schedules import it at their first call, which would then count, and warn, in every process.
    import megatron.core.transformer.multi_token_prediction  # noqa: F401
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig


class Stage(nn.Module):
    """One chunk of the model: what a schedule calls once a micro-batch, and where its losses are kept.

    Called with rows, it gives what the next stage takes, or at the end of the model what the schedule differentiates.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, piece: Any, config: TransformerConfig, *, virtual_stage: int | None, recompute: Recompute):
        super().__init__()
        self.piece, self.config, self.vp_stage = piece, config, virtual_stage
        self.recompute: Recompute = recompute
        self.objective: Objective = NEXT_TOKEN
        self.factors: dict[str, Tensor] | None = None
        """By name of a term, what makes this process's micro-batch sums its share of the step's loss; None:
        evaluation."""
        self.losses: list[Losses] = []
        """Of each micro-batch since the last `begin`; the objective's terms on the last chunk alone."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """All summands of the loss, the objective's first."""
        return (*self.objective.terms, *self.piece.config.terms)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Modules that the forward pass calls in order, each with its own weights; none where it is not made so."""
        return ()

    @property
    def scheduled_terms(self) -> tuple[Term, ...]:
        """Those of the last stage's output, which the schedule divides by the micro-batches and differentiates."""
        return self.objective.terms

    def begin(self, objective: Objective, counts: Tensor | None, *, divisor: int = 1, micro_batches: int = 1) -> None:
        """A step of as many labels, rows and documents, on the device, or without `counts` an evaluation.

        `divisor`: what the sum of gradients over processes is divided by.
        """
        self.objective, self.factors = objective, None
        self.losses.clear()
        self.piece.train(counts is not None)
        if counts is not None:
            shares = {term.name: divisor * micro_batches for term in self.scheduled_terms}
            of_unit = dict(zip(UNITS, counts.double().clamp(min=1), strict=True))
            self.factors = {t.name: shares.get(t.name, divisor) * t.weight / of_unit[t.per] for t in self.terms}

    def set_input_tensor(self, tensor: Any) -> None:
        """What the stage before gave; the schedule calls it on the first stage too."""

    def _weighted(self, sums: dict[str, Tensor]) -> Tensor:
        of = self.factors
        first, *rest = [value * of[name].to(value.dtype) if of else value for name, value in sums.items()]
        for value in rest:
            first = first + value
        return first


class DecoderStage(Stage):
    """A piece of a decoder: it takes and gives hidden states, of which the schedule only knows that they have the shape
    `[T, B, D]`: they lie in memory as `[B, T, D]`."""

    piece: Decoder
    received: Tensor | None = None

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.piece.layers.values()]

    def set_input_tensor(self, tensor: Any) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, rows: Rows) -> Tensor:
        if self.piece.is_first:
            x = self.piece.embed(rows.ids)
        else:
            assert self.received is not None
            x = self.received.view(len(rows.ids), -1, self.received.shape[-1])
        recompute = self.recompute if self.factors is not None else "none"
        x, _, found = self.piece.run(x, self.piece.context(rows, x.dtype, recompute=recompute))
        sums = found.sums(self.piece.config.num_layers)
        if self.factors is not None and sums:
            x = _Attach.apply(x, self._weighted(sums))
        if self.piece.is_last:
            own = self.piece.sums(x, rows, self.objective)
            # The schedule divides its loss by the number of micro-batches, in place: the sums are kept apart.
            sums |= {name: value.detach().clone() for name, value in own.items()}
            x = self._weighted(own)
        else:
            x = x.contiguous().view(x.shape[1], x.shape[0], -1)
        self.losses.append(Losses({name: value.detach() for name, value in sums.items()}, found.measure))
        return x


class WholeStage(Stage):
    """All of a model that has no pieces.

    Where a row is several passes, each is differentiated here, before the next; the schedule gets their sum as a value.
    """

    piece: LanguageModel

    def __init__(self, piece: LanguageModel, config: TransformerConfig, *, recompute: Recompute):
        super().__init__(piece, config, virtual_stage=None, recompute=recompute)
        self.one_pass = piece.config.row_is_one_pass
        assert self.one_pass or not piece.config.measured, "what is measured is of one pass"

    @property
    def scheduled_terms(self) -> tuple[Term, ...]:
        return self.terms if self.one_pass else ()

    def forward(self, rows: Rows) -> Tensor:
        found: list[Losses] = []
        loss = torch.zeros((), device=rows.ids.device)
        recompute = self.recompute if self.factors is not None else "none"
        for losses in self.piece.loss_parts(rows, self.objective, recompute=recompute):
            part = self._weighted(losses.sums)
            if self.factors is not None and not self.one_pass:
                part.backward()
                part = part.detach()
            loss = loss + part
            found.append(Losses({name: value.detach() for name, value in losses.sums.items()}, losses.measure))
        sums = {name: torch.stack([each.sums[name] for each in found]).double().sum() for name in found[0].sums}
        self.losses.append(Losses(sums, found[0].measure))
        # A backward pass of its own, which reaches nothing.
        return loss if self.one_pass else loss.requires_grad_(self.factors is not None) * 1.0


def make_stage(
    piece: LanguageModel, config: TransformerConfig, *, virtual_stage: int | None, recompute: Recompute
) -> Stage:
    if isinstance(piece, Decoder):
        return DecoderStage(piece, config, virtual_stage=virtual_stage, recompute=recompute)
    return WholeStage(piece, config, recompute=recompute)


class _Attach(torch.autograd.Function):
    """`x`, in whose backward the scalar `term` is differentiated too: how a loss of an early stage takes part."""

    @staticmethod
    def forward(ctx, x, term):  # type: ignore[override]
        ctx.save_for_backward(term)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (term,) = ctx.saved_tensors
        return grad, torch.ones_like(term)


def run_schedule(
    stages: Sequence[nn.Module],
    micro_batches: Sequence[Rows],
    *,
    transfers: Transfers | None,
    seq_length: int,
    forward_only: bool,
    on_micro_batch: Callable[[int], None] = lambda index: None,
) -> None:
    """1F1B, interleaved or plain, over this process's chunks; gradients are left where the stages put them.

    `transfers`: to and from the other stages, None where one stage is all.
    """

    def forward_step(iterator: Iterator[tuple[int, Rows]], stage: nn.Module, *_: Any):
        index, micro_batch = next(iterator)
        on_micro_batch(index)
        if transfers is not None:
            transfers.forward_passes -= 1
        return stage(micro_batch), lambda output: (output, {})

    if transfers is not None:
        transfers.begin(forward_passes=len(micro_batches) * len(stages))
    iterators = [iter(list(enumerate(micro_batches))) for _ in stages]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(stages) > 1 else iterators[0],
        model=list(stages) if len(stages) > 1 else stages[0],
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=len(micro_batches[0].ids),
        forward_only=forward_only,
        p2p_communicator=transfers,
        pg_collection=None if transfers is None else transfers.collection,
    )
    if transfers is not None:
        transfers.finish()
