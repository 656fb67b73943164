"""Vocabularies of other projects are read, and models renumbered to pytbptt's ids keep their probabilities."""

import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.conversion.vocabulary import read_symbols, renumber
from pytbptt.data import Vocabulary
from pytbptt.errors import InputError
from pytbptt.nn import AWDLSTMConfig, TransformerXLConfig
from pytbptt.nn.language_model import LanguageModel
from tests.common.external_models import PickledObject, temporary_modules

SYMBOLS = ["<eos>", "the", "<unk>", ",", "of", "ä", "rare", "rarer", "rarest"]


def write_pickle(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


VOCAB = {
    "counter": Counter("aab"),
    "special": ["<eos>"],
    "unk_idx": 2,
    "idx2sym": SYMBOLS,
    "sym2idx": OrderedDict(the=1),
}
FILES: dict[str, tuple[Any, Any]] = {
    "vocab.bin of TransfoXL": (torch.save, VOCAB),
    "vocab.pkl of TransfoXL": (None, VOCAB),
    "cache.pt of kimiyoung": (
        torch.save,
        PickledObject(dataset="wt103", vocab=PickledObject(**VOCAB), train=torch.arange(5)),
    ),
    "corpus.data of awd-lstm-lm": (
        torch.save,
        PickledObject(dictionary=PickledObject(word2idx={}, idx2word=SYMBOLS, total=7)),
    ),
    "itos.pkl of fastai": (None, SYMBOLS),
    "Vocab of fastai": (None, PickledObject(itos=SYMBOLS)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_vocabulary_format_gives_symbols_in_id_order(tmp_path: Path, name: str) -> None:
    save, value = FILES[name]
    with temporary_modules(data_utils=[PickledObject]):
        if save is None:
            write_pickle(tmp_path / "file", value)
        else:
            save(value, tmp_path / "file")
    assert read_symbols(tmp_path / "file")[0] == SYMBOLS


def test_text_vocabulary_has_one_symbol_per_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("".join(f"{symbol} 12\n" for symbol in SYMBOLS), encoding="utf-8")
    assert read_symbols(tmp_path / "vocab.txt") == (SYMBOLS, [])


def test_invalid_vocabulary_files_raise(tmp_path: Path) -> None:
    for value in ({"weights": torch.ones(2)}, ["a", 1], [], 3):
        torch.save(value, tmp_path / "file")
        with pytest.raises(InputError, match=r"expected a list of symbols, idx2sym, idx2word or itos"):
            read_symbols(tmp_path / "file")
    with pytest.raises(InputError, match=r"--vocabulary: .*nowhere: found no such file"):
        read_symbols(tmp_path / "nowhere")


CONFIGS: dict[str, Any] = {
    "one embedding table": TransformerXLConfig(cutoffs=(6,), d_embed=8, untie_bias=False),
    "an embedding table per cluster": TransformerXLConfig(cutoffs=(4, 7), div_val=2),
    "untied weights": TransformerXLConfig(cutoffs=(), tie_weights=False),
    "LSTM": AWDLSTMConfig(d_embed=4, d_hidden=6, n_layer=2, cutoffs=(5,)),
}


def make_model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    config = CONFIGS[name]
    config.vocab_size = len(SYMBOLS)
    if isinstance(config, TransformerXLConfig):
        config.n_layer, config.d_model, config.n_head, config.d_head, config.d_inner, config.mem_len = 2, 8, 2, 4, 8, 4
        config.init_std = 0.5
    return config.build().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_renumbered_model_keeps_log_probabilities(name: str) -> None:
    before = make_model(name)
    after, vocabulary = renumber(before, SYMBOLS)
    after.eval()
    assert [vocabulary.symbol(token) for token in range(len(vocabulary))] == [
        *Vocabulary.SPECIALS,
        *(symbol for symbol in SYMBOLS if symbol not in ("<eos>", "<unk>")),
    ]
    ids = torch.tensor([2 if symbol == "<eos>" else vocabulary.index(symbol) for symbol in SYMBOLS])
    tokens = torch.randint(len(SYMBOLS), (2, 7))
    with torch.no_grad():
        old, new = before(tokens)[0], after(ids[tokens])[0]
        torch.testing.assert_close(old, new, rtol=0, atol=1e-6)
        old, new = before.log_prob(old), after.log_prob(new)
    torch.testing.assert_close(new[..., ids], old, rtol=0, atol=1e-5)
    assert new[..., :2].exp().max() == 0.0  # <s> and <pad>, which the original did not have
    assert (after.softmax.weights[0] is after.embedding.weights[0]) == before.config.tie_weights


def test_special_and_unrepresentable_symbols_are_escaped(tmp_path: Path) -> None:
    symbols = ["xxunk", "xxpad", "xxbos", "xxeos", "the", "\n", "</s>", "", "xxfake", "xxfake"]
    torch.manual_seed(0)
    config = AWDLSTMConfig(vocab_size=len(symbols), d_embed=4, n_layer=1)
    _, vocabulary = renumber(config.build(), symbols)
    assert len(vocabulary) == len(symbols)
    ordinary = [vocabulary.symbol(token) for token in range(4, len(vocabulary))]
    assert ordinary == ["the", "<0x0A>", "<0x3C><0x2F><0x73><0x3E>", "<0x>", "xxfake", "xxfake"]
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    assert Vocabulary.from_state_dict(vocabulary.state_dict()) == vocabulary


def test_vocabulary_model_mismatch_raises() -> None:
    with pytest.raises(InputError, match="found 8 symbols, expected 9"):
        renumber(make_model("one embedding table"), SYMBOLS[:-1])
    with pytest.raises(
        InputError, match="found <unk> outside the softmax's first cluster, expected it among the first 6 ids"
    ):
        renumber(make_model("one embedding table"), ["<eos>", *"abcdefg", "<unk>"])
