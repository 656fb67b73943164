"""The architectures by name."""

import torch

from pytbptt.nn.awd_lstm import AWDLSTM, AWDLSTMConfig
from pytbptt.nn.transformer_xl import TransformerXL, TransformerXLConfig
from pytbptt.ops import dispatch

Model = TransformerXL | AWDLSTM
ModelConfig = TransformerXLConfig | AWDLSTMConfig
ARCHITECTURES: dict[str, type[TransformerXLConfig] | type[AWDLSTMConfig]] = {
    "transformer_xl": TransformerXLConfig,
    "awd_lstm": AWDLSTMConfig,
}


def build_model(config: ModelConfig) -> Model:
    """The model of a configuration; InputError says what in the configuration does not fit."""
    return TransformerXL(config) if isinstance(config, TransformerXLConfig) else AWDLSTM(config)


def describe_computation(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What computes such a model: the device, the dtype of its products, and which implementation of its op."""
    precision = str(dtype).removeprefix("torch.") + (" mixed with float32" if dtype != torch.float32 else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    op, size = ("rel_attention", config.d_head) if isinstance(config, TransformerXLConfig) else ("lstm", 0)
    return f"on {device} ({name}) in {precision}, {op}: {dispatch.describe(op, device, dtype, size)}"
