"""One layer of a Transformer-XL."""

from torch import Tensor, nn

from pytbptt.nn import aligned
from pytbptt.nn.attention import RelativeAttention
from pytbptt.nn.dropout import Dropout


class DecoderLayer(nn.Module):
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
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            aligned.Linear(d_model, d_inner),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            aligned.Linear(d_inner, d_model),
            Dropout(dropout),
        )
        self.feed_forward_norm = nn.LayerNorm(d_model)

    def project_memory(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, M, H, D) of this layer's earlier inputs (B, M, E)."""
        return self.attention.project_memory(self.attention_norm(hidden) if self.pre_norm else hidden)

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        first_key: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output (B, T, E), and the chunk's keys and values; arguments as for `RelativeAttention`."""
        inputs = self.attention_norm(hidden) if self.pre_norm else hidden
        attended, key, value = self.attention(inputs, position, memory, first_key, window)
        hidden = hidden + self.attention_dropout(attended)
        if self.pre_norm:
            return hidden + self.feed_forward(self.feed_forward_norm(hidden)), key, value
        hidden = self.attention_norm(hidden)
        return self.feed_forward_norm(hidden + self.feed_forward(hidden)), key, value
