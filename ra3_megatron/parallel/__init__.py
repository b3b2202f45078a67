"""Process groups, device, seeds and collectives with deadlines: the only package that knows a GPU from a CPU."""

import logging
import warnings

from ra3_megatron.parallel.triton_stub import install_triton_stub

# What Megatron-Core and torch say on every start and a user can do nothing about; only these exact lines are silenced.
# That it falls back to torch is said by `install_fused_adam`, the layer spec and `doctor`, with what is used instead.
for _message in (
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "Transformer Engine and Apex are not installed. Falling back to local implementations",
    "Apex is not installed. Falling back to Torch Norm",
    "full scope is deprecated. Use empty cuda_graph_modules",
    "MimoModelConfig is experimental",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # Reading a checkpoint in one process, for conversion, is meant to be done without process groups.
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to",
):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)


def _silence(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(beginning))


_silence("torch.utils.cpp_extension", "No CUDA runtime is found")
# It then computes the layout itself, which is what we want: nobody else needs it.
_silence("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not")

install_triton_stub()
