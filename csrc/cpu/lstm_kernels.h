// One lstm call on one thread of its team, for the target that the including file chose.
//
// Forward: a thread owns blocks of `lanes` hidden units. Per step and block, the gates' tile is filled from the input,
// the recurrent product is added to it, and the pointwise part follows while it is in L1. Backward: likewise in
// reverse, where the pointwise part makes the gates' gradients of all own units, and the product with all of them the
// own columns of the hidden state's gradient.
//
// Every result is a sum over k in an order that depends on sizes alone, so that it has the same bits however many
// threads there are and whichever of them computes it.
#pragma once
#include "cpu/gemm.h"
#include "cpu/lstm_activations.h"
#include "cpu/lstm_team.h"
#include "cpu/storage.h"

namespace pytbptt::cpu::PYTBPTT_ISA {
namespace {

using std::int64_t;

PYTBPTT_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Range {
  int64_t begin, end;
};

// Part `index` of [0, count) cut into `parts` whose lengths differ by one at most, the longer ones first.
PYTBPTT_INLINE Range part(int64_t count, int64_t index, int64_t parts) {
  const int64_t length = count / parts, longer = count % parts;
  const int64_t begin = index * length + smaller(index, longer);
  return {begin, begin + length + (index < longer ? 1 : 0)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Elements as they are stored: float and double, and 16 bits that are computed with as float.

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

PYTBPTT_INLINE float widen(Bfloat16 value) {
  return from_bfloat16(value.bits);
}
PYTBPTT_INLINE float widen(Float16 value) {
  return from_float16(value.bits);
}
PYTBPTT_INLINE float widen(float value) {
  return value;
}
PYTBPTT_INLINE double widen(double value) {
  return value;
}
PYTBPTT_INLINE void narrow(float value, Bfloat16* to) {
  to->bits = to_bfloat16(value);
}
PYTBPTT_INLINE void narrow(float value, Float16* to) {
  to->bits = to_float16(value);
}
PYTBPTT_INLINE void narrow(float value, float* to) {
  *to = value;
}
PYTBPTT_INLINE void narrow(double value, double* to) {
  *to = value;
}

template <typename T, typename S>
constexpr bool stored_as_computed = false;
template <typename T>
constexpr bool stored_as_computed<T, T> = true;

// The first `count` lanes from memory, the others zero.
template <typename T, typename S>
PYTBPTT_INLINE typename Vec<T>::type load_lanes(const S* from, int64_t count) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (stored_as_computed<T, S>) {
    if (count >= lanes) return load(from);
  }
  alignas(64) T values[lanes] = {};
  if (count >= lanes) {
    for (int lane = 0; lane < lanes; ++lane) values[lane] = widen(from[lane]);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) values[lane] = widen(from[lane]);
  }
  return load(values);
}

// Writes the first `count` lanes.
template <typename T, typename S>
PYTBPTT_INLINE void store_lanes(S* to, typename Vec<T>::type vector, int64_t count) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (stored_as_computed<T, S>) {
    if (count >= lanes) return store(to, vector);
  }
  alignas(64) T values[lanes];
  store(values, vector);
  if (count >= lanes) {
    for (int lane = 0; lane < lanes; ++lane) narrow(values[lane], to + lane);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) narrow(values[lane], to + lane);
  }
}

// What storing as S and loading again leaves.
template <typename T, typename S>
PYTBPTT_INLINE typename Vec<T>::type as_stored(typename Vec<T>::type vector) {
  if constexpr (stored_as_computed<T, S>) return vector;
  alignas(64) S stored[Vec<T>::lanes];
  store_lanes<T, S>(stored, vector, Vec<T>::lanes);
  return load_lanes<T, S>(stored, Vec<T>::lanes);
}

// ---------------------------------------------------------------------------------------------------------------------
// The product of hidden states or gradients (rows: streams) with packed weights.

// How many of the sum's terms one pass over the rows adds: a slice of weights two vectors wide stays in half an L1, the
// other half being another thread's where two share a core.
constexpr int64_t slice_depth = 104;

