// What the forward and the backward kernels of rel_attention share: one tile of TILE queries by TILE keys. (By
// warpgroups, on compute capability 9.0, in 16 bits and for head sizes up to 64: warpgroup_tile.cuh.)
//
// Distances are counted from the farthest, as places: with `far` = the distance of the tile's last query from its first
// key, place y is distance far - y, and query i of the tile meets key c at place TILE - 1 - i + c.
//
//   place       0                  TILE             2 TILE - 1
//               |      upper       |      lower      |         two groups of TILE rows of the table, in shared memory
//   query 0     |                x x x x x x x x x x |
//         1     |              x x x x x x x x x x   |         warp w has queries 16w to 16w + 15. Their places are a
//         :     |      x x x x x x x x x x           |         band of TILE + 15, from place TILE - 16 - 16w on
//         :     |  x x x x x x x x x x               |
//   TILE - 1    |x x x x x x x x x x                 |
//
// The warp multiplies (query + v) with its whole band, as matrices of 16 x (TILE + 16), and moves each row to the left
// as it stores it to its scratch in shared memory, the skew. Read back, the products are in the layout of the scores:
//
//   key         0         TILE - 1
//   query 0     | x x x x x x x x |
//         1     | x x x x x x x x |       + (query + u) · keyᵀ   =   scores
//         :     | x x x x x x x x |
//
// Fragments of 16 x 8 elements are owned by lanes as products.cuh shows.
#pragma once
#include "common/cuda/device/philox.h"
#include "common/cuda/products.cuh"
#include "rel_attention/cuda/pack.cuh"

namespace pytbptt::cuda {

// A launch's inputs, packed, and what every kernel derives from them.
struct KernelInputs : RelAttention {
  // Scores are computed unscaled, with sign(scale) multiplied into the queries; log2_scale = |scale| · log2(e), or 1 if
  // scale is 0.
  float sign, log2_scale;
};

inline KernelInputs make_kernel_inputs(const RelAttention& in) {
  const double size = in.scale < 0 ? -in.scale : in.scale;
  return {in,
          in.scale > 0   ? 1.0f
          : in.scale < 0 ? -1.0f
                         : 0.0f,
          in.scale == 0 ? 1.0f : static_cast<float>(size * 1.4426950408889634)};
}

constexpr int largest_power_of_2(int most) {
  return most < 2 ? 1 : 2 * largest_power_of_2(most / 2);
}
constexpr int at_least(int a, int b) {
  return a > b ? a : b;
}
PYTBPTT_DEVICE int64_t larger64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
PYTBPTT_DEVICE int64_t smaller64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr int max_shared_bytes = 99 * 1024;  // of a block, on every GPU of compute capability 8.0 and up

// Sizes of a tile for an element type and a head size rounded up to PADDED: as large as registers and shared memory
// allow.
template <typename Kind, int PADDED, bool BACKWARD = false>
struct Tile {
  using Element = typename Products<Kind>::Element;
  static constexpr bool floats = sizeof(Element) == 4;
  static constexpr int size = floats ? (PADDED <= 64 ? 32 : 16) : BACKWARD && PADDED > 64 ? 32 : 64;  // queries, keys
  static constexpr int warps = size / 16, threads = warps * warp_size;
  static constexpr int columns = PADDED;
  static constexpr int pieces = columns * static_cast<int>(sizeof(Element)) / 16;  // of a row
  static constexpr int rows_at_once = largest_power_of_2(threads / pieces);        // that a block copies
  static_assert(size % rows_at_once == 0, "the last rows fill the tile");
  static constexpr int stride = columns + Products<Kind>::padding;  // of a tile's rows
  static constexpr int elements = size * stride;
  static constexpr int bytes = elements * static_cast<int>(sizeof(Element));
  // Where a tile has an element; linear in the row.
  static PYTBPTT_DEVICE constexpr int index(int row, int column) { return row * stride + column; }
  static constexpr int skew_stride = size + 8;            // floats
  static constexpr int skew_elements = 16 * skew_stride;  // of one warp
};

template <typename E>
PYTBPTT_DEVICE const E* row_of(const Operand& operand, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const E*>(operand.data) + (batch * operand.batch + row * operand.row + head * operand.head);
}

// Rows at equal distances: row r, for r below `count`, is at first + r * step.
template <typename E>
struct Run {
  const E* first;
  int64_t step;
  int count;
};

// Row accessors with precomputed base and stride. If is_run(begin, size), the rows are equally spaced and run(begin,
// size) describes them (the common case).

// The rows of keys (or of values) of a stream, those of the memory first; nullptr beyond the chunk's.
template <typename E>
class KeyRows {
 public:
  PYTBPTT_DEVICE KeyRows(const Operand& memory, const Operand& chunk, const KernelInputs& in, int64_t batch,
                         int64_t head)
      : memory_(row_of<E>(memory, batch, 0, head)),
        chunk_(row_of<E>(chunk, batch, -in.M, head)),
        memory_row_(memory.row),
        chunk_row_(chunk.row),
        M_(static_cast<int>(in.M)),
        end_(static_cast<int>(in.M + in.T)) {}
  PYTBPTT_DEVICE const E* operator()(int j) const {
    const bool in_memory = j < M_;
    const E* const row = (in_memory ? memory_ : chunk_) + j * (in_memory ? memory_row_ : chunk_row_);
    return j < end_ ? row : nullptr;
  }
  PYTBPTT_DEVICE bool is_run(int begin, int size) const { return begin >= M_ || begin + size <= M_; }
  PYTBPTT_DEVICE Run<E> run(int begin, int) const {
    const int64_t step = begin < M_ ? memory_row_ : chunk_row_;
    return {(begin < M_ ? memory_ : chunk_) + begin * step, step, end_ - begin};
  }

