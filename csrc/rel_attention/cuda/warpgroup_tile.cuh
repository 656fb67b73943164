// What the kernels of rel_attention for warpgroups share, half and bfloat16 on GPUs of compute capability 9.0.
//
// A block has GROUPS warpgroups of 64 queries each, which walk over tiles of 64 keys, and one more that brings the
// tiles. Distances count from the farthest, as places: those of a warpgroup's 64x64 scores are in groups s and s + 1 of
// 64 places each, at its next tile in groups s + 1 and s + 2.
//
//     place      64 s            64 (s + 1)          64 (s + 2)
//                |      group s      |    group s + 1    |
//     query 0    |                 x x x x x x x x x x   |      query i meets key c at place 63 - i + c
//           1    |               x x x x x x x x x x     |
//           :    |       x x x x x x x x x x             |
//          63    | x x x x x x x x x x                   |
//
// (query + v) · rᵀ is computed for one new group a tile, 64x64 as the scores, and kept in a ring of two, from which it
// is read skewed (BandRing). Backward, the gradients of scores are written skewed into such a ring, where a group is
// whole after two steps: one more product gives the queries' part, another one the table's rows'.
#pragma once
#include "rel_attention/cuda/head_size.cuh"
#include "rel_attention/cuda/tile.cuh"