PYTBPTT_INLINE int64_t slices_of(int64_t depth) {
  return (depth + slice_depth - 1) / slice_depth;
}

// Rows of a microkernel that is `vectors` vectors wide. Four vectors and their four sums per row only fit 16 registers
// two rows at a time; a single vector is the remainder of a thread's blocks and not worth more code.
template <int VECTORS>
constexpr int rows_of_kernel = VECTORS == 4 ? (PYTBPTT_ACCUMULATORS >= 24 ? 6 : 2) : rows_per_tile(2);

// Vectors of the widest microkernel for `streams` rows: few rows need more columns for enough independent sums.
PYTBPTT_INLINE int widest_kernel(int64_t streams) {
  return streams <= rows_of_kernel<4> ? 4 : 2;
}

// C (rows x VECTORS vectors) = A (rows x depth) B (depth x VECTORS vectors, packed), added to C if accumulate. What is
// added is a sum of its own first, since one long chain of additions would lose digits.
template <typename T, int VECTORS>
void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
                   bool accumulate) {
  constexpr int most = rows_of_kernel<VECTORS>;
  constexpr int64_t width = VECTORS * Vec<T>::lanes;
  const int64_t tiles = (rows + most - 1) / most;
  const Range first = part(rows, 0, tiles);
  tile_rows<T, VECTORS, Layout::row_major, most, true>(first.end, depth, a, lda, b, width, c, ldc, accumulate);
  for (int64_t index = 1; index < tiles; ++index) {
    const Range own = part(rows, index, tiles);
    tile_rows<T, VECTORS, Layout::row_major, most>(own.end - own.begin, depth, a + own.begin * lda, lda, b, width,
                                                   c + own.begin * ldc, ldc, accumulate);
  }
}

template <typename T>
PYTBPTT_INLINE void multiply(int vectors, int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, T* c,
                             int64_t ldc, bool accumulate) {
  if (vectors == 4) return multiply_rows<T, 4>(rows, depth, a, lda, b, c, ldc, accumulate);
  if (vectors == 2) return multiply_rows<T, 2>(rows, depth, a, lda, b, c, ldc, accumulate);
  multiply_rows<T, 1>(rows, depth, a, lda, b, c, ldc, accumulate);
}

// ---------------------------------------------------------------------------------------------------------------------
// Workspaces.

// Elements from one row to the next: an odd number of cache lines, or rows whose length is a power of two would all
// compete for the same few places in the cache.
template <typename T>
PYTBPTT_INLINE int64_t row_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (width + line - 1) / line;
  return (lines | 1) * line;
}

template <typename T>
PYTBPTT_INLINE int64_t blocks_of(const Lstm& inputs) {
  return (inputs.H + Vec<T>::lanes - 1) / Vec<T>::lanes;
}

// Hands out consecutive parts of a buffer, each a multiple of 64 bytes; from nullptr, it only adds up.
template <typename T>
struct Cutter {
  char* base;
  int64_t used = 0;

