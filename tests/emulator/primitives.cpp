// A kernel for each primitive of device.h, and a flag handshake between two blocks. The emulator and GPUs must give the
// same results.
#include <cstring>
#include <type_traits>

#include "common/cuda/device/device.h"

namespace pytbptt {
namespace {

using namespace device;

constexpr int threads = 64;

// Runs Primitive on each thread's four floats of `in`, and stores its result in `out`.
template <typename Primitive>
PYTBPTT_KERNEL(threads, 1)
primitive(const float* in, float* out) {
  const Smem<float> tile = shared<float>(0, 4 * threads);
  float own[4], result[4] = {};
  for (int i = 0; i < 4; ++i) own[i] = load(in + 4 * thread() + i);
  Primitive::run(in, own, result, tile);
  for (int i = 0; i < 4; ++i) store(out + 4 * thread() + i, result[i]);
}

#define RUN                                                                                                \
  static PYTBPTT_DEVICE void run([[maybe_unused]] const float* in, [[maybe_unused]] const float (&own)[4], \
                                 float (&result)[4], [[maybe_unused]] Smem<float> tile)

struct SyncThreads {
  RUN {
    tile.store(thread(), own[0]);
    sync_threads();
    result[0] = tile.load(threads - 1 - thread());
  }
};

struct SyncWarp {
  RUN {
    tile.store(thread(), own[0]);
    sync_warp();
    result[0] = tile.load(thread() ^ 31);
  }
};

struct Shuffle {
  RUN {
    result[0] = shfl(own[0], 3 * lane() % warp_size);
    result[1] = shfl_xor(own[0], 5);
  }
};

struct LoadMany {
  RUN {
    tile.store_many(4 * thread(), load(reinterpret_cast<const Quad*>(in + 4 * thread())));
    const auto two = tile.load_many<Pair>(4 * thread() + 2);
    result[0] = two.y;
    result[1] = two.x;
  }
};

struct CpAsync {
  RUN {
    cp_async_16(tile + 4 * thread(), in + 4 * thread(), thread() % 5 * 4);
    cp_async_wait();
    for (int i = 0; i < 4; ++i) result[i] = tile.load(4 * thread() + i);
  }
};

template <bool TRANSPOSED>
struct Ldmatrix {
  RUN {
    const auto rows = shared<half>(512 * warp(), 256);
    for (int i = 0; i < 8; ++i) rows.store(32 * i + lane(), from_float<half>(own[0] + static_cast<float>(i)));
    sync_warp();
    std::uint32_t words[4];
    ldmatrix_x4<TRANSPOSED>(words, rows + (lane() % 16 * 16 + lane() / 16 * 8));
    for (int i = 0; i < 4; ++i) {
      const half low{static_cast<std::uint16_t>(words[i] & 0xffffu)}, high{static_cast<std::uint16_t>(words[i] >> 16)};
      result[i] = to_float(low) + 64 * to_float(high);
    }
  }
};

template <typename E>
struct Mma {
  RUN {
    std::uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = pack<E>(own[i], own[i] + 1);
    for (int i = 0; i < 4; ++i) result[i] = static_cast<float>(i);
    mma<E>(result, a, {pack<E>(own[0], own[1]), pack<E>(own[2], own[3])});
  }
};

struct MmaTf32 {
  RUN {
    std::uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(own[i]);
    for (int i = 0; i < 4; ++i) result[i] = static_cast<float>(i);
    mma_tf32(result, a, {to_tf32(own[1]), to_tf32(own[2])});
  }
};

template <typename E>
struct Conversion {
  RUN {
    const std::uint32_t word = pack<E>(own[2], own[3]);
    result[0] = to_float(from_float<E>(own[0]));
    result[1] = to_float(from_float<E>(own[1]));
    result[2] = to_float(E{static_cast<std::uint16_t>(word & 0xffffu)});
    result[3] = to_float(E{static_cast<std::uint16_t>(word >> 16)});
  }
};

struct RoundTf32 {
  RUN {
    for (int i = 0; i < 4; ++i) result[i] = from_tf32(to_tf32(own[i]));
  }
};

struct Arithmetic {
  RUN {
    result[0] = device::exp2(own[0]);
    result[1] = device::log2(own[1] * own[1] + 1);
    result[2] = device::fma(own[0], own[1], own[2]);
    result[3] = largest(own[2], own[3]);
  }
};

struct HighWord {
  RUN {
    const std::uint32_t product = high_word(static_cast<std::uint32_t>(thread()) * 0x9E3779B9u, 0xD2511F53u);
    result[0] = static_cast<float>(product >> 8);  // as many bits as a float has
  }
};

// One warpgroup: out (64, 8 N) = a · b, from 64x64 tiles in shared memory, of columns `first` to `first` + 8 N of b
// (rows of b as stored, unless TRANSPOSED). With FROM_REGISTERS, a is in registers.
template <typename E, int N, bool TRANSPOSED_A, bool TRANSPOSED, bool FROM_REGISTERS>
PYTBPTT_WARPGROUP_KERNEL(128, 1)
wgmma(const float* a, const float* b, int first, float* out) {
  if constexpr (has_warpgroups) {
    const auto left = shared<E>(0, 64 * row_elements), right = shared<E>(64 * 128, 64 * row_elements);
    for (int i = thread(); i < 64 * 64; i += 128) {
      const int row = i / 64, column = i % 64;
      const int at =
          row * row_elements + swizzled(row, column / chunk_elements) * chunk_elements + column % chunk_elements;
      left.store(at, from_float<E>(load(a + i)));
      right.store(at, from_float<E>(load(b + i)));
    }
    fence_async_shared();
    sync_threads();
    const int row = 16 * warp() + lane() / 4, column = lane() % 4 * 2;
    float d[N][4] = {};
    std::uint32_t rows[4][4];
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < 4; ++i) {
        const float* const pair = a + (row + i % 2 * 8) * 64 + 16 * k + column + i / 2 * 8;
        rows[k][i] = pack<E>(load(pair), load(pair + 1));
      }
    }
    warpgroup_arrive(d, rows);
    PYTBPTT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Matrix<E> b_part = TRANSPOSED ? Matrix<E>(right).from(16 * k, first) : Matrix<E>(right).from(first, 16 * k);
      if constexpr (FROM_REGISTERS) {
        warpgroup_mma<TRANSPOSED>(d, rows[k], b_part);
      } else {
        const Matrix<E> a_part = TRANSPOSED_A ? Matrix<E>(left).from(16 * k, 0) : Matrix<E>(left).from(0, 16 * k);
        warpgroup_mma<TRANSPOSED_A, TRANSPOSED>(d, a_part, b_part);
      }
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>(d, rows);
    sync_warpgroup();
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 4; ++i) store(out + (row + i / 2 * 8) * 8 * N + 8 * n + column + i % 2, d[n][i]);
    }
  }
}

