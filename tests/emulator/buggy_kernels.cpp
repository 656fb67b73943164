// Correct kernels, and variants of each with one injected fault, to test what the emulator detects.
#include <cstring>
#include <string>

#include "common/cuda/device/device.h"

namespace pytbptt {
namespace {

using namespace device;

constexpr int threads = 64, steps = 4;

enum class Fault {
  none,
  missing_barrier,
  warp_instead_of_block_barrier,
  divergent_barrier,
  early_return,
  smem_view_overrun,
  smem_overrun,
  uninitialised_smem,
  missing_wait,
  missing_barrier_after_wait,
  missing_double_buffer,
  misaligned_copy,
  divergent_shuffle,
  wrong_lane,
  mixed_warp_operations,
  missing_warp_barrier,
  blocks_share_output,
  output_overrun,
  input_overrun,
  writes_input,
  reads_other_block,
  missing_flag_wait,
  early_flag_wait,
  missing_barrier_after_flag,
  missing_barrier_before_flag,
  single_exchange_buffer,
  stale_exchange,
  flag_never_set,
};

// out[64 * block + t] = in[64 * block + 63 - t], through shared memory.
template <Fault FAULT>
PYTBPTT_KERNEL(threads, 1)
reverse(float* in, float* out) {
  const Smem<float> tile = shared<float>(0, threads);
  const int t = thread(), first = block() * threads;
  if (FAULT == Fault::early_return && t == 40) return;
  const float value = load(in + first + t + (FAULT == Fault::input_overrun ? threads : 0));
  if (FAULT != Fault::uninitialised_smem || t != 7) {
    tile.store(t + (FAULT == Fault::smem_view_overrun && t == 63), value);
  }
  if constexpr (FAULT == Fault::warp_instead_of_block_barrier) {
    sync_warp();
  } else if constexpr (FAULT == Fault::divergent_barrier) {
    if (t < 32) {
      sync_threads();
    } else {
      sync_threads();
    }
  } else if constexpr (FAULT != Fault::missing_barrier) {
    sync_threads();
  }
  if (FAULT == Fault::smem_overrun) shared<float>(0, 4 * threads);
  if (FAULT == Fault::writes_input && t == 0) store(in, value);
  const int to = FAULT == Fault::blocks_share_output ? t : first + t + (FAULT == Fault::output_overrun ? threads : 0);
  store(out + to, tile.load(threads - 1 - t));
  if (FAULT == Fault::reads_other_block && block() == 1) load(out + t);
}

// out[t] = sum over steps of in[64 * step + 63 - t]; the next step's values are copied while this step's are added.
template <Fault FAULT>
PYTBPTT_KERNEL(threads, 1)
pipeline(float* in, float* out) {
  const Smem<float> tiles = shared<float>(0, 2 * threads);
  const int t = thread();
  const auto buffer = [&](int step) {
    return tiles + (FAULT == Fault::missing_double_buffer ? 0 : step % 2 * threads);
  };
  const auto fetch = [&](int step) {
    if (t < threads / 4) {
      const float* const from = in + threads * step + 4 * t + (FAULT == Fault::misaligned_copy ? 1 : 0);
      cp_async_16(buffer(step) + 4 * t, from, 16);
    }
  };
  fetch(0);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (FAULT != Fault::missing_wait) cp_async_wait();
    if (FAULT != Fault::missing_barrier_after_wait) sync_threads();
    if (step + 1 < steps) fetch(step + 1);
    sum += buffer(step).load(threads - 1 - t);
  }
  if (FAULT == Fault::missing_wait) cp_async_wait();
  store(out + t, sum);
}

// out[t] = the sum of in over the warp, plus the neighbouring lane's element, read from shared memory.
template <Fault FAULT>
PYTBPTT_KERNEL(threads, 1)
warp_sum(float* in, float* out) {
  const Smem<float> tile = shared<float>(0, threads);
  float sum = load(in + thread());
  tile.store(thread(), sum);
  for (int mask = 16; mask > 0; mask /= 2) {
    if (FAULT == Fault::divergent_shuffle && lane() == 5) continue;
    if (FAULT == Fault::mixed_warp_operations && lane() < 16) sync_warp();
    const int other = FAULT == Fault::wrong_lane && mask == 4 ? 2 : mask;
    sum += shfl_xor(sum, other);
  }
  if (FAULT != Fault::missing_warp_barrier) sync_warp();
  store(out + thread(), sum + tile.load(thread() ^ 1));
}

// Two blocks exchange 64 values each in every step, through two buffers in `out`, guarded by a flag for each block. A
// block sums both blocks' values, in[128 * step + i], over two steps, and writes the result to buffer 0.
template <Fault FAULT>
PYTBPTT_KERNEL(threads, 1)
exchange(float* in, float* out, std::uint32_t* flags) {
  const int t = thread(), own = block() * threads, other = threads - own;
  const auto buffer = [&](int step) {
    return out + (FAULT == Fault::single_exchange_buffer ? 0 : step % 2 * 2 * threads);
  };
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    const float value = load(in + 2 * threads * step + own + t);
    store(buffer(step) + own + t, value);
    if (FAULT != Fault::missing_barrier_before_flag) sync_threads();
    if (t == 0 && (FAULT != Fault::flag_never_set || block() == 0)) store_release(flags + block(), step + 1);
    const int expected = step + (FAULT == Fault::early_flag_wait ? 0 : 1);
    if (FAULT != Fault::missing_flag_wait && lane() == 0) wait_at_least(flags + 1 - block(), expected);
    if (FAULT != Fault::missing_barrier_after_flag) sync_warp();
    sum += value + load(buffer(step + (FAULT == Fault::stale_exchange ? 1 : 0)) + other + t);
  }
  store(buffer(0) + own + t, sum);
}