  T* take(int64_t count) {
    T* taken = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

template <typename T>
struct ForwardWorkspace {
  int64_t hidden_stride, tile_size, bytes;
  T* weights;    // (blocks, 4 / vectors, H, vectors, lanes)
  T* hidden[2];  // (B, hidden_stride) before the even and the odd steps; zero where reset
  T* cell;       // (B, hidden_stride) before the next step; zero where reset
  T* tiles;      // (threads, tile_size)

  ForwardWorkspace(const Lstm& inputs, int threads, void* memory) {
    constexpr int64_t lanes = Vec<T>::lanes;
    Cutter<T> cutter{static_cast<char*>(memory)};
    hidden_stride = row_stride<T>(blocks_of<T>(inputs) * lanes);
    tile_size = inputs.B * 4 * lanes;
    weights = cutter.take(blocks_of<T>(inputs) * 4 * lanes * inputs.H);
    for (T*& state : hidden) state = cutter.take(inputs.B * hidden_stride);
    cell = cutter.take(inputs.B * hidden_stride);
    tiles = cutter.take(threads * tile_size);
    bytes = cutter.used;
  }
};

// The weight's gradient is made block by block, each block whole before the next: rows and columns of a block, and how
// many of the T * B products of a gates' gradient and a hidden state are packed and added up at a time. So few keep the
// chains of additions about as short as those of one product per step.
constexpr int64_t weight_rows = 192, weight_columns = 256, weight_depth = 80;

template <typename T>
struct BackwardWorkspace {
  int64_t depth, gates_stride, hidden_stride, bytes;
  T* weights;        // per kernel of v blocks: (depth, v, lanes); kernels one after another
  T* grad_gates[2];  // (B, gates_stride) of the even and the odd steps, each row (blocks, 4, lanes)
  T* grad_hidden;    // (B, hidden_stride), without what the output adds
  T* grad_cell;      // (B, hidden_stride)

  // Per thread, for its blocks of the weight's gradient.
  static constexpr int64_t gates_size = weight_rows * (weight_depth + Vec<T>::lanes);
  static constexpr int64_t hidden_size = weight_depth * weight_columns, sums_size = weight_rows * weight_columns;
  T* packed_gates;   // (threads, gates_size): (tiles of rows, depth, rows of a tile)
  T* packed_hidden;  // (threads, hidden_size): per kernel of v vectors (depth, v, lanes)
  T* sums;           // (threads, sums_size)

  BackwardWorkspace(const Lstm& inputs, int threads, void* memory) {
    constexpr int64_t lanes = Vec<T>::lanes;
    const int64_t blocks = blocks_of<T>(inputs);
    Cutter<T> cutter{static_cast<char*>(memory)};
    depth = blocks * 4 * lanes;
    gates_stride = row_stride<T>(depth);
    hidden_stride = row_stride<T>(blocks * lanes);
    weights = cutter.take(blocks * lanes * depth);
    for (T*& gates : grad_gates) gates = cutter.take(inputs.B * gates_stride);
    grad_hidden = cutter.take(inputs.B * hidden_stride);
    grad_cell = cutter.take(inputs.B * hidden_stride);
    packed_gates = cutter.take(threads * gates_size);
    packed_hidden = cutter.take(threads * hidden_size);
    sums = cutter.take(threads * sums_size);
    bytes = cutter.used;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// A thread's part.

struct Share {
  Range streams, blocks;
  const LstmMember& member;
  int64_t group, meetings_of_everyone = 0, meetings_of_group = 0;

  Share(const Lstm& inputs, int64_t block_count, const LstmMember& member)
      : member(member), group(member.rank / member.unit_groups) {
    streams = part(inputs.B, group, member.stream_groups);
    blocks = part(block_count, member.rank % member.unit_groups, member.unit_groups);
  }

  int threads() const { return member.stream_groups * member.unit_groups; }

  void meet_everyone() {
    if (threads() > 1) arrive_and_wait(*member.everyone, ++meetings_of_everyone * threads());
  }

  void meet_group() {
    if (member.unit_groups > 1) arrive_and_wait(member.by_group[group], ++meetings_of_group * member.unit_groups);
  }
};

PYTBPTT_INLINE bool resets(const Lstm& inputs, int64_t t, int64_t b) {
  return inputs.reset != nullptr && t < inputs.T && inputs.reset[t * inputs.B + b];
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward.

// Lays out the rows of weight_hh that belong to one block of units by k, all gates of `vectors` at a time side by side.
template <typename T, typename S>
void pack_for_forward(const Lstm& inputs, int64_t block, int vectors, T* to) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const auto* weight = static_cast<const S*>(inputs.weight_hh);
  const int64_t units = smaller(lanes, inputs.H - block * lanes);
  for (int gate = 0; gate < 4; ++gate) {
    const S* rows = weight + (gate * inputs.H + block * lanes) * inputs.weight_stride;
    T* column = to + gate / vectors * inputs.H * vectors * lanes + gate % vectors * lanes;
    for (int64_t k = 0; k < inputs.H; k += lanes) {
      const int64_t count = smaller(lanes, inputs.H - k);
      typename Vec<T>::type square[lanes];
      for (int64_t unit = 0; unit < lanes; ++unit) {
        square[unit] =
            unit < units ? load_lanes<T, S>(rows + unit * inputs.weight_stride + k, count) : typename Vec<T>::type{};
      }
      transpose<T>(square);
      for (int64_t index = 0; index < count; ++index) store(column + (k + index) * vectors * lanes, square[index]);
    }
  }
}

// One block of units at one step, in streams [streams.begin, streams.end), which are `rows` of the tile.
template <typename T, typename S>
void forward_block(const LstmForward& p, const ForwardWorkspace<T>& workspace, int64_t t, int64_t block, Range streams,
                   int vectors, T* tile) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H, first = block * lanes, count = smaller(lanes, H - first);
  const int64_t rows = streams.end - streams.begin, stride = workspace.hidden_stride;
  const int64_t width = vectors * lanes, half = rows * width;  // the tile is (4 / vectors, rows, vectors, lanes)
  const T* hidden = workspace.hidden[t % 2] + streams.begin * stride;
  const T* weights = workspace.weights + block * 4 * lanes * H;

  const S* gates = static_cast<const S*>(p.gates.data) + t * p.gates.step + first;
  for (int64_t b = streams.begin; b < streams.end; ++b) {
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + b * p.gates.stream + gate * H);
  }
  for (int part_of_gates = 0; part_of_gates < 4 / vectors; ++part_of_gates) {
    for (int64_t slice = 0; slice < slices_of(H); ++slice) {
      const Range k = part(H, slice, slices_of(H));
      multiply<T>(vectors, rows, k.end - k.begin, hidden + k.begin, stride,
                  weights + part_of_gates * H * width + k.begin * width, tile + part_of_gates * half, width, slice > 0);
    }
  }

  T* next_hidden = workspace.hidden[(t + 1) % 2];
  // The input's part is added last, when the sum over k is complete: it is the larger one, and costs digits earlier.
  const auto gate_of = [&](int64_t row, int gate) {
    const V sum = load(tile + gate / vectors * half + row * width + gate % vectors * lanes);
    return sum + load_lanes<T, S>(gates + (streams.begin + row) * p.gates.stream + gate * H, count);
  };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = streams.begin + row, place = b * stride + first, in_chunk = (t * inputs.B + b) * H + first;
    const V i = sigmoid<T>(gate_of(row, 0)), f = sigmoid<T>(gate_of(row, 1));
    const V g = tanh<T>(gate_of(row, 2)), o = sigmoid<T>(gate_of(row, 3));
    const V c = f * load(workspace.cell + place) + i * g;
    const V h = as_stored<T, S>(o * tanh<T>(c));
    const bool forgets = resets(inputs, t + 1, b);
    store(workspace.cell + place, forgets ? V{} : c);
    store(next_hidden + place, forgets ? V{} : h);
    store_lanes<T, S>(static_cast<S*>(p.output) + in_chunk, h, count);
    if (p.activated != nullptr) {
      S* activated = static_cast<S*>(p.activated) + (t * inputs.B + b) * 4 * H + first;
      store_lanes<T, S>(activated, i, count);
      store_lanes<T, S>(activated + H, f, count);
      store_lanes<T, S>(activated + 2 * H, g, count);
      store_lanes<T, S>(activated + 3 * H, o, count);
      store_lanes<T, T>(static_cast<T*>(p.cells) + in_chunk, c, count);
    }
    if (t == inputs.T - 1) {
      store_lanes<T, S>(static_cast<S*>(p.h_n) + b * H + first, h, count);
      store_lanes<T, T>(static_cast<T*>(p.c_n) + b * H + first, c, count);
    }
  }
}

template <typename T, typename S>
void forward_of(const LstmForward& p, const LstmMember& member, void* memory) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t blocks = blocks_of<T>(inputs);
  Share own(inputs, blocks, member);
  const ForwardWorkspace<T> workspace(inputs, own.threads(), memory);
  const int vectors = widest_kernel(inputs.B);

