"""Inputs and expected results of the kernels of primitives.cpp, for the emulator and for GPUs."""

import ctypes

import torch
from torch import Tensor

PRIMITIVES = [
    "sync_threads",
    "sync_warp",
    "shfl",
    "load_many",
    "cp_async_16",
    "ldmatrix_x4",
    "ldmatrix_x4 transposed",
    "mma half",
    "mma bfloat16",
    "mma_tf32",
    "half",
    "bfloat16",
    "tf32",
    "exp2 log2 fma largest",
    "high_word",
]

# dtype, columns of the result, whether a and b are transposed, whether a is in registers, and the first column of b
# (row as stored, if b is not transposed).
WGMMA_CASES = [
    *((dtype, 64, *layout, 0) for dtype in (torch.float16, torch.bfloat16) for layout in (
        (False, False, False), (False, True, False), (True, False, False), (True, True, False),
        (False, False, True), (False, True, True),
    )),
    *((torch.bfloat16, columns, True, True, False, 8) for columns in (8, 16, 24, 32, 48)),
    (torch.float16, 24, True, True, False, 24),
    (torch.float16, 32, True, True, False, 32),
]  # fmt: skip


def check_wgmma(kernels: ctypes.CDLL, case: tuple, device: str) -> str | None:
    """Returns the error message; without an error, asserts the result, which is exact for small integers."""
    dtype, columns, transposed_a, transposed, registers, first = case
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 64), generator=generator).float() for _ in range(2))
    inputs = [a.to(device), b.to(device)]
    out = torch.full((64, columns), float("nan"), device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    kernels.run_wgmma.restype = ctypes.c_char_p
    flags = [
        ctypes.c_bool(dtype == torch.bfloat16),
        columns,
        *map(ctypes.c_bool, (transposed_a, transposed, registers)),
    ]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out)]
    error = kernels.run_wgmma(*flags, *pointers[:2], first, pointers[2])
    if error is not None:
        return error.decode()
    left, right = (a.t() if transposed_a else a), (b if transposed else b.t())
    assert torch.equal(out.cpu(), (left @ right)[:, first : first + columns])
    return None


def make_input(name: str) -> Tensor:
    """(64, 4) float32; small integers where sums must be exact in every order."""
    generator = torch.Generator().manual_seed(0)
    if name in ("half", "bfloat16", "tf32", "exp2 log2 fma largest"):
        return 4 * torch.randn(64, 4, generator=generator)
    return torch.randint(-8, 9, (64, 4), generator=generator).float()


def tolerance(name: str) -> float:
    """Relative and absolute: the GPU's exp2 may be wrong by 2 units in the last place, its log2 by 1."""
    return 1e-6 if name.startswith("exp2") else 0.0


def expected(name: str, x: Tensor) -> Tensor:
    """(64, 4) float32, for x of `make_input`."""
    out = torch.zeros(64, 4)
    lane = torch.arange(64) % 32
    warp_start = torch.arange(64) - lane
    if name == "sync_threads":
        out[:, 0] = x[:, 0].flip(0)
    elif name == "sync_warp":
        out[:, 0] = x[warp_start + 31 - lane, 0]
    elif name == "shfl":
        out[:, 0] = x[warp_start + 3 * lane % 32, 0]
        out[:, 1] = x[warp_start + (lane ^ 5), 0]
    elif name == "load_many":
        out[:, 0], out[:, 1] = x[:, 3], x[:, 2]
    elif name == "cp_async_16":
        out = torch.where(torch.arange(4) < torch.arange(64)[:, None] % 5, x, 0)
    elif name.startswith("ldmatrix"):
        for warp in range(2):
            rows = (x[32 * warp : 32 * warp + 32, 0] + torch.arange(8)[:, None]).reshape(16, 16)
            for number, (r, c) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
                matrix = rows[r : r + 8, c : c + 8]
                pairs = (matrix.t() if "transposed" in name else matrix).reshape(32, 2)
                out[32 * warp : 32 * warp + 32, number] = pairs[:, 0] + 64 * pairs[:, 1]
    elif name.startswith("mma"):
        for warp in range(2):
            out[32 * warp : 32 * warp + 32] = expected_mma(x[32 * warp : 32 * warp + 32], tf32=name == "mma_tf32")
    elif name in ("half", "bfloat16"):
        out = x.to(getattr(torch, name)).float()
    elif name == "tf32":
        out = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    elif name == "exp2 log2 fma largest":
        out[:, 0], out[:, 1] = x[:, 0].exp2(), (x[:, 1].square() + 1).log2()
        out[:, 2], out[:, 3] = (x[:, 0].double() * x[:, 1] + x[:, 2]).float(), x[:, 2].maximum(x[:, 3])
    elif name == "high_word":
        words = torch.arange(64) * 0x9E3779B9 % 2**32
        out[:, 0] = torch.tensor([int(word) * 0xD2511F53 >> 40 for word in words]).float()
    return out


def assert_ping_pong_result(flags: Tensor, values: Tensor, rounds: int) -> None:
    """After flags that were 0 and values that were 0 to 127."""
    assert flags.tolist() == [rounds, rounds]
    last = torch.arange(64.0, 128.0) + 2 * rounds
    assert torch.equal(values.cpu(), torch.stack([last.flip(0) - 1, last]))


def expected_mma(x: Tensor, tf32: bool) -> Tensor:
    """One warp's accumulators, from its fragments in the layout of the PTX ISA."""
    depth = 8 if tf32 else 16
    a, b = torch.zeros(16, depth), torch.zeros(depth, 8)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for register in range(4):
            row, column = g + register % 2 * 8, register // 2 * depth // 2
            if tf32:
                a[row, column + q] = x[lane, register]
            else:
                a[row, column + 2 * q] = x[lane, register]
                a[row, column + 2 * q + 1] = x[lane, register] + 1
        for register in range(2):
            if tf32:
                b[4 * register + q, g] = x[lane, 1 + register]
            else:
                b[8 * register + 2 * q, g] = x[lane, 2 * register]
                b[8 * register + 2 * q + 1, g] = x[lane, 2 * register + 1]
    product = a @ b
    out = torch.empty(32, 4)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(4):
            out[lane, i] = product[g + i // 2 * 8, 2 * q + i % 2] + i
    return out