// One warp: out (16, 8) = a (16, 16) · b (8, 16)ᵀ, or · b (16, 8) where TRANSPOSED.
template <typename E, bool TRANSPOSED>
PYTBPTT_KERNEL(32, 1)
warp_mma(E* a, E* b, float* out) {
  const Smem<E> rows = shared<E>(0, 256), columns = shared<E>(512, 256);
  for (int i = lane(); i < 256; i += 32) {
    rows.store(i, load(a + i));
    columns.store(i, i < 128 ? load(b + i) : from_float<E>(0));
  }
  sync_warp();
  std::uint32_t fragment_a[4], fragment_b[4];
  ldmatrix_x4<false>(fragment_a, rows + (lane() % 16 * 16 + lane() / 16 * 8));
  ldmatrix_x4<TRANSPOSED>(fragment_b,
                          TRANSPOSED ? columns + lane() % 16 * 8 : columns + (lane() % 8 * 16 + lane() / 8 % 2 * 8));
  float sums[4] = {};
  const std::uint32_t b_registers[2] = {fragment_b[0], fragment_b[1]};
  mma<E>(sums, fragment_a, b_registers);
  for (int i = 0; i < 4; ++i) store(out + (lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2, sums[i]);
}

// One warp: out (16, 8) = a (16, 8) · b (8, 8)ᵀ in TF32.
PYTBPTT_KERNEL(32, 1) warp_mma_tf32(float* a, float* b, float* out) {
  const int g = lane() / 4, q = lane() % 4;
  const std::uint32_t fragment_a[4] = {to_tf32(load(a + g * 8 + q)), to_tf32(load(a + (g + 8) * 8 + q)),
                                       to_tf32(load(a + g * 8 + q + 4)), to_tf32(load(a + (g + 8) * 8 + q + 4))};
  const std::uint32_t fragment_b[2] = {to_tf32(load(b + g * 8 + q)), to_tf32(load(b + g * 8 + q + 4))};
  float sums[4] = {};
  mma_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) store(out + (g + i / 2 * 8) * 8 + 2 * q + i % 2, sums[i]);
}