  const Range packs = part(blocks, member.rank, own.threads());
  for (int64_t block = packs.begin; block < packs.end; ++block) {
    pack_for_forward<T, S>(inputs, block, vectors, workspace.weights + block * 4 * lanes * inputs.H);
  }
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    const bool forgets = resets(inputs, 0, b);
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      const int64_t first = block * lanes, count = forgets ? 0 : smaller(lanes, inputs.H - first);
      const S* h0 = static_cast<const S*>(inputs.h0.data) + b * inputs.h0.stream + first;
      const T* c0 = static_cast<const T*>(inputs.c0.data) + b * inputs.c0.stream + first;
      store(workspace.hidden[0] + b * workspace.hidden_stride + first, load_lanes<T, S>(h0, count));
      store(workspace.cell + b * workspace.hidden_stride + first, load_lanes<T, T>(c0, count));
    }
  }
  own.meet_everyone();

  T* tile = workspace.tiles + member.rank * workspace.tile_size;
  for (int64_t t = 0; t < inputs.T; ++t) {
    // To and fro over the blocks: the weights that a step used last are still in L2 for the next one.
    for (int64_t index = own.blocks.begin; index < own.blocks.end; ++index) {
      const int64_t block = t % 2 == 0 ? index : own.blocks.begin + own.blocks.end - 1 - index;
      forward_block<T, S>(p, workspace, t, block, own.streams, vectors, tile);
    }
    own.meet_group();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward.

// Calls use(first block, vectors) for the kernels that cover a thread's blocks, widest first.
template <typename Use>
PYTBPTT_INLINE void for_kernels(Range blocks, int widest, const Use& use) {
  int vectors = widest;
  for (int64_t block = blocks.begin; block < blocks.end; block += vectors) {
    while (vectors > blocks.end - block) vectors /= 2;
    use(block, vectors);
  }
}

// Copies the columns of weight_hh that belong to some blocks of units, rows in the order of grad_gates. Row by row over
// all kernels: a column of a large matrix is a page per element.
template <typename T, typename S>
void pack_for_backward(const Lstm& inputs, Range packed_blocks, int widest, T* weights) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const auto* weight = static_cast<const S*>(inputs.weight_hh);
  const int64_t H = inputs.H, depth = blocks_of<T>(inputs) * 4 * lanes;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t gate = k / lanes % 4, unit = k / (4 * lanes) * lanes + k % lanes;
    const S* row = weight + (gate * H + unit) * inputs.weight_stride;
    for_kernels(packed_blocks, widest, [&](int64_t block, int vectors) {
      T* to = weights + (block * depth + k * vectors) * lanes;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (block + v) * lanes;
        store(to + v * lanes, unit < H ? load_lanes<T, S>(row + first, smaller(lanes, H - first)) : V{});
      }
    });
  }
}

