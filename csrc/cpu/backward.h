// adapt_backward.
#pragma once

#include "cpu/product.h"
#include "cpu/tokens.h"

namespace idlora::cpu::IDLORA_ISA {

constexpr int64_t DEPTH = 128;   // columns of dy, or tokens, that a product takes at a time
constexpr int64_t DB_ROWS = 96;  // rows of dB that a thread sums at a time

// Tokens whose share of dT is summed on its own. It depends on N alone, so that dT does not depend on the threads.
inline int64_t tokens_per_chunk(int64_t N) { return larger(8, smaller(32, N / 16)); }

// dz of tokens [begin, end), [tokens, s, padded(q)], not scaled. Copies dy to dy0 on the way.
template <class T>
void multiply_dy(const AdaptBackwardProblem& p, int64_t begin, int64_t end, float* dz) {
  const int64_t ds = p.d / p.s, q = p.r / p.s, width = padded(q), parts = (end - begin) * p.s;
  const bool as_it_is = p.B_dtype == Dtype::float32 && !std::is_same_v<T, bfloat16> && q == width;
  const Buffer dy(parts * DEPTH), panel(as_it_is ? 0 : DEPTH * width);
  for (int64_t c = 0; c < ds; c += DEPTH) {
    const int64_t depth = smaller(DEPTH, ds - c);
    const float* B = panel;
    if (as_it_is)
      B = static_cast<const float*>(p.B) + c * q;
    else
      typed(p.B_dtype, p.B, [&](const auto* narrow) { pack<T>(narrow + c * q, depth, q, panel); });
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t n = begin + part / p.s, at = part % p.s * ds + c;
      const T* const from = static_cast<const T*>(p.dy) + n * p.dy_stride + at;
      T* const to = static_cast<T*>(p.dy0) + n * p.d + at;
      for_vectors(depth, [=, &dy](int64_t i, auto load, auto store_part) {
        const Floats v = load(from + i);
        store_part(to + i, v);
        store(dy + part * DEPTH + i, v);
      });
      const int64_t next = smaller(DEPTH, ds - c - depth);
      prefetch(from + depth, next);
      prefetch(to + depth, next);
    }
    multiply(parts, width, depth, dy, DEPTH, 1, B, width, dz, width, c > 0);
  }
}

// dy0[index_i] += dx_i for one token and cluster, rounded once.
template <class T>
inline void scatter(T* dy0, const int32_t* index, int64_t r, const float* dx) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t j = 0; j < r; ++j) dy0[index[j]] += dx[j];
    return;
  }
  for (int64_t j = 0; j < r; j += W) {
    const int64_t count = smaller(W, r - j);
    T v[W] = {};
    for (int64_t i = 0; i < count; ++i) v[i] = dy0[index[j + i]];
    store(v, load(v) + load(dx + j));
    for (int64_t i = 0; i < count; ++i) dy0[index[j + i]] = v[i];
  }
}

// dy0 of tokens [begin, end) and their share of dT, [router_rows, padded(r)]; of a static router's, first in each row.
// z: where the operands of dB go, [N, s, padded(q)]; or else dz is given.
template <class T>
void backward_tokens(const AdaptBackwardProblem& p, const Router& router, const T* given_dz, int64_t begin, int64_t end,
                     float* z, float* dT) {
  const int64_t tokens = end - begin, k = p.x_clusters, n = k * p.r, width = padded(p.r), q = p.r / p.s,
                q_width = padded(q);
  const Buffer x(tokens * k * width), a(tokens * k), one(width), parts(given_dz ? 0 : tokens * p.s * q_width),
      dx(width);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const wide = x + t * k * width;
    widen_x(static_cast<const T*>(p.x) + (begin + t) * n, k, p.r, wide);
    route(wide, router, k, width, a + t * k, one);
    if (given_dz)
      std::memcpy(static_cast<T*>(p.dy0) + (begin + t) * p.d,
                  static_cast<const T*>(p.dy) + (begin + t) * p.dy_stride, p.d * sizeof(T));
    else
      for (int64_t j = 0; j < p.s; ++j) pack<T>(one + j * q, 1, q, z + ((begin + t) * p.s + j) * q_width);
  }
  if (!given_dz) multiply_dy<T>(p, begin, end, parts);

  std::memset(dT, 0, p.router_rows * width * sizeof(float));
  const float* const dz = one;
  const float scaling = p.scaling;
  for (int64_t t = 0; t < tokens; ++t) {
    if (given_dz)
      widen(given_dz + (begin + t) * p.r, p.r, one);
    else
      for (int64_t j = 0; j < p.s; ++j)
        for_vectors(q, [&](int64_t i, auto load, auto store) {
          store(one + j * q + i, scaling * load(parts + (t * p.s + j) * q_width + i));
        });
    T* const dy0 = static_cast<T*>(p.dy0) + (begin + t) * p.d;
    for (int64_t i = 0; i < k; ++i) {
      const float* const x_i = x + (t * k + i) * width;
      float* const dT_i = dT + (p.router_rows == 1 ? 0 : i * width);
      Floats product{};
      for (int64_t j = 0; j < width; j += W) product += load(dz + j) * load(x_i + j);
      const float da = sum(product), a_i = a[t * k + i];
      if (router.constants()) {
        for (int64_t j = 0; j < width; j += W) store(dx + j, a_i * load(dz + j));
        *dT_i += da;
      } else {
        for (int64_t j = 0; j < width; j += W) {
          store(dx + j, a_i * load(dz + j) + da * load(router[i] + j));
          store(dT_i + j, load(dT_i + j) + da * load(x_i + j));
        }
      }
      scatter(dy0, p.index + i * p.r, p.r, dx);
    }
    for (int64_t i = k; i < p.k; ++i) scatter(dy0, p.index + i * p.r, p.r, dx);  // x was the sum: all have the same dx
  }
}

