// adapt_backward.
#pragma once

#include "cpu/product.h"
#include "cpu/tokens.h"

namespace idlora::cpu::IDLORA_ISA {

constexpr int64_t DEPTH = 128;  // columns of dy that a product takes at a time, from a copy
constexpr int64_t STRIDE = DEPTH + W;  // of the rows of such a copy: a column lies in many sets of the cache
constexpr int64_t TOKENS = 32;  // whose dy, in so many columns, stays in the cache from its first use to its last
constexpr int64_t SHARES = 16;  // of the tokens, at most, each with sums of its own for dT and dB

// Tokens of a share. It depends on N alone, so that the sums over all shares do not depend on the threads.
inline int64_t tokens_per_share(int64_t N) { return larger(8, ceil_div(N, SHARES)); }

// Of tokens [begin, end): dz, [tokens, s, padded(q)], not scaled; adds what they give to dB, [d/s, padded(q)], not
// scaled either, with z as dz. Copies dy to dy0 on the way.
template <class T>
void multiply_dy(const AdaptBackwardProblem& p, int64_t begin, int64_t end, const float* z, float* dz, float* dB) {
  const int64_t ds = p.d / p.s, q = p.r / p.s, width = padded(q), parts = (end - begin) * p.s;
  const bool as_it_is = p.B_dtype == Dtype::float32 && !std::is_same_v<T, bfloat16> && q == width;
  const Buffer dy(parts * STRIDE), panel(as_it_is ? 0 : DEPTH * width);
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
        store(dy + part * STRIDE + i, v);
      });
      const int64_t next = smaller(DEPTH, ds - c - depth);
      prefetch(from + depth, next);
      prefetch(to + depth, next);
    }
    multiply(parts, width, depth, dy, STRIDE, 1, B, width, dz, width, c > 0);
    multiply(depth, width, parts, dy, 1, STRIDE, z, width, dB + c * width, width, true);
  }
}

// dy0[index_ij] += c_ij dx_ij for one token and cluster, rounded once. scale: c_i, or null.
template <class T>
inline void scatter_cluster(T* dy0, const int32_t* index, int64_t r, const float* dx, const float* scale) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t j = 0; j < r; ++j) dy0[index[j]] += scale ? scale[j] * dx[j] : dx[j];
    return;
  }
  for (int64_t j = 0; j < r; j += W) {
    const int64_t count = smaller(W, r - j);
    T v[W] = {};
    for (int64_t i = 0; i < count; ++i) v[i] = dy0[index[j + i]];
    store(v, load(v) + (scale ? load(scale + j, count) * load(dx + j) : load(dx + j)));
    for (int64_t i = 0; i < count; ++i) dy0[index[j + i]] = v[i];
  }
}

