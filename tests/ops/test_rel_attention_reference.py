"""The reference rel_attention matches the definition, written as loops."""

import math

import pytest
import torch

from pytbptt.ops import rel_attention

NAMES = ["query", "key", "value", "position", "content_bias", "position_bias", "memory_key", "memory_value"]


def make_inputs(dtype=torch.float64, B=2, T=4, M=3, H=2, D=5, R=None):
    """The tensors by name; query, key and value are views of one projection, as in a model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    query, key, value = normal(B, T, 3, H, D).unbind(2)
    memory_key, memory_value = normal(B, M, 2, H, D).unbind(2)
    tensors = [query, key, value, normal(M + T if R is None else R, H, D), normal(H, D), normal(H, D)]
    return dict(zip(NAMES, [*tensors, memory_key, memory_value], strict=True))


def loop_definition(inputs, first_key=None, window=None, scale=None):
    query, position = inputs["query"], inputs["position"]
    key = torch.cat([inputs["memory_key"], inputs["key"]], dim=1)
    value = torch.cat([inputs["memory_value"], inputs["value"]], dim=1)
    B, T, H, D = query.shape
    M, R = key.shape[1] - T, position.shape[0]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(query)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                begin = 0 if first_key is None else int(first_key[b, i])
                if window is not None:
                    begin = max(begin, M + i - window + 1)
                exponentials = {}
                for j in range(max(begin, 0), M + i + 1):
                    content = (query[b, i, h] + inputs["content_bias"][h]) @ key[b, j, h]
                    distance = min(M + i - j, R - 1)
                    positional = (query[b, i, h] + inputs["position_bias"][h]) @ position[distance, h]
                    exponentials[j] = math.exp(scale * (content + positional))
                for j, exponential in exponentials.items():
                    out[b, i, h] += exponential / sum(exponentials.values()) * value[b, j, h]
    return out


def call(inputs, **options):
    inputs = dict(inputs)
    positional = [inputs.pop(name) for name in NAMES[:6]]
    return rel_attention(*positional, **inputs, **options)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"T": 1}, {}),
        ({"M": 0}, {}),
        ({"T": 1, "M": 0}, {}),
        ({"B": 3, "D": 41}, {}),
        ({"R": 1}, {}),
        ({"R": 4}, {}),
        ({"R": 30}, {}),
        ({"T": 7, "M": 2}, {"window": 3}),
        ({"T": 3, "M": 6}, {"window": 1}),
        ({"T": 3, "M": 6, "R": 4}, {"window": 4, "scale": 0.7}),
    ],
)
def test_matches_loop_definition(sizes, options):
    inputs = make_inputs(**sizes)
    torch.testing.assert_close(call(inputs, **options), loop_definition(inputs, **options), rtol=0, atol=1e-13)


def test_first_key_and_window_masks_match_definition():
    inputs = make_inputs(B=3, T=4, M=3)
    first_key = torch.tensor([[0, 0, 5, 5], [3, 3, 3, 3], [2, 4, 4, 6]], dtype=torch.int32)
    for window in (None, 2):
        expected = loop_definition(inputs, first_key, window)
        torch.testing.assert_close(call(inputs, first_key=first_key, window=window), expected, rtol=0, atol=1e-13)


def test_fully_masked_row_and_its_gradients_are_zero():
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in make_inputs(B=1, T=2, M=1).items()}
    out = call(inputs, first_key=torch.tensor([[9, 0]], dtype=torch.int32))
    assert torch.equal(out[0, 0], torch.zeros_like(out[0, 0]))
    out[0, 0].sum().backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in inputs.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 2},
        {"first_key": torch.tensor([[0, 3, 3], [4, 4, 4]], dtype=torch.int32)},
        {"dropout_p": 0.4, "seed": torch.tensor([11])},
    ],
    ids=["plain", "window", "first_key", "dropout"],
)
def test_gradients_of_all_eight_inputs(options):
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in make_inputs(T=3, M=2, H=1, D=3, R=4).items()}
    torch.autograd.gradcheck(
        lambda *tensors: call(dict(zip(NAMES, tensors, strict=True)), **options), tuple(inputs.values())
    )


def test_dropout_of_a_query_is_independent_of_batch_and_chunk_sizes():
    inputs, seed = make_inputs(B=3, T=6, M=5), torch.tensor([5])
    expected = call(inputs, dropout_p=0.5, seed=seed)
    smaller = {name: inputs[name][:2] if name not in NAMES[3:6] else inputs[name] for name in NAMES}
    smaller |= {name: smaller[name][:, :4] for name in NAMES[:3]}
    torch.testing.assert_close(call(smaller, dropout_p=0.5, seed=seed), expected[:2, :4], rtol=0, atol=1e-13)


def test_dropout_has_the_expected_mean():
    inputs = make_inputs(B=1, T=2, M=2)
    repeated = {name: t.expand(4000, -1, -1, -1) if t.dim() == 4 else t for name, t in inputs.items()}
    samples = call(repeated, dropout_p=0.5, seed=torch.tensor([1]))
    error = samples.std(dim=0) / len(samples) ** 0.5
    assert ((samples.mean(dim=0) - call(inputs)[0]).abs() < 5 * error).all()


def test_dropout_without_seed_uses_default_generator():
    inputs, out = make_inputs(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(call(inputs, dropout_p=0.5))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_autocast_computes_in_its_dtype():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(inputs)
    assert out.dtype == torch.bfloat16
    # bfloat16 rounds values of order 1 by up to 2**-9.
    torch.testing.assert_close(out.float(), call(inputs), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda tensor: tensor[0]),
        ("key", lambda tensor: tensor[:, 1:]),
        ("value", lambda tensor: tensor.float()),
        ("position", lambda tensor: tensor[:0]),
        ("content_bias", lambda tensor: tensor[:, :1]),
        ("position_bias", lambda tensor: tensor.long()),
        ("memory_value", lambda tensor: tensor[:, 1:]),
        ("memory_key", lambda tensor: None),
        ("query", lambda tensor: tensor[..., :0]),
    ],
)
def test_error_names_the_input(name, change):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=f"rel_attention: {name}.*found.*expected"):
        call(inputs | {name: change(inputs[name])})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_key", torch.zeros(2, 4)),
        ("first_key", torch.zeros(2, 3, dtype=torch.int32)),
        ("window", 0),
        ("window", 2.5),
        ("window", True),
        ("window", 2**63),
        ("dropout_p", 1.0),
        ("seed", torch.tensor(1)),
    ],
)
def test_error_names_the_option(name, value):
    with pytest.raises(ValueError, match=f"rel_attention: {name}: found.*expected"):
        call(make_inputs(), **{name: value})


@pytest.mark.parametrize(
    ("name", "rank", "expected"), [("memory_key", 3, r"\(B, M, H, D\)"), ("position", 2, r"\(R, H, D\)")]
)
def test_rank_error_names_the_dimensions(name, rank, expected):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=f"rel_attention: {name}: found shape .*, expected {expected}"):
        call(inputs | {name: inputs[name].flatten(rank - 1)})


def test_integer_dtype_error_names_the_dtype():
    with pytest.raises(ValueError, match=r"rel_attention: query: found torch.int64, expected a floating-point dtype"):
        call({name: tensor.long() for name, tensor in make_inputs().items()})


@pytest.mark.parametrize(("name", "value"), [("query", None), ("value", [1.0]), ("seed", 5), ("first_key", [[0]])])
def test_non_tensor_arguments_raise(name, value):
    with pytest.raises(TypeError, match=f"rel_attention: {name}: found {type(value).__name__}, expected a tensor"):
        call(make_inputs() | {name: value}, dropout_p=0.5)
