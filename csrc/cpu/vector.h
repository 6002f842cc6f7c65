// Vectors of W floats, in the compiler's own notation, and how bfloat16 and float16 become floats and back.
#pragma once

#include "cpu/includes.h"

namespace idlora::cpu::IDLORA_ISA {

constexpr int W = IDLORA_WIDTH;

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t n) { return ceil_div(n, W) * W; }

inline Floats splat(float value) { return Floats{} + value; }
inline Words splat_bits(uint32_t value) { return Words{} + value; }

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- load and store, rounding to nearest even -----------------------------------------------------------------------

inline Words round_bfloat16(Floats v) {  // in the upper halves of the words; what is below them is undefined
  const Words bits = bit_cast<Words>(v);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : splat_bits(0x7fc00000);
}

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats load(const bfloat16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Floats>(__builtin_convertvector(half, Words) << 16);
}
inline void store(bfloat16* p, Floats v) {
  const Halves half = __builtin_convertvector(round_bfloat16(v) >> 16, Halves);
  std::memcpy(p, &half, sizeof half);
}

#if IDLORA_WIDTH == 16
inline Floats load(const float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif IDLORA_WIDTH == 8
inline Floats load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Float16 has 5 bits of exponent with a bias of 15, float32 8 with a bias of 127.
inline Floats load(const float16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  const Words bits = __builtin_convertvector(half, Words);
  const Words magnitude = (bits & 0x7fff) << 13, exponent = magnitude & (0x1fu << 23);
  const Words normal = magnitude + (112u << 23);
  const Words infinite = magnitude + (224u << 23);
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude + (113u << 23)) - 0x1p-14f);
  const Words result = exponent == (0x1fu << 23) ? infinite : exponent == 0 ? subnormal : normal;
  return bit_cast<Floats>(result | (bits & 0x8000) << 16);
}
inline void store(float16* p, Floats v) {
  const Words bits = bit_cast<Words>(v), magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Added to 0.5, the last bit of a float is that of a subnormal float16: the addition rounds.
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - (126u << 23);
  const Words special = magnitude > (0xffu << 23) ? splat_bits(0x7e00) : splat_bits(0x7c00);
  const Words result = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
  const Halves half = __builtin_convertvector(result | (bits >> 16 & 0x8000), Halves);
  std::memcpy(p, &half, sizeof half);
}
#endif

// The first n < W elements; zero behind them.
template <class T>
inline Floats load(const T* p, int64_t n) {
  T copy[W] = {};
  std::memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
template <class T>
inline void store(T* p, Floats v, int64_t n) {
  T copy[W];
  store(copy, v);
  std::memcpy(p, copy, n * sizeof(T));
}

// Calls f(i, load, store) for each vector of a row of n elements, the last one perhaps shorter, so that
// load(p + i) and store(p + i, v) touch nothing beyond the row.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    f(i, [](const auto* p) { return load(p); }, [](auto* p, Floats v) { store(p, v); });
  if (i < n)
    f(i, [=](const auto* p) { return load(p, n - i); }, [=](auto* p, Floats v) { store(p, v, n - i); });
}

// n elements as floats, and zeros behind them to a multiple of W.
template <class T>
inline void widen(const T* from, int64_t n, float* to) {
  for_vectors(n, [=](int64_t i, auto load, auto) { store(to + i, load(from + i)); });
}

// Asks for n elements that are read or written soon: what lies a row apart, no processor foresees.
template <class T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// Lanes of a, and from W on those of b, in the order given.
template <int... LANE>
inline Floats shuffle(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, LANE...);
#else
  return __builtin_shuffle(a, b, Ints{LANE...});
#endif
}

template <int HALF = W / 2, int... LANE>
inline float sum(Floats v, std::integer_sequence<int, LANE...> lanes) {
  if constexpr (HALF == 0)
    return v[0];
  else
    return sum<HALF / 2>(v + shuffle(v, v, std::integer_sequence<int, (LANE ^ HALF)...>{}), lanes);
}
inline float sum(Floats v) { return sum(v, std::make_integer_sequence<int, W>{}); }

// ---- which dtype a product runs in ----------------------------------------------------------------------------------

// Products with B run in the activation's dtype, those of float16 in float32: v as an operand of such a product.
template <class T>
inline Floats operand(Floats v) {
  return v;
}
template <>
inline Floats operand<bfloat16>(Floats v) {
  return bit_cast<Floats>(round_bfloat16(v) & 0xffff0000);
}

// Calls f with p as a pointer of the type that dtype says.
template <class F>
inline void typed(Dtype dtype, void* p, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(p));
    case Dtype::bfloat16: return f(static_cast<bfloat16*>(p));
    case Dtype::float16: return f(static_cast<float16*>(p));
  }
}
template <class F>
inline void typed(Dtype dtype, const void* p, const F& f) {
  typed(dtype, const_cast<void*>(p), [&](const auto* typed_p) { f(typed_p); });
}

// ---- memory and threads ---------------------------------------------------------------------------------------------

// n floats, the few of one token on the stack: aligned memory from the heap takes longer than a kernel has for a token.
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(n <= HERE ? here_ : static_cast<float*>(::operator new(n * sizeof(float), ALIGNMENT))) {}
  ~Buffer() {
    if (data_ != here_) ::operator delete(data_, ALIGNMENT);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data_; }

 private:
  static constexpr int64_t HERE = 1024;
  static constexpr std::align_val_t ALIGNMENT{64};
  alignas(64) float here_[HERE];
  float* data_;
};

// f(begin, end) over [0, n); `cost` is that of one step, in multiplications or so.
template <class F>
inline void parallel_for(const Parallel& parallel, int64_t n, int64_t cost, const F& f) {
  constexpr int64_t WORTH_A_THREAD = 1 << 17;
  const int64_t grain = larger(1, WORTH_A_THREAD / larger(1, cost));
  if (n <= 0) return;
  if (n <= grain || parallel.threads == 1) return f(0, n);
  parallel.run(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace idlora::cpu::IDLORA_ISA
