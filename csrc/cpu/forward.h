// cluster_gather, rb_scale, shared_gemm and the three in one, adapt.
#pragma once

#include "cpu/product.h"
#include "cpu/tokens.h"

namespace idlora::cpu::IDLORA_ISA {

constexpr int64_t GROUP_ROWS = 96;  // rows of the product, which are tokens' parts, between two walks through B

template <class T>
void gather_x(const T* y0, const GatherProblem& p, const Parallel& parallel) {
  const int64_t n = p.k * p.r;
  const Offset offset(p.bias, p.bias_dtype, p.index, n);
  parallel_for(parallel, p.N, 4 * n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += GROUP_ROWS)
      gather_tokens(y0, p.y0_stride, i, smaller(end, i + GROUP_ROWS), p.index, n, offset, p.row_scale,
                    static_cast<T*>(p.x) + i * n);
  });
}

template <class T>
void rb_scale_tokens(const T* x, const RbScaleProblem& p, const Parallel& parallel) {
  const Router router(p);
  const Center center(p.center, p.r);
  const int64_t width = padded(p.r);
  parallel_for(parallel, p.N, 4 * p.k * p.r, [&](int64_t begin, int64_t end) {
    const Buffer wide(p.k * width), a(p.k), z(width);
    for (int64_t n = begin; n < end; ++n) {
      widen_x(x + n * p.k * p.r, p.k, p.r, wide);
      route(wide, router, center, p.k, width, a, z);
      std::memcpy(p.z + n * p.r, z, p.r * sizeof(float));
    }
  });
}

// y = y0 + bias + scaling * sums, for n columns of one token; without sums, y0 + bias.
template <class T>
inline void finish(const T* y0, const float* bias, float scaling, const float* sums, int64_t n, T* y) {
  for_vectors(n, [=](int64_t i, auto load, auto store) {
    Floats v = load(y0 + i);
    if (bias) v += load(bias + i);
    if (sums) v += scaling * load(sums + i);
    store(y + i, v);
  });
}

// The z of tokens [begin, end) as operands of their product. Keeps x where p.x is.
template <class T>
void route_tokens(const AdaptProblem& p, const float* offset, const Router& router, const Center& center, int64_t begin,
                  int64_t end, float* z) {
  const int64_t n = p.k * p.r, width = padded(p.r);
  const bool keeps_sum = p.x && p.x_clusters == 1 && (p.k > 1 || center), keeps_x = p.x && !keeps_sum;
  const Buffer gathered(keeps_x ? 0 : (end - begin) * n), wide(p.k * width), a(p.k), routed(width);
  T* x = keeps_x ? static_cast<T*>(p.x) + begin * n : reinterpret_cast<T*>(static_cast<float*>(gathered));
  gather_tokens(static_cast<const T*>(p.y0), p.y0_stride, begin, end, p.index, n, offset, p.row_scale, x);
  for (int64_t i = begin; i < end; ++i, x += n, z += p.r) {
    widen_x(x, p.k, p.r, wide);
    if (keeps_sum) {
      add_clusters(wide, p.k, width, routed);
      center.apply(routed);
      for_vectors(p.r, [&](int64_t j, auto load, auto store) {
        store(static_cast<T*>(p.x) + i * p.r + j, load(routed + j));
      });
    }
    route(wide, router, center, p.k, width, a, routed);
    for_vectors(p.r, [=, &routed](int64_t j, auto, auto store) { store(z + j, operand<T>(load(routed + j))); });
  }
}

// Blocks of TILE_COLUMNS rows of B, of which each gives columns of y in all s parts.
inline int64_t blocks_of(const SharedGemmProblem& p) { return ceil_div(p.d / p.s, TILE_COLUMNS); }

template <class T>
void pack_block(const SharedGemmProblem& p, int64_t block, float* panel) {
  const int64_t q = p.r / p.s, c = block * TILE_COLUMNS;
  typed(p.B_dtype, p.B, [&](const auto* B) {
    pack_transposed<T>(B + c * q, smaller(TILE_COLUMNS, p.d / p.s - c), q, panel);
  });
}

// y of tokens [begin, end) in the columns that a block gives. z: operands, [end - begin, r].
template <class T>
void multiply_block(const SharedGemmProblem& p, const float* bias, int64_t begin, int64_t end, const float* z,
                    int64_t block, const float* panel) {
  const int64_t ds = p.d / p.s, q = p.r / p.s, parts = (end - begin) * p.s;
  const int64_t c = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, ds - c);
  alignas(64) float sums[TILE_ROWS * TILE_COLUMNS];
  for (int64_t part = 0; part < parts; part += TILE_ROWS) {
    const int64_t rows = smaller(TILE_ROWS, parts - part);
    const T* y0[TILE_ROWS];
    T* y[TILE_ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = begin + (part + i) / p.s, at = (part + i) % p.s * ds + c;
      y0[i] = static_cast<const T*>(p.y0) + n * p.y0_stride + at;
      y[i] = static_cast<T*>(p.y) + n * p.d + at;
      prefetch(y0[i], columns);
      prefetch(y[i], columns);
    }
    multiply(rows, padded(columns), q, z + part * q, q, 1, panel, TILE_COLUMNS, sums, TILE_COLUMNS, false);
    for (int64_t i = 0; i < rows; ++i) {
      const float* const added = bias ? bias + (part + i) % p.s * ds + c : nullptr;
      finish(y0[i], added, p.scaling, sums + i * TILE_COLUMNS, columns, y[i]);
    }
  }
}

