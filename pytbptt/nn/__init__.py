"""Language models that carry a memory from chunk to chunk, and the layers that they are made of."""

from pytbptt.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from pytbptt.nn.attention import RelativeAttention
from pytbptt.nn.awd_lstm import AWDLSTM, AWDLSTMConfig, LSTMMemory
from pytbptt.nn.language_model import LanguageModel, LossResult
from pytbptt.nn.lstm import LSTM
from pytbptt.nn.transformer_xl import ProjectedMemory, TransformerXL, TransformerXLConfig, TransformerXLMemory

__all__ = [
    "AWDLSTM",
    "LSTM",
    "AWDLSTMConfig",
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "LSTMMemory",
    "LanguageModel",
    "LossResult",
    "ProjectedMemory",
    "RelativeAttention",
    "TransformerXL",
    "TransformerXLConfig",
    "TransformerXLMemory",
]