template <Fault FAULT>
void run(const char* kernel, float* in, float* out) {
  const std::string name = kernel;
  if (name == "reverse") launch(&reverse<FAULT>, 2, threads, 256, nullptr, in, out);
  if (name == "pipeline") launch(&pipeline<FAULT>, 1, threads, 512, nullptr, in, out);
  if (name == "exchange") {
    auto* const flags = reinterpret_cast<std::uint32_t*>(out + 4 * threads);
    clear(flags, 8, nullptr);
    launch_together(&exchange<FAULT>, 2, threads, 0, nullptr, in, out, flags);
  }
  if (name == "warp_sum") launch(&warp_sum<FAULT>, 1, threads, 256, nullptr, in, out);
}

}  // namespace
}  // namespace pytbptt

using pytbptt::Fault;

#define CASE(name)                              \
  if (std::strcmp(fault, #name) == 0) {         \
    pytbptt::run<Fault::name>(kernel, in, out); \
    return pytbptt::emulator::error().c_str();  \
  }

// `in` holds 256 floats and `out` 128 (258 for `exchange`). Returns the error message, empty without an error.
extern "C" const char* run_kernel(const char* kernel, const char* fault, unsigned schedule, float* in, float* out) {
  using namespace pytbptt;
  emulator::clear_error();
  emulator::clear_buffers();
  emulator::set_schedule(schedule);
  const bool reverse = std::strcmp(kernel, "reverse") == 0;
  emulator::add_buffer(in, (reverse ? 128 : 256) * sizeof(float), false);
  emulator::add_buffer(out, (std::strcmp(kernel, "exchange") == 0 ? 258 : 128) * sizeof(float), true);
  CASE(none)
  CASE(missing_barrier)
  CASE(warp_instead_of_block_barrier)
  CASE(divergent_barrier)
  CASE(early_return)
  CASE(smem_view_overrun)
  CASE(smem_overrun)
  CASE(uninitialised_smem)
  CASE(missing_wait)
  CASE(missing_barrier_after_wait)
  CASE(missing_double_buffer)
  CASE(misaligned_copy)
  CASE(divergent_shuffle)
  CASE(wrong_lane)
  CASE(mixed_warp_operations)
  CASE(missing_warp_barrier)
  CASE(blocks_share_output)
  CASE(output_overrun)
  CASE(input_overrun)
  CASE(writes_input)
  CASE(reads_other_block)
  CASE(missing_flag_wait)
  CASE(early_flag_wait)
  CASE(missing_barrier_after_flag)
  CASE(missing_barrier_before_flag)
  CASE(single_exchange_buffer)
  CASE(stale_exchange)
  CASE(flag_never_set)
  return "no such fault";
}

// `kind` is half, bfloat16 or tf32; `transposed` applies to the first two.
extern "C" const char* run_mma(const char* kind, bool transposed, void* a, void* b, float* out) {
  using namespace pytbptt;
  emulator::clear_error();
  emulator::clear_buffers();
  const std::string name = kind;
  emulator::add_buffer(a, 512, false);
  emulator::add_buffer(b, 256, false);
  emulator::add_buffer(out, 512, true);
  const auto run = [&](auto element) {
    using E = decltype(element);
    const auto kernel = transposed ? &warp_mma<E, true> : &warp_mma<E, false>;
    launch(kernel, 1, 32, 1024, nullptr, static_cast<E*>(a), static_cast<E*>(b), out);
  };
  if (name == "half") run(device::half{});
  if (name == "bfloat16") run(device::bfloat16{});
  if (name == "tf32") launch(&warp_mma_tf32, 1, 32, 0, nullptr, static_cast<float*>(a), static_cast<float*>(b), out);
  return emulator::error().c_str();
}

extern "C" void convert(const char* kind, bool to_float, std::int64_t count, std::uint16_t* narrow, float* wide) {
  using namespace pytbptt::device;
  const bool is_half = std::strcmp(kind, "half") == 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (to_float) {
      wide[i] = is_half ? pytbptt::device::to_float(half{narrow[i]}) : pytbptt::device::to_float(bfloat16{narrow[i]});
    } else {
      narrow[i] = is_half ? from_float<half>(wide[i]).bits : from_float<bfloat16>(wide[i]).bits;
    }
  }
}
