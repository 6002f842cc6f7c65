// Tensor-core building blocks: 16-bit pairs, mma.sync m16n8k16, ldmatrix, cp.async, and the product with B that adapt,
// adapt_decode and shared_gemm have in common. sm_80 and later.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace idlora::cuda {

// ---- pairs of 16-bit numbers in a register ---------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t v) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<const __half2&>(v));
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// Eight numbers of type S as eight of type T.
template <class T, class S>
__device__ __forceinline__ uint4 load8(const S* p) {
  if constexpr (std::is_same_v<T, S>) {
    return __ldg(reinterpret_cast<const uint4*>(p));
  } else {
    const float4 u = __ldg(reinterpret_cast<const float4*>(p)), v = __ldg(reinterpret_cast<const float4*>(p) + 1);
    return make_uint4(pack<T>(u.x, u.y), pack<T>(u.z, u.w), pack<T>(v.x, v.y), pack<T>(v.z, v.w));
  }
}

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// ---- instructions ----------------------------------------------------------------------------------------------------

// c [16, 8] += a [16, 16] b [16, 8]. Thread (g, t) = (lane / 4, lane % 4) holds c[g + {0, 8}][2t + {0, 1}],
// a[g + {0, 8}][2t + {0, 1} + {0, 8}] and b[2t + {0, 1} + {0, 8}][g].
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices; lanes 8i .. 8i + 7 point at the rows of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}

// BYTES from global to shared memory in the background; where not valid, zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `pending` groups of this thread are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Rows [token][columns], whole sectors: each lane holds 16 neighbours of its token (two times 8, packed), and a pair of
// lanes writes them. `valid` says of each 8 whether they are columns at all.
template <class T>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, const uint32_t (&own)[2][4], bool valid0, bool valid1,
                                           int tokens) {
  const int half = threadIdx.x % 2;
#pragma unroll
  for (int n = 0; n < 32; n += 16) {
    const int token = n + threadIdx.x % 32 / 2;
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t lo = __shfl_sync(~0u, own[0][i], token), hi = __shfl_sync(~0u, own[1][i], token);
      v[i] = half ? hi : lo;
    }
    if (token < tokens && (half ? valid1 : valid0))
      __stcg(reinterpret_cast<uint4*>(out + token * stride + 8 * half), make_uint4(v[0], v[1], v[2], v[3]));
  }
}

// ---- y = y0 + bias + scaling * concat_j(z^(j) B^T) -------------------------------------------------------------------
//
// A warp makes 32 columns of every part of y, for all tokens of the block: B goes from L2 straight to the registers where
// mma wants it, once a block, and needs no shared memory. Two permutations make every access 16 bytes a thread and whole
// sectors:
//   columns  tile m of 8 columns takes columns 8 (n / 2) + 2m + n % 2 of the 32, so thread (g, t) ends up with the eight
//            neighbours 8t .. 8t + 7 of y;
//   inner    within 32 entries of z and B, thread t owns 8t .. 8t + 7. B is read like that; z is stored like that:
//            entry 8t + 2m + e lies at 8m + 2t + e (`slot`), where ldmatrix hands it to thread t.

constexpr int INNER = 32;     // entries of z that one 16-byte load of B serves
constexpr int COLUMNS = 32;   // columns of B a warp works on
constexpr int ROWS = 16;      // tokens of one mma
constexpr int MAX_CHUNKS = 4;  // q <= 128: beyond, B no longer fits the registers

// Entries of z a part of length q takes in shared memory, zeros behind q: no branch in the inner loop.
__host__ __device__ constexpr int padded(int q) { return q <= 2 * INNER ? 2 * INNER : MAX_CHUNKS * INNER; }
// Elements between rows of z in shared memory: an odd number of 16-byte units, so that eight rows touch all banks.
__host__ __device__ constexpr int z_stride(int s, int q) { return s * padded(q) + 8; }
__device__ __forceinline__ int slot(int i) { return i / INNER * INNER + (i / 2 % 4) * 8 + (i / 8 % 4) * 2 + i % 2; }

// What a block works on: tokens [first, first + tokens), and of the groups of COLUMNS columns a share, which begins for
// this warp at `group` and ends at `end`. Blocks of one tile of tokens run at the same time and meet in L2.
struct Share {
  int split, tokens, group, end;
  int64_t first;
};

template <int TOKENS>
__device__ __forceinline__ Share share_of_block(int64_t N, int ds, int splits) {
  Share own;
  own.split = blockIdx.x % splits;
  own.first = static_cast<int64_t>(blockIdx.x / splits) * TOKENS;
  own.tokens = static_cast<int>(min(static_cast<int64_t>(TOKENS), N - own.first));
  const int groups = (ds + COLUMNS - 1) / COLUMNS, share = (groups + splits - 1) / splits;
  own.group = own.split * share + static_cast<int>(threadIdx.x / 32);
  own.end = min(groups, (own.split + 1) * share);
  return own;
}

