// The passes of k-means over the rows of W, each row read once and in its own dtype.
//
// No result depends on the number of threads: every sum is made by one thread, in an order of its own. Threads take the
// next piece of work when they are free, so that one that is held up on a busy machine does not hold up the others.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "idlora/cpu.h"
#include "idlora/rows.h"

namespace idlora {
namespace {

#define IDLORA_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Vectors of L elements, in the compiler's notation.
template <int L>
struct Vectors;
#define IDLORA_VECTORS(L)                                        \
  template <>                                                    \
  struct Vectors<L> {                                            \
    typedef double Doubles __attribute__((vector_size(8 * L)));  \
    typedef float Floats __attribute__((vector_size(4 * L)));    \
    typedef uint32_t Words __attribute__((vector_size(4 * L)));  \
    typedef uint16_t Halves __attribute__((vector_size(2 * L))); \
  };
IDLORA_VECTORS(2)
IDLORA_VECTORS(4)
IDLORA_VECTORS(8)

// L elements as float64. By reference: vectors are no arguments where the instruction set lacks them.
template <int L>
struct Lanes : Vectors<L> {
  using typename Vectors<L>::Doubles;
  using typename Vectors<L>::Floats;
  using typename Vectors<L>::Words;
  using typename Vectors<L>::Halves;

