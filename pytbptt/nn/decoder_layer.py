"""One layer of a Transformer-XL."""

from torch import Tensor, nn

from pytbptt.nn.attention import RelativeAttention
from pytbptt.nn.dropout import Dropout
from pytbptt.nn.layer_norm import LayerNorm
from pytbptt.nn.unscriptable import UnscriptableModule


class DecoderLayer(UnscriptableModule):
    """Attention and feed-forward, each with dropout, a residual connection and a normalisation.

    Source: Dai et al., "Transformer-XL" (2019), section 3.3; `pre_norm` as in its implementation, where the memory
    is normalised like the chunk and nothing is normalised after the last layer.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        d_inner: int,
        dropout: float = 0.0,
        dropatt: float = 0.0,
        pre_norm: bool = False,
        content_bias: nn.Parameter | None = None,
        position_bias: nn.Parameter | None = None,
    ) -> None:
        """
        Args:
            d_model, d_inner: width E of input and output, and width inside the feed-forward.
            n_head, d_head, dropatt, content_bias, position_bias: as for `RelativeAttention`.
            dropout: probability that a hidden unit is dropped in training.
            pre_norm: normalise each sublayer's input instead of its output.
        """
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = RelativeAttention(d_model, n_head, d_head, dropatt, content_bias, position_bias)
        self.attention_dropout = Dropout(dropout)
        self.attention_norm = LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_inner),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(d_inner, d_model),
            Dropout(dropout),
        )
        self.feed_forward_norm = LayerNorm(d_model)

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        first_key: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The layer's output (B, T, E), and what was projected; arguments and results as for `RelativeAttention`."""
        inputs = hidden
        if self.pre_norm:
            inputs = self.attention_norm(hidden)
            memory = self.attention_norm(memory) if isinstance(memory, Tensor) else memory
        attended, key_value, position = self.attention(inputs, position, memory, first_key, window)
        hidden = hidden + self.attention_dropout(attended)
        if self.pre_norm:
            return hidden + self.feed_forward(self.feed_forward_norm(hidden)), key_value, position
        hidden = self.attention_norm(hidden)
        return self.feed_forward_norm(hidden + self.feed_forward(hidden)), key_value, position