// The gates' gradients of own units at one step; leaves the cell's gradient as the step before needs it.
template <typename T, typename S>
void backward_pointwise(const LstmBackward& p, const BackwardWorkspace<T>& workspace, const Share& own, int64_t t) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H, B = inputs.B;
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    const bool forgets = resets(inputs, t, b);
    const int64_t row = t * B + b;
    const S* activated_row = static_cast<const S*>(p.activated) + row * 4 * H;
    const T* cells = static_cast<const T*>(p.cells) + row * H;
    const T* cells_before = t > 0 ? cells - B * H : static_cast<const T*>(inputs.c0.data) + b * inputs.c0.stream;
    S* grad_row = static_cast<S*>(p.grad_gates) + row * 4 * H;
    T* own_grad_row = workspace.grad_gates[t % 2] + b * workspace.gates_stride;
    const S* grad_output = static_cast<const S*>(p.grad_output.data);
    if (grad_output != nullptr) grad_output += t * p.grad_output.step + b * p.grad_output.stream;
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      const int64_t first = block * lanes, count = smaller(lanes, H - first);
      const int64_t place = b * workspace.hidden_stride + first;
      const S* activated = activated_row + first;
      const V i = load_lanes<T, S>(activated, count), f = load_lanes<T, S>(activated + H, count);
      const V g = load_lanes<T, S>(activated + 2 * H, count), o = load_lanes<T, S>(activated + 3 * H, count);
      const V tanh_c = tanh<T>(load_lanes<T, T>(cells + first, count));
      const V c_before = forgets ? V{} : load_lanes<T, T>(cells_before + first, count);
      V dh = load(workspace.grad_hidden + place);
      if (grad_output != nullptr) dh += load_lanes<T, S>(grad_output + first, count);
      const V dc = load(workspace.grad_cell + place) + dh * o * (T{1} - tanh_c * tanh_c);
      const V grads[4] = {dc * g * i * (T{1} - i), dc * c_before * f * (T{1} - f), dc * i * (T{1} - g * g),
                          dh * tanh_c * o * (T{1} - o)};
      store(workspace.grad_cell + place, forgets ? V{} : dc * f);
      for (int gate = 0; gate < 4; ++gate) {
        store(own_grad_row + (block * 4 + gate) * lanes, grads[gate]);
        store_lanes<T, S>(grad_row + gate * H + first, grads[gate], count);
      }
    }
  }
}