  static IDLORA_INLINE void load(const double* p, Doubles& v) { std::memcpy(&v, p, sizeof v); }
  static IDLORA_INLINE void load(const float* p, Doubles& v) {
    Floats f;
    std::memcpy(&f, p, sizeof f);
    v = __builtin_convertvector(f, Doubles);
  }
  static IDLORA_INLINE void load(const bfloat16* p, Doubles& v) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    of_bits(__builtin_convertvector(h, Words) << 16, v);
  }
  static IDLORA_INLINE void load(const float16* p, Doubles& v) {  // 5 bits of exponent, biased by 15; float32 8 by 127
    Halves h;
    std::memcpy(&h, p, sizeof h);
    const Words bits = __builtin_convertvector(h, Words);
    const Words sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13, exponent = magnitude & (0x1fu << 23);
    const Words zero_or_subnormal = Words{} + (exponent == 0), special = Words{} + (exponent == (0x1fu << 23));
    of_bits(sign | (magnitude + (112u << 23) + (zero_or_subnormal & (1u << 23)) + (special & (112u << 23))), v);
    Doubles raised;
    of_bits(sign | (zero_or_subnormal & (113u << 23)), raised);
    v -= raised;
  }
  static IDLORA_INLINE void of_bits(const Words& bits, Doubles& v) {
    Floats f;
    std::memcpy(&f, &bits, sizeof f);
    v = __builtin_convertvector(f, Doubles);
  }
  // The first n <= L of them; zero behind.
  template <class T>
  static IDLORA_INLINE void load(const T* p, int64_t n, Doubles& v) {
    if (n >= L) return load(p, v);
    T copy[L] = {};
    std::memcpy(copy, p, n * sizeof(T));
    load(copy, v);
  }
  static IDLORA_INLINE double sum(const Doubles& v) {
    double total = 0;
    for (int l = 0; l < L; ++l) total += v[l];
    return total;
  }
};

constexpr int ROWS = 4;             // share what is loaded of the centroids
constexpr int CENTROIDS = 4;        // share what is loaded of the rows
constexpr int64_t COLUMNS = 512;    // of the sums, which one thread adds to
constexpr int64_t PIECE = 1 << 18;  // elements of W that are worth a thread

template <class T>
struct Typed {
  explicit Typed(const Rows& rows) : W(static_cast<const T*>(rows.W)), d_in(rows.d_in), stride(rows.stride) {}
  // Rows first, first + 1, ... but none beyond the last: it is read again, and what comes of that is not used.
  IDLORA_INLINE void point(int64_t first, int64_t last, const T* (&x)[ROWS]) const {
    for (int i = 0; i < ROWS; ++i) x[i] = W + std::min(first + i, last) * stride;
  }
  const T* W;
  int64_t d_in, stride;
};

template <int L, class T>
IDLORA_INLINE void squares_of(const Typed<T>& rows, int64_t begin, int64_t end, const double* origin, double* squares) {
  using V = Lanes<L>;
  for (int64_t first = begin; first < end; first += ROWS) {
    const T* x[ROWS];
    rows.point(first, end - 1, x);
    typename V::Doubles total[ROWS] = {};
    for (int64_t j = 0; j < rows.d_in; j += L) {
      typename V::Doubles o, v;
      V::load(origin + j, rows.d_in - j, o);
      for (int i = 0; i < ROWS; ++i) {
        V::load(x[i] + j, rows.d_in - j, v);
        v -= o;
        total[i] += v * v;
      }
    }
    for (int i = 0; i < ROWS && first + i < end; ++i) squares[first + i] = V::sum(total[i]);
  }
}

// products [valid, n] of the first rows x with the n <= C centroids from e on; k is the distance between its rows. What
// is computed beyond, up to [ROWS, C], is that of the last centroid again.
template <int L, int C, class T>
IDLORA_INLINE void products_of(const T* const (&x)[ROWS], int64_t d_in, const double* e, int64_t n, int64_t valid,
                               double* products, int64_t k) {
  using V = Lanes<L>;
  const double* centroid[C];
  for (int c = 0; c < C; ++c) centroid[c] = e + std::min<int64_t>(c, n - 1) * d_in;
  typename V::Doubles total[ROWS][C] = {};
  const int64_t whole = d_in - d_in % L;
  for (int64_t j = 0; j < whole; j += L) {
    typename V::Doubles v[ROWS], w;
    for (int i = 0; i < ROWS; ++i) V::load(x[i] + j, v[i]);
    for (int c = 0; c < C; ++c) {
      V::load(centroid[c] + j, w);
      for (int i = 0; i < ROWS; ++i) total[i][c] += v[i] * w;
    }
  }
  if (whole < d_in) {
    typename V::Doubles v[ROWS], w;
    for (int i = 0; i < ROWS; ++i) V::load(x[i] + whole, d_in - whole, v[i]);
    for (int c = 0; c < C; ++c) {
      V::load(centroid[c] + whole, d_in - whole, w);
      for (int i = 0; i < ROWS; ++i) total[i][c] += v[i] * w;
    }
  }
  for (int i = 0; i < valid; ++i)
    for (int c = 0; c < C && c < n; ++c) products[i * k + c] = V::sum(total[i][c]);
}

template <int L, class T>
IDLORA_INLINE void products_of(const Typed<T>& rows, int64_t begin, int64_t end, const double* e, int64_t k,
                               double* products) {
  for (int64_t first = begin; first < end; first += ROWS) {
    const T* x[ROWS];
    rows.point(first, end - 1, x);
    const int64_t valid = std::min<int64_t>(ROWS, end - first);
    for (int64_t c = 0; c < k; c += CENTROIDS) {
      const double* some = e + c * rows.d_in;
      double* to = products + first * k + c;
      if (k - c == 1)
        products_of<L, 1>(x, rows.d_in, some, 1, valid, to, k);
      else
        products_of<L, CENTROIDS>(x, rows.d_in, some, std::min<int64_t>(CENTROIDS, k - c), valid, to, k);
    }
  }
}

template <int L, class T>
IDLORA_INLINE void add_row(const T* x, double sign, int64_t n, double* sum) {
  using V = Lanes<L>;
  for (int64_t j = 0; j < n; j += L) {
    typename V::Doubles v, total;
    V::load(x + j, n - j, v);
    V::load(sum + j, n - j, total);
    total += sign * v;
    std::memcpy(sum + j, &total, std::min<int64_t>(L, n - j) * sizeof(double));
  }
}

template <int L, class T>
IDLORA_INLINE void move_columns(const Typed<T>& rows, int64_t d, int64_t begin, int64_t end, const int64_t* before,
                                const int64_t* after, double* sums) {
  for (int64_t i = 0; i < d; ++i) {
    if (before[i] == after[i]) continue;
    const T* x = rows.W + i * rows.stride + begin;
    if (before[i] >= 0) add_row<L>(x, -1, end - begin, sums + before[i] * rows.d_in + begin);
    if (after[i] >= 0) add_row<L>(x, 1, end - begin, sums + after[i] * rows.d_in + begin);
  }
}

// One set of passes for every instruction set. (Not by a lambda, which would not take over its caller's.)
struct Passes {
  void (*squares)(const Rows&, int64_t begin, int64_t end, const double* origin, double* squares);
  void (*products)(const Rows&, int64_t begin, int64_t end, const double* e, int64_t k, double* products);
  void (*move)(const Rows&, int64_t begin, int64_t end, const int64_t* before, const int64_t* after, double* sums);
};

#define IDLORA_FOR_ELEMENT(CALL)                                 \
  switch (rows.element) {                                        \
    case Element::float64: { using T = double; return CALL; }    \
    case Element::float32: { using T = float; return CALL; }     \
    case Element::float16: { using T = float16; return CALL; }   \
    case Element::bfloat16: { using T = bfloat16; return CALL; } \
  }
#define IDLORA_PASSES(NAME, L, TARGET)                                                                              \
  TARGET void squares_##NAME(const Rows& rows, int64_t begin, int64_t end, const double* origin, double* squares) { \
    IDLORA_FOR_ELEMENT((squares_of<L>(Typed<T>(rows), begin, end, origin, squares)))                                \
  }                                                                                                                 \
  TARGET void products_##NAME(const Rows& rows, int64_t begin, int64_t end, const double* e, int64_t k,             \
                              double* products) {                                                                   \
    IDLORA_FOR_ELEMENT((products_of<L>(Typed<T>(rows), begin, end, e, k, products)))                                \
  }                                                                                                                 \
  TARGET void move_##NAME(const Rows& rows, int64_t begin, int64_t end, const int64_t* before,                      \
                          const int64_t* after, double* sums) {                                                     \
    IDLORA_FOR_ELEMENT((move_columns<L>(Typed<T>(rows), rows.d, begin, end, before, after, sums)))                  \
  }                                                                                                                 \
  constexpr Passes NAME{squares_##NAME, products_##NAME, move_##NAME};

IDLORA_PASSES(baseline, 2, )
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
IDLORA_PASSES(avx2, 4, __attribute__((target("avx2,fma"))))
IDLORA_PASSES(avx512, 8, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))

