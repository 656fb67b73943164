"""The architectures by name."""

from pytbptt.nn.awd_lstm import AWDLSTM, AWDLSTMConfig
from pytbptt.nn.transformer_xl import TransformerXL, TransformerXLConfig

Model = TransformerXL | AWDLSTM
ModelConfig = TransformerXLConfig | AWDLSTMConfig
ARCHITECTURES: dict[str, type[TransformerXLConfig] | type[AWDLSTMConfig]] = {
    "transformer_xl": TransformerXLConfig,
    "awd_lstm": AWDLSTMConfig,
}


def build_model(config: ModelConfig) -> Model:
    """The model of a configuration; InputError says what in the configuration does not fit."""
    return TransformerXL(config) if isinstance(config, TransformerXLConfig) else AWDLSTM(config)
