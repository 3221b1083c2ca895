"""Layers of an LSTM over whole rows: products for all inputs of a piece, then a kernel a step."""

from lfm.kernels.lstm.op import lstm_stack, takes

__all__ = ["lstm_stack", "takes"]
