// The backward of rel_attention: every gradient without atomics, each sum in an order that sizes alone decide.
//
//   dots       rows of grad_out · out, which the softmax's gradient needs
//   keys       a block has TILE keys of a stream and head, and walks over the queries that see them: keys and values
//   queries    a block walks over several tiles of one head's queries, and for each over the keys that they see:
//   queries,
//              and, in a slab of its own, the head's positions and biases
//   positions  the slabs of a head, added up
//   biases     likewise
//
// With dS the gradient of the scores, before their scale: d query = dS · key + band · position, where the band is dS
// with each row moved to the places of its distances, d position = bandᵀ · (query + v), and as content_bias and
// position_bias receive the two halves of d query, summed over queries, position_bias is (column sums of the band) ·
// position.
#pragma once
#include "cuda/rel_attention_head_size.cuh"
#include "cuda/rel_attention_tile.cuh"

namespace pytbptt::cuda {

struct BackwardLaunch {
  Inputs in;
  Operand grad_out, out;
  const float* log_sum_exp;
  bool memory_needs_grad;
  void *query, *key, *value, *position, *content_bias, *position_bias, *memory_key, *memory_value;
  std::int64_t first_key;  // of the keys kernel's first tile
  std::int64_t slabs;      // for each head
  float* dots;             // (B, H, T)
  float* sums;        // (slabs, H, R, PADDED + 8): d position / |scale|, and in column PADDED the band's column sums
  float* query_sums;  // (slabs, H, PADDED): d query / scale, summed over queries
};

// How the two large kernels lay out their shared memory, in bytes.
template <typename Kind, int PADDED>
struct BackwardMemory {
  using T = Tile<Kind, PADDED, true>;
  static constexpr int element = sizeof(typename T::Element);
  // What a warp has for itself: the moved band of the forward, then, in its place, either the weights and the gradients
  // of the scores, 16 rows of TILE each, or the band of the latter, 16 rows of TILE + 16.
  static constexpr int weights_stride = T::size + Products<Kind>::padding;
  static constexpr int band_stride = T::size + 16 + Products<Kind>::padding;
  static constexpr int own = at_least(T::skew_elements * 4, element * 16 * at_least(2 * weights_stride, band_stride));
  static constexpr int keys = 0;
  static constexpr int values = keys + T::bytes;
  static constexpr int upper = values + T::bytes;
  static constexpr int lower = upper + T::bytes;
  static constexpr int with_content = lower + T::bytes;
  static constexpr int with_position = with_content + T::bytes;
  static constexpr int grad_out = with_position + T::bytes;
  static constexpr int warps = grad_out + T::bytes;
  static constexpr int query_sums = warps + T::warps * own;
  static constexpr int far_sums = query_sums + T::warps * PADDED * 4;
  static constexpr int carried = far_sums + T::size * 4;
  static constexpr int bytes = carried + T::size * PADDED * 4;
  static_assert(bytes <= most_shared_bytes, "a block must fit on every GPU");
};

constexpr int dots_threads = 128;

// The weights times their gradients, summed over the keys, are grad_out · out with the factors that the products of
// `differentiate` see: what these round off has to cancel there.
template <typename Kind>
PYTBPTT_KERNEL(dots_threads, 1)
rel_attention_dots_kernel(const BackwardLaunch launch) {
  using E = typename Products<Kind>::Element;
  const Inputs& in = launch.in;
  const int64_t row = int64_t{block()} * (dots_threads / warp_size) + warp();
  if (row >= in.B * in.H * in.T) return;
  const int64_t query = row % in.T, head = row / in.T % in.H, batch = row / in.T / in.H;
  const E* const grad_out = row_of<E>(launch.grad_out, batch, query, head);
  const E* const out = row_of<E>(launch.out, batch, query, head);
  float sum = 0;
  for (int c = lane(); c < in.D; c += warp_size) {
    sum = fma(Products<Kind>::factor(to_float(load(grad_out + c))), to_float(load(out + c)), sum);
  }
  PYTBPTT_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (lane() == 0) store(launch.dots + row, sum);
}

// The log-sum-exp and the dot product of each of a lane's two queries.
struct Softmax {
  float log_sum_exp[2], dot[2];

