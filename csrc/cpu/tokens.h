// Of tokens: the gather and the routed sum.
#pragma once

#include "cpu/vector.h"

namespace idlora::cpu::IDLORA_ISA {

// The router as floats, [rows, padded(r)] with zeros behind each row; a static one's constants, each a row of its own.
class Router {
 public:
  template <class Problem>
  explicit Router(const Problem& p)
      : form_(p.router_form), shared_(p.router_rows == 1), r_(p.r), width_(padded(constants() ? 1 : p.r)),
        floats_(p.router_rows * width_) {
    const int64_t columns = constants() ? 1 : p.r;
    typed(p.router_dtype, p.router, [&](const auto* T) {
      for (int64_t i = 0; i < p.router_rows; ++i) widen(T + i * columns, columns, floats_ + i * width_);
    });
  }
  bool constants() const { return form_ == RouterForm::constants; }
  bool bounded() const { return form_ == RouterForm::bounded; }
  int64_t r() const { return r_; }
  int64_t width() const { return width_; }
  const float* operator[](int64_t i) const { return floats_ + (shared_ ? 0 : i * width_); }

 private:
  RouterForm form_;
  bool shared_;
  int64_t r_, width_;
  Buffer floats_;
};

// The bias as floats, or null.
class Bias {
 public:
  Bias(const void* bias, Dtype dtype, int64_t d)
      : copied_(bias && dtype != Dtype::float32), copy_(copied_ ? d : 0),
        floats_(copied_ ? copy_ : static_cast<const float*>(bias)) {
    if (copied_) typed(dtype, bias, [&](const auto* b) { widen(b, d, copy_); });
  }
  operator const float*() const { return floats_; }

 private:
  bool copied_;
  Buffer copy_;
  const float* floats_;
};

// What is subtracted from the columns that are gathered, bias[index] as floats, or null.
class Offset {
 public:
  Offset(const void* bias, Dtype dtype, const int32_t* index, int64_t n) : given_(bias), floats_(bias ? n : 0) {
    if (bias) typed(dtype, bias, [&](const auto* b) { take(b, index, n); });
  }
  operator const float*() const { return given_ ? static_cast<const float*>(floats_) : nullptr; }

 private:
  template <class T>
  void take(const T* bias, const int32_t* index, int64_t n) {
    const Buffer memory(n);
    T* const gathered = reinterpret_cast<T*>(static_cast<float*>(memory));
    for (int64_t i = 0; i < n; ++i) gathered[i] = bias[index[i]];
    widen(gathered, n, floats_);
  }

  bool given_;
  Buffer floats_;
};

// P v = v - ubar <w, v> and P^T v = v - w <ubar, v>, for v of padded(r) floats with zeros behind r; or v as it is.
class Center {
 public:
  Center(const float* center, int64_t r) : given_(center), width_(padded(r)), rows_(center ? 2 * width_ : 0) {
    for (int64_t i = 0; center && i < 2; ++i) widen(center + i * r, r, rows_ + i * width_);
  }
  explicit operator bool() const { return given_; }
  void apply(float* v) const { subtract(v, rows_, rows_ + width_); }
  void apply_transposed(float* v) const { subtract(v, rows_ + width_, rows_); }

 private:
  void subtract(float* v, const float* direction, const float* weights) const {
    if (!given_) return;
    Floats product{};
    for (int64_t j = 0; j < width_; j += W) product += load(weights + j) * load(v + j);
    const float size = sum(product);
    for (int64_t j = 0; j < width_; j += W) store(v + j, load(v + j) - size * load(direction + j));
  }

  bool given_;
  int64_t width_;
  Buffer rows_;
};

// x of one token as floats, [k, padded(r)].
template <class T>
inline void widen_x(const T* x, int64_t k, int64_t r, float* wide) {
  for (int64_t i = 0; i < k; ++i) widen(x + i * r, r, wide + i * padded(r));
}

// x_i = y0[index_i] of one token. `next` is y0 of the token that follows: no processor foresees what is gathered there.
template <class T>
inline void gather(const T* y0, const T* next, const int32_t* index, int64_t n, T* x) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) {
    x[i] = y0[index[i]];
    __builtin_prefetch(next + index[i]);
  }
}

// Likewise of tokens [begin, end), less an offset [n] and times a scale [n] if there is one, rounded to T as it is kept.
// Of all tokens first what is gathered: a vector that was just written in single elements has to wait for them.
template <class T>
inline void gather_tokens(const T* y0, int64_t stride, int64_t begin, int64_t end, const int32_t* index, int64_t n,
                          const float* offset, const float* scale, T* x) {
  for (int64_t i = begin; i < end; ++i) {
    const T* const row = y0 + i * stride;
    gather(row, i + 1 < end ? row + stride : row, index, n, x + (i - begin) * n);
  }
  if (!offset && !scale) return;
  for (int64_t i = begin; i < end; ++i, x += n)
    for_vectors(n, [=](int64_t j, auto load, auto store) {
      Floats v = load(x + j);
      if (offset) v -= load(offset + j);
      if (scale) v *= load(scale + j);
      store(x + j, v);
    });
}

// A bounded router's weight for u, [padded(r)] with zeros behind r, and what its gradient needs.
struct Weight {
  float inverse, t, tanh;  // 1 / rms(u), 4 <T, u> / rms(u)

  Weight(const float* u, const Router& router) {
    Floats product{}, square{};
    for (int64_t j = 0; j < router.width(); j += W) {
      const Floats v = load(u + j);
      product += load(router[0] + j) * v;
      square += v * v;
    }
    inverse = 1 / __builtin_sqrtf(sum(square) / router.r() + TINY_SQUARE);
    t = ROUTER_GAIN * inverse * sum(product);
    tanh = __builtin_tanhf(t);
  }
};

// u = sum_i x_i; x is [k, width] with zeros behind r, width = padded(r).
inline void add_clusters(const float* x, int64_t k, int64_t width, float* u) {
  for (int64_t j = 0; j < width; j += W) {
    Floats sum = load(x + j);
    for (int64_t i = 1; i < k; ++i) sum += load(x + i * width + j);
    store(u + j, sum);
  }
}

// a_i = <T_i, x_i>, z = sum_i a_i x_i; x as above.
inline void route(const float* x, const Router& router, const Center& center, int64_t k, int64_t width, float* a,
                  float* z) {
  if (router.bounded()) {
    add_clusters(x, k, width, z);
    center.apply(z);
    const float weight = 1 + Weight(z, router).tanh;
    for (int64_t i = 0; i < k; ++i) a[i] = weight;
    for (int64_t j = 0; j < width; j += W) store(z + j, weight * load(z + j));
    return;
  }
  for (int64_t i = 0; i < k; ++i) {
    const float* const T = router[i];
    if (router.constants()) {
      a[i] = *T;
      continue;
    }
    Floats product{};
    for (int64_t j = 0; j < width; j += W) product += load(T + j) * load(x + i * width + j);
    a[i] = sum(product);
  }
  for (int64_t j = 0; j < width; j += W) {
    Floats routed{};
    for (int64_t i = 0; i < k; ++i) routed += a[i] * load(x + i * width + j);
    store(z + j, routed);
  }
  center.apply(z);
}

}  // namespace idlora::cpu::IDLORA_ISA
