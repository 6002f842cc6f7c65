// The product with B on floats: a register tile, and the packing of its right operand.
#pragma once

#include "cpu/vector.h"

namespace idlora::cpu::IDLORA_ISA {

// Rows and vectors of the register tile: with the loaded operand it fills 32 or 16 registers.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = W == 16 ? 4 : 2;
constexpr int TILE_COLUMNS = TILE_VECTORS * W;

// C [ROWS, VECTORS * W] (+)= A [ROWS, K] P [K, VECTORS * W]; A has strides (a_row, a_k), P and C rows of their strides.
template <int ROWS, int VECTORS>
void tile(int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* P, int64_t p_row, float* C, int64_t c_row,
          bool add) {
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < K; ++k) {
    Floats p[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) p[v] = load(P + k * p_row + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const float a = A[m * a_row + k * a_k];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += a * p[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* const c = C + m * c_row + v * W;
      store(c, add ? load(c) + sums[m][v] : sums[m][v]);
    }
}

using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int VECTORS, int... ROWS>
inline Tile tile_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  constexpr Tile tiles[] = {tile<ROWS + 1, VECTORS>...};
  return tiles[rows - 1];
}
inline Tile tile_of(int64_t rows, int64_t vectors) {
  const std::make_integer_sequence<int, TILE_ROWS> any{};
  switch (vectors) {
    case 1: return tile_of<1>(rows, any);
    case 2: return tile_of<2>(rows, any);
#if IDLORA_WIDTH == 16
    case 3: return tile_of<3>(rows, any);
    case 4: return tile_of<4>(rows, any);
#endif
    default: return nullptr;
  }
}

// C [M, columns] (+)= A [M, K] P [K, columns]; columns is a multiple of W.
inline void multiply(int64_t M, int64_t columns, int64_t K, const float* A, int64_t a_row, int64_t a_k, const float* P,
                     int64_t p_row, float* C, int64_t c_row, bool add) {
  for (int64_t c = 0; c < columns; c += TILE_COLUMNS) {
    const int64_t vectors = smaller(TILE_COLUMNS, columns - c) / W;
    for (int64_t m = 0; m < M; m += TILE_ROWS) {
      const int64_t rows = smaller(TILE_ROWS, M - m);
      tile_of(rows, vectors)(K, A + m * a_row, a_row, a_k, P + c, p_row, C + m * c_row + c, c_row, add);
    }
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Exchanges the blocks of HALF lanes that are odd in a with those that are even in b.
template <int HALF, int... LANE>
inline void exchange(Floats& a, Floats& b, std::integer_sequence<int, LANE...>) {
  const Floats even = shuffle(a, b, std::integer_sequence<int, ((LANE & HALF) ? W + LANE - HALF : LANE)...>{});
  b = shuffle(a, b, std::integer_sequence<int, ((LANE & HALF) ? W + LANE : LANE + HALF)...>{});
  a = even;
}

template <int HALF>
inline void transpose(Floats (&rows)[W]) {
  if constexpr (HALF > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & HALF)) exchange<HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, W>{});
    transpose<HALF / 2>(rows);
  }
}

// P [q, TILE_COLUMNS] = B[0 : rows]^T, with zeros for rows that are missing. T: whose product it is for.
template <class T, class BT>
void pack_transposed(const BT* B, int64_t rows, int64_t q, float* P) {
  for (int64_t c = 0; c < TILE_COLUMNS; c += W)
    for (int64_t j = 0; j < q; j += W) {
      const int64_t count = smaller(W, q - j);
      Floats block[W];
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) {
        const BT* const from = B + (c + i) * q + j;
        block[i] = c + i >= rows ? Floats{} : operand<T>(count == W ? load(from) : load(from, count));
      }
      transpose<W / 2>(block);
      for (int64_t i = 0; i < count; ++i) store(P + (j + i) * TILE_COLUMNS + c, block[i]);
    }
}

// P [rows, padded(q)] = B[0 : rows].
template <class T, class BT>
void pack(const BT* B, int64_t rows, int64_t q, float* P) {
  for (int64_t i = 0; i < rows; ++i)
    for_vectors(q, [=](int64_t j, auto load, auto) { store(P + i * padded(q) + j, operand<T>(load(B + i * q + j))); });
}

}  // namespace idlora::cpu::IDLORA_ISA