  PYTBPTT_DEVICE Softmax(const BackwardLaunch& launch, int64_t batch, int64_t first_query, int64_t head) {
    for (int h = 0; h < 2; ++h) {
      const int64_t query = first_query + lane() / 4 + 8 * h;
      const bool exists = query < launch.in.T;
      const int64_t row = (batch * launch.in.H + head) * launch.in.T + query;
      log_sum_exp[h] = exists ? load(launch.log_sum_exp + row) : INFINITY;
      dot[h] = exists ? load(launch.dots + row) : 0.0f;
    }
  }
};

// From the sums of a warp's queries with a tile's keys to the weights, as dropout leaves them (where KEEP_WEIGHTS, in
// the place of the sums), and the gradients of the scores.
template <bool KEEP_WEIGHTS, typename Kind, typename T, int PADDED>
PYTBPTT_DEVICE void differentiate(float (&sums)[T::size / 8][4], float (&gradients)[T::size / 8][4],
                                  const BackwardLaunch& launch, const Softmax& softmax, const Sight& sight,
                                  Smem<typename T::Element> grad_out, Smem<typename T::Element> values, int64_t seed,
                                  int64_t batch, int64_t first_query, int first_key, int64_t head) {
  const Inputs& in = launch.in;
  const bool all = sight.everything<T>(first_key);
  PYTBPTT_UNROLL
  for (int n = 0; n < T::size / 8; ++n) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool seen = all || sight.sees(i / 2, first_key + 8 * n + lane() % 4 * 2 + i % 2);
      sums[n][i] = seen ? exp2(fma(sums[n][i], in.log2_scale, -softmax.log_sum_exp[i / 2])) : 0.0f;
      gradients[n][i] = 0;
    }
  }
  const typename Products<Kind>::template Rows<PADDED> rows(grad_out + 16 * warp() * T::stride, T::stride);
  Products<Kind>::template times_transposed<T::size / 8, PADDED>(gradients, rows, values, T::stride);
  const auto finish = [&](int n, int i, float keep) {
    gradients[n][i] = sums[n][i] * fma(gradients[n][i], keep, -softmax.dot[i / 2]);
    if (KEEP_WEIGHTS) sums[n][i] *= keep;
  };
  if (in.dropout_threshold != 0) {
    random_bits<T>(in, seed, batch, first_query, first_key, head, [&](int n, int i, std::uint32_t bits) {
      finish(n, i, bits < in.dropout_threshold ? 0.0f : static_cast<float>(in.keep_scale));
    });
  } else {
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) finish(n, i, 1.0f);
    }
  }
}

// Columns 2q and 2q + 1 of a warp's rows, as the products read them.
template <typename E>
PYTBPTT_DEVICE void keep_two(Smem<E> rows, int index, float first, float second) {
  if constexpr (sizeof(E) == 2) {
    rows.template store_many<std::uint32_t>(index, pack<E>(first, second));
  } else {
    rows.template store_many<Pair>(index, Pair{first, second});
  }
}