// The hidden state's gradient before a step, own columns: the step's gates' gradients times weight_hh.
template <typename T>
void backward_product(const Lstm& inputs, const BackwardWorkspace<T>& workspace, const Share& own, int64_t t,
                      int widest) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t stride = workspace.hidden_stride, rows = own.streams.end - own.streams.begin;
  const T* grads = workspace.grad_gates[t % 2] + own.streams.begin * workspace.gates_stride;
  T* hidden = workspace.grad_hidden + own.streams.begin * stride;
  const int64_t slices = slices_of(workspace.depth);
  // A slice of all streams' gradients stays in L2 for all own columns. To and fro as in the forward.
  for (int64_t index = 0; index < slices; ++index) {
    const Range k = part(workspace.depth, t % 2 == 0 ? index : slices - 1 - index, slices);
    for_kernels(own.blocks, widest, [&](int64_t block, int vectors) {
      const T* weights = workspace.weights + (block * workspace.depth + k.begin * vectors) * lanes;
      multiply<T>(vectors, rows, k.end - k.begin, grads + k.begin, workspace.gates_stride, weights,
                  hidden + block * lanes, stride, index > 0);
    });
  }
  for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
    if (!resets(inputs, t, b)) continue;
    for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
      store(workspace.grad_hidden + b * stride + block * lanes, V{});
    }
  }
}

// Elements from one packed tile of gates' gradients to the next: room for the last vector to write too far.
template <typename T>
PYTBPTT_INLINE int64_t packed_tile(int64_t depth) {
  return depth * rows_of_kernel<2> + Vec<T>::lanes;
}

// Lays out gradients of gates [rows.begin, rows.end) at steps and streams [places.begin, places.end), both flat, in
// tiles as high as the microkernel.
template <typename T, typename S>
void pack_grad_gates(const LstmBackward& p, Range rows, Range places, T* to) {
  constexpr int64_t lanes = Vec<T>::lanes, height = rows_of_kernel<2>;
  const int64_t tile = packed_tile<T>(places.end - places.begin);
  for (int64_t place = places.begin; place < places.end; ++place, to += height) {
    const S* from = static_cast<const S*>(p.grad_gates) + place * 4 * p.inputs.H;
    T* to_tile = to;
    for (int64_t first = rows.begin; first < rows.end; first += height, to_tile += tile) {
      // Whole vectors: what they write too far is written again at the next place, or is spare.
      for (int64_t row = 0; row < height; row += lanes) {
        store(to_tile + row, load_lanes<T, S>(from + first + row, 4 * p.inputs.H - first - row));
      }
    }
  }
}

