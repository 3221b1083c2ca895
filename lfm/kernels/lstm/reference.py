"""The definition of a layer of an LSTM, as a loop under autograd, in at least fp32."""

import torch
from torch import Tensor


def lstm_layer_reference(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    given = x.to(wide) @ weight_ih.to(wide).T + (bias_ih.to(wide) + bias_hh.to(wide))
    h = c = given.new_zeros(len(x), weight_hh.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            h, c = (part.masked_fill(reset[:, t, None], 0) for part in (h, c))
        i, f, g, o = (given[:, t] + h @ weight_hh.to(wide).T).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1).to(x.dtype), h, c