 private:
  const E *memory_, *chunk_;
  int64_t memory_row_, chunk_row_;
  int M_, end_;
};

// The rows of a stream's chunk; nullptr beyond it.
template <typename E>
class ChunkRows {
 public:
  PYTBPTT_DEVICE ChunkRows(const Operand& chunk, const KernelInputs& in, int64_t batch, int64_t head)
      : first_(row_of<E>(chunk, batch, 0, head)), row_(chunk.row), end_(static_cast<int>(in.T)) {}
  PYTBPTT_DEVICE const E* operator()(int t) const { return t < end_ ? first_ + t * row_ : nullptr; }
  PYTBPTT_DEVICE bool is_run(int, int) const { return true; }
  PYTBPTT_DEVICE Run<E> run(int begin, int) const { return {first_ + begin * row_, row_, end_ - begin}; }

 private:
  const E* first_;
  int64_t row_;
  int end_;
};

// The table's rows, the farthest first: row r is distance -r, so that a tile begins at row -far. Negative distances
// (keys after the query) are clamped to 0; their scores are masked.
template <typename E>
class PositionRows {
 public:
  PYTBPTT_DEVICE PositionRows(const KernelInputs& in, int64_t head)
      : first_(row_of<E>(in.position, 0, 0, head)), row_(in.position.row), last_(static_cast<int>(in.R - 1)) {}
  PYTBPTT_DEVICE const E* operator()(int r) const { return first_ + larger(0, smaller(-r, last_)) * row_; }
  PYTBPTT_DEVICE bool is_run(int begin, int size) const { return -begin <= last_ && begin + size <= 1; }
  PYTBPTT_DEVICE Run<E> run(int begin, int size) const { return {first_ - begin * row_, -row_, size}; }

