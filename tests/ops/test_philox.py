"""Dropout uses Philox-4x32-10; the mask depends only on the index and the seed."""

import pytest
import torch

from pytbptt.ops.philox import dropout_threshold, philox
from pytbptt.ops.rel_attention.reference import attention_keep_mask


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answer_vectors(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_mask_depends_only_on_index_and_seed():
    seed = torch.tensor([2**40 + 7])
    mask = attention_keep_mask(seed, 3, 2, 9, 21, 0.3)
    assert torch.equal(attention_keep_mask(seed, 2, 2, 5, 13, 0.3), mask[:2, :, :5, :13])


def test_keep_rate_matches_dropout_p():
    keep_rate = attention_keep_mask(torch.tensor([3]), 4, 4, 128, 128, 0.25).double().mean().item()
    # The standard deviation of the mean of 262,144 elements is 0.00085.
    assert abs(keep_rate - (1 - dropout_threshold(0.25) / 65536)) < 0.004


def test_seeds_that_differ_in_high_word_give_different_masks():
    masks = [attention_keep_mask(torch.tensor([seed]), 1, 1, 16, 16, 0.5) for seed in (1, 1 + 2**32, 2)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 0, 0)])
def test_empty_sizes_give_an_empty_mask(sizes):
    assert attention_keep_mask(torch.tensor([3]), *sizes, 0.3).shape == sizes
