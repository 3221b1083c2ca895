"""megatron-core's tensor parallelism and expert exchange as parts of the plain model.

megatron-core gathers and scatters the first dimension.  Layers are batch-first, so that is the flat `B * T` here: a
process's share are consecutive tokens of the rows one after the other, and nothing is transposed.
"""

import warnings
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfm.kernels.embedding import embedding
from lfm.layers.parts import Parts, TokenDispatcher
from lfm.layout.layout import Layout
from lfm.models.registry import ModelConfig
from lfm.parallel.cut_linear import column_linear, row_linear
from lfm.parallel.dispatch import AllToAll, CutByWidth
from lfm.parallel.groups import Groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mappings
    from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(model: ModelConfig, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's config, for what its linears and schedules read of it; attention and experts are ours."""
    experts = model.expert_divides().values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            # It wants heads of every model, and as many as it can share out.
            num_attention_heads=layout.tensor,
            num_moe_experts=next(iter(experts), None),
            moe_token_dispatcher_type="alltoall",
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            # The stages are ours and may be uneven; megatron-core would otherwise insist on equal ones.
            pipeline_model_parallel_layout=None,
            num_layers_in_first_pipeline_stage=None,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            sequence_parallel=layout.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            # Weights are made where the caller says (the meta device) and filled by `initial_tensor`.
            use_cpu_initialization=True,
            perform_initialization=False,
            add_bias_linear=False,
            gated_linear_unit=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            variable_seq_lengths=False,
            # Transfers are posted by a communicator of our own, one by one.
            batch_p2p_comm=False,
            # Only the interleaved schedule can go on before what it has posted is there.
            overlap_p2p_comm=layout.virtual_pipeline > 1,
            overlap_p2p_comm_warmup_flush=layout.virtual_pipeline > 1,
        )


class MegatronParts(Parts):
    def __init__(self, groups: Groups, config: TransformerConfig) -> None:
        layout = groups.layout
        self.groups, self.config = groups, config
        self.tensor_size, self.tensor_rank = layout.tensor, groups.tensor.rank()
        self.tensor_group = groups.tensor if layout.tensor > 1 else None

    def column_linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        if self.tensor_group is None:
            return super().column_linear(in_features, out_features, bias=bias)
        return _Column(
            in_features,
            out_features,
            config=self.config,
            init_method=_no_init,
            bias=bias,
            gather_output=False,
            tp_group=self.tensor_group,
        )

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        if self.tensor_group is None:
            return super().row_linear(in_features, out_features, bias=bias)
        return _Row(
            in_features,
            out_features,
            config=self.config,
            init_method=_no_init,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tensor_group,
        )

    def vocabulary_embedding(self, num_embeddings: int, hidden_size: int) -> nn.Embedding:
        if self.tensor_group is None:
            return super().vocabulary_embedding(num_embeddings, hidden_size)
        embedding = _Embedding(
            num_embeddings,
            hidden_size,
            init_method=_no_init,
            config=self.config,
            reduce_scatter_embeddings=True,
            tp_group=self.tensor_group,
        )
        return cast(nn.Embedding, embedding)

    def output_projection(self, hidden_size: int, num_embeddings: int) -> nn.Linear:
        return super().output_projection(hidden_size, num_embeddings // self.tensor_size)

    def shared(self, weight: Tensor) -> Tensor:
        if self.tensor_group is None:
            return weight
        return mappings.copy_to_tensor_model_parallel_region(weight, group=self.tensor_group)

    def whole_sequence(self, x: Tensor, *, partial_gradients: bool) -> Tensor:
        if self.tensor_group is None:
            return x
        whole = mappings.gather_from_sequence_parallel_region(
            x.flatten(0, 1), tensor_parallel_output_grad=partial_gradients, group=self.tensor_group
        )
        return whole.unflatten(0, (len(x), -1))

    def gather_units(self, x: Tensor) -> Tensor:
        if self.tensor_group is None:
            return x
        return mappings.gather_from_tensor_model_parallel_region(x, group=self.tensor_group)

    def own_units(self, x: Tensor) -> Tensor:
        if self.tensor_group is None:
            return x
        return mappings.scatter_to_tensor_model_parallel_region(x, group=self.tensor_group)

    def token_dispatcher(self, num_experts: int) -> TokenDispatcher:
        if self.groups.layout.expert > 1:
            return AllToAll(num_experts, self.groups)
        if self.tensor_group is not None:
            return CutByWidth(num_experts, self)
        return TokenDispatcher(num_experts)


class _Column(ColumnParallelLinear):
    weight: nn.Parameter
    tp_group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return column_linear(x, self.weight, self.bias, self.tp_group)


class _Row(RowParallelLinear):
    tp_group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = row_linear(x, self.weight, self.tp_group)
        # Every process adds the bias to its own tokens alone.
        bias = self.bias
        return y if bias is None else y + mappings.copy_to_tensor_model_parallel_region(bias, group=self.tp_group)


class _Embedding(VocabParallelEmbedding):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        own = ids.flatten() - self.vocab_start_index
        elsewhere = (own < 0) | (own >= len(self.weight))
        # Ids of other processes take some row and add zeros to its gradient: not all the same, whose sum would be long.
        summands = embedding(own % len(self.weight), self.weight).masked_fill(elsewhere[:, None], 0)
        x = mappings.reduce_scatter_to_sequence_parallel_region(summands, group=self.tp_group)
        return x.unflatten(0, (len(ids), -1))


def _no_init(weight: Tensor) -> Tensor:
    return weight
