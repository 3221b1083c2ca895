import os

import torch

from lfm.job.process import prepare_environment

# Before any test module imports megatron-core or DeepSpeed.
if torch.cuda.is_available():
    # Ranks are CPU processes here too; but not the rest, which would keep the GPU tests from compiling.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
else:
    prepare_environment("cpu")
