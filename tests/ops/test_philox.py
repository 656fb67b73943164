"""Dropout's random bits are Philox-4x32-10, and the mask is a function of place and seed alone."""

import pytest
import torch

from pytbptt.ops.philox import attention_keep_mask, dropout_threshold, philox


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
def test_known_answers_of_the_authors(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_mask_depends_on_place_and_not_on_the_sizes_around_it():
    seed = torch.tensor([2**40 + 7])
    whole = attention_keep_mask(seed, 3, 2, 9, 21, 0.3)
    assert torch.equal(attention_keep_mask(seed, 2, 2, 5, 13, 0.3), whole[:2, :, :5, :13])


def test_mask_keeps_the_share_it_says():
    kept = attention_keep_mask(torch.tensor([3]), 4, 4, 128, 128, 0.25).double().mean().item()
    # 262,144 draws: the standard deviation is 0.00085.
    assert abs(kept - (1 - dropout_threshold(0.25) / 65536)) < 0.004


def test_seeds_that_differ_in_their_high_word_draw_different_masks():
    masks = [attention_keep_mask(torch.tensor([seed]), 1, 1, 16, 16, 0.5) for seed in (1, 1 + 2**32, 2)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 0, 0)])
def test_mask_of_nothing_is_empty(sizes):
    assert attention_keep_mask(torch.tensor([3]), *sizes, 0.3).shape == sizes
