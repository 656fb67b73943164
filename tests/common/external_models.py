"""Models of other projects, with the names that upstream pickles and straightforward mathematics."""

import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def temporary_modules(**modules: list[type]) -> Iterator[None]:
    """Modules with these classes, which can be pickled within the context and not be imported after it."""
    for name, classes in modules.items():
        module = types.ModuleType(name)
        for cls in classes:
            cls.__module__ = name
            setattr(module, cls.__name__, cls)
        sys.modules[name] = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.save warns that the modules have no source code
            yield
    finally:
        for name in modules:
            del sys.modules[name]


def with_random_weights(module: nn.Module) -> Any:
    """The module in evaluation mode, with weights large enough that each of them affects the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.4, generator=generator).add_(name.endswith("layer_norm.weight"))
    return module.eval()


class PickledObject:
    """Stands for any project's Vocab, Dictionary or Corpus, of which pickle saves the attributes alone."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class PositionwiseFF(nn.Module):
    def __init__(self, d_model: int, d_inner: int, dropout: float, pre_lnorm: bool) -> None:
        super().__init__()
        self.d_model, self.d_inner, self.dropout, self.pre_lnorm = d_model, d_inner, dropout, pre_lnorm
        drops = nn.Dropout(dropout), nn.Dropout(dropout)
        self.CoreNet = nn.Sequential(
            nn.Linear(d_model, d_inner), nn.ReLU(inplace=True), drops[0], nn.Linear(d_inner, d_model), drops[1]
        )
        self.layer_norm = nn.LayerNorm(d_model)


class RelPartialLearnableMultiHeadAttn(nn.Module):
    def __init__(self, n_head: int, d_model: int, d_head: int, dropout: float, dropatt: float, pre_lnorm: bool) -> None:
        super().__init__()
        self.n_head, self.d_model, self.d_head, self.dropout = n_head, d_model, d_head, dropout
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.drop, self.dropatt = nn.Dropout(dropout), nn.Dropout(dropatt)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        self.scale, self.pre_lnorm = d_head**-0.5, pre_lnorm
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)


class RelPartialLearnableDecoderLayer(nn.Module):
    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.dec_attn, self.pos_ff = attention, feed_forward


class AdaptiveEmbedding(nn.Module):
    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: list[int], div_val: int) -> None:
        super().__init__()
        self.n_token, self.d_embed, self.d_proj, self.div_val = n_token, d_embed, d_proj, div_val
        self.cutoffs = [*cutoffs, n_token]
        self.cutoff_ends = [0, *self.cutoffs]
        self.emb_layers, self.emb_projs = nn.ModuleList(), nn.ParameterList()
        if div_val == 1:
            self.emb_layers.append(nn.Embedding(n_token, d_embed))
            if d_proj != d_embed:
                self.emb_projs.append(nn.Parameter(torch.empty(d_proj, d_embed)))
        else:
            for i, (first, end) in enumerate(pairwise(self.cutoff_ends)):
                self.emb_layers.append(nn.Embedding(end - first, d_embed // div_val**i))
                self.emb_projs.append(nn.Parameter(torch.empty(d_proj, d_embed // div_val**i)))


class ProjectedAdaptiveLogSoftmax(nn.Module):
    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: list[int], div_val: int) -> None:
        super().__init__()
        ends = [0, *cutoffs, n_token]
        if cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(cutoffs), d_embed))
            self.cluster_bias = nn.Parameter(torch.empty(len(cutoffs)))
        self.out_layers, self.out_projs = nn.ModuleList(), nn.ParameterList()
        for i, (first, end) in enumerate(pairwise(ends)):
            width = d_embed // div_val**i
            if div_val > 1:
                self.out_layers.append(nn.Linear(width, end - first))
            if div_val > 1 or d_proj != d_embed:
                self.out_projs.append(nn.Parameter(torch.empty(d_proj, width)))
        if div_val == 1:
            self.out_layers.append(nn.Linear(d_embed, n_token))


class PositionalEmbedding(nn.Module):
    def __init__(self, demb: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0.0, demb, 2.0) / demb)))


