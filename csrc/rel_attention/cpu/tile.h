// The products of rel_attention on one tile of queries and keys, in a strip of rows that are strip_stride apart.
//
//   by key                          by place (largest distance first): the same elements, with rows strip_stride + 1
//   row 0   | k0 k1 k2 k3 |         apart, as row r sees key j at the place j + T - 1 - (first_query + r). So position
//   row 1   | k0 k1 k2 k3 |         scores are written skewed into the strip of the content scores, and dS is read from
//   row 2   | k0 k1 k2 k3 |         it by distance, without a copy.
#pragma once
#include "rel_attention/cpu/sizes.h"

namespace pytbptt::cpu::PYTBPTT_ISA {

// The scores of a tile of queries against a chunk of keys, or their gradients.
template <typename T>
struct Tile {
  int64_t first_query, rows;
  int64_t first_key;  // of column 0
  const Span* keys;   // what each row sees of this chunk
  Span all_keys;      // the range that bounds them
  int64_t T_;         // the chunk's queries in all

  // Element (row, column 0) of the strip that holds the tile.
  T* row(T* strip, int64_t r) const { return strip + r * strip_stride<T>; }
  // Base pointer (may be out of bounds) for skewed access by distance index, with row stride strip_stride + 1.
  T* by_place(T* strip) const { return strip + first_query - (T_ - 1) - first_key; }

  Span keys_of_rows(int64_t first, int64_t count) const {
    Span all{0, 0};
    for (int64_t r = first; r < first + count; ++r) all = bounding_range(all, keys[r]);
    return all;
  }
  Span columns_of_rows(int64_t first, int64_t count) const {
    const Span all = keys_of_rows(first, count);
    return all.empty() ? Span{0, 0} : Span{all.begin - first_key, all.end - first_key};
  }
  Span places_of_rows(int64_t first, int64_t count) const {
    Span all{0, 0};
    for (int64_t r = first; r < first + count; ++r) {
      const int64_t shift = T_ - 1 - (first_query + r);
      if (!keys[r].empty()) all = bounding_range(all, {keys[r].begin + shift, keys[r].end + shift});
    }
    return all;
  }
};

// strip = queries · panels, skipping (row group, panel) pairs with no visible column.
template <typename T, typename ColumnsOf>
void multiply_by_panels(int64_t rows, const T* queries, const T* panels, const Widths<T>& widths, T* strip,
                        int64_t stride, bool accumulate, const ColumnsOf& columns_of) {
  constexpr int64_t width = panel_width<T>;
  Span wanted[tile_queries];
  Span all{0, 0};
  for (int64_t r = 0, group = 0; r < rows; r += score_rows, ++group) {
    wanted[group] = columns_of(r, smaller(score_rows, rows - r));
    all = bounding_range(all, wanted[group]);
  }
  if (all.empty()) return;
  for (int64_t column = all.begin / width * width; column < all.end; column += width) {
    const T* panel = panels + column * widths.depth;
    for (int64_t r = 0, group = 0; r < rows; r += score_rows, ++group) {
      const Span here = intersect(wanted[group], {column, column + width});
      if (here.empty()) continue;
      const int64_t count = smaller(score_rows, rows - r);
      const T* from = queries + r * widths.padded;
      T* to = strip + r * stride + column;
      const int64_t middle = column + Vec<T>::lanes;
      if (here.begin < middle && here.end > middle) {
        tile_rows<T, 2, Layout::row_major>(count, widths.depth, from, widths.padded, panel, width, to, stride,
                                           accumulate);
      } else {
        const int64_t half = here.begin < middle ? 0 : Vec<T>::lanes;
        tile_rows<T, 1, Layout::row_major>(count, widths.depth, from, widths.padded, panel + half, width, to + half,
                                           stride, accumulate);
      }
    }
  }
}

// The scores of a tile before their scale: what lies outside a row's visible keys is undefined.
template <typename T>
void score_tile(const Tile<T>& tile, const T* content, const T* position, const T* key_panels, const T* place_panels,
                const Widths<T>& widths, T* strip) {
  multiply_by_panels<T>(tile.rows, position, place_panels, widths, tile.by_place(strip), strip_stride<T> + 1, false,
                        [&](int64_t r, int64_t count) { return tile.places_of_rows(r, count); });
  multiply_by_panels<T>(tile.rows, content, key_panels, widths, strip, strip_stride<T>, true,
                        [&](int64_t r, int64_t count) { return tile.columns_of_rows(r, count); });
}

template <typename T, int VECTORS, Layout LAYOUT, typename DepthOf>
void add_product_columns(int64_t rows, const T* a, int64_t lda, const T* b, T* c, int64_t stride,
                         const DepthOf& depth_of) {
  constexpr int64_t step = rows_per_tile(VECTORS);
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t count = smaller(step, rows - r);
    const Span depth = depth_of(r, count);
    if (depth.empty()) continue;
    const T* from = LAYOUT == Layout::row_major ? a + r * lda + depth.begin : a + r + depth.begin * lda;
    tile_rows<T, VECTORS, LAYOUT>(count, depth.size(), from, lda, b + depth.begin * stride, stride, c + r * stride,
                                  stride, true);
  }
}

// C (rows x width) += A B, B and C with rows `width` apart, restricted to k in depth_of(row, count) for each group of
// rows.
template <typename T, Layout LAYOUT, typename DepthOf>
void add_product(int64_t rows, const T* a, int64_t lda, const T* b, T* c, int64_t width, const DepthOf& depth_of) {
  constexpr int64_t lanes = Vec<T>::lanes;
  const int64_t vectors = width / lanes;
  const int64_t panels = (vectors + widest_tile - 1) / widest_tile;
  const int64_t each = (vectors + panels - 1) / panels;
  for (int64_t first = 0; first < vectors; first += each) {
    const T* columns_b = b + first * lanes;
    T* columns_c = c + first * lanes;
    switch (smaller(each, vectors - first)) {
      case 1:
        add_product_columns<T, 1, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      case 2:
        add_product_columns<T, 2, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      case 3:
        add_product_columns<T, 3, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        break;
      default:
        if constexpr (widest_tile >= 4) {
          add_product_columns<T, 4, LAYOUT>(rows, a, lda, columns_b, columns_c, width, depth_of);
        }
    }
  }
}

}  // namespace pytbptt::cpu::PYTBPTT_ISA