template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED, true>::threads), 1)
rel_attention_keys_kernel(const BackwardLaunch launch) {
  using T = Tile<Kind, PADDED, true>;
  using E = typename T::Element;
  using P = Products<Kind>;
  using Rows = typename P::template Rows<PADDED>;
  using Memory = BackwardMemory<Kind, PADDED>;
  const Inputs& in = launch.in;
  const int64_t tiles_of_keys = (in.M + in.T - launch.first_key + T::size - 1) / T::size;
  const auto first_key = static_cast<int>(launch.first_key + block() % tiles_of_keys * T::size);
  const int64_t head = block() / tiles_of_keys % in.H, batch = block() / tiles_of_keys / in.H;

  const auto keys = shared<E>(Memory::keys, T::elements), values = shared<E>(Memory::values, T::elements);
  const auto upper = shared<E>(Memory::upper, T::elements), lower = shared<E>(Memory::lower, T::elements);
  const auto with_content = shared<E>(Memory::with_content, T::elements);
  const auto with_position = shared<E>(Memory::with_position, T::elements);
  const auto grad_out = shared<E>(Memory::grad_out, T::elements);
  const auto skew = shared<float>(Memory::warps + warp() * Memory::own, T::skew_elements);
  // The weights of a warp's queries, and after them the gradients of their scores.
  const auto weights_of = [](int of_warp) {
    return shared<E>(Memory::warps + of_warp * Memory::own, 2 * 16 * Memory::weights_stride);
  };
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);

  fetch<T>(keys, in, [&](int r) { return key_row<E>(in.memory_key, in.key, in, batch, first_key + r, head); });
  fetch<T>(values, in, [&](int r) { return key_row<E>(in.memory_value, in.value, in, batch, first_key + r, head); });

  float d_key[PADDED / 8][4] = {}, d_value[PADDED / 8][4] = {};
  const int64_t last_key = smaller64(first_key + T::size, in.M + in.T) - 1;
  const int64_t end = smaller64(last_key + in.window - in.M, in.T);
  PYTBPTT_LOOP
  for (int64_t first_query = larger64(0, first_key - in.M); first_query < end; first_query += T::size) {
    if (first_visible_to_tile<T>(in, batch, first_query) > last_key) continue;
    sync_threads();
    const int64_t far = in.M + first_query + T::size - 1 - first_key;
    biased_queries<T>(with_content, with_position, in, batch, first_query, head);
    fetch<T>(grad_out, in, [&](int r) {
      return first_query + r < in.T ? row_of<E>(launch.grad_out, batch, first_query + r, head) : nullptr;
    });
    fetch<T>(upper, in, [&](int r) { return position_row<E>(in, far - r, head); });
    fetch<T>(lower, in, [&](int r) { return position_row<E>(in, far - T::size - r, head); });
    cp_async_wait();
    sync_threads();

    const int64_t own_query = first_query + 16 * warp();
    const Sight sight(in, batch, own_query);
    const Softmax softmax(launch, batch, own_query, head);
    float weights[T::size / 8][4], gradients[T::size / 8][4];
    compute_sums<Kind, T, PADDED>(
        weights, [&] { return Rows(with_content + 16 * warp() * T::stride, T::stride); },
        [&] { return Rows(with_position + 16 * warp() * T::stride, T::stride); }, keys, upper, lower,
        far - 2 * T::size + 2 >= in.R - 1, skew);
    differentiate<true, Kind, T, PADDED>(weights, gradients, launch, softmax, sight, grad_out, values, seed, batch,
                                         own_query, first_key, head);
    sync_warp();  // the skew has been read
    const auto mine = weights_of(warp());
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int index = (lane() / 4 + 8 * h) * Memory::weights_stride + 8 * n + lane() % 4 * 2;
        keep_two(mine, index, weights[n][2 * h], weights[n][2 * h + 1]);
        keep_two(mine, index + 16 * Memory::weights_stride, gradients[n][2 * h], gradients[n][2 * h + 1]);
      }
    }
    sync_threads();
    PYTBPTT_LOOP
    for (int of_warp = 0; of_warp < T::warps; ++of_warp) {
      const auto theirs = weights_of(of_warp) + 16 * warp();
      const int rows = 16 * of_warp * T::stride;
      P::template transposed_times<PADDED / 8>(d_value, theirs, Memory::weights_stride, grad_out + rows, T::stride);
      P::template transposed_times<PADDED / 8>(d_key, theirs + 16 * Memory::weights_stride, Memory::weights_stride,
                                               with_content + rows, T::stride);
    }
  }
  cp_async_wait();

  const float scale = in.sign * static_cast<float>(in.scale);
  PYTBPTT_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t j = first_key + 16 * warp() + lane() / 4 + 8 * h;
    if (j >= in.M + in.T || (j < in.M && !launch.memory_needs_grad)) continue;
    const int64_t row = j < in.M ? batch * in.M + j : batch * in.T + j - in.M;
    E* const key = static_cast<E*>(j < in.M ? launch.memory_key : launch.key) + (row * in.H + head) * in.D;
    E* const value = static_cast<E*>(j < in.M ? launch.memory_value : launch.value) + (row * in.H + head) * in.D;
    PYTBPTT_UNROLL
    for (int n = 0; n < PADDED / 8; ++n) {
      const int column = 8 * n + lane() % 4 * 2, depth = static_cast<int>(in.D);
      store_two(key, column, depth, d_key[n][2 * h] * scale, d_key[n][2 * h + 1] * scale);
      store_two(value, column, depth, d_value[n][2 * h], d_value[n][2 * h + 1]);
    }
  }
}