// Lays out blocks of units of the hidden states before the same steps, for kernels of at most two vectors.
template <typename T, typename S>
void pack_hidden_before(const LstmBackward& p, Range blocks, Range places, T* to) {
  using V = typename Vec<T>::type;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t depth = places.end - places.begin;
  for (int64_t place = places.begin; place < places.end; ++place) {
    const bool forgets = inputs.reset != nullptr && inputs.reset[place];
    const S* from = place < inputs.B ? static_cast<const S*>(inputs.h0.data) + place * inputs.h0.stream
                                     : static_cast<const S*>(p.output) + (place - inputs.B) * inputs.H;
    for_kernels(blocks, 2, [&](int64_t block, int vectors) {
      T* row = to + ((block - blocks.begin) * depth + (place - places.begin) * vectors) * lanes;
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (block + v) * lanes;
        store(row + v * lanes, forgets ? V{} : load_lanes<T, S>(from + first, smaller(lanes, inputs.H - first)));
      }
    });
  }
}

// A thread's rows of the weight's gradient: the sum over steps and streams of gates' gradient times hidden state.
template <typename T, typename S>
void backward_weight(const LstmBackward& p, const BackwardWorkspace<T>& workspace, int rank, int threads) {
  constexpr int64_t lanes = Vec<T>::lanes, height = rows_of_kernel<2>;
  constexpr int64_t blocks_at_once = weight_columns / lanes;
  const int64_t H = p.inputs.H, blocks = blocks_of<T>(p.inputs), places = p.inputs.T * p.inputs.B;
  const int64_t longest = smaller(weight_depth, places > 64 ? places / 4 : 16);
  const int64_t slices = (places + longest - 1) / longest;
  T* gates = workspace.packed_gates + rank * workspace.gates_size;
  T* hidden = workspace.packed_hidden + rank * workspace.hidden_size;
  T* sums = workspace.sums + rank * workspace.sums_size;

  const Range tiles = part((4 * H + height - 1) / height, rank, threads);
  const int64_t end_row = smaller(tiles.end * height, 4 * H);
  for (int64_t first_row = tiles.begin * height; first_row < end_row; first_row += weight_rows) {
    const Range rows{first_row, smaller(first_row + weight_rows, end_row)};
    for (int64_t first_block = 0; first_block < blocks; first_block += blocks_at_once) {
      const Range columns{first_block, smaller(first_block + blocks_at_once, blocks)};
      for (int64_t slice = 0; slice < slices; ++slice) {
        const Range summed = part(places, slice, slices);
        const int64_t depth = summed.end - summed.begin;
        pack_grad_gates<T, S>(p, rows, summed, gates);
        pack_hidden_before<T, S>(p, columns, summed, hidden);
        for_kernels(columns, 2, [&](int64_t block, int vectors) {
          const T* packed = hidden + (block - first_block) * depth * lanes;
          for (int64_t row = rows.begin; row < rows.end; row += height) {
            const int64_t count = smaller(height, rows.end - row);
            const T* a = gates + (row - rows.begin) / height * packed_tile<T>(depth);
            T* c = sums + (row - rows.begin) * weight_columns + (block - first_block) * lanes;
            if (vectors == 2) {
              tile_rows<T, 2, Layout::column_major, height>(count, depth, a, height, packed, 2 * lanes, c,
                                                            weight_columns, slice > 0);
            } else {
              tile_rows<T, 1, Layout::column_major, height>(count, depth, a, height, packed, lanes, c, weight_columns,
                                                            slice > 0);
            }
          }
        });
      }
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t block = columns.begin; block < columns.end; ++block) {
          const T* from = sums + (row - rows.begin) * weight_columns + (block - first_block) * lanes;
          store_lanes<T, S>(static_cast<S*>(p.grad_weight) + row * H + block * lanes, load(from),
                            smaller(lanes, H - block * lanes));
        }
      }
    }
  }
}

