// Emulator of csrc/common/cuda/device/warpgroup.h (WGMMA); included by emulator.h.
#pragma once

namespace pytbptt::device {

constexpr bool has_warpgroups = true;

inline constexpr int swizzled(int row, int chunk) {
  return chunk ^ row % 8;
}

template <typename E>
class Matrix {
 public:
  explicit Matrix(Smem<E> first) : first_(first) {}
  Matrix from(int row, int column) const {
    Matrix moved(*this);
    moved.offset_ += row * row_elements + column;
    return moved;
  }
  // Element (row, k) of the operand; `read` must be called before.
  template <bool TRANSPOSED>
  float element(int row, int k) const {
    const int at = offset_ + (TRANSPOSED ? k * row_elements + row : row * row_elements + k);
    return to_float(data_[swizzled_index(at)]);
  }
  // Checks and tracks the reads of 16-byte chunks of `rows` rows from `first_row` on: those of `thread` of `threads`.
  template <bool TRANSPOSED>
  void read(int first_row, int rows, int thread, int threads, const SourceLocation& location) {
    data_ = first_.inside(0, 16, location);
    if (emulator::shared_offset(data_) % 1024 != 0) {
      emulator::fail("a matrix that is not aligned to 1024 bytes", location);
    }
    const int chunks = TRANSPOSED ? rows / chunk_elements : 2, of_rows = TRANSPOSED ? 16 : rows;
    const int first = offset_ + (TRANSPOSED ? first_row : first_row * row_elements);
    for (int i = thread; i < of_rows * chunks; i += threads) {
      const int at = first + i / chunks * row_elements + i % chunks * chunk_elements;
      emulator::track_async_operand(first_.at(swizzled_index(at), 16, false, location), location);
    }
  }

 private:
  static int swizzled_index(int at) {
    const int row = at / row_elements, column = at % row_elements;
    return row * row_elements + swizzled(row, column / chunk_elements) * chunk_elements + column % chunk_elements;
  }
  Smem<E> first_;
  int offset_ = 0;
  const E* data_ = nullptr;
};

struct WarpgroupArgument {
  float* d;
  const std::uint32_t* a;
};

// `left(row, k)` is an element of A.
template <bool TRANSPOSED, typename E, int N, typename Left>
void add_warpgroup_products(void** threads, const Matrix<E>& b, Left left) {
  for (int row = 0; row < 64; ++row) {
    for (int n = 0; n < N; ++n) {
      for (int pair = 0; pair < 4; ++pair) {
        const int thread = row / 16 * 32 + row % 8 * 4 + pair;
        float* const d =
            emulator::pending_accumulator(thread, static_cast<WarpgroupArgument*>(threads[thread])->d, 4 * N);
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * pair + i;
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += left(row, k) * b.template element<TRANSPOSED>(column, k);
          d[4 * n + row % 16 / 8 * 2 + i] += sum;
        }
      }
    }
  }
}

template <bool TRANSPOSED, typename E, int N>
void warpgroup_mma(float (&d)[N][4], const std::uint32_t (&a)[4], Matrix<E> b,
                   SourceLocation location = SourceLocation::current()) {
  b.template read<TRANSPOSED>(0, 8 * N, thread() % 128, 128, location);
  struct Argument : WarpgroupArgument {
    const Matrix<E>* b;
  } argument{{&d[0][0], a}, &b};
  emulator::warpgroup_collective(
      "warpgroup_mma", &argument,
      [](void** threads) {
        float left[64][16];
        for (int thread = 0; thread < 128; ++thread) {
          const int g = thread % 32 / 4, q = thread % 4;
          for (int part = 0; part < 4; ++part) {
            const std::uint32_t two = static_cast<Argument*>(threads[thread])->a[part];
            for (int i = 0; i < 2; ++i) {
              left[thread / 32 * 16 + g + part % 2 * 8][2 * q + i + part / 2 * 8] =
                  to_float(E{static_cast<std::uint16_t>(two >> 16 * i)});
            }
          }
        }
        add_warpgroup_products<TRANSPOSED, E, N>(threads, *static_cast<Argument*>(threads[0])->b,
                                                 [&](int row, int k) { return left[row][k]; });
      },
      location);
}

template <bool TRANSPOSED_A, bool TRANSPOSED, typename E, int N>
void warpgroup_mma(float (&d)[N][4], Matrix<E> a, Matrix<E> b, SourceLocation location = SourceLocation::current()) {
  a.template read<TRANSPOSED_A>(0, 64, thread() % 128, 128, location);
  b.template read<TRANSPOSED>(0, 8 * N, thread() % 128, 128, location);
  struct Argument : WarpgroupArgument {
    const Matrix<E>*a_matrix, *b;
  } argument{{&d[0][0], nullptr}, &a, &b};
  emulator::warpgroup_collective(
      "warpgroup_mma", &argument,
      [](void** threads) {
        const auto& first = *static_cast<Argument*>(threads[0]);
        add_warpgroup_products<TRANSPOSED, E, N>(
            threads, *first.b, [&](int row, int k) { return first.a_matrix->template element<TRANSPOSED_A>(row, k); });
      },
      location);
}

inline void sync_warpgroup(SourceLocation location = SourceLocation::current()) {
  emulator::sync_warpgroup(location);
}
template <int REGISTERS>
void warpgroup_reg_alloc() {}
template <int REGISTERS>
void warpgroup_reg_dealloc() {}
inline void fence_async_shared() {
  emulator::fence_async_shared();
}
template <typename... Registers>
void warpgroup_arrive(Registers&...) {
  emulator::warpgroup_arrive();
}
inline void warpgroup_commit_batch() {
  emulator::warpgroup_commit_batch();
}
// Errors report the line below: a default source location cannot follow a parameter pack.
template <int GROUPS, typename... Registers>
void warpgroup_wait(Registers&...) {
  emulator::warpgroup_wait(GROUPS, SourceLocation::current());
}
template <typename... Parameters>
bool offers_warpgroups(void (*)(Parameters...)) {
  return emulator::supports_wgmma();
}

}  // namespace pytbptt::device
