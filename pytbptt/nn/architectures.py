"""The architectures by their --arch names."""

from typing import TYPE_CHECKING, Literal

import torch

from pytbptt.nn.awd_lstm import AWDLSTMConfig
from pytbptt.nn.language_model import ModelConfig
from pytbptt.nn.transformer_xl import TransformerXLConfig
from pytbptt.ops import dispatch

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    TransformerXLConfig.arch: TransformerXLConfig,
    AWDLSTMConfig.arch: AWDLSTMConfig,
}
DEFAULT_ARCHITECTURE = TransformerXLConfig.arch

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(ARCHITECTURES)]  # the choices of --arch


def describe_computation(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Describe how such a model is computed: the device, the dtype of its products, the implementation of its op."""
    precision = str(dtype).removeprefix("torch.") + (" mixed with float32" if dtype != torch.float32 else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    implementation = dispatch.describe(config.op, device, dtype, config.op_size)
    return f"on {device} ({name}) in {precision}, {config.op}: {implementation}"