template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED, true>::threads), 1)
rel_attention_queries_kernel(const BackwardLaunch launch) {
  using T = Tile<Kind, PADDED, true>;
  using E = typename T::Element;
  using P = Products<Kind>;
  using Rows = typename P::template Rows<PADDED>;
  using Memory = BackwardMemory<Kind, PADDED>;
  constexpr int slab_stride = PADDED + 8;
  // d position is computed in cuts of its columns: all at once are too many registers where rows are wide.
  constexpr int cuts = PADDED <= 64 ? 1 : T::floats ? PADDED / 32 : 2, columns = PADDED / cuts;
  const Inputs& in = launch.in;
  const int64_t head = block() % in.H, slab_index = block() / in.H;
  const int g = lane() / 4, q = lane() % 4, depth = static_cast<int>(in.D);

  const auto keys = shared<E>(Memory::keys, T::elements), values = shared<E>(Memory::values, T::elements);
  const auto table = shared<E>(Memory::upper, 2 * T::elements);  // groups of TILE places: this tile's and the next
  const auto with_content = shared<E>(Memory::with_content, T::elements);
  const auto with_position = shared<E>(Memory::with_position, T::elements);
  const auto grad_out = shared<E>(Memory::grad_out, T::elements);
  const auto skew = shared<float>(Memory::warps + warp() * Memory::own, T::skew_elements);
  const auto band_of = [](int of_warp) {
    return shared<E>(Memory::warps + of_warp * Memory::own, 16 * Memory::band_stride);
  };
  const auto query_sums = shared<float>(Memory::query_sums, T::warps * PADDED);
  const auto far_sums = shared<float>(Memory::far_sums, T::size);
  const auto carried = shared<float>(Memory::carried, T::size * PADDED);
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);

  float* const slab = launch.sums + (slab_index * in.H + head) * in.R * slab_stride;
  for (int64_t i = thread(); i < in.R * slab_stride; i += T::threads) store(slab + i, 0.0f);
  for (int i = thread(); i < T::warps * PADDED; i += T::threads) query_sums.store(i, 0.0f);

  const int64_t tiles_of_queries = (in.T + T::size - 1) / T::size;
  PYTBPTT_LOOP
  for (int64_t item = slab_index; item < in.B * tiles_of_queries; item += launch.slabs) {
    const int64_t batch = item % in.B, first_query = (tiles_of_queries - 1 - item / in.B) * T::size;
    const int64_t own_query = first_query + 16 * warp();
    const int start = first_visible_to_tile<T>(in, batch, first_query) / 8 * 8;
    const auto end = static_cast<int>(in.M + smaller64(first_query + T::size, in.T));
    const int tiles = end > start ? (end - start + T::size - 1) / T::size : 0;
    const int64_t far = in.M + first_query + T::size - 1 - start;  // at place 0 of the first tile

    const auto fetch_group = [&](int group) {
      fetch<T>(table + group % 2 * T::elements, in,
               [&](int r) { return position_row<E>(in, far - int64_t{group} * T::size - r, head); });
    };
    sync_threads();
    biased_queries<T>(with_content, with_position, in, batch, first_query, head);
    fetch<T>(grad_out, in, [&](int r) {
      return first_query + r < in.T ? row_of<E>(launch.grad_out, batch, first_query + r, head) : nullptr;
    });
    if (tiles > 0) fetch_group(0);

    const Sight sight(in, batch, own_query);
    const Softmax softmax(launch, batch, own_query, head);
    float d_query[PADDED / 8][4] = {};
    // d position for places of the tile, TILE / 16 groups of 16 and as many again, two groups for each warp: `near` in
    // the first half, complete after the tile, and `next` in the second, which becomes the next tile's first. Between
    // tiles it lies in shared memory, each lane's part where no other touches it; its column sums are few enough to
    // stay.
    float near_sums[4] = {};
    const auto carried_index = [&](int cut, int n, int h) {
      return 2 * ((2 * (cut * columns / 8 + n) + h) * T::threads + thread());
    };
    const auto carry = [&](int cut, const float (&next)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int n = 0; n < columns / 8; ++n) {
        PYTBPTT_UNROLL
        for (int h = 0; h < 2; ++h) {
          carried.template store_many<Pair>(carried_index(cut, n, h), Pair{next[n][2 * h], next[n][2 * h + 1]});
        }
      }
    };
    const auto take_carried = [&](int cut, float (&into)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int n = 0; n < columns / 8; ++n) {
        PYTBPTT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const Pair two = carried.template load_many<Pair>(carried_index(cut, n, h));
          into[n][2 * h] = two.x;
          into[n][2 * h + 1] = two.y;
        }
      }
    };
    PYTBPTT_LOOP
    for (int cut = 0; cut < cuts; ++cut) {
      const float nothing[columns / 8][4] = {};
      carry(cut, nothing);
    }
    float far_total[2] = {};  // of dS over the keys that use the table's last row

    const auto add_to_slab = [&](int group, int cut, const float (&near)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int64_t distance = far - int64_t{group} * T::size - (16 * warp() + g + 8 * h);
        if (distance < 0 || distance >= in.R - 1) continue;
        float* const row = slab + distance * slab_stride;
        PYTBPTT_UNROLL
        for (int n = 0; n < columns / 8; ++n) {
          Pair* const to = reinterpret_cast<Pair*>(row + cut * columns + 8 * n + 2 * q);
          const Pair before = load(to);
          store(to, Pair{before.x + near[n][2 * h], before.y + near[n][2 * h + 1]});
        }
        if (q == 0 && cut == 0) store(row + PADDED, load(row + PADDED) + near_sums[2 * h]);
      }
    };

    PYTBPTT_LOOP
    for (int tile = 0; tile < tiles; ++tile) {
      const int first_key = start + tile * T::size;
      sync_threads();
      fetch<T>(keys, in, [&](int r) { return key_row<E>(in.memory_key, in.key, in, batch, first_key + r, head); });
      fetch<T>(values, in,
               [&](int r) { return key_row<E>(in.memory_value, in.value, in, batch, first_key + r, head); });
      fetch_group(tile + 1);
      cp_async_wait();
      sync_threads();

      const auto upper = table + tile % 2 * T::elements, lower = table + (tile + 1) % 2 * T::elements;
      const int64_t farthest = far - int64_t{tile} * T::size;
      const bool one_row = farthest - 2 * T::size + 2 >= in.R - 1;
      const auto band = band_of(warp());
      if (sight.nothing<T>(first_key)) {
        if (!one_row) {
          for (int i = lane(); i < 16 * (T::size + 16); i += warp_size) {
            band.store(i / (T::size + 16) * Memory::band_stride + i % (T::size + 16), from_float<E>(0));
          }
        }
      } else {
        float sums[T::size / 8][4], gradients[T::size / 8][4];
        compute_sums<Kind, T, PADDED>(
            sums, [&] { return Rows(with_content + 16 * warp() * T::stride, T::stride); },
            [&] { return Rows(with_position + 16 * warp() * T::stride, T::stride); }, keys, upper, lower, one_row,
            skew);
        differentiate<false, Kind, T, PADDED>(sums, gradients, launch, softmax, sight, grad_out, values, seed, batch,
                                              own_query, first_key, head);
        P::template weights_times<PADDED / 8, T::size>(d_query, gradients, keys, T::stride);
        if (farthest >= in.R - 1) {
          PYTBPTT_UNROLL
          for (int n = 0; n < T::size / 8; ++n) {
            PYTBPTT_UNROLL
            for (int i = 0; i < 4; ++i) {
              const int64_t key = first_key + 8 * n + 2 * q + i % 2;
              if (in.M + own_query + g + i / 2 * 8 - key < in.R - 1) continue;
              far_total[i / 2] += gradients[n][i];
              gradients[n][i] = 0;
            }
          }
        }
        if (!one_row) {
          sync_warp();  // the skew has been read
          for (int i = lane(); i < 16 * 16; i += warp_size) {
            const int row = i / 16, column = i % 16 < 15 - row ? i % 16 : T::size + i % 16;
            band.store(row * Memory::band_stride + column, from_float<E>(0));
          }
          PYTBPTT_UNROLL
          for (int n = 0; n < T::size / 8; ++n) {
            PYTBPTT_UNROLL
            for (int i = 0; i < 4; ++i) {
              const int row = g + i / 2 * 8;
              band.store(row * Memory::band_stride + 15 - row + 8 * n + 2 * q + i % 2, from_float<E>(gradients[n][i]));
            }
          }
          sync_warp();
          PYTBPTT_UNROLL
          for (int part = 0; part < T::size / 16 + 1; ++part) {
            const int y = T::size - 16 - 16 * warp() + 16 * part;
            const auto rows = y < T::size ? upper + y * T::stride : lower + (y - T::size) * T::stride;
            P::template times<PADDED / 8>(d_query, band + 16 * part, Memory::band_stride, rows, T::stride);
          }
        }
      }
      if (one_row) continue;  // so were the tiles before: nothing has been carried
      sync_threads();
      // Warp w's band starts at place TILE - 16 - 16w, so group G of the tile's 2 TILE places, 16 each, is in its
      // columns from 16 (G - (warps - 1 - w)) on, if it has the group at all.
      float next_sums[4] = {};
      PYTBPTT_LOOP
      for (int cut = 0; cut < cuts; ++cut) {
        float near[columns / 8][4];
        take_carried(cut, near);
        PYTBPTT_LOOP
        for (int of_warp = T::warps - 1 - warp(); of_warp < T::warps; ++of_warp) {
          const auto part = band_of(of_warp) + 16 * (warp() - (T::warps - 1 - of_warp));
          const auto queries = with_position + (16 * of_warp * T::stride + cut * columns);
          P::template transposed_times<columns / 8>(near, part, Memory::band_stride, queries, T::stride);
          if (cut == 0) P::add_columns(near_sums, part, Memory::band_stride);
        }
        add_to_slab(tile, cut, near);
        float next[columns / 8][4] = {};
        PYTBPTT_LOOP
        for (int of_warp = 0; of_warp < T::warps - warp(); ++of_warp) {
          const auto part = band_of(of_warp) + 16 * (warp() + 1 + of_warp);
          const auto queries = with_position + (16 * of_warp * T::stride + cut * columns);
          P::template transposed_times<columns / 8>(next, part, Memory::band_stride, queries, T::stride);
          if (cut == 0) P::add_columns(next_sums, part, Memory::band_stride);
        }
        carry(cut, next);
      }
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) near_sums[i] = next_sums[i];
    }
    cp_async_wait();
    PYTBPTT_LOOP
    for (int cut = 0; cut < cuts; ++cut) {
      float near[columns / 8][4];
      take_carried(cut, near);
      add_to_slab(tiles, cut, near);
    }

    if (far >= in.R - 1) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        far_total[h] += shfl_xor(far_total[h], 1);
        far_total[h] += shfl_xor(far_total[h], 2);
        if (q == 0) far_sums.store(16 * warp() + g + 8 * h, far_total[h]);
      }
      const E* const last_row = position_row<E>(in, in.R - 1, head);
      PYTBPTT_UNROLL
      for (int n = 0; n < PADDED / 8; ++n) {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * n + 2 * q + i % 2;
          if (column < depth) d_query[n][i] = fma(far_total[i / 2], to_float(load(last_row + column)), d_query[n][i]);
        }
      }
      sync_threads();
      for (int c = thread(); c <= PADDED; c += T::threads) {
        float sum = 0;
        for (int r = 0; r < T::size; ++r) {
          sum = fma(far_sums.load(r), c == PADDED ? 1.0f : to_float(with_position.load(r * T::stride + c)), sum);
        }
        float* const to = slab + (in.R - 1) * slab_stride + c;
        store(to, load(to) + sum);
      }
    }

    PYTBPTT_UNROLL
    for (int n = 0; n < PADDED / 8; ++n) {
      PYTBPTT_UNROLL
      for (int i = 0; i < 2; ++i) {
        float sum = d_query[n][i] + d_query[n][i + 2];
        PYTBPTT_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
        const int index = warp() * PADDED + 8 * n + 2 * q + i;
        if (g == 0) query_sums.store(index, query_sums.load(index) + sum);
      }
    }
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t query = own_query + g + 8 * h;
      if (query >= in.T) continue;
      E* const row = static_cast<E*>(launch.query) + ((batch * in.T + query) * in.H + head) * in.D;
      const auto scale = static_cast<float>(in.scale);
      PYTBPTT_UNROLL
      for (int n = 0; n < PADDED / 8; ++n) {
        store_two(row, 8 * n + 2 * q, depth, d_query[n][2 * h] * scale, d_query[n][2 * h + 1] * scale);
      }
    }
  }

  sync_threads();
  for (int c = thread(); c < PADDED; c += T::threads) {
    float sum = 0;
    for (int of_warp = 0; of_warp < T::warps; ++of_warp) sum += query_sums.load(of_warp * PADDED + c);
    store(launch.query_sums + (slab_index * in.H + head) * PADDED + c, sum);
  }
}

