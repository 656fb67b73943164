// A block's slice of weight_hh: its fragment layout, and how it is loaded into registers, shared memory and workspace.
//
//   weight_hh rows of a block (M tiles of 16)            held: registers   resident: shared memory   streamed: L2
//
//             k tiles of warp 0      of warp 1      …      of warp 7
//           | h h h r r r s s s | h h h r r r s s s |     | h h h r r r s s s |      tile of 16 rows m = 0
//           | h h h r r r s s s | h h h r r r s s s |     | h h h r r r s s s |      m = 1
//
// Each warp multiplies its own k tiles with all streams of a pass; the 8 warps' partial sums are added in shared
// memory (recurrence.cuh).
#pragma once
#include "common/cuda/products.cuh"
#include "lstm/cuda/launch.h"

namespace pytbptt::cuda {

using std::int64_t;

// Fragment layout for 16 weight rows × 8 streams × one k tile. Both operands are stored as 16-byte vectors in lane
// order. k is permuted, identically for both, so that each lane reads contiguous memory.
template <typename Kind>
struct Fragments {  // for tensor cores; float has its own below
  using Element = typename Products<Kind>::Element;
  static constexpr int per_word = 4 / static_cast<int>(sizeof(Element));  // elements
  static constexpr int in_piece = 4 * per_word, depth = 4 * in_piece;
  static constexpr int row_pieces = 32, stream_pieces = 1;  // of half a tile of weights; of a lane's streams
  struct alignas(16) Piece {
    std::uint32_t words[4];
  };
  struct Weights {
    std::uint32_t words[2][4];
  };
  struct Streams {
    std::uint32_t words[stream_pieces][4];
  };

  static PYTBPTT_DEVICE int row_slot() { return lane(); }
  static PYTBPTT_DEVICE int stream_slot(int) { return lane(); }
  // A slot covers two rows (r and r + 8) and four words of each, two in each half of k.
  static PYTBPTT_DEVICE int row(int slot) { return slot / 4; }
  static PYTBPTT_DEVICE int place(int slot) { return slot % 4 * in_piece; }
  static PYTBPTT_DEVICE void set(Weights& weights, bool lower_row, int i, std::uint32_t word) {
    weights.words[i / 2][i % 2 * 2 + lower_row] = word;
  }
  static PYTBPTT_DEVICE std::uint32_t word(float value) { return to_tf32(value); }
  static PYTBPTT_DEVICE void publish(Element* to, float value) {
    if constexpr (per_word == 2) {
      store(to, from_float<Element>(value));
    } else {
      store(reinterpret_cast<std::uint32_t*>(to), to_tf32(value));
    }
  }
  static PYTBPTT_DEVICE void multiply(float (&sums)[4], const Weights& weights, const Streams& streams) {
    PYTBPTT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t two[2] = {streams.words[0][2 * half], streams.words[0][2 * half + 1]};
      if constexpr (per_word == 2) {
        mma<Element>(sums, weights.words[half], two);
      } else {
        mma_tf32(sums, weights.words[half], two);
      }
    }
  }
};

template <>
struct Fragments<float> {
  using Element = float;
  static constexpr int in_piece = 4, depth = 4;
  static constexpr int row_pieces = 8, stream_pieces = 2;
  struct alignas(16) Piece {
    float words[4];
  };
  struct Weights {
    float words[2][4];
  };
  struct Streams {
    float words[stream_pieces][4];
  };

  static PYTBPTT_DEVICE int row_slot() { return lane() / 4; }
  static PYTBPTT_DEVICE int stream_slot(int piece) { return lane() % 4 * 2 + piece; }
  static PYTBPTT_DEVICE int row(int slot) { return slot; }
  static PYTBPTT_DEVICE int place(int) { return 0; }
  static PYTBPTT_DEVICE void set(Weights& weights, bool lower_row, int i, float word) {
    weights.words[lower_row][i] = word;
  }
  static PYTBPTT_DEVICE float word(float value) { return value; }
  static PYTBPTT_DEVICE void publish(float* to, float value) { store(to, value); }
  static PYTBPTT_DEVICE void multiply(float (&sums)[4], const Weights& weights, const Streams& streams) {
    PYTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      PYTBPTT_UNROLL
      for (int e = 0; e < 4; ++e) sums[i] = fma(weights.words[i / 2][e], streams.words[i % 2][e], sums[i]);
    }
  }
};

struct Recurrence {
  Lstm in;
  LstmPlan plan;
  std::uint32_t* flags = nullptr;  // one of each block
  void* exchange = nullptr;
  void* streamed = nullptr;
  int first = 0, end = 0;  // the phases of this launch; there are T + 1
};

