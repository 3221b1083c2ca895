from lfm.parallel.process import prepare_environment

prepare_environment("cpu")  # before any test module imports megatron-core or DeepSpeed