const Passes& passes() {
  const std::string capability = cpu::capability();
  return capability == "avx512" ? avx512 : capability == "avx2" ? avx2 : baseline;
}
#else
const Passes& passes() { return baseline; }
#endif

// f(i) for i in [0, n).
template <class F>
void share(int64_t n, int threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < n;) f(i);
  };
  std::vector<std::thread> others;
  others.reserve(std::max(threads, 0));
  try {
    while (int64_t(others.size()) + 1 < std::min<int64_t>(threads, n)) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are do the work.
  }
  work();
  for (std::thread& thread : others) thread.join();
}

// f(begin, end) over pieces of the rows.
template <class F>
void share_rows(const Rows& rows, int threads, const F& f) {
  const int64_t piece = (std::max<int64_t>(1, PIECE / rows.d_in) + ROWS - 1) / ROWS * ROWS;
  share((rows.d + piece - 1) / piece, threads, [&](int64_t i) { f(i * piece, std::min(rows.d, (i + 1) * piece)); });
}

}  // namespace

void row_squares(const Rows& rows, const double* origin, double* squares, int threads) {
  share_rows(rows, threads, [&](int64_t begin, int64_t end) { passes().squares(rows, begin, end, origin, squares); });
}

void row_distances(const Rows& rows, const double* origin, const double* squares, const double* e, int64_t k, int bits,
                   double* distances, int threads) {
  std::vector<double> constant(k);  // 2 <origin, e> + |e|^2
  double farthest = 0;
  for (int64_t c = 0; c < k; ++c) {
    double product = 0, square = 0;
    for (int64_t j = 0; j < rows.d_in; ++j) {
      const double x = e[c * rows.d_in + j];
      product += origin[j] * x;
      square += x * x;
    }
    constant[c] = 2 * product + square;
    farthest = std::max(farthest, square);
  }
  share_rows(rows, threads, [&](int64_t begin, int64_t end) {
    passes().products(rows, begin, end, e, k, distances);
    for (int64_t i = begin; i < end; ++i) {
      int exponent;
      std::frexp(std::max(squares[i] + farthest, 1e-200), &exponent);
      const double grid = std::ldexp(1.0, exponent - bits);
      for (int64_t c = 0; c < k; ++c) {
        double& D = distances[i * k + c];
        D = std::max(std::nearbyint((squares[i] - 2 * D + constant[c]) / grid) * grid, 0.0);
      }
    }
  });
}

void move_rows(const Rows& rows, const int64_t* before, const int64_t* after, double* sums, int threads) {
  int64_t moved = 0;
  for (int64_t i = 0; i < rows.d; ++i) moved += before[i] != after[i];
  if (moved * rows.d_in < PIECE) threads = 1;
  share((rows.d_in + COLUMNS - 1) / COLUMNS, threads, [&](int64_t i) {
    passes().move(rows, i * COLUMNS, std::min(rows.d_in, (i + 1) * COLUMNS), before, after, sums);
  });
}

}  // namespace idlora