// A block's part of the units and streams, and its warp's of the depth. Counts fit into 32 bits, as launch.h says.
struct BlockPartition {
  PYTBPTT_DEVICE explicit BlockPartition(const Recurrence& r) {
    const LstmPlan& plan = r.plan;
    const auto blocks_per_group = static_cast<int>(plan.blocks_per_group);
    const int group = block() / blocks_per_group;
    block_of_group = block() % blocks_per_group;
    first_unit = block_of_group * static_cast<int>(plan.units);
    first_stream = group * static_cast<int>(plan.stream_tiles) * lstm_tile_streams;
    const int left = (static_cast<int>(r.in.B) - first_stream + lstm_tile_streams - 1) / lstm_tile_streams;
    stream_tiles = smaller(left, static_cast<int>(plan.stream_tiles));
    passes = (stream_tiles + static_cast<int>(plan.pass_tiles) - 1) / static_cast<int>(plan.pass_tiles);
    first_tile = warp() * static_cast<int>(plan.tiles_per_warp);
    tiles = larger(0, smaller(static_cast<int>(plan.depth_tiles) - first_tile, static_cast<int>(plan.tiles_per_warp)));
  }
  int block_of_group, first_unit, first_stream;
  int stream_tiles, passes;
  int first_tile, tiles;  // of depth
};

// A part of the weights (16 rows, one k tile) in shared memory, on its way from weight_hh. What is contiguous there
// stays contiguous: along k (forward) or along rows (backward).
template <typename Kind, bool ALONG_DEPTH>
struct Staged {
  using F = Fragments<Kind>;
  using E = typename F::Element;
  using Weights = typename F::Weights;
  // Padding against bank conflicts.
  static constexpr int padding = ALONG_DEPTH ? 0 : 2 * F::in_piece;
  static constexpr int elements = lstm_tile_rows * F::depth + F::depth / F::in_piece * padding;

  static PYTBPTT_DEVICE int index(int row, int place) {
    return ALONG_DEPTH ? row * F::depth + place : place * lstm_tile_rows + place / F::in_piece * padding + row;
  }

  // Rows of tile m over a tile of the block's depth; all lanes take part.
  template <typename Cell>
  static PYTBPTT_DEVICE void copy(Smem<E> to, const Lstm& in, int first_unit, int tile, int m) {
    const auto* const weight_hh = static_cast<const E*>(in.weight_hh);
    const auto row = [](int e) { return ALONG_DEPTH ? e / F::depth : e % lstm_tile_rows; };
    const auto place = [](int e) { return ALONG_DEPTH ? e % F::depth : e / lstm_tile_rows; };
    const auto find = [&](int e) {
      return Cell::weight(in, first_unit, lstm_tile_rows * m + row(e), tile * F::depth + place(e));
    };
    // Aligned: each 16-byte vector is entirely inside or entirely outside weight_hh.
    const bool aligned =
        reinterpret_cast<std::uintptr_t>(weight_hh) % 16 == 0 && (in.H | in.weight_stride) % F::in_piece == 0;
    if (aligned) {
      PYTBPTT_LOOP
      for (int e = lane() * F::in_piece; e < lstm_tile_rows * F::depth; e += warp_size * F::in_piece) {
        const int64_t at = find(e);
        cp_async_16(to + index(row(e), place(e)), weight_hh + (at < 0 ? 0 : at), at < 0 ? 0 : 16);
      }
      return;
    }
    constexpr int per_lane = lstm_tile_rows * F::depth / warp_size, unroll = per_lane < 8 ? per_lane : 8;
    PYTBPTT_LOOP
    for (int first = 0; first < per_lane; first += unroll) {
      E values[unroll];  // issue all loads before the first store
      PYTBPTT_UNROLL
      for (int i = 0; i < unroll; ++i) {
        const int64_t at = find(lane() + warp_size * (first + i));
        values[i] = at < 0 ? from_float<E>(0) : load(weight_hh + at);
      }
      PYTBPTT_UNROLL
      for (int i = 0; i < unroll; ++i) {
        const int e = lane() + warp_size * (first + i);
        to.store(index(row(e), place(e)), values[i]);
      }
    }
  }

  static PYTBPTT_DEVICE Weights load_fragment(Smem<E> from, int slot) {
    Weights weights;
    PYTBPTT_UNROLL
    for (int lower_row = 0; lower_row < 2; ++lower_row) {
      const int row = F::row(slot) + lower_row * 8, place = F::place(slot);
      if constexpr (sizeof(E) == 4) {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) F::set(weights, lower_row, i, F::word(from.load(index(row, place + i))));
      } else if constexpr (ALONG_DEPTH) {
        const Words four = from.template load_many<Words>(index(row, place));
        const std::uint32_t words[4] = {four.x, four.y, four.z, four.w};
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) F::set(weights, lower_row, i, words[i]);
      } else {
        PYTBPTT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t low = from.load(index(row, place + 2 * i)).bits;
          const std::uint32_t high = from.load(index(row, place + 2 * i + 1)).bits;
          F::set(weights, lower_row, i, low | high << 16);
        }
      }
    }
    return weights;
  }
};