// The router in shared memory, as floats, and the center, if there is one: ubar, then w.
template <class Problem>
__device__ __forceinline__ void load_router(const Problem& p, float* to, float* ubar) {
  for (int i = threadIdx.x; i < router_size(p); i += blockDim.x) to[i] = load_as_float(p.router, p.router_dtype, i);
  for (int i = threadIdx.x; p.center && i < 2 * p.r; i += blockDim.x) ubar[i] = __ldg(p.center + i);
}

template <class Problem>
__host__ __device__ __forceinline__ size_t center_bytes(const Problem& p) {
  return p.center ? 2 * p.r * sizeof(float) : 0;
}

// u less along * ubar, of two neighbouring positions.
__device__ __forceinline__ void subtract(float2& u, float along, const float* ubar) {
  const float2 direction = *reinterpret_cast<const float2*>(ubar);
  u.x = fmaf(-along, direction.x, u.x), u.y = fmaf(-along, direction.y, u.y);
}

// z is quadratic in the activation and may leave float16's range: there it is divided by a power of two of its size.
__device__ __forceinline__ float power_of_two_above(float size, float least = -120, float most = 120) {
  return exp2f(fminf(fmaxf(ceilf(log2f(size)), least), most));
}

// What a center adds to that size, at most, for each <w, u>: with |u| <= size * MOST, |P u| <= (size + that) * MOST.
__device__ __forceinline__ float size_of_center(const float* ubar, int r) {
  constexpr float MOST = 65504;  // of float16
  float largest = 0;
  for (int i = threadIdx.x % 32; i < r; i += 32) largest = fmaxf(largest, fabsf(ubar[i]));
#pragma unroll
  for (int o = 16; o; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  return largest / MOST;
}

template <class T>
struct Epilogue {
  const T* y0;
  T* y;
  const void* bias;  // null: none is added
  int64_t N, d, y0_stride;
  float scaling;
  int ds, q, s;
  Dtype bias_dtype;

  // `added`: the bias, unless y0 contains it.
  template <class Problem>
  __device__ __forceinline__ Epilogue(const Problem& p, const void* added)
      : y0(static_cast<const T*>(p.y0)), y(static_cast<T*>(p.y)), bias(added), N(p.N), d(p.d), y0_stride(p.y0_stride),
        scaling(p.scaling), ds(p.d / p.s), q(p.r / p.s), s(p.s), bias_dtype(p.bias_dtype) {}
};

template <class T, class BT, int CHUNKS>
struct BColumns {
  uint4 v[CHUNKS][4];

  __device__ __forceinline__ void load(const void* B, int ds, int q, int group) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < CHUNKS; ++h)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int c = group * COLUMNS + 8 * (g / 2) + 2 * m + g % 2, i = h * INNER + 8 * t;
        v[h][m] = c < ds && i < q ? load8<T>(static_cast<const BT*>(B) + static_cast<int64_t>(c) * q + i)
                                  : make_uint4(0, 0, 0, 0);
      }
  }
};