// dy0 of tokens [begin, end), and what they add to dT, [router_rows, router.width()] (a static router's: first in each
// row), and to dB; or else dz is given, and dB is not summed here.
template <class T>
void backward_tokens(const AdaptBackwardProblem& p, const Router& router, const Center& center, const T* given_dz,
                     int64_t begin, int64_t end, float* dT, float* dB) {
  const int64_t tokens = end - begin, k = p.x_clusters, n = k * p.r, width = padded(p.r), q = p.r / p.s,
                q_width = padded(q);
  const int64_t operands = given_dz ? 0 : tokens * p.s * q_width;
  const Center not_yet(k > 1 ? p.center : nullptr, p.r);  // else x is the sum, and centred
  const Buffer x(tokens * k * width), a(tokens * k), one(width), z(operands), parts(operands), dx(width);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const wide = x + t * k * width;
    widen_x(static_cast<const T*>(p.x) + (begin + t) * n, k, p.r, wide);
    route(wide, router, not_yet, k, width, a + t * k, one);
    if (given_dz)
      std::memcpy(static_cast<T*>(p.dy0) + (begin + t) * p.d,
                  static_cast<const T*>(p.dy) + (begin + t) * p.dy_stride, p.d * sizeof(T));
    else
      for (int64_t j = 0; j < p.s; ++j) pack<T>(one + j * q, 1, q, z + (t * p.s + j) * q_width);
  }
  if (!given_dz) multiply_dy<T>(p, begin, end, z, parts, dB);

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
    not_yet.apply_transposed(one);
    T* const dy0 = static_cast<T*>(p.dy0) + (begin + t) * p.d;
    auto scatter = [&](int64_t i) {
      scatter_cluster(dy0, p.index + i * p.r, p.r, dx, p.row_scale ? p.row_scale + i * p.r : nullptr);
    };
    for (int64_t i = 0; i < k; ++i) {
      const float* const x_i = x + (t * k + i) * width;
      float* const dT_i = dT + (p.router_rows == 1 ? 0 : i * router.width());
      Floats product{};
      for (int64_t j = 0; j < width; j += W) product += load(dz + j) * load(x_i + j);
      const float a_i = a[t * k + i];
      float da = sum(product), own = 0;  // dx_i = a_i dz + da T_i + own x_i
      if (router.bounded()) {
        const Weight weight(x_i, router);
        const float dt = da * (1 - weight.tanh) * (1 + weight.tanh);
        da = ROUTER_GAIN * dt * weight.inverse;
        own = -dt * weight.t * weight.inverse * weight.inverse / p.r;
      }
      if (router.constants()) {
        for (int64_t j = 0; j < width; j += W) store(dx + j, a_i * load(dz + j));
        *dT_i += da;
      } else {
        for (int64_t j = 0; j < width; j += W) {
          store(dx + j, a_i * load(dz + j) + da * load(router[i] + j) + own * load(x_i + j));
          store(dT_i + j, load(dT_i + j) + da * load(x_i + j));
        }
      }
      if (k == 1) center.apply_transposed(dx);
      scatter(i);
    }
    for (int64_t i = k; i < p.k; ++i) scatter(i);  // x was the sum: all have the same dx
  }
}

// Rows of n columns in `dtype`: to = scaling * the sum over all shares of `from`, whose rows have padded(n) columns.
inline void add_up(const Parallel& parallel, const float* from, int64_t shares, int64_t rows, int64_t n, float scaling,
                   Dtype dtype, void* to) {
  const int64_t width = padded(n);
  parallel_for(parallel, rows, shares * width, [&](int64_t begin, int64_t end) {
    const Buffer sums(width);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < width; j += W) {
        Floats sum{};
        for (int64_t i = 0; i < shares; ++i) sum += load(from + (i * rows + row) * width + j);
        store(sums + j, scaling * sum);
      }
      typed(dtype, to, [&](auto* narrow) {
        for_vectors(n, [&](int64_t j, auto load, auto store) { store(narrow + row * n + j, load(sums + j)); });
      });
    }
  });
}

template <class T>
void backward(const T*, const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel) {
  const Router router(p);
  const Center center(p.center, p.r);
  const int64_t ds = p.d / p.s, q = p.r / p.s, columns = router.constants() ? 1 : p.r;
  const int64_t tokens = tokens_per_share(p.N), shares = ceil_div(p.N, tokens);
  const int64_t dT_size = p.router_rows * router.width(), dB_size = dz ? 0 : ds * padded(q);
  const Buffer dT(shares * dT_size), dB(shares * dB_size);
  parallel_for(parallel, shares, tokens * (16 * p.k * p.r + (dz ? p.d : 2 * p.d * q)), [&](int64_t begin, int64_t end) {
    std::memset(dT + begin * dT_size, 0, (end - begin) * dT_size * sizeof(float));
    std::memset(dB + begin * dB_size, 0, (end - begin) * dB_size * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stop = smaller(p.N, (i + 1) * tokens);
      for (int64_t n = i * tokens; n < stop; n += TOKENS)
        backward_tokens(p, router, center, static_cast<const T*>(dz), n, smaller(stop, n + TOKENS), dT + i * dT_size,
                        dB + i * dB_size);
    }
  });
  add_up(parallel, dT, shares, p.router_rows, columns, 1, p.router_dtype, p.drouter);
  if (!dz) add_up(parallel, dB, shares, ds, q, p.scaling, p.B_dtype, p.dB);
}

inline void adapt_backward(const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel) {
  typed(p.dtype, p.dy, [&](const auto* dy) { backward(dy, p, dz, parallel); });
}

}  // namespace idlora::cpu::IDLORA_ISA