constexpr int reduce_threads = 256;

template <typename E, int PADDED>
PYTBPTT_KERNEL(reduce_threads, 1)
rel_attention_positions_kernel(const BackwardLaunch launch) {
  const Inputs& in = launch.in;
  const int64_t i = int64_t{block()} * reduce_threads + thread();
  if (i >= in.R * in.H * in.D) return;
  const int64_t column = i % in.D, row = i / in.D % in.R, head = i / in.D / in.R;
  const float* const from = launch.sums + (head * in.R + row) * (PADDED + 8) + column;
  float sum = 0;
  for (int64_t slab = 0; slab < launch.slabs; ++slab) sum += load(from + slab * in.H * in.R * (PADDED + 8));
  E* const to = static_cast<E*>(launch.position) + (row * in.H + head) * in.D + column;
  store(to, from_float<E>(sum * in.sign * static_cast<float>(in.scale)));
}

// A block has a head: it adds up the band's column sums of as many distances as it has threads, and multiplies these by
// the table's rows, its threads cut into parts that take every so-manieth.
template <typename E, int PADDED>
PYTBPTT_KERNEL(reduce_threads, 1)
rel_attention_biases_kernel(const BackwardLaunch launch) {
  constexpr int parts = reduce_threads / PADDED;
  const Inputs& in = launch.in;
  const int64_t head = block();
  const auto columns = shared<float>(0, reduce_threads);
  const int part = thread() / PADDED, c = thread() % PADDED;
  float position = 0;
  for (int64_t first = 0; first < in.R; first += reduce_threads) {
    float column = 0;
    for (int64_t slab = 0; first + thread() < in.R && slab < launch.slabs; ++slab) {
      column += load(launch.sums + ((slab * in.H + head) * in.R + first + thread()) * (PADDED + 8) + PADDED);
    }
    sync_threads();
    columns.store(thread(), column);
    sync_threads();
    if (part < parts && c < in.D) {
      for (int r = part; r < reduce_threads && first + r < in.R; r += parts) {
        position = fma(columns.load(r), to_float(load(position_row<E>(in, first + r, head) + c)), position);
      }
    }
  }
  sync_threads();
  columns.store(thread(), position);
  sync_threads();
  if (thread() >= in.D) return;
  const auto scale = static_cast<float>(in.scale);
  float content = 0;
  position = 0;
  for (int from = 0; from < parts; ++from) position += columns.load(from * PADDED + c);
  for (int64_t slab = 0; slab < launch.slabs; ++slab) {
    content += load(launch.query_sums + (slab * in.H + head) * PADDED + c);
  }
  store(static_cast<E*>(launch.content_bias) + head * in.D + c, from_float<E>((content - position) * scale));
  store(static_cast<E*>(launch.position_bias) + head * in.D + c, from_float<E>(position * scale));
}

