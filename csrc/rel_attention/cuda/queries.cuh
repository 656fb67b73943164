// The queries kernel of rel_attention's backward (backward.cuh): d query, and a partial sum of d position.
//
// A block walks over the tiles of keys of TILE queries. dS is stored by distance, as the band of each warp, shifted the
// other way than in tile.cuh (an x is 8 places):
//
//   place       0                 TILE            2 TILE - 1
//   warp 3      | x x x x x x x x | x x             |     Places 0 to TILE - 1 (`near`) get nothing from later tiles:
//   warp 2      |     x x x x x x | x x x x         |     they are complete, and are added to the partial sum.
//   warp 1      |         x x x x | x x x x x x     |     The others (`next`) become `near` of the next tile, and are
//   warp 0      |             x x | x x x x x x x x |     saved in shared memory until then.
#pragma once
#include "rel_attention/cuda/backward_tile.cuh"

namespace pytbptt::cuda {

template <typename Kind, int PADDED>
PYTBPTT_KERNEL((Tile<Kind, PADDED, true>::threads), 1)
rel_attention_queries_kernel(const BackwardLaunch launch) {
  using T = Tile<Kind, PADDED, true>;
  using E = typename T::Element;
  using P = Products<Kind>;
  using Rows = typename P::template Rows<PADDED>;
  using Memory = BackwardMemory<Kind, PADDED>;
  constexpr int partial_stride = PADDED + 8;
  // grad_position is computed in column chunks to limit register use.
  constexpr int cuts = PADDED <= 64 ? 1 : T::floats ? PADDED / 32 : 2, columns = PADDED / cuts;
  const KernelInputs& in = launch.in;
  const int64_t head = block() % in.H, partial_index = block() / in.H;
  const int g = lane() / 4, q = lane() % 4, depth = static_cast<int>(in.D);

  const auto keys = shared<E>(Memory::keys, T::elements), values = shared<E>(Memory::values, T::elements);
  const auto table = shared<E>(Memory::upper, 2 * T::elements);  // groups of TILE places: this tile's and the next
  const auto query_u = shared<E>(Memory::query_u, T::elements);
  const auto query_v = shared<E>(Memory::query_v, T::elements);
  const auto grad_out = shared<E>(Memory::grad_out, T::elements);
  const auto skew = shared<float>(Memory::warps + warp() * Memory::own, T::skew_elements);
  const auto band_of = [](int of_warp) {
    return shared<E>(Memory::warps + of_warp * Memory::own, 16 * Memory::band_stride);
  };
  const auto query_sums = shared<float>(Memory::query_sums, T::warps * PADDED);
  const auto clamped_sums = shared<float>(Memory::clamped_sums, T::size);
  const auto saved = shared<float>(Memory::saved, T::size * PADDED);
  const int64_t seed = in.dropout_threshold == 0 ? 0 : load(in.seed);
  const PositionRows<E> distances(in, head);

  float* const partial = launch.sums + (partial_index * in.H + head) * in.R * partial_stride;
  for (int64_t i = thread(); i < in.R * partial_stride; i += T::threads) store(partial + i, 0.0f);
  for (int i = thread(); i < T::warps * PADDED; i += T::threads) query_sums.store(i, 0.0f);

  const int64_t tiles_of_queries = (in.T + T::size - 1) / T::size;
  PYTBPTT_LOOP
  for (int64_t item = partial_index; item < in.B * tiles_of_queries; item += launch.partials) {
    const int64_t batch = item % in.B, first_query = (tiles_of_queries - 1 - item / in.B) * T::size;
    const int64_t own_query = first_query + 16 * warp();
    const int start = first_visible_to_tile<T>(in, batch, first_query) / 8 * 8;
    const auto end = static_cast<int>(in.M + smaller64(first_query + T::size, in.T));
    const int tiles = end > start ? (end - start + T::size - 1) / T::size : 0;
    const auto far = static_cast<int>(in.M + first_query + T::size - 1 - start);  // at place 0 of the first tile

    const KeyRows<E> key_rows(in.memory_key, in.key, in, batch, head);
    const KeyRows<E> value_rows(in.memory_value, in.value, in, batch, head);
    const auto fetch_group = [&](int group) {
      fetch<T>(table + group % 2 * T::elements, in, distances, group * T::size - far);
    };
    sync_threads();
    const auto first_row = static_cast<int>(first_query);
    fetch<T>(query_u, in, ChunkRows<E>(launch.query_u, in, batch, head), first_row);
    fetch<T>(query_v, in, ChunkRows<E>(launch.query_v, in, batch, head), first_row);
    fetch<T>(grad_out, in, ChunkRows<E>(launch.grad_out, in, batch, head), first_row);
    if (tiles > 0) fetch_group(0);

    const Visibility visibility(in, batch, own_query);
    const Softmax softmax(launch, batch, own_query, head);
    float d_query[PADDED / 8][4] = {};
    // grad_position for the tile's 2 TILE distances; each warp has 16 of the first half (`near`, complete after this
    // tile) and 16 of the second (`next`, the next tile's first half). Kept between tiles in shared memory, private to
    // each lane; column sums stay in registers.
    float near_sums[4] = {};
    const auto saved_index = [&](int cut, int n, int h) {
      return 2 * ((2 * (cut * columns / 8 + n) + h) * T::threads + thread());
    };
    const auto save = [&](int cut, const float (&next)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int n = 0; n < columns / 8; ++n) {
        PYTBPTT_UNROLL
        for (int h = 0; h < 2; ++h) {
          saved.template store_many<Pair>(saved_index(cut, n, h), Pair{next[n][2 * h], next[n][2 * h + 1]});
        }
      }
    };
    const auto load_saved = [&](int cut, float (&into)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int n = 0; n < columns / 8; ++n) {
        PYTBPTT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const Pair two = saved.template load_many<Pair>(saved_index(cut, n, h));
          into[n][2 * h] = two.x;
          into[n][2 * h + 1] = two.y;
        }
      }
    };
    PYTBPTT_LOOP
    for (int cut = 0; cut < cuts; ++cut) {
      const float zeros[columns / 8][4] = {};
      save(cut, zeros);
    }
    float clamped_total[2] = {};  // of dS over the keys that use the table's last row

    const auto add_to_partial = [&](int group, int cut, const float (&near)[columns / 8][4]) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int distance = far - group * T::size - (16 * warp() + g + 8 * h);
        if (distance < 0 || distance >= in.R - 1) continue;
        float* const row = partial + distance * int64_t{partial_stride};
        PYTBPTT_UNROLL
        for (int n = 0; n < columns / 8; ++n) {
          add_to(reinterpret_cast<Pair*>(row + cut * columns + 8 * n + 2 * q),
                 Pair{near[n][2 * h], near[n][2 * h + 1]});
        }
        if (q == 0 && cut == 0) add_to(row + PADDED, near_sums[2 * h]);
      }
    };

    PYTBPTT_LOOP
    for (int tile = 0; tile < tiles; ++tile) {
      const int first_key = start + tile * T::size;
      sync_threads();
      fetch<T>(keys, in, key_rows, first_key);
      fetch<T>(values, in, value_rows, first_key);
      fetch_group(tile + 1);
      cp_async_wait();
      sync_threads();

      const auto upper = table + tile % 2 * T::elements, lower = table + (tile + 1) % 2 * T::elements;
      const int farthest = far - tile * T::size;
      const bool all_clamped = farthest - 2 * T::size + 2 >= in.R - 1;
      const auto band = band_of(warp());
      if (visibility.none_visible<T>(first_key)) {
        if (!all_clamped) {
          for (int i = lane(); i < 16 * (T::size + 16); i += warp_size) {
            band.store(i / (T::size + 16) * Memory::band_stride + i % (T::size + 16), from_float<E>(0));
          }
        }
      } else {
        float sums[T::size / 8][4], gradients[T::size / 8][4];
        compute_scores<Kind, T, PADDED>(
            sums, [&] { return Rows(query_u + 16 * warp() * T::stride, T::stride); },
            [&] { return Rows(query_v + 16 * warp() * T::stride, T::stride); }, keys, upper, lower, all_clamped, skew);
        score_gradients<false, Kind, T, PADDED>(sums, gradients, launch, softmax, visibility, grad_out, values, seed,
                                                batch, own_query, first_key, head);
        P::template weights_times<PADDED / 8, T::size>(d_query, gradients, keys, T::stride);
        const int own_distance = farthest - (T::size - 1) + 16 * warp();
        if (farthest >= in.R - 1) extract_clamped<T>(clamped_total, gradients, own_distance, in.R);
        if (!all_clamped) {
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
      if (all_clamped) continue;  // all earlier tiles were clamped too, so no partial sums exist
      sync_threads();
      // Warp w's band starts at place TILE - 16 - 16w, so the 16 places 16G … 16G + 15 are in its columns from
      // 16 (G - (warps - 1 - w)) on, if it has them.
      float next_sums[4] = {};
      PYTBPTT_LOOP
      for (int cut = 0; cut < cuts; ++cut) {
        float near[columns / 8][4];
        load_saved(cut, near);
        PYTBPTT_LOOP
        for (int of_warp = T::warps - 1 - warp(); of_warp < T::warps; ++of_warp) {
          const auto part = band_of(of_warp) + 16 * (warp() - (T::warps - 1 - of_warp));
          const auto queries = query_v + (16 * of_warp * T::stride + cut * columns);
          P::template transposed_times<columns / 8>(near, part, Memory::band_stride, queries, T::stride);
          if (cut == 0) P::add_columns(near_sums, part, Memory::band_stride);
        }
        add_to_partial(tile, cut, near);
        float next[columns / 8][4] = {};
        PYTBPTT_LOOP
        for (int of_warp = 0; of_warp < T::warps - warp(); ++of_warp) {
          const auto part = band_of(of_warp) + 16 * (warp() + 1 + of_warp);
          const auto queries = query_v + (16 * of_warp * T::stride + cut * columns);
          P::template transposed_times<columns / 8>(next, part, Memory::band_stride, queries, T::stride);
          if (cut == 0) P::add_columns(next_sums, part, Memory::band_stride);
        }
        save(cut, next);
      }
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) near_sums[i] = next_sums[i];
    }
    cp_async_wait();
    PYTBPTT_LOOP
    for (int cut = 0; cut < cuts; ++cut) {
      float near[columns / 8][4];
      load_saved(cut, near);
      add_to_partial(tiles, cut, near);
    }

    if (far >= in.R - 1) {
      add_clamped_to_query<PADDED>(d_query, clamped_total, clamped_sums, distances(-far), depth);
      sync_threads();
      add_clamped_to_position<T, PADDED>(partial + (in.R - 1) * partial_stride, clamped_sums,
                                         [&](int r, int c) { return to_float(query_v.load(T::index(r, c))); });
    }
    add_query_sums<PADDED>(query_sums, d_query);
    store_queries<E, PADDED>(launch, d_query, batch, own_query, head);
  }

  sync_threads();
  store_query_sums<T, PADDED>(launch, query_sums, partial_index, head);
}

}  // namespace pytbptt::cuda