// Adds what the mma gave to eight neighbours of y0.
template <class T>
__device__ __forceinline__ uint4 add8(const uint4& y0, const float (&bias)[8], float scaling, const float (&c)[4][4],
                                      int row) {
  uint32_t out[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float2 v = unpack<T>(word(y0, m));
    out[m] = pack<T>(fmaf(scaling, c[m][2 * row], v.x + bias[2 * m]),
                     fmaf(scaling, c[m][2 * row + 1], v.y + bias[2 * m + 1]));
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// z: [tokens rounded up to 16][z_stride] in shared memory; z_scale [tokens] (float16 only): y gets z * z_scale.
// `columns` holds the B of this warp's first group.
template <class T, class BT, int CHUNKS>
__device__ __forceinline__ void multiply_and_store(const Epilogue<T>& e, BColumns<T, BT, CHUNKS>& columns, const void* B,
                                                   const T* z, const float* z_scale, const Share& own, int warps) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride = e.s * CHUNKS * INNER + 8;
  const T* const z_lane = z + (lane % 16) * stride + lane / 16 * 8;
  const int tokens = own.tokens;
  for (int group = own.group; group < own.end; group += warps) {
    const int64_t column = group * COLUMNS + 8 * t;
    const bool inside = column < e.ds;
    const T* const y0 = e.y0 + (own.first + g) * e.y0_stride + column;
    T* y = e.y + (own.first + g) * e.d + column;
    // Tiles of 16 rows (part j, tokens n ..), the next two of them always on their way.
    const T* from = y0;
    int n_from = 0, j_from = 0;
    auto load = [&](uint4 (&rows)[2]) {
      if (inside && j_from < e.s) {
        if (n_from + g < tokens) rows[0] = __ldcs(reinterpret_cast<const uint4*>(from));
        if (n_from + g + 8 < tokens) rows[1] = __ldcs(reinterpret_cast<const uint4*>(from + 8 * e.y0_stride));
      }
      from += ROWS * e.y0_stride;
      if ((n_from += ROWS) >= tokens) n_from = 0, from = y0 + ++j_from * static_cast<int64_t>(e.ds);
    };
    uint4 next[2] = {}, after[2] = {};
    load(next);
    load(after);
    for (int j = 0; j < e.s; ++j, y += e.ds) {
      float bias[8] = {};
      if (e.bias && inside)
#pragma unroll
        for (int c = 0; c < 8; ++c) bias[c] = load_as_float(e.bias, e.bias_dtype, j * e.ds + column + c);
      const T* z_row = z_lane + j * CHUNKS * INNER;
      T* to = y;
      for (int n = 0; n < tokens; n += ROWS, z_row += ROWS * stride, to += ROWS * e.d) {
        const uint4 now[2] = {next[0], next[1]};
        next[0] = after[0], next[1] = after[1];
        load(after);
        float c[4][4] = {};
#pragma unroll
        for (int h = 0; h < CHUNKS; ++h)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t a[4];
            ldmatrix(a, z_row + h * INNER + half * 16);
#pragma unroll
            for (int m = 0; m < 4; ++m)
              mma<T>(c[m], a, word(columns.v[h][m], 2 * half), word(columns.v[h][m], 2 * half + 1));
          }
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (const int row = n + g + 8 * half; inside && row < tokens) {
            const float scaling = std::is_same_v<T, __half> ? e.scaling * z_scale[row] : e.scaling;
            __stcs(reinterpret_cast<uint4*>(to + 8 * half * e.d), add8<T>(now[half], bias, scaling, c, half));
          }
      }
    }
    if (group + warps < own.end) columns.load(B, e.ds, e.q, group + warps);
  }
}

// ---- host ------------------------------------------------------------------------------------------------------------

// Byte offsets into dynamic shared memory, each a multiple of 16.
struct SharedLayout {
  int bytes = 0;

  __host__ __device__ int take(size_t size) {
    const int offset = bytes;
    bytes += static_cast<int>(round_up(size, 16));
    return offset;
  }
  // For what is never needed at the same time.
  __host__ __device__ int take_larger(size_t u, size_t v) { return take(u > v ? u : v); }
};

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What every tensor-core kernel asks of a problem: rows that start on 16 bytes, parts that are multiples of 16 bytes.
inline bool fits_tensor_cores(Dtype dtype, int64_t d, int64_t r, int64_t s, int64_t stride, const void* in,
                              const void* out, const void* B) {
  return dtype != Dtype::float32 && current_device().arch >= 80 && d / s % 8 == 0 && r / s % 8 == 0 &&
         r / s <= MAX_CHUNKS * INNER && stride % 8 == 0 && aligned(in) && aligned(out) && aligned(B);
}

template <class Problem>
int64_t B_bytes(const Problem& p) {
  return p.d / p.s * (p.r / p.s) * (p.B_dtype == Dtype::float32 ? 4 : 2);
}

// How many blocks share the columns of a tile of tokens. Each of them gathers all of the tile's x, so more blocks fill
// more SMs and cost more L2 traffic. An SM takes at most 64 bytes a clock, L2 gives about 24 for each SM; taken are the
// fewest blocks whose time by that model is at most `tolerance` times the best.
inline int column_splits(int64_t tiles, int64_t shared_bytes, int64_t split_bytes, int64_t most, double tolerance) {
  const double sms = current_device().sms;
  auto clocks = [&](int64_t splits) {
    const double block = shared_bytes + static_cast<double>(split_bytes) / splits, blocks = tiles * splits;
    return std::max(block * ceil_div(tiles * splits, static_cast<int64_t>(sms)) / 64, block * blocks / (24 * sms));
  };
  double best = clocks(1);
  for (int64_t splits = 2; splits <= most; ++splits) best = std::min(best, clocks(splits));
  int64_t splits = 1;
  while (clocks(splits) > tolerance * best) ++splits;
  return static_cast<int>(splits);
}

// Calls f with the types of activation and B, and how many 32-entry pieces of B's rows the kernel has registers for.
template <class F>
const char* with_tensor_types(Dtype dtype, Dtype B_dtype, int64_t q, F&& f) {
  auto with_chunks = [&](auto t, auto b) {
    return q <= 2 * INNER ? f(t, b, std::integral_constant<int, 2>{}) : f(t, b, std::integral_constant<int, 4>{});
  };
  auto with_B = [&](auto t) { return B_dtype == Dtype::float32 ? with_chunks(t, float{}) : with_chunks(t, t); };
  return dtype == Dtype::float16 ? with_B(__half{}) : with_B(__nv_bfloat16{});
}

}  // namespace idlora::cuda
