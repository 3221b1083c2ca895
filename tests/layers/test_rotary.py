import torch

from lfm.kernels.rotary.reference import rotate
from lfm.layers.rotary import rotary_tables


def test_dimension_j_turns_with_dimension_j_plus_half():
    cos, sin = rotary_tables(torch.tensor([[3]]), head_size=4, base=100.0, dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    angle = torch.tensor([3.0, 0.3], dtype=torch.float64)  # 3 * 100^0, 3 * 100^(-1/2)
    pair = torch.tensor([1.0 + 3.0j, 2.0 + 4.0j], dtype=torch.complex128) * torch.exp(1j * angle)
    assert torch.allclose(rotate(x, cos, sin).flatten(), torch.cat((pair.real, pair.imag)))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        tables = [rotary_tables(torch.tensor([[p]]), head_size=16, base=1e4, dtype=torch.float64) for p in (i, j)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    assert torch.allclose(score(7, 3), score(8007, 8003), rtol=1e-9)
