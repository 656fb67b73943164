// Warp-level matrix instructions: ldmatrix and mma; included by emulator.h.
#pragma once

namespace pytbptt::device {

template <bool TRANSPOSED, typename E>
void ldmatrix_x4(std::uint32_t (&to)[4], Smem<E> row, SourceLocation location = SourceLocation::current()) {
  struct Argument {
    std::uint32_t* to;
    const E* row;
  } argument{to, row.at(0, 16, false, location)};
  emulator::warp_collective(
      TRANSPOSED ? "ldmatrix_x4 transposed" : "ldmatrix_x4", &argument,
      [](void** lanes) {
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int row, int column) {
              const E* const from = static_cast<Argument*>(lanes[8 * matrix + row])->row;
              return static_cast<std::uint32_t>(from[column].bits);
            };
            static_cast<Argument*>(lanes[lane])->to[matrix] = TRANSPOSED
                                                                  ? element(2 * q, g) | element(2 * q + 1, g) << 16
                                                                  : element(g, 2 * q) | element(g, 2 * q + 1) << 16;
          }
        }
      },
      location);
}

// One warp's tile, summed in float in the order of k. Columns are the inner loop, so that the compiler vectorises it.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], float (&d)[16][8]) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) d[m][n] = 0;
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
}

struct MmaArgument {
  float* d;
  const std::uint32_t *a, *b;
};

inline void add_products(void** lanes, const float (&products)[16][8]) {
  for (int lane = 0; lane < warp_size; ++lane) {
    const int g = lane / 4, q = lane % 4;
    float* const d = static_cast<MmaArgument*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) d[i] += products[g + i / 2 * 8][2 * q + i % 2];
  }
}

template <typename E>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
         SourceLocation location = SourceLocation::current()) {
  MmaArgument argument{d, a, b};
  emulator::warp_collective(
      "mma", &argument,
      [](void** lanes) {
        float wide_a[16][16], wide_b[16][8], products[16][8];
        const auto element = [](std::uint32_t packed, int i) {
          return to_float(E{static_cast<std::uint16_t>(packed >> 16 * i)});
        };
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          const auto& argument = *static_cast<MmaArgument*>(lanes[lane]);
          for (int i = 0; i < 2; ++i) {
            for (int part = 0; part < 4; ++part) {
              wide_a[g + part % 2 * 8][2 * q + i + part / 2 * 8] = element(argument.a[part], i);
            }
            for (int part = 0; part < 2; ++part) wide_b[2 * q + i + part * 8][g] = element(argument.b[part], i);
          }
        }
        multiply(wide_a, wide_b, products);
        add_products(lanes, products);
      },
      location);
}

inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     SourceLocation location = SourceLocation::current()) {
  MmaArgument argument{d, a, b};
  emulator::warp_collective(
      "mma_tf32", &argument,
      [](void** lanes) {
        float wide_a[16][8], wide_b[8][8], products[16][8];
        for (int lane = 0; lane < warp_size; ++lane) {
          const int g = lane / 4, q = lane % 4;
          const auto& argument = *static_cast<MmaArgument*>(lanes[lane]);
          for (int part = 0; part < 4; ++part) {
            wide_a[g + part % 2 * 8][q + part / 2 * 4] = from_tf32(argument.a[part]);
          }
          for (int part = 0; part < 2; ++part) wide_b[q + part * 4][g] = from_tf32(argument.b[part]);
        }
        multiply(wide_a, wide_b, products);
        add_products(lanes, products);
      },
      location);
}

}  // namespace pytbptt::device
