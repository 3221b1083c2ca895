import torch

from lfm.parallel.process import prepare_environment

if not torch.cuda.is_available():
    prepare_environment("cpu")  # before any test imports megatron-core and DeepSpeed