 private:
  const E* first_;
  int64_t row_;
  int last_;
};

// Starts to fill a tile with `rows`, of one of the kinds above, from number `begin` on; columns beyond D and rows that
// do not exist are zeros. `cp_async_wait` and a barrier make it ready.
template <typename T, typename Rows>
PYTBPTT_DEVICE void fetch(Smem<typename T::Element> tile, const KernelInputs& in, const Rows& rows, int begin) {
  using E = typename T::Element;
  // A thread copies one piece of every `rows_at_once` rows, always of the same columns.
  constexpr int at_once = T::rows_at_once;
  const int r = thread() / T::pieces, c = thread() % T::pieces * in_piece<E>;
  if (r >= at_once) return;
  const bool has_columns = c < static_cast<int>(in.D);
  const auto* const nowhere = static_cast<const E*>(in.position.data);
  const auto to = tile + T::index(r, c);
  if (rows.is_run(begin, T::size)) {
    const Run<E> run = rows.run(begin, T::size);
    const E* from = run.first + (r * run.step + c);
    const int count = has_columns ? run.count - r : 0;
    PYTBPTT_UNROLL
    for (int i = 0; i < T::size; i += at_once) {
      cp_async_16(to + T::index(i, 0), i < count ? from : nowhere, i < count ? 16 : 0);
      from += at_once * run.step;
    }
    return;
  }
  PYTBPTT_LOOP
  for (int i = 0; i < T::size; i += at_once) {
    const E* const from = rows(begin + r + i);
    const bool exists = from != nullptr && has_columns;
    cp_async_16(to + T::index(i, 0), exists ? from + c : nowhere, exists ? 16 : 0);
  }
}

// Fills two tiles with the queries plus content_bias and plus position_bias, both times the sign of the scale.
template <typename T>
PYTBPTT_DEVICE void load_biased_queries(Smem<typename T::Element> content, Smem<typename T::Element> position,
                                        const KernelInputs& in, int64_t batch, int64_t first_query, int64_t head) {
  using E = typename T::Element;
  constexpr int each = in_piece<E>, pieces = T::columns / each;
  const int depth = static_cast<int>(in.D);
  const E* const u = row_of<E>(in.content_bias, 0, 0, head);
  const E* const v = row_of<E>(in.position_bias, 0, 0, head);
  PYTBPTT_LOOP
  for (int p = thread(); p < T::size * pieces; p += T::threads) {
    const int r = p / pieces, c = p % pieces * each;
    float to_content[each] = {}, to_position[each] = {};
    if (first_query + r < in.T && c < depth) {
      float query[each];
      load_piece(query, row_of<E>(in.query, batch, first_query + r, head) + c);
      load_piece(to_content, u + c);
      load_piece(to_position, v + c);
      PYTBPTT_UNROLL
      for (int i = 0; i < each; ++i) {
        to_content[i] = in.sign * (query[i] + to_content[i]);
        to_position[i] = in.sign * (query[i] + to_position[i]);
      }
    }
    content.store_many(T::index(r, c), piece_of<E>(to_content));
    position.store_many(T::index(r, c), piece_of<E>(to_position));
  }
}

constexpr int no_visible_key = 0x7fffffff;

// The first key that a query sees; `no_visible_key` for rows beyond the chunk. The last one is M + query.
PYTBPTT_DEVICE int first_visible(const KernelInputs& in, int64_t batch, int64_t query) {
  if (query >= in.T) return no_visible_key;
  const int first = in.first_key == nullptr ? 0 : larger(0, load(in.first_key + batch * in.T + query));
  return larger(first, static_cast<int>(in.M + query + 1 - in.window));
}

// Warp-wide minimum, returned to all lanes.
PYTBPTT_DEVICE int warp_min(int value) {
  PYTBPTT_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value = smaller(value, shfl_xor(value, mask));
  return value;
}

// The first key that any of a tile's queries sees.
template <typename T>
PYTBPTT_DEVICE int first_visible_to_tile(const KernelInputs& in, int64_t batch, int64_t first_query) {
  int first = no_visible_key;
  for (int r = lane(); r < T::size; r += warp_size) first = smaller(first, first_visible(in, batch, first_query + r));
  return warp_min(first);
}

// What the warp's 16 queries see; a lane has rows g and g + 8 of them.
struct Visibility {
  int first[2], last[2];
  int any_first, any_last;  // keys that some of the queries may see
  int all_first, all_last;  // keys that all of them see

  PYTBPTT_DEVICE Visibility(const KernelInputs& in, int64_t batch, int64_t first_query) {
    for (int h = 0; h < 2; ++h) {
      const int64_t query = first_query + lane() / 4 + 8 * h;
      first[h] = first_visible(in, batch, query);
      last[h] = static_cast<int>(in.M + query);
    }
    any_first = warp_min(smaller(first[0], first[1]));
    all_first = -warp_min(-larger(first[0], first[1]));
    all_last = static_cast<int>(in.M + first_query);
    any_last = all_last + 15;
  }
  template <typename T>
  PYTBPTT_DEVICE bool none_visible(int first_key) const {
    return first_key + T::size <= any_first || first_key > any_last;
  }
  template <typename T>
  PYTBPTT_DEVICE bool all_visible(int first_key) const {
    return first_key >= all_first && first_key + T::size - 1 <= all_last;
  }
  PYTBPTT_DEVICE bool is_visible(int h, int key) const { return key >= first[h] && key <= last[h]; }
  // Sets masked scores to -inf. Fully visible tiles return early.
  template <typename T>
  PYTBPTT_DEVICE void mask(float (&sums)[T::size / 8][4], int first_key) const {
    if (all_visible<T>(first_key)) return;
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (!is_visible(i / 2, first_key + 8 * n + lane() % 4 * 2 + i % 2)) sums[n][i] = -INFINITY;
      }
    }
  }
};