// Two blocks take turns `rounds` times: each reads the other's row of `values` in reverse order, adds one, and writes
// the result to its own row.
PYTBPTT_KERNEL(threads, 1)
ping_pong(int rounds, std::uint32_t* flags, float* values) {
  const int own = block(), other = 1 - own;
  for (int round = 0; round < rounds; ++round) {
    if (lane() == 0) wait_at_least(flags + other, static_cast<std::uint32_t>(round + own));
    sync_warp();
    const float value = load(values + other * threads + (threads - 1 - thread()));
    store(values + own * threads + thread(), value + 1);
    sync_threads();
    if (thread() == 0) store_release(flags + own, static_cast<std::uint32_t>(round + 1));
  }
}

}  // namespace
}  // namespace pytbptt

// `flags` holds 2 zeros and `values` 2 x 64 floats, in memory of the device. Returns an error message or nullptr.
extern "C" const char* run_ping_pong(int rounds, std::uint32_t* flags, float* values) {
  using namespace pytbptt;
#ifndef __CUDACC__
  emulator::clear_error();
  emulator::clear_buffers();
  emulator::add_buffer(flags, 2 * sizeof(std::uint32_t), true);
  emulator::add_buffer(values, 2 * threads * sizeof(float), true);
#endif
  if (!fit_together(&ping_pong, 2, threads, 0)) return "two blocks are not resident at once";
  return launch_together(&ping_pong, 2, threads, 0, nullptr, rounds, flags, values);
}

