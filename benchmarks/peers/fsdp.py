"""Our own model under torch's FSDP2: `torchrun --nproc-per-node N benchmarks/peers/fsdp.py [key.path=value ...]`.

The same module, rows, losses and precision as ours with ZeRO-1: fp32 masters cut over the processes, bf16 in forward
and backward, gradients accumulated and reduced in fp32 once a step, the fused AdamW.  Every layer is a unit; weights
stay whole between forward and backward (`reshard_after_forward=False`).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from benchmarks.model.measure import rows_of
from benchmarks.peers.loop import parse, record, timed_steps
from lfm.errors import UserError
from lfm.exits import command
from lfm.job.process import Process
from lfm.layers.documents import Counts, Rows
from lfm.models.decoder import Decoder
from lfm.models.initialization import initialize, materialize
from lfm.models.language_model import Recompute
from lfm.models.losses import weighted
from lfm.models.registry import build
from lfm.training.run import RunConfig


class Loss(nn.Module):
    """A micro-batch's share of the loss of a whole step, as the call that FSDP surrounds."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        super().__init__()
        self.objective = run.objective
        self.recompute: Recompute = run.training.recompute
        self.model = materialize(lambda: build(run.model), device=device, dtype=torch.float32)
        initialize(self.model, run.seed)
        self.model.train()

    def forward(self, rows: Rows, counts: Counts) -> Tensor:
        losses = self.model.losses(rows, self.objective, recompute=self.recompute)
        return weighted((*self.objective.terms, *self.model.config.terms), losses.sums, counts)


def sharded(run: RunConfig, device: torch.device) -> FSDPModule:
    loss = Loss(run, device)
    if not isinstance(loss.model, Decoder):
        raise UserError(f"model.kind={run.model.kind} has no layers that FSDP could cut; give a decoder, such as lfm")
    policy = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in loss.model.layers.values():
        fully_shard(block, mp_policy=policy, reshard_after_forward=False)
    return fully_shard(loss, mp_policy=policy, reshard_after_forward=False)


@command
def main() -> None:
    run, flags = parse("Train our model under torch's FSDP2, and time it.")
    process, training = Process.from_environment(), run.training
    if training.global_batch_size % (process.world_size * training.micro_batch_size):
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is no multiple of {process.world_size} processes "
            f"x training.micro_batch_size={training.micro_batch_size}; set one of them"
        )
    device = torch.device("cuda", process.local_rank) if run.device.type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if process.world_size == 1:
        raise UserError("there is one process; start several: torchrun --nproc-per-node N benchmarks/peers/fsdp.py")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))  # initial values are drawn on the host
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = sharded(run, device)
    assert isinstance(model, nn.Module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    rows = training.global_batch_size // process.world_size
    stream = rows_of(run, slice(process.rank * rows, (process.rank + 1) * rows), random_ids=flags.random_ids)
    attended: list[int] = []

    def step() -> float:
        batch = stream.next().to(device)
        own = batch.documents.counts
        numbers = [own.labels, own.rows, own.documents, batch.documents.attended_pairs]
        total = torch.tensor(numbers, device=device, dtype=torch.float64)
        dist.all_reduce(total)
        labels, all_rows, documents, pairs = (int(number) for number in total.tolist())
        attended.append(pairs)
        losses, starts = [], range(0, rows, training.micro_batch_size)
        for start in starts:
            model.set_requires_gradient_sync(start == starts[-1])
            # FSDP takes the mean over processes, and this is a sum over them.
            loss = model(batch.slice(start, start + training.micro_batch_size), Counts(labels, all_rows, documents))
            (loss * process.world_size).backward()
            losses.append(loss.detach())
        if run.optimizer.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        whole = torch.stack(losses).sum().double()
        dist.all_reduce(whole)
        return float(whole)

    timed = timed_steps(step, flags, device)
    stream.close()
    if process.rank == 0:
        flops = run.model.flops_per_token(attended=attended[-1] / (training.global_batch_size * run.model.seq_length))
        name = f"FSDP2 of torch {torch.__version__}"
        record(name, run, timed, flags, flops_per_token=flops, world=process.world_size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