// A warp's weights: the first k tiles in registers, then as many 16-row parts as fit in shared memory, the rest in
// global memory.
template <typename Kind, int M, typename Cell>
class WarpWeights {
  using F = Fragments<Kind>;
  using E = typename F::Element;
  using Piece = typename F::Piece;
  using Part = Staged<Kind, !Cell::is_backward>;
  static constexpr int pieces = 2 * F::row_pieces;  // of a part
  static constexpr int max_held = lstm_held_tiles(F::row_pieces == warp_size, Cell::is_backward, M);
  // Parts staged at a time; staging uses the warp's part of the reduction buffer.
  static constexpr int staging_bytes = (M < 2 ? 1 : 2) * lstm_sums_tile * static_cast<int>(sizeof(float));
  static constexpr int max_staged = staging_bytes / (Part::elements * static_cast<int>(sizeof(E)));

 public:
  PYTBPTT_DEVICE WarpWeights(const Recurrence& r, const BlockPartition& share)
      : held_tiles_(static_cast<int>(r.plan.held)),
        resident_parts_(static_cast<int>(r.plan.resident)),
        resident_(shared<Piece>(static_cast<int>(r.plan.shared_bytes - r.plan.resident_bytes) +
                                    warp() * static_cast<int>(r.plan.resident_bytes / lstm_warps),
                                static_cast<int>(r.plan.resident_bytes / lstm_warps / sizeof(Piece)))),
        streamed_(static_cast<Piece*>(r.streamed) + (int64_t{block()} * lstm_warps + warp()) *
                                                        (r.plan.streamed_bytes / lstm_warps / int64_t{sizeof(Piece)})) {
    const auto staged = shared<E>(warp() * staging_bytes, max_staged * Part::elements);
    const auto stage = [&](int first, int end) {
      sync_warp();  // all lanes have read the parts before
      PYTBPTT_LOOP
      for (int part = first; part < smaller(first + max_staged, end); ++part) {
        Part::template copy<Cell>(staged + (part - first) * Part::elements, r.in, share.first_unit,
                                  share.first_tile + part / M, part % M);
      }
      cp_async_wait();
      sync_warp();
    };
    // Per-step launches: only the first one packs the weights to global memory.
    const int parts = r.first == 0 ? share.tiles * M : 0, held_parts = smaller(parts, held_tiles_ * M);
    PYTBPTT_UNROLL
    for (int part = 0; part < max_held * M; ++part) {
      if (part % max_staged == 0 && part < held_parts) stage(part, held_parts);
      typename F::Weights weights{};
      if (part < held_parts) weights = Part::load_fragment(staged + part % max_staged * Part::elements, F::row_slot());
      held_[part / M][part % M] = weights;
    }
    PYTBPTT_LOOP
    for (int first = held_parts; first < parts; first += max_staged) {
      stage(first, parts);
      PYTBPTT_LOOP
      for (int part = first; part < smaller(first + max_staged, parts); ++part) {
        for (int slot = lane(); slot < F::row_pieces; slot += warp_size) {
          store_part(part - held_parts, slot, Part::load_fragment(staged + (part - first) * Part::elements, slot));
        }
      }
    }
    sync_threads();
  }

  // use(i, rows) with each tile of depth and a function that gives its M parts.
  template <typename Use>
  PYTBPTT_DEVICE void for_each(const BlockPartition& share, Use use) const {
    PYTBPTT_UNROLL
    for (int i = 0; i < max_held; ++i) {
      if (i < share.tiles && i < held_tiles_) use(i, [&](int m) { return held_[i][m]; });
    }
    PYTBPTT_LOOP
    for (int i = held_tiles_; i < share.tiles; ++i) {
      use(i, [&](int m) {
        const int part = (i - held_tiles_) * M + m;
        typename F::Weights weights;
        PYTBPTT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int p = half * F::row_pieces + F::row_slot();
          const Piece piece = part < resident_parts_ ? resident_.load(part * pieces + p)
                                                     : load(streamed_ + ((part - resident_parts_) * pieces + p));
          PYTBPTT_UNROLL
          for (int w = 0; w < 4; ++w) weights.words[half][w] = piece.words[w];
        }
        return weights;
      });
    }
  }

 private:
  PYTBPTT_DEVICE void store_part(int part, int slot, const typename F::Weights& weights) const {
    PYTBPTT_UNROLL
    for (int half = 0; half < 2; ++half) {
      Piece piece;
      PYTBPTT_UNROLL
      for (int w = 0; w < 4; ++w) piece.words[w] = weights.words[half][w];
      const int p = half * F::row_pieces + slot;
      if (part < resident_parts_) {
        resident_.store(part * pieces + p, piece);
      } else {
        store(streamed_ + ((part - resident_parts_) * pieces + p), piece);
      }
    }
  }

  typename F::Weights held_[max_held == 0 ? 1 : max_held][M];
  int held_tiles_, resident_parts_;
  Smem<Piece> resident_;
  Piece* streamed_;
};

}  // namespace pytbptt::cuda