// to[at + i] = scaling * from[i] in `dtype`.
inline void narrow(const float* from, float scaling, int64_t n, Dtype dtype, void* to, int64_t at) {
  typed(dtype, to, [=](auto* typed_to) {
    for_vectors(n, [=](int64_t i, auto load, auto store) { store(typed_to + at + i, scaling * load(from + i)); });
  });
}

// Rows [begin, end) of dB = scaling * sum over tokens and parts of dy^T z, with z the operands [N, s, padded(q)].
template <class T>
void sum_dB(const AdaptBackwardProblem& p, const float* z, int64_t begin, int64_t end) {
  const int64_t ds = p.d / p.s, q = p.r / p.s, width = padded(q);
  const Buffer dy(DEPTH * DB_ROWS), dB(DB_ROWS * width);
  for (int64_t c = begin; c < end; c += DB_ROWS) {
    const int64_t rows = smaller(DB_ROWS, end - c);
    std::memset(dB, 0, rows * width * sizeof(float));
    for (int64_t n = 0; n < p.N; n += DEPTH) {
      const int64_t depth = smaller(DEPTH, p.N - n);
      for (int64_t j = 0; j < p.s; ++j) {
        const T* from = static_cast<const T*>(p.dy) + n * p.dy_stride + j * ds + c;
        for (int64_t t = 0; t < depth; ++t, from += p.dy_stride) {
          widen(from, rows, dy + t * DB_ROWS);
          if (n + t + DEPTH < p.N) prefetch(from + DEPTH * p.dy_stride, rows);
        }
        multiply(rows, width, depth, dy, 1, DB_ROWS, z + (n * p.s + j) * width, p.s * width, dB, width, true);
      }
    }
    for (int64_t i = 0; i < rows; ++i) narrow(dB + i * width, p.scaling, q, p.B_dtype, p.dB, (c + i) * q);
  }
}

template <class T>
void backward(const T*, const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel) {
  const Router router(p);
  const int64_t ds = p.d / p.s, q = p.r / p.s, width = padded(p.r);
  const int64_t chunk = tokens_per_chunk(p.N), chunks = ceil_div(p.N, chunk), share = p.router_rows * width;
  const Buffer z(dz ? 0 : p.N * p.s * padded(q)), dT((chunks + 1) * share);
  parallel_for(parallel, chunks, chunk * (16 * p.k * p.r + (dz ? p.d : p.d * q)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      backward_tokens(p, router, static_cast<const T*>(dz), i * chunk, smaller(p.N, (i + 1) * chunk), z,
                      dT + (i + 1) * share);
  });
  std::memset(dT, 0, share * sizeof(float));
  for (int64_t i = 1; i <= chunks; ++i)
    for (int64_t j = 0; j < share; j += W) store(dT + j, load(dT + j) + load(dT + i * share + j));
  const int64_t columns = p.static_router ? 1 : p.r;
  for (int64_t i = 0; i < p.router_rows; ++i)
    narrow(dT + i * width, 1, columns, p.router_dtype, p.drouter, i * columns);

  if (dz) return;
  const int64_t groups = ceil_div(ds, TILE_ROWS);
  parallel_for(parallel, groups, p.N * p.s * q * TILE_ROWS, [&](int64_t begin, int64_t end) {
    sum_dB<T>(p, z, begin * TILE_ROWS, smaller(ds, end * TILE_ROWS));
  });
}

inline void adapt_backward(const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel) {
  typed(p.dtype, p.dy, [&](const auto* dy) { backward(dy, p, dz, parallel); });
}

}  // namespace idlora::cpu::IDLORA_ISA
