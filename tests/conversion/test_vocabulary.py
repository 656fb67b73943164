"""Vocabularies of other projects, and what a model is after its ids have changed."""

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
from tests.conversion.external_models import importable

SYMBOLS = ["<eos>", "the", "<unk>", ",", "of", "ä", "rare", "rarer", "rarest"]


class Holder:
    """Vocab, Dictionary and Corpus of any of the projects: attributes are all that is saved of them."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


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
    "cache.pt of kimiyoung": (torch.save, Holder(dataset="wt103", vocab=Holder(**VOCAB), train=torch.arange(5))),
    "corpus.data of awd-lstm-lm": (torch.save, Holder(dictionary=Holder(word2idx={}, idx2word=SYMBOLS, total=7))),
    "itos.pkl of fastai": (None, SYMBOLS),
    "a Vocab of fastai": (None, Holder(itos=SYMBOLS)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_project_s_file_gives_the_symbols_in_order(tmp_path: Path, name: str) -> None:
    save, value = FILES[name]
    with importable(data_utils=[Holder]):
        if save is None:
            write_pickle(tmp_path / "file", value)
        else:
            save(value, tmp_path / "file")
    assert read_symbols(tmp_path / "file")[0] == SYMBOLS


def test_text_is_one_symbol_a_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("".join(f"{symbol} 12\n" for symbol in SYMBOLS), encoding="utf-8")
    assert read_symbols(tmp_path / "vocab.txt") == (SYMBOLS, [])


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    for value in ({"weights": torch.ones(2)}, ["a", 1], [], 3):
        torch.save(value, tmp_path / "file")
        with pytest.raises(InputError, match=r"expected a list of symbols, idx2sym, idx2word or itos"):
            read_symbols(tmp_path / "file")
    with pytest.raises(InputError, match=r"--vocabulary: .*nowhere: found no such file"):
        read_symbols(tmp_path / "nowhere")


CONFIGS: dict[str, Any] = {
    "one table": TransformerXLConfig(cutoffs=(6,), d_embed=8, untie_bias=False),
    "a table for each cluster": TransformerXLConfig(cutoffs=(4, 7), div_val=2),
    "tables of its own": TransformerXLConfig(cutoffs=(), tie_weights=False),
    "an LSTM": AWDLSTMConfig(d_embed=4, d_hidden=6, n_layer=2, cutoffs=(5,)),
}


def model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    config = CONFIGS[name]
    config.vocab_size = len(SYMBOLS)
    if isinstance(config, TransformerXLConfig):
        config.n_layer, config.d_model, config.n_head, config.d_head, config.d_inner, config.mem_len = 2, 8, 2, 4, 8, 4
        config.init_std = 0.5
    return config.build().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_new_ids_have_the_old_log_probabilities(name: str) -> None:
    before = model(name)
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


def test_roles_and_symbols_that_dict_txt_cannot_hold(tmp_path: Path) -> None:
    symbols = ["xxunk", "xxpad", "xxbos", "xxeos", "the", "\n", "</s>", "", "xxfake", "xxfake"]
    torch.manual_seed(0)
    config = AWDLSTMConfig(vocab_size=len(symbols), d_embed=4, n_layer=1)
    _, vocabulary = renumber(config.build(), symbols)
    assert len(vocabulary) == len(symbols)
    rest = [vocabulary.symbol(token) for token in range(4, len(vocabulary))]
    assert rest == ["the", "<0x0A>", "<0x3C><0x2F><0x73><0x3E>", "<0x>", "xxfake", "xxfake"]
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    assert Vocabulary.from_state_dict(vocabulary.state_dict()) == vocabulary


def test_symbols_that_do_not_go_with_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="found 8 symbols, expected 9"):
        renumber(model("one table"), SYMBOLS[:-1])
    with pytest.raises(InputError, match="found <unk> outside the softmax's first cluster, expected it among 6 ids"):
        renumber(model("one table"), ["<eos>", *"abcdefg", "<unk>"])
