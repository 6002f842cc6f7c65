// adapt_backward for any shape, dtype and architecture, in float32 arithmetic. Three launches, sums in a fixed order:
//   1. dz = scaling B^T dy, a partial sum for each share of the columns where rows are few; other blocks make z;
//   2. by chunks of tokens: dB, a partial sum a chunk; other blocks copy dy to dy0, which finds dy in L2, make da_i and
//      dy0[index_i] += a_i dz + da_i T_i, and a partial sum of dT for each 32 tokens;
//   3. the partial sums of dB and dT added up.
#include <algorithm>
#include <type_traits>

#include "plain.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

using namespace plain;

constexpr int TOKENS = 32;  // of a block that works token by token

struct Plan {
  int splits;               // of the columns, for dz
  int chunks;               // of the tokens, for dB
  int64_t tokens_a_chunk;   // a multiple of TOKENS
  float* z;                 // [N, r]
  float* dz;                // [splits, N, r]
  float* da;                // [N, x_clusters]
  float* dB;                // [chunks, q, ds], without scaling
  float* dT;                // [tokens / TOKENS, entries of the router]
  size_t bytes;             // of the workspace
};

struct alignas(16) Shared {
  float A[INNER * A_STRIDE], B[INNER * B_STRIDE];
};

// c += A B over the inner entries [begin, end). Warps without a row of A (`idle`) only help to load.
template <class TileA, class TileB, class LoadA, class LoadB>
__device__ __forceinline__ void accumulate(float (&c)[8][4], Shared& shared, int begin, int end, bool idle,
                                           LoadA&& load_A, LoadB&& load_B) {
  TileA A;
  TileB B;
  auto load = [&](int i0) {
    A.load([&](int outer, int inner) { return load_A(outer, i0 + inner); });
    B.load([&](int outer, int inner) { return load_B(outer, i0 + inner); });
  };
  if (begin < end) load(begin);
  for (int i0 = begin; i0 < end; i0 += INNER) {
    __syncthreads();
    A.store(shared.A, A_STRIDE);
    B.store(shared.B, B_STRIDE);
    __syncthreads();
    if (i0 + INNER < end) load(i0 + INNER);
    if (!idle) multiply<4>(c, shared.A + 8 * warp(), A_STRIDE, shared.B, min(INNER, end - i0));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) plain_dz_kernel(const AdaptBackwardProblem p, const Plan plan,
                                                              const int64_t product_blocks) {
  __shared__ Shared shared;
  __shared__ int64_t dy_of[COLUMNS];  // where a row starts in dy
  const int k = p.x_clusters, r = p.r, s = p.s, q = r / s, ds = p.d / s;
  if (blockIdx.x >= product_blocks) {
    const int64_t begin = (blockIdx.x - product_blocks) * TOKENS, end = min(p.N, begin + TOKENS);
    for (int64_t n = begin + warp(); n < end; n += WARPS) {
      const T* const x = static_cast<const T*>(p.x) + n * k * r;
      float* const z = plan.z + n * r;
      route<T>(
          p, k > 1 ? p.center : nullptr, k, [&](int e) { return to_float(__ldg(x + e)); },  // else x is centred
          [&](int e, float value, bool first) { z[e] = first ? value : z[e] + value; });
    }
    return;
  }

  // dz^T, a tile of it: 64 entries of q by 128 rows (token, part).
  const int q_tiles = (q + A_ROWS - 1) / A_ROWS, q0 = blockIdx.x % q_tiles * A_ROWS;
  const int split = blockIdx.x / q_tiles % plan.splits;
  const int64_t first_row = blockIdx.x / q_tiles / plan.splits * static_cast<int64_t>(COLUMNS);
  const int rows = static_cast<int>(min(static_cast<int64_t>(COLUMNS), p.N * s - first_row));
  if (threadIdx.x < rows) {
    const int part = static_cast<int>(first_row % s) + threadIdx.x;
    dy_of[threadIdx.x] = (first_row / s + part / s) * p.dy_stride + part % s * ds;
  }
  __syncthreads();
  const T* const dy = static_cast<const T*>(p.dy);
  const int share = ((ds + INNER - 1) / INNER + plan.splits - 1) / plan.splits * INNER;
  const int begin = split * share, end = min(ds, begin + share);
  float sum[8][4] = {};
  auto load_dy = [&](int row, int c) { return row < rows && c < end ? __ldg(dy + dy_of[row] + c) : from_float<T>(0); };
  typed<T>(p.B, p.B_dtype, [&](auto B) {
    using BT = std::remove_const_t<std::remove_pointer_t<decltype(B)>>;
    auto load_B = [&](int i, int c) {
      return c < end && q0 + i < q ? __ldg(B + (static_cast<int64_t>(c) * q + q0 + i)) : from_float<BT>(0);
    };
    accumulate<Tile<BT, A_ROWS, false>, Tile<T, COLUMNS, true>>(sum, shared, begin, end, q0 + 8 * warp() >= q, load_B,
                                                                load_dy);
  });

  const int i0 = q0 + 8 * warp();
#pragma unroll
  for (int u = 0; u < 4; ++u)
    if (const int row = lane() + 32 * u; row < rows) {
      float* const dz = plan.dz + ((split * p.N * s + first_row + row) * q + i0);
#pragma unroll
      for (int m = 0; m < 8; m += 4) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = p.scaling * sum[m + e][u];
        if (q % 4 == 0) {
          if (i0 + m < q) *reinterpret_cast<float4*>(dz + m) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (i0 + m + e < q) dz[m + e] = v[e];
        }
      }
    }
}