// Blocks of the queries kernel to aim for: two for each multiprocessor of the largest GPUs. More of them balance better
// and take more memory for slabs. It does not follow the GPU at hand, for the order of sums follows from it.
constexpr int64_t wanted_blocks = 264;

template <typename Kind, int PADDED>
int64_t count_slabs(const RelAttention& in) {
  constexpr int size = Tile<Kind, PADDED, true>::size;
  const int64_t items = in.B * ((in.T + size - 1) / size);
  if (items == 0) return 0;
  const int64_t most = (wanted_blocks + in.H - 1) / in.H;
  const int64_t each = (items + most - 1) / most;
  return (items + each - 1) / each;
}

template <typename Kind, int PADDED>
int64_t sums_bytes(const RelAttention& in) {
  const int64_t dots = (in.B * in.H * in.T + 3) / 4 * 4;
  return 4 * (dots + count_slabs<Kind, PADDED>(in) * in.H * (in.R * (PADDED + 8) + PADDED));
}

// Packs `grad_out` and returns the inputs packed.
inline RelAttention pack_all(Packing& packing, const RelAttention& in, Operand& grad_out) {
  pack_rows(packing, grad_out, in.B, in.T);
  return pack_inputs(packing, in);
}

// Bytes of memory that `launch_backward` wants, aligned to 16.
template <typename Kind, int PADDED>
int64_t backward_workspace(const RelAttentionBackward& backward) {
  const RelAttention& in = backward.inputs;
  Packing packing{nullptr, in.H, in.D, in.dtype};
  Operand grad_out = backward.grad_out;
  pack_all(packing, in, grad_out);
  return sums_bytes<Kind, PADDED>(in) + packing.bytes;
}