// y = y0 + bias + scaling * z B^T. prepare(begin, end, z) writes the operands of these tokens, [end - begin, r].
// Many tokens: each thread takes some and goes through B for a few at a time, whose y0 stays in the cache from
// `prepare` to the end. Few: all are prepared first, then each thread takes a part of B.
template <class T, class Prepare>
void multiply_tokens(const SharedGemmProblem& p, const float* bias, const Parallel& parallel, const Prepare& prepare) {
  const int64_t q = p.r / p.s, blocks = blocks_of(p), panel_size = q * TILE_COLUMNS;
  if (p.N >= 32 * parallel.threads) {
    const Buffer panels(blocks * panel_size);
    parallel_for(parallel, blocks, 2 * panel_size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pack_block<T>(p, i, panels + i * panel_size);
    });
    parallel_for(parallel, p.N, p.d * q, [&](int64_t begin, int64_t end) {
      const int64_t group = larger(1, GROUP_ROWS / p.s);
      const Buffer z(group * p.r);
      for (int64_t n = begin; n < end; n += group) {
        const int64_t stop = smaller(end, n + group);
        prepare(n, stop, z);
        for (int64_t i = 0; i < blocks; ++i) multiply_block<T>(p, bias, n, stop, z, i, panels + i * panel_size);
      }
    });
  } else {
    const Buffer z(p.N * p.r);
    parallel_for(parallel, p.N, 8 * p.r, [&](int64_t begin, int64_t end) { prepare(begin, end, z + begin * p.r); });
    parallel_for(parallel, blocks, (p.N * p.s + 2) * panel_size, [&](int64_t first, int64_t last) {
      const Buffer panel(panel_size);
      for (int64_t i = first; i < last; ++i) {
        pack_block<T>(p, i, panel);
        multiply_block<T>(p, bias, 0, p.N, z, i, panel);
      }
    });
  }
}

template <class T>
void shared_gemm_tokens(const T* y0, const SharedGemmProblem& p, bool product, const Parallel& parallel) {
  const Bias bias(p.bias, p.bias_dtype, p.d);
  if (product)
    return multiply_tokens<T>(p, bias, parallel, [&](int64_t begin, int64_t end, float* z) {
      for_vectors((end - begin) * p.r, [&](int64_t i, auto load, auto store) {
        store(z + i, operand<T>(load(p.z + begin * p.r + i)));
      });
    });
  parallel_for(parallel, p.N, p.d, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      finish(y0 + n * p.y0_stride, bias, 0, nullptr, p.d, static_cast<T*>(p.y) + n * p.d);
  });
}

template <class T>
void adapt_tokens(const T* y0, const AdaptProblem& p, float* z, const Parallel& parallel) {
  const Bias added(p.bias_in_y0 ? nullptr : p.bias, p.bias_dtype, p.d);
  const Offset offset(p.bias_in_y0 ? p.bias : nullptr, p.bias_dtype, p.index, p.k * p.r);
  const Router router(p);
  const Center center(p.center, p.r);
  if (!z) {
    SharedGemmProblem product{};
    product.N = p.N, product.d = p.d, product.r = p.r, product.s = p.s, product.y0_stride = p.y0_stride;
    product.y0 = p.y0, product.B = p.B, product.y = p.y, product.scaling = p.scaling, product.B_dtype = p.B_dtype;
    return multiply_tokens<T>(product, added, parallel, [&](int64_t begin, int64_t end, float* operands) {
      route_tokens<T>(p, offset, router, center, begin, end, operands);
    });
  }
  parallel_for(parallel, p.N, 8 * p.k * p.r + p.d, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      route_tokens<T>(p, offset, router, center, n, n + 1, z + n * p.r);
      finish(y0 + n * p.y0_stride, added, 0, nullptr, p.d, static_cast<T*>(p.y) + n * p.d);
    }
  });
}

inline void cluster_gather(const GatherProblem& p, const Parallel& parallel) {
  typed(p.dtype, p.y0, [&](const auto* y0) { gather_x(y0, p, parallel); });
}
inline void rb_scale(const RbScaleProblem& p, const Parallel& parallel) {
  typed(p.dtype, p.x, [&](const auto* x) { rb_scale_tokens(x, p, parallel); });
}
inline void shared_gemm(const SharedGemmProblem& p, bool product, const Parallel& parallel) {
  typed(p.dtype, p.y0, [&](const auto* y0) { shared_gemm_tokens(y0, p, product, parallel); });
}
inline void adapt(const AdaptProblem& p, float* z, const Parallel& parallel) {
  typed(p.dtype, p.y0, [&](const auto* y0) { adapt_tokens(y0, p, z, parallel); });
}

}  // namespace idlora::cpu::IDLORA_ISA