// da, dy0 and a partial sum of dT for up to TOKENS tokens.
template <class T>
__device__ __forceinline__ void finish_tokens(const AdaptBackwardProblem& p, const Plan& plan, int64_t first_token) {
  const int k = p.x_clusters, r = p.r, d = p.d;  // k: of x, which may be its sum over the clusters
  const int tokens = static_cast<int>(min(static_cast<int64_t>(TOKENS), p.N - first_token));
  const T* const x_first = static_cast<const T*>(p.x) + first_token * k * r;
  float* const da_first = plan.da + first_token * k;

  for (int t = warp(); t < tokens; t += WARPS) {
    const int64_t n = first_token + t;
    const T* const dy = static_cast<const T*>(p.dy) + n * p.dy_stride;
    T* const dy0 = static_cast<T*>(p.dy0) + n * d;
    copy<8>(d, [&](int c) { return __ldg(dy + c); }, [&](int c, T v) { dy0[c] = v; });
    float* const dz = plan.dz + n * r;
    if (plan.splits > 1)
      for (int e = lane(); e < r; e += 32) {
        float sum = 0;
#pragma unroll 4
        for (int split = 0; split < plan.splits; ++split) sum += dz[split * p.N * r + e];
        dz[e] = sum;
      }
    __syncwarp();  // dy0 is copied before others add to it
    auto add = [&](int i, auto&& dx) {
      const int32_t* const index = p.index + i * r;
      const float* const scale = p.row_scale ? p.row_scale + i * r : nullptr;
      auto scaled = [&](int e) { return scale ? __ldg(scale + e) * dx(e) : dx(e); };
      copy<4>(
          r, [&](int e) { return from_float<T>(to_float(__ldg(dy + __ldg(index + e))) + scaled(e)); },
          [&](int e, T v) { dy0[__ldg(index + e)] = v; });
    };
    auto centre_dz = [&] {  // dz becomes P^T dz
      if (!p.center) return;
      float along = 0;
      for (int e = lane(); e < r; e += 32) along = fmaf(__ldg(p.center + e), dz[e], along);
      along = warp_sum(along);
      for (int e = lane(); e < r; e += 32) dz[e] = fmaf(-along, __ldg(p.center + r + e), dz[e]);
    };
    if (k > 1) centre_dz();
    float a = 0;
    if (p.router_form == RouterForm::bounded) {  // k = 1: x is u, and all clusters get the same
      const T* const u = x_first + static_cast<int64_t>(t) * r;
      const Weight weight = weigh<T>(p, [&](int e) { return to_float(__ldg(u + e)); });
      float dz_u = 0;
      for (int e = lane(); e < r; e += 32) dz_u = fmaf(dz[e], to_float(__ldg(u + e)), dz_u);
      const WeightGradient gradient(weight, warp_sum(dz_u), r);
      a = 1 + weight.tanh;
      with_router<T>(p, 0, [&](auto router) {
        for (int e = lane(); e < r; e += 32)
          dz[e] = fmaf(a, dz[e], fmaf(gradient.P, to_float(__ldg(router + e)), gradient.Q * to_float(__ldg(u + e))));
      });
      centre_dz();
      __syncwarp();
      if (lane() == 0) da_first[t] = gradient.P;
      for (int i = 0; i < p.k; ++i) add(i, [&](int e) { return dz[e]; });
      continue;
    }
    for (int i = 0; i < p.k; ++i) {
      const T* const x = x_first + static_cast<int64_t>(t) * k * r + i * r;
      float da = 0;
      if (p.router_form == RouterForm::constants) {
        if (i < k) {
          a = constant<T>(p, i);
#pragma unroll 4
          for (int e = lane(); e < r; e += 32) da = fmaf(dz[e], to_float(__ldg(x + e)), da);
          da = warp_sum(da);
          if (k == 1) centre_dz();
        }
        add(i, [&](int e) { return a * dz[e]; });
      } else {
        with_router<T>(p, i, [&](auto T_i) {
          a = 0;
#pragma unroll 4
          for (int e = lane(); e < r; e += 32) {
            const float v = to_float(__ldg(x + e));
            a = fmaf(to_float(__ldg(T_i + e)), v, a);
            da = fmaf(dz[e], v, da);
          }
          a = warp_sum(a), da = warp_sum(da);
          add(i, [&](int e) { return fmaf(a, dz[e], da * to_float(__ldg(T_i + e))); });
        });
      }
      if (i < k && lane() == 0) da_first[t * k + i] = da;
    }
  }
  __syncthreads();

  const int entries = router_size(p), together = p.router_rows == 1 ? k : 1;
  float* const dT = plan.dT + first_token / TOKENS * entries;
  for (int e = threadIdx.x; e < entries; e += THREADS) {
    float sum[8] = {};  // of every eighth token, then added in pairs: one long sum loses digits
    const int first_cluster = p.router_form == RouterForm::constants ? e : e / r;
    for (int i = first_cluster; i < first_cluster + together; ++i)
      for (int first = 0; first < tokens; first += 8)
#pragma unroll
        for (int u = 0; u < 8; ++u)
          if (const int t = first + u; t < tokens) {
            const T* const x = x_first + (static_cast<int64_t>(t) * k + i) * r;
            sum[u] = fmaf(da_first[t * k + i], p.router_form == RouterForm::constants ? 1.0f : to_float(x[e % r]), sum[u]);
          }
    dT[e] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) plain_dB_kernel(const AdaptBackwardProblem p, const Plan plan) {
  __shared__ Shared shared;
  const int s = p.s, q = p.r / s, ds = p.d / s;
  const int c_tiles = (ds + COLUMNS - 1) / COLUMNS, tiles = c_tiles * ((q + A_ROWS - 1) / A_ROWS);
  // Blocks of a chunk run at about the same time and find its dy in L2.
  const int blocks = tiles + static_cast<int>(plan.tokens_a_chunk / TOKENS), chunk = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int64_t first_token = chunk * plan.tokens_a_chunk;
  if (block >= tiles) {
    const int64_t first = first_token + static_cast<int64_t>(block - tiles) * TOKENS;
    if (first < p.N) finish_tokens<T>(p, plan, first);
    return;
  }

  // dB^T, a tile of it: 64 entries of q by 128 columns of a part.
  const int q0 = block / c_tiles * A_ROWS, c0 = block % c_tiles * COLUMNS;
  const int rows = static_cast<int>(min(plan.tokens_a_chunk, p.N - first_token) * s);
  const float* const z = plan.z + first_token * p.r + q0;
  const T* const dy = static_cast<const T*>(p.dy) + first_token * p.dy_stride + c0;
  float sum[8][4] = {};
  accumulate<Tile<float, A_ROWS, false>, Tile<T, COLUMNS, false>>(
      sum, shared, 0, rows, q0 + 8 * warp() >= q,
      [&](int i, int row) { return row < rows && q0 + i < q ? z[static_cast<int64_t>(row) * q + i] : 0.0f; },
      [&](int c, int row) {
        return row < rows && c0 + c < ds ? __ldg(dy + (row / s * p.dy_stride + row % s * ds + c)) : from_float<T>(0);
      });
  float* const dB = plan.dB + (static_cast<int64_t>(chunk) * q + q0 + 8 * warp()) * ds + c0 + lane();
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (q0 + 8 * warp() + m < q && c0 + lane() + 32 * u < ds) dB[static_cast<int64_t>(m) * ds + 32 * u] = sum[m][u];
}

// dB and dT from their partial sums; a block has 32 x 32 entries of dB, or 32 of dT.
__global__ void __launch_bounds__(THREADS)
    plain_sum_kernel(const AdaptBackwardProblem p, const Plan plan, const int64_t dB_blocks) {
  __shared__ float tile[32][33];
  const int q = p.r / p.s, ds = p.d / p.s;
  if (blockIdx.x < dB_blocks) {
    const int i_tiles = (q + 31) / 32, i0 = blockIdx.x % i_tiles * 32, c0 = blockIdx.x / i_tiles * 32;
    for (int i = warp(); i < 32 && i0 + i < q; i += WARPS)
      if (c0 + lane() < ds) {
        float sum = 0;
#pragma unroll 4
        for (int chunk = 0; chunk < plan.chunks; ++chunk)
          sum += plan.dB[(static_cast<int64_t>(chunk) * q + i0 + i) * ds + c0 + lane()];
        tile[i][lane()] = p.scaling * sum;
      }
    __syncthreads();
    for (int c = warp(); c < 32 && c0 + c < ds; c += WARPS)
      if (i0 + lane() < q)
        store_from_float(p.dB, p.B_dtype, static_cast<int64_t>(c0 + c) * q + i0 + lane(), tile[lane()][c]);
    return;
  }
  const int64_t entries = router_size(p), e = (blockIdx.x - dB_blocks) * 32 + lane();
  const int64_t count = (p.N + TOKENS - 1) / TOKENS;
  float sum = 0;
  if (e < entries)
#pragma unroll 4
    for (int64_t b = warp(); b < count; b += WARPS) sum += plan.dT[b * entries + e];
  tile[warp()][lane()] = sum;
  __syncthreads();
  if (warp() == 0 && e < entries) {
    for (int w = 1; w < WARPS; ++w) sum += tile[w][lane()];
    store_from_float(p.drouter, p.router_dtype, e, sum);
  }
}

Plan plan_for(const AdaptBackwardProblem& p) {
  const int64_t N = p.N, r = p.r, q = r / p.s, ds = p.d / p.s, resident = 2 * current_device().sms;
  const int64_t q_tiles = ceil_div(q, A_ROWS), steps = ceil_div(ds, INNER);
  Plan plan{};
  // As many blocks as the device holds at a time, and at least 8 steps of a product for each.
  auto parts = [resident](int64_t tiles, int64_t inner) {
    return std::clamp<int64_t>(resident / tiles, 1, std::max<int64_t>(1, ceil_div(inner, 8 * INNER)));
  };
  const int64_t splits = parts(std::max<int64_t>(1, ceil_div(N * p.s, COLUMNS) * q_tiles), ds);
  plan.splits = static_cast<int>(ceil_div(steps, ceil_div(steps, splits)));
  const int64_t chunks = parts(ceil_div(ds, COLUMNS) * q_tiles, N * p.s);
  plan.tokens_a_chunk = std::max<int64_t>(TOKENS, round_up(ceil_div(N, chunks), TOKENS));
  plan.chunks = static_cast<int>(ceil_div(N, plan.tokens_a_chunk));

  auto take = [&plan, base = static_cast<char*>(p.workspace)](int64_t count) {
    float* const start = reinterpret_cast<float*>(base + plan.bytes);
    plan.bytes += static_cast<size_t>(round_up(count * int64_t{sizeof(float)}, 16));
    return start;
  };
  plan.dz = take(plan.splits * N * r);
  plan.z = take(N * r);
  plan.da = take(N * p.x_clusters);
  plan.dB = take(plan.chunks * ds * q);
  plan.dT = take(ceil_div(N, TOKENS) * router_size(p));
  return plan;
}

}  // namespace