template <typename T, typename S>
void backward_of(const LstmBackward& p, const LstmMember& member, void* memory) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const Lstm& inputs = p.inputs;
  const int64_t H = inputs.H;
  Share own(inputs, blocks_of<T>(inputs), member);
  const BackwardWorkspace<T> workspace(inputs, own.threads(), memory);
  const int widest = widest_kernel(inputs.B);

  // Groups share the packed weights: each packs part of the kernels, cut where kernels begin.
  const Range packed = part((own.blocks.end - own.blocks.begin + widest - 1) / widest, own.group, member.stream_groups);
  pack_for_backward<T, S>(
      inputs,
      {own.blocks.begin + packed.begin * widest, smaller(own.blocks.begin + packed.end * widest, own.blocks.end)},
      widest, workspace.weights);
  const auto for_own = [&](const auto& use) {
    for (int64_t b = own.streams.begin; b < own.streams.end; ++b) {
      for (int64_t block = own.blocks.begin; block < own.blocks.end; ++block) {
        const int64_t first = block * lanes;
        use(b, first, smaller(lanes, H - first), b * workspace.hidden_stride + first);
      }
    }
  };
  for_own([&](int64_t b, int64_t first, int64_t count, int64_t place) {
    const auto* grad_h_n = static_cast<const S*>(p.grad_h_n.data);
    const auto* grad_c_n = static_cast<const T*>(p.grad_c_n.data);
    store(workspace.grad_hidden + place,
          load_lanes<T, S>(grad_h_n + b * p.grad_h_n.stream + first, grad_h_n == nullptr ? 0 : count));
    store(workspace.grad_cell + place,
          load_lanes<T, T>(grad_c_n + b * p.grad_c_n.stream + first, grad_c_n == nullptr ? 0 : count));
  });
  own.meet_everyone();

  for (int64_t t = inputs.T - 1; t >= 0; --t) {
    backward_pointwise<T, S>(p, workspace, own, t);
    own.meet_group();
    backward_product<T>(inputs, workspace, own, t, widest);
  }
  for_own([&](int64_t b, int64_t first, int64_t count, int64_t place) {
    store_lanes<T, S>(static_cast<S*>(p.grad_h0) + b * H + first, load(workspace.grad_hidden + place), count);
    store_lanes<T, T>(static_cast<T*>(p.grad_c0) + b * H + first, load(workspace.grad_cell + place), count);
  });
  own.meet_everyone();
  backward_weight<T, S>(p, workspace, member.rank, own.threads());
}

// ---------------------------------------------------------------------------------------------------------------------
// By dtype.

int64_t forward_workspace(const LstmForward& p, int threads) {
  return p.inputs.dtype == Scalar::float64 ? ForwardWorkspace<double>(p.inputs, threads, nullptr).bytes
                                           : ForwardWorkspace<float>(p.inputs, threads, nullptr).bytes;
}

int64_t backward_workspace(const LstmBackward& p, int threads) {
  return p.inputs.dtype == Scalar::float64 ? BackwardWorkspace<double>(p.inputs, threads, nullptr).bytes
                                           : BackwardWorkspace<float>(p.inputs, threads, nullptr).bytes;
}

void forward(const LstmForward& p, const LstmMember& member, void* workspace) {
  switch (p.inputs.dtype) {
    case Scalar::float32:
      return forward_of<float, float>(p, member, workspace);
    case Scalar::float64:
      return forward_of<double, double>(p, member, workspace);
    case Scalar::bfloat16:
      return forward_of<float, Bfloat16>(p, member, workspace);
    case Scalar::float16:
      return forward_of<float, Float16>(p, member, workspace);
  }
}

void backward(const LstmBackward& p, const LstmMember& member, void* workspace) {
  switch (p.inputs.dtype) {
    case Scalar::float32:
      return backward_of<float, float>(p, member, workspace);
    case Scalar::float64:
      return backward_of<double, double>(p, member, workspace);
    case Scalar::bfloat16:
      return backward_of<float, Bfloat16>(p, member, workspace);
    case Scalar::float16:
      return backward_of<float, Float16>(p, member, workspace);
  }
}

}  // namespace

const LstmKernels lstm_kernels = {forward_workspace, backward_workspace, forward, backward};

}  // namespace pytbptt::cpu::PYTBPTT_ISA