// The text of an error, or nullptr.
template <typename Kind, int PADDED>
const char* launch_backward(const RelAttentionBackward& backward, void* workspace, Stream stream) {
  using T = Tile<Kind, PADDED, true>;
  using E = typename T::Element;
  const RelAttention& in = backward.inputs;
  const int64_t slabs = count_slabs<Kind, PADDED>(in), rows = in.B * in.H * in.T;
  // Random bits come in eights of keys, so the first tile starts at one, among the memory's keys if need be.
  const int64_t first_key = backward.memory_needs_grad ? 0 : in.M / 8 * 8;
  auto* const dots = static_cast<float*>(workspace);
  float* const sums = dots + (rows + 3) / 4 * 4;
  Packing packing{static_cast<char*>(workspace) + sums_bytes<Kind, PADDED>(in), in.H, in.D, in.dtype};
  Operand grad_out = backward.grad_out;
  const RelAttention packed = pack_all(packing, in, grad_out);
  const BackwardLaunch launch{derive(packed),
                              grad_out,
                              backward.out,
                              static_cast<const float*>(backward.log_sum_exp),
                              backward.memory_needs_grad,
                              backward.query,
                              backward.key,
                              backward.value,
                              backward.position,
                              backward.content_bias,
                              backward.position_bias,
                              backward.memory_key,
                              backward.memory_value,
                              first_key,
                              slabs,
                              dots,
                              sums,
                              sums + slabs * in.H * in.R * (PADDED + 8)};
  constexpr int shared_bytes = BackwardMemory<Kind, PADDED>::bytes;
  constexpr int rows_per_block = dots_threads / warp_size;
  const int64_t tiles_of_keys = (in.M + in.T - first_key + T::size - 1) / T::size;
  const char* error = launch_pack<E>(packing, stream);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_dots_kernel<Kind>, (rows + rows_per_block - 1) / rows_per_block, dots_threads,
                         0, stream, launch);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_keys_kernel<Kind, PADDED>, in.B * in.H * tiles_of_keys, T::threads,
                         shared_bytes, stream, launch);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_queries_kernel<Kind, PADDED>, in.H * slabs, T::threads, shared_bytes, stream,
                         launch);
  if (error != nullptr) return error;
  error = device::launch(&rel_attention_positions_kernel<E, PADDED>,
                         (in.R * in.H * in.D + reduce_threads - 1) / reduce_threads, reduce_threads, 0, stream, launch);
  if (error != nullptr) return error;
  return device::launch(&rel_attention_biases_kernel<E, PADDED>, in.H, reduce_threads, reduce_threads * 4, stream,
                        launch);
}

template <Arithmetic ARITHMETIC>
std::int64_t rel_attention_backward_workspace(const RelAttentionBackward& launch) {
  return with_head_size(launch.inputs.D,
                        [&](auto padded) { return backward_workspace<KindOf<ARITHMETIC>, padded.value>(launch); });
}

template <Arithmetic ARITHMETIC>
const char* rel_attention_backward(const RelAttentionBackward& launch, void* workspace, CUstream_st* stream) {
  return with_head_size(launch.inputs.D, [&](auto padded) {
    return launch_backward<KindOf<ARITHMETIC>, padded.value>(launch, workspace, stream);
  });
}

}  // namespace pytbptt::cuda