size_t plain_adapt_backward_workspace(const AdaptBackwardProblem& p) { return plan_for(p).bytes; }

const char* plain_adapt_backward(const AdaptBackwardProblem& p, cudaStream_t stream) {
  const Plan plan = plan_for(p);
  const int64_t q = p.r / p.s, ds = p.d / p.s, q_tiles = ceil_div(q, A_ROWS), token_blocks = ceil_div(p.N, TOKENS);
  const int64_t product_blocks = ceil_div(p.N * p.s, COLUMNS) * q_tiles * plan.splits;
  const int64_t chunk_blocks = ceil_div(ds, COLUMNS) * q_tiles + plan.tokens_a_chunk / TOKENS;
  const int64_t dB_blocks = ceil_div(ds, 32) * ceil_div(q, 32), dT_blocks = ceil_div(router_size(p), 32);
  auto grid = [](int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); };
  if (p.N > 0) {
    const char* const error = with_type(p.dtype, [&](auto t) {
      using T = decltype(t);
      const char* const first = launch(plain_dz_kernel<T>, grid(product_blocks + token_blocks), THREADS, 0, stream, p,
                                       plan, product_blocks);
      return first ? first : launch(plain_dB_kernel<T>, grid(plan.chunks * chunk_blocks), THREADS, 0, stream, p, plan);
    });
    if (error) return error;
  }
  return launch(plain_sum_kernel, grid(dB_blocks + dT_blocks), THREADS, 0, stream, p, plan, dB_blocks);
}

}  // namespace idlora::cuda