// Calls use(n, i, bits) with the 16 random bits of each accumulator element c[n][i]. A Philox block covers 8 keys of
// one query, which four lanes share: each lane computes one of four blocks, and they exchange words by shuffles.
template <typename T, typename Use>
PYTBPTT_DEVICE void random_bits(const KernelInputs& in, int64_t seed, int64_t batch, int64_t first_query, int first_key,
                                int64_t head, Use use) {
  const int q = lane() % 4;
  PYTBPTT_UNROLL
  for (int four = 0; four < T::size / 16; ++four) {
    std::uint32_t w[4];
    const int64_t query = first_query + lane() / 4 + q % 2 * 8;
    philox(seed, static_cast<std::uint32_t>(first_key / 8 + 2 * four + q / 2), static_cast<std::uint32_t>(query),
           static_cast<std::uint32_t>(batch * in.H + head), w);
    // Lane q has row q of a 4x4 matrix of words and wants column q.
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const std::uint32_t other = shfl_xor(q & 1 ? w[i] : w[i + 1], 1);
      (q & 1 ? w[i] : w[i + 1]) = other;
    }
    PYTBPTT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t other = shfl_xor(q & 2 ? w[i] : w[i + 2], 2);
      (q & 2 ? w[i] : w[i + 2]) = other;
    }
    PYTBPTT_UNROLL
    for (int block = 0; block < 4; ++block) {
      const int n = 2 * four + block / 2, h = block % 2;
      use(n, 2 * h, w[block] & 0xffffu);
      use(n, 2 * h + 1, w[block] >> 16);
    }
  }
}

// Rows that are in registers already, for `compute_scores`.
template <typename Rows>
struct Preloaded {
  const Rows& rows;
  PYTBPTT_DEVICE const Rows& operator()() const { return rows; }
};

// sums = (Q + u) · Kᵀ + shift((Q + v) · Rᵀ) for the warp's queries and the tile's keys. content() and position() return
// the queries' fragments, so that a caller with few registers can load them on demand. `upper` and `lower` are the
// table's rows for places 0 to TILE - 1 and the next TILE; all_clamped: all distances use the table's last row, which
// every row of `upper` is then. `skew` is the warp's scratch: synchronise before using it otherwise.
template <typename Kind, typename T, int PADDED, typename Content, typename Position>
PYTBPTT_DEVICE void compute_scores(float (&sums)[T::size / 8][4], Content content, Position position,
                                   Smem<typename T::Element> keys, Smem<typename T::Element> upper,
                                   Smem<typename T::Element> lower, bool all_clamped, Smem<float> skew) {
  const int g = lane() / 4, q = lane() % 4;
  if (all_clamped) {
    float band[2][4] = {};
    Products<Kind>::template times_transposed<2, PADDED>(band, position(), upper, T::stride);
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] = band[0][i];
    }
  } else {
    const auto& position_rows = position();
    constexpr int parts = T::size / 16 + 1;
    float band[parts][2][4] = {};  // all before the first is stored: their products do not wait for one another
    PYTBPTT_UNROLL
    for (int part = 0; part < parts; ++part) {
      const int y = T::size - 16 - 16 * warp() + 16 * part;
      const auto rows = y < T::size ? upper + y * T::stride : lower + (y - T::size) * T::stride;
      Products<Kind>::template times_transposed<2, PADDED>(band[part], position_rows, rows, T::stride);
    }
    PYTBPTT_UNROLL
    for (int part = 0; part < parts; ++part) {
      PYTBPTT_UNROLL
      for (int n = 0; n < 2; ++n) {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = g + i / 2 * 8, key = 16 * part + 8 * n + 2 * q + i % 2 - 15 + row;
          const bool always_inside = part > 0 && part < parts - 1;
          if (always_inside || (key >= 0 && key < T::size)) skew.store(row * T::skew_stride + key, band[part][n][i]);
        }
      }
    }
    sync_warp();
    PYTBPTT_UNROLL
    for (int n = 0; n < T::size / 8; ++n) {
      PYTBPTT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Pair two = skew.load_many<Pair>((g + 8 * h) * T::skew_stride + 8 * n + 2 * q);
        sums[n][2 * h] = two.x;
        sums[n][2 * h + 1] = two.y;
      }
    }
  }
  Products<Kind>::template times_transposed<T::size / 8, PADDED>(sums, content(), keys, T::stride);
}

// Rounding error of storing as E.
template <typename E>
PYTBPTT_DEVICE float rounded_off(float value) {
  return value - to_float(from_float<E>(value));
}

// Writes columns 8n + 2q and the next of a row of D elements that follows others without a gap.
template <typename E>
PYTBPTT_DEVICE void store_two(E* row, int column, int depth, float first, float second) {
  if (column + 1 < depth && depth % 2 == 0) {
    if constexpr (sizeof(E) == 2) {
      store(reinterpret_cast<std::uint32_t*>(row + column), pack<E>(first, second));
    } else {
      store(reinterpret_cast<Pair*>(row + column), Pair{first, second});
    }
    return;
  }
  if (column < depth) store(row + column, from_float<E>(first));
  if (column + 1 < depth) store(row + column + 1, from_float<E>(second));
}

}  // namespace pytbptt::cuda