// `a` and `b` hold 64 x 64 floats each and `out` 64 x `columns`, in memory of the device. Returns an error message or
// nullptr.
extern "C" const char* run_wgmma(bool bf16, int columns, bool transposed_a, bool transposed, bool registers,
                                 const float* a, const float* b, int first, float* out) {
  using namespace pytbptt;
#ifndef __CUDACC__
  emulator::clear_error();
  emulator::clear_buffers();
  emulator::set_wgmma_support(true);
  emulator::add_buffer(a, 64 * 64 * sizeof(float), false);
  emulator::add_buffer(b, 64 * 64 * sizeof(float), false);
  emulator::add_buffer(out, 64 * columns * sizeof(float), true);
#endif
  const auto run = [&](auto kernel) {
    if (!offers_warpgroups(kernel)) return "no warpgroups";
    return launch(kernel, 1, 128, 2 * 64 * 128, nullptr, a, b, first, out);
  };
  const auto run_columns = [&](auto element, auto count) {
    using E = decltype(element);
    constexpr int n = decltype(count)::value;
    if (registers && transposed) return run(&wgmma<E, n, false, true, true>);
    if (registers) return run(&wgmma<E, n, false, false, true>);
    if (transposed_a && transposed) return run(&wgmma<E, n, true, true, false>);
    if (transposed_a) return run(&wgmma<E, n, true, false, false>);
    if (transposed) return run(&wgmma<E, n, false, true, false>);
    return run(&wgmma<E, n, false, false, false>);
  };
  const auto run_type = [&](auto element) -> const char* {
    switch (columns) {
      case 8:
        return run_columns(element, std::integral_constant<int, 1>());
      case 16:
        return run_columns(element, std::integral_constant<int, 2>());
      case 24:
        return run_columns(element, std::integral_constant<int, 3>());
      case 32:
        return run_columns(element, std::integral_constant<int, 4>());
      case 48:
        return run_columns(element, std::integral_constant<int, 6>());
      case 64:
        return run_columns(element, std::integral_constant<int, 8>());
      default:
        return "no such number of columns";
    }
  };
  return bf16 ? run_type(bfloat16{}) : run_type(half{});
}

// `in` and `out` hold 64 x 4 floats each, in memory of the device. Returns an error message or nullptr.
extern "C" const char* run_primitive(const char* name, const float* in, float* out) {
  using namespace pytbptt;
#ifndef __CUDACC__
  emulator::clear_error();
  emulator::clear_buffers();
  emulator::add_buffer(in, 4 * threads * sizeof(float), false);
  emulator::add_buffer(out, 4 * threads * sizeof(float), true);
#endif
  const auto run = [&](auto kernel) { return launch(kernel, 1, threads, 4 * threads * 4, nullptr, in, out); };
  const auto is = [&](const char* one) { return std::strcmp(name, one) == 0; };
  if (is("sync_threads")) return run(&primitive<SyncThreads>);
  if (is("sync_warp")) return run(&primitive<SyncWarp>);
  if (is("shfl")) return run(&primitive<Shuffle>);
  if (is("load_many")) return run(&primitive<LoadMany>);
  if (is("cp_async_16")) return run(&primitive<CpAsync>);
  if (is("ldmatrix_x4")) return run(&primitive<Ldmatrix<false>>);
  if (is("ldmatrix_x4 transposed")) return run(&primitive<Ldmatrix<true>>);
  if (is("mma half")) return run(&primitive<Mma<half>>);
  if (is("mma bfloat16")) return run(&primitive<Mma<bfloat16>>);
  if (is("mma_tf32")) return run(&primitive<MmaTf32>);
  if (is("half")) return run(&primitive<Conversion<half>>);
  if (is("bfloat16")) return run(&primitive<Conversion<bfloat16>>);
  if (is("tf32")) return run(&primitive<RoundTf32>);
  if (is("exp2 log2 fma largest")) return run(&primitive<Arithmetic>);
  if (is("high_word")) return run(&primitive<HighWord>);
  return "no such primitive";
}