class MemTransformerLM(nn.Module):
    """kimiyoung/transformer-xl's model, with the arguments that its train.py passes."""

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        mem_len: int,
        d_embed: int,
        cutoffs: list[int],
        div_val: int = 1,
        tie_weight: bool = True,
        tie_projs: tuple[bool, ...] = (),
        pre_lnorm: bool = False,
        same_length: bool = False,
        clamp_len: int = -1,
    ) -> None:
        super().__init__()
        self.n_token, self.d_embed, self.d_model, self.n_head, self.d_head = n_token, d_embed, d_model, n_head, d_head
        self.word_emb = AdaptiveEmbedding(n_token, d_embed, d_model, cutoffs, div_val)
        self.drop = nn.Dropout(0.1)
        self.n_layer, self.tgt_len, self.mem_len, self.ext_len, self.attn_type = n_layer, 4, mem_len, 0, 0
        self.layers = nn.ModuleList(
            RelPartialLearnableDecoderLayer(
                RelPartialLearnableMultiHeadAttn(n_head, d_model, d_head, 0.1, 0.2, pre_lnorm),
                PositionwiseFF(d_model, d_inner, 0.1, pre_lnorm),
            )
            for _ in range(n_layer)
        )
        self.sample_softmax = -1
        self.crit = ProjectedAdaptiveLogSoftmax(n_token, d_embed, d_model, cutoffs, div_val)
        if tie_weight:
            for out, embedding in zip(self.crit.out_layers, self.word_emb.emb_layers, strict=True):
                out.weight = embedding.weight
        for i, tied in enumerate(tie_projs):
            if tied:
                self.crit.out_projs[i] = self.word_emb.emb_projs[0 if div_val == 1 else i]
        self.same_length, self.clamp_len = same_length, clamp_len
        self.pos_emb = PositionalEmbedding(d_model)
        self.r_w_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.empty(n_head, d_head))

    def forward_chunk(self, tokens: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A chunk's (T,) hidden states (T, E) and the next memory: per layer at most (mem_len, E), at first (0, E)."""
        hidden, next_memory = self.embed(tokens), []
        for layer, old in zip(self.layers, memory, strict=True):
            next_memory.append(torch.cat([old, hidden])[max(0, len(old) + len(hidden) - self.mem_len) :])
            hidden = self.attend(layer, hidden, old)
        return hidden, next_memory

    def embed(self, tokens: Tensor) -> Tensor:
        rows = []
        for token in tokens.tolist():
            i = sum(token >= cutoff for cutoff in self.word_emb.cutoffs)
            if self.word_emb.div_val == 1:
                row, i = self.word_emb.emb_layers[0].weight[token], 0
            else:
                row = self.word_emb.emb_layers[i].weight[token - self.word_emb.cutoff_ends[i]]
            rows.append(self.word_emb.emb_projs[i] @ row if len(self.word_emb.emb_projs) else row)
        return torch.stack(rows) * self.d_model**0.5

    def attend(self, layer: Any, hidden: Tensor, memory: Tensor) -> Tensor:
        attention, feed_forward = layer.dec_attn, layer.pos_ff
        T, M, H, D = len(hidden), len(memory), self.n_head, self.d_head
        context = torch.cat([memory, hidden])
        q, k, v = attention.qkv_net(attention.layer_norm(context) if attention.pre_lnorm else context).chunk(3, dim=1)
        q, k, v = (part.view(M + T, H, D) for part in (q, k, v))
        attended = hidden.new_zeros(T, H, D)
        for i in range(T):
            keys = range(max(0, M + i - self.mem_len + 1) if self.same_length else 0, M + i + 1)
            for h in range(H):
                scores = []
                for j in keys:
                    distance = M + i - j if self.clamp_len <= 0 else min(M + i - j, self.clamp_len)
                    angle = distance * self.pos_emb.inv_freq
                    position = attention.r_net(torch.cat([angle.sin(), angle.cos()])).view(H, D)[h]
                    query = q[M + i, h]
                    scores.append((query + self.r_w_bias[h]) @ k[j, h] + (query + self.r_r_bias[h]) @ position)
                weights = (torch.stack(scores) * attention.scale).softmax(0)
                attended[i, h] = sum(weight * v[j, h] for weight, j in zip(weights, keys, strict=True))
        result = hidden + attention.o_net(attended.view(T, H * D))
        if attention.pre_lnorm:
            return result + feed_forward.CoreNet(feed_forward.layer_norm(result))
        result = attention.layer_norm(result)
        return feed_forward.layer_norm(result + feed_forward.CoreNet(result))

    def log_prob(self, hidden: Tensor) -> Tensor:
        """(T, V). The head's probabilities end with those of the clusters, in reverse order."""
        crit, ends = self.crit, self.word_emb.cutoff_ends

        def logits(i: int, with_clusters: bool) -> Tensor:
            first, end = ends[i], ends[i + 1]
            layer = crit.out_layers[0 if self.word_emb.div_val == 1 else i]
            rows = slice(first, end) if self.word_emb.div_val == 1 else slice(None)
            weight, bias = layer.weight[rows], layer.bias[rows]
            if with_clusters:
                weight, bias = torch.cat([weight, crit.cluster_weight]), torch.cat([bias, crit.cluster_bias])
            projected = hidden @ crit.out_projs[i] if len(crit.out_projs) else hidden
            return projected @ weight.T + bias

        clusters = len(ends) - 2
        head = logits(0, with_clusters=clusters > 0).log_softmax(1)
        tails = [head[:, -i, None] + logits(i, with_clusters=False).log_softmax(1) for i in range(1, clusters + 1)]
        return torch.cat([head[:, : ends[1]], *tails], dim=1)


KIMIYOUNG_MODULES = {
    "mem_transformer": [
        MemTransformerLM,
        PositionalEmbedding,
        PositionwiseFF,
        RelPartialLearnableDecoderLayer,
        RelPartialLearnableMultiHeadAttn,
        AdaptiveEmbedding,
    ],
    "proj_adaptive_softmax": [ProjectedAdaptiveLogSoftmax],
}


class WeightDrop(nn.Module):
    """awd-lstm-lm's: the parameter is called ..._raw, and a bound method replaces flatten_parameters."""

    def __init__(self, module: nn.LSTM, weights: list[str], dropout: float) -> None:
        super().__init__()
        self.module, self.weights, self.dropout = module, weights, dropout
        module.flatten_parameters = self.widget_demagnetizer_y2k_edition  # type: ignore[method-assign]
        for name in weights:
            raw = module._parameters.pop(name)
            assert raw is not None
            module.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
            setattr(module, name, nn.Parameter(torch.zeros_like(raw)))  # the last masked weight

    def widget_demagnetizer_y2k_edition(self) -> None:
        pass


class RNNModel(nn.Module):
    """awd-lstm-lm's model."""

    def __init__(self, ntoken: int, ninp: int, nhid: int, nlayers: int, wdrop: float, tie_weights: bool) -> None:
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        widths = [ninp, *[nhid] * (nlayers - 1), ninp if tie_weights else nhid]
        rnns: list[nn.Module] = [nn.LSTM(*sizes) for sizes in pairwise(widths)]
        if wdrop:
            rnns = [WeightDrop(rnn, ["weight_hh_l0"], wdrop) for rnn in rnns]  # type: ignore[arg-type]
        self.rnns = nn.ModuleList(rnns)
        self.decoder = nn.Linear(widths[-1], ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        self.dropout, self.dropouti, self.dropouth, self.dropoute = 0.4, 0.65, 0.3, 0.1


class SplitCrossEntropyLoss(nn.Module):
    """awd-lstm-lm's adaptive softmax: the parameters that are not in the model's decoder."""

    def __init__(self, hidden_size: int, splits: list[int]) -> None:
        super().__init__()
        self.splits = [0, *splits, 100 * 1000000]
        if splits:
            self.tail_vectors = nn.Parameter(torch.empty(len(splits), hidden_size))
            self.tail_bias = nn.Parameter(torch.empty(len(splits)))


AWD_LSTM_LM_MODULES = {"model": [RNNModel], "weight_drop": [WeightDrop], "splitcross": [SplitCrossEntropyLoss]}
