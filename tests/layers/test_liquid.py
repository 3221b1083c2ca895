import copy

import pytest
import torch

from lfm.errors import UserError
from lfm.kernels.reservoir import RecurrenceStats, cluster, make_reservoir
from lfm.layers.liquid import Liquid, ReservoirConfig

needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def make_layer(hidden_size, **options):
    config = ReservoirConfig(**({"num_reservoirs": 2, "reservoir_size": 16} | options))
    layer, generator = Liquid(hidden_size, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        matrices = [make_reservoir(config.reservoir_size, 0.2, 0.9, generator) for _ in range(config.num_reservoirs)]
        layer.reservoirs.copy_(torch.stack(matrices))
        if config.train_reservoir:
            layer.connections.copy_(layer.reservoirs != 0)
    return layer


def test_a_scaled_drive_is_that_of_a_scaled_projection():
    plain, scaled = make_layer(8).double(), make_layer(8, input_scaling=0.5).double()
    with torch.no_grad():
        plain.input.weight.mul_(0.5)
        plain.input.bias.mul_(0.5)
    u = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(scaled(u)[0], plain(u)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", ["full", 0])
def test_a_chunk_length_is_a_number_or_fill(value):
    assert ReservoirConfig.from_tree({"chunk_length": "fill"}, source="test").chunk_length == "fill"
    with pytest.raises(UserError, match="chunk_length"):
        ReservoirConfig.from_tree({"chunk_length": value}, source="test")


def test_a_trained_reservoir_gets_no_gradient_where_it_has_no_connection():
    layer = make_layer(8, train_reservoir=True)
    layer(torch.randn(2, 20, 8))[0].sum().backward()
    grad = layer.reservoirs.grad
    assert grad is not None and torch.equal(grad != 0, layer.connections)


class OnGPU:
    """A layer of bf16 projections on the cluster kernel, its inputs, and one training step without an optimizer."""

    def __init__(self, **options):
        options = {"num_reservoirs": 3, "reservoir_size": 512, "chunk_length": 64} | options
        self.layer = make_layer(256, **options).cuda()
        for linear in (self.layer.input, self.layer.output):
            linear.bfloat16()
        self.u, self.grad = (torch.randn(2, 400, 256, device="cuda").bfloat16() for _ in range(2))
        self.starts = torch.zeros(2, 400, dtype=torch.bool, device="cuda")
        self.starts[:, 0] = self.starts[1, 170] = True

    def step(self):
        stats = RecurrenceStats()
        u = self.u.detach().requires_grad_()
        y, final = self.layer(u, starts=self.starts, stats=stats)
        grads = torch.autograd.grad(y, [u, *self.layer.parameters()], self.grad)
        return [y.detach(), final.detach(), *grads, *vars(stats).values()]

    def renew(self):
        self.u.normal_()
        self.grad.normal_()
        self.starts[0].copy_(torch.rand(400, device="cuda") < 0.01)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("options", [{"train_reservoir": True}, {"chunk_length": "fill"}, {"tolerance": 1e-9}], ids=str)
def test_a_step_of_the_layer_does_not_wait_for_the_device(options):
    layer = OnGPU(**options)
    want = layer.step()  # compiles, if nobody has
    assert cluster.supports(want[0].new_empty(1, 1, 1, 512))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = layer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("tolerance", [1e-2, 1e-9], ids=["agrees", "falls back"])
def test_a_graph_of_the_layer_follows_its_inputs_and_weights(tolerance):
    layer = OnGPU(train_reservoir=True, tolerance=tolerance)
    layer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step()
    for _ in range(2):
        layer.renew()
        with torch.no_grad():
            layer.layer.reservoirs.mul_(0.9)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(x, y) for x, y in zip(replayed, layer.step(), strict=True))


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("chunk_length", [64, "fill"])
def test_the_layer_in_bf16_stays_near_the_one_in_float64(chunk_length):
    layer = OnGPU(train_reservoir=True, chunk_length=chunk_length)
    with torch.no_grad():
        layer.layer.reservoirs.copy_(layer.layer.reservoirs.bfloat16())
    got = layer.step()
    exact = copy.copy(layer)
    exact.layer = make_layer(256, num_reservoirs=3, reservoir_size=512, train_reservoir=True, backend="sequential")
    exact.layer = exact.layer.cuda().double()
    exact.layer.load_state_dict(layer.layer.state_dict())
    exact.u, exact.grad = layer.u.double(), layer.grad.double()
    want = exact.step()
    for x, y in zip(got[:8], want[:8], strict=True):  # both outputs, and the gradients of u and five parameters
        assert (x.double() - y).norm() <= 1e-2 * y.norm()