namespace pytbptt::cuda {

// For which kinds and head sizes there are such kernels.
template <typename Kind, int PADDED>
constexpr bool has_warpgroup_kernel = sizeof(typename Products<Kind>::Element) == 2 && PADDED <= 64;

constexpr int warps_per_warpgroup = 4;

// 64 rows of 128 bytes, of which as many are used as the head size needs, as `Matrix` has them.
template <typename Kind, int PADDED, int GROUPS>
struct WarpgroupTile {
  using Element = Kind;
  static constexpr int size = 64, columns = PADDED;
  static constexpr int warps = warps_per_warpgroup * GROUPS, threads = warps * warp_size;  // that compute
  static constexpr int block_threads = threads + warps_per_warpgroup * warp_size, block_queries = size * GROUPS;
  // setmaxnreg: a launch gives each thread 168 registers (2 consumer warpgroups) or 128 (3); the producer drops to 56,
  // and consumers rise to 224 or 152.
  static constexpr int consumer_registers = GROUPS == 2 ? 224 : 152, producer_registers = 56;
  static_assert(GROUPS == 2 || GROUPS == 3, "register counts are known for 2 and 3 only");
  static constexpr int elements = size * row_elements, bytes = elements * 2;
  static PYTBPTT_DEVICE constexpr int index(int row, int column) {
    return row * row_elements + swizzled(row, column / chunk_elements) * chunk_elements + column % chunk_elements;
  }
};

// Warpgroup index, made warp-uniform by a shuffle.
PYTBPTT_DEVICE int warpgroup() {
  return shfl(warp() / warps_per_warpgroup, 0);
}

// `fetch` by one warpgroup, eight lanes a row.
template <typename T, typename Rows>
PYTBPTT_DEVICE void fetch_by_warpgroup(Smem<typename T::Element> tile, const KernelInputs& in, const Rows& rows,
                                       int begin) {
  using E = typename T::Element;
  constexpr int rows_at_once = warps_per_warpgroup * warp_size / 8;
  const int r = thread() % (8 * rows_at_once) / 8, c = thread() % 8 * chunk_elements;
  if (c >= T::columns) return;
  const bool has_columns = c < static_cast<int>(in.D);
  const auto* const nowhere = static_cast<const E*>(in.position.data);
  const auto to = tile + T::index(r, c);
  const auto copy = [&](int i, const E* from) {
    const bool exists = from != nullptr && has_columns;
    cp_async_16(to + T::index(i, 0), exists ? from + c : nowhere, exists ? 16 : 0);
  };
  if (rows.is_run(begin, T::size)) {
    const Run<E> run = rows.run(begin, T::size);
    const E* from = run.first + r * run.step;
    PYTBPTT_UNROLL
    for (int i = 0; i < T::size; i += rows_at_once) {
      copy(i, r + i < run.count ? from : nullptr);
      from += rows_at_once * run.step;
    }
    return;
  }
  PYTBPTT_LOOP
  for (int i = 0; i < T::size; i += rows_at_once) copy(i, rows(begin + r + i));
}

// Starts c += rows · tileᵀ, 64 x 64. A could stay in registers for all tiles, but nvcc 13.0 reuses those registers
// while an asynchronous wgmma still reads them; so it stays in shared memory.
template <typename T>
PYTBPTT_DEVICE void start_scores(float (&c)[8][4], Smem<typename T::Element> rows, Smem<typename T::Element> tile) {
  using E = typename T::Element;
  const Matrix<E> left(rows), right(tile);
  PYTBPTT_UNROLL
  for (int k = 0; k < T::columns; k += 16) warpgroup_mma<false, false>(c, left.from(0, k), right.from(0, k));
  warpgroup_commit_batch();
}

// Converts a 64-column accumulator to A fragments.
template <typename E>
PYTBPTT_DEVICE void pack_sums(std::uint32_t (&packed)[4][4], const float (&sums)[8][4]) {
  PYTBPTT_UNROLL
  for (int k = 0; k < 4; ++k) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = sums[2 * k + i / 2];
      packed[k][i] = pack<E>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

// Starts c += a · tile, 64 x columns.
template <typename T>
PYTBPTT_DEVICE void start_sums(float (&c)[T::columns / 8][4], const std::uint32_t (&a)[4][4],
                               Smem<typename T::Element> tile) {
  const Matrix<typename T::Element> right(tile);
  PYTBPTT_UNROLL
  for (int k = 0; k < 4; ++k) warpgroup_mma<true>(c, a[k], right.from(16 * k, 0));
  warpgroup_commit_batch();
}

// Rings of two groups, for a warp's 16 queries or a warpgroup's 64: those of even groups lie in columns 0 to 63, those
// of odd ones in 64 to 127. `row` is a query's number in its warpgroup.
PYTBPTT_DEVICE int ring_column(int group, int row) {
  return group % 2 * 64 + 63 - row;  // of key 0 of a tile whose upper group it is
}

// Products of a warp's 16 queries with groups of the table.
struct BandRing {
  // The first 8 columns are duplicated at the end, so that 8 consecutive keys can be read without wrapping.
  static constexpr int stride = 128 + 8, elements = 16 * stride, bytes = elements * 4;
  Smem<float> ring;

  PYTBPTT_DEVICE void store(int group, const float (&products)[8][4]) const {
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int at = (lane() / 4 + 8 * h) * stride + lane() % 4 * 2;
      PYTBPTT_UNROLL
      for (int n = 0; n < 8; ++n) {
        ring.store_many(at + group % 2 * 64 + 8 * n, Pair{products[n][2 * h], products[n][2 * h + 1]});
      }
      if (group % 2 == 0) ring.store_many(at + 128, Pair{products[0][2 * h], products[0][2 * h + 1]});
    }
  }
  // Adds to the scores of a tile, whose upper group is given, their positions' part.
  PYTBPTT_DEVICE void add_to(float (&scores)[8][4], int group) const {
    PYTBPTT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int in_warp = lane() / 4 + 8 * h, of_warp = warp() % warps_per_warpgroup;
      const auto from = ring + (in_warp * stride + ring_column(group, 16 * of_warp + in_warp) + lane() % 4 * 2);
      const auto wrapped = from + -128;
      // The last n that is read without wrapping around (uniform over lanes).
      const int last = group % 2 == 0 ? 8 : 2 * of_warp + h;
      PYTBPTT_UNROLL
      for (int n = 0; n < 8; ++n) {
        const auto here = n > last ? wrapped : from;
        scores[n][2 * h] += here.load(8 * n);
        scores[n][2 * h + 1] += here.load(8 * n + 1);
      }
    }
  }
};

// The least key that any query of a block sees.
template <typename T>
PYTBPTT_DEVICE int first_visible_to_block(const KernelInputs& in, int64_t batch, int64_t first_query) {
  int first = no_visible_key;
  for (int query = 0; query < T::block_queries; query += T::size) {
    first = smaller(first, first_visible_to_tile<T>(in, batch, first_query + query));
  }
  return first;
}

}  // namespace pytbptt::cuda
