"""A layer of an LSTM over whole rows: one product for all inputs, then a kernel a step."""

from lfm.kernels.lstm.op import lstm_layer, takes

__all__ = ["lstm_layer", "takes"]
