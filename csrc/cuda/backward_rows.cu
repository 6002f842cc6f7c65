// The gradient of adapt on tensor cores, first launch: a, z and dz of every token, dy0, and sums of dT.
//
//   dz^(j) = scaling B^T dy^(j);  da_i = <dz, x_i>;  dT_i = sum_n da_i x_i;  dy0 = dy + sum_i (a_i dz + da_i T_i) at index_i
//
// A block of 8 warps takes tiles of 32 tokens. Lanes are tokens wherever rows are chosen by index, so that no choice of
// rows causes bank conflicts:
//   1. route    x to shared memory; a; z, which the second launch multiplies with dy, to the workspace;
//   2. dz       dy goes from global memory to the registers where mma wants it (as B does in tensor.cuh); B comes through
//               a ring in shared memory, read transposed. Warps share out the row tiles and, if there are fewer than
//               warps, the columns;
//   3. da, dT   in float32; of a bounded router dz becomes what every x_i gets, with a center P^T of it (problems.h);
//   4. dy0      dy, found again in L2 from its last columns to its first, passes through tiles of 64 columns whose rows
//               have an odd number of words; a tile's share of the sorted columns is added, then whole rows are written.
#include "backward.h"
#include "sort_columns.cuh"
#include "tensor.cuh"

namespace idlora::cuda {
namespace {

constexpr int TOKENS = 32, WARPS = 8, THREADS = 32 * WARPS;
constexpr int STAGE = 128, STAGES = 2;  // rows of B in a stage of the ring
constexpr int DZ_STRIDE = TOKENS + 4;   // floats: 8 rows apart are 8 tokens apart in the banks
constexpr int TILE_COLUMNS = 64, TILE_STRIDE = TILE_COLUMNS + 2;  // elements; 33 words

// Elements between rows of x: an odd number of 16-byte units.
__host__ __device__ constexpr int x_stride(int kr) { return (kr / 8 | 1) * 8; }
__host__ __device__ constexpr int B_stride(int q) { return (q / 8 | 1) * 8; }

struct Layout : SharedLayout {
  int order, row_scale, before, router, center, dT, a, da, along, weight, x, ring;

  __host__ __device__ explicit Layout(const AdaptBackwardProblem& p) {
    const int d = p.d, k = p.x_clusters, r = p.r, s = p.s, kr = k * r;
    order = take(p.k * r * sizeof(int2));
    row_scale = take(p.row_scale ? p.k * r * sizeof(float) : 0);
    before = take((sort_words(d) + 1) * sizeof(uint32_t));
    router = take(router_size(p) * sizeof(float));
    center = take(center_bytes(p));
    dT = take(kr * sizeof(float));
    a = take(k * TOKENS * sizeof(float));
    da = take(k * TOKENS * sizeof(float));
    along = take(p.center ? TOKENS * sizeof(float) : 0);
    weight = take(p.router_form == RouterForm::bounded ? TOKENS * sizeof(Weight) : 0);
    // The tiles of dy come when x is done with; the warps' shares of a and da and the sort use the ring when B is not in it.
    x = take_larger(static_cast<size_t>(TOKENS) * x_stride(kr) * 2, static_cast<size_t>(WARPS) * TOKENS * TILE_STRIDE * 2);
    const size_t B = static_cast<size_t>(STAGES) * STAGE * B_stride(r / s) * 2, sort = sort_bytes(d);
    ring = take_larger(B > sort ? B : sort, (r * DZ_STRIDE + WARPS * k * TOKENS) * sizeof(float));
  }
};

// Rows [first_row, first_row + STAGE) of B into a stage of the ring, at the row `slot` says; zeros behind the last.
template <class T, class BT>
__device__ __forceinline__ void fill_stage(T* stage, const void* B, int first_row, int ds, int q) {
  const int units = q / 8, lane_row = threadIdx.x / 8;  // 8 threads a row, 32 rows at a time
  T* to_row = stage + slot(lane_row) * B_stride(q);
  const BT* from_row = static_cast<const BT*>(B) + static_cast<int64_t>(first_row + lane_row) * q;
  constexpr int UNROLL = std::is_same_v<T, BT> ? STAGE / 32 : 1;  // what waits in registers is not unrolled: they are few
#pragma unroll UNROLL
  for (int c = first_row + lane_row; c < first_row + STAGE; c += 32, to_row += 32 * B_stride(q), from_row += 32 * q)
#pragma unroll UNROLL
    for (int unit = threadIdx.x % 8; unit < units; unit += 8) {
      T* const to = to_row + 8 * unit;
      const BT* const from = c < ds ? from_row + 8 * unit : static_cast<const BT*>(B);
      if constexpr (std::is_same_v<T, BT>) {
        copy_async<16>(to, from, c < ds);
      } else {
        *reinterpret_cast<uint4*>(to) = c < ds ? load8<T>(from) : make_uint4(0, 0, 0, 0);
      }
    }
  commit_copies();
}

// out[i][token] = sum_p f(i, p, x of the token): each warp sums every eighth block of 8 positions; fixed order.
template <class T, class Dot>
__device__ __forceinline__ void sum_over_positions(float* out, float* shares, int k, int r, Dot&& dot) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < k; ++i) {
    float sum = 0;
    for (int b = 8 * warp; b < r; b += 8 * WARPS) sum = dot(i, b, sum);
    shares[(warp * k + i) * TOKENS + lane] = sum;
  }
  __syncthreads();
  for (int i = warp; i < k; i += WARPS) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += shares[(w * k + i) * TOKENS + lane];
    out[i * TOKENS + lane] = sum;
  }
  __syncthreads();
}

template <class T, class BT, int CHUNKS>
__global__ void __launch_bounds__(THREADS, CHUNKS == 2 ? 2 : 1)
    adapt_backward_rows(const __grid_constant__ AdaptBackwardProblem p, const __grid_constant__ BackwardPlan plan) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int k = p.x_clusters, r = p.r, s = p.s, q = r / s, kr = k * r, d = p.d, ds = d / s;  // k, kr: of x
  const Layout at(p);
  int2* const order = reinterpret_cast<int2*>(shared + at.order);  // column, cluster << 16 | position in the cluster
  uint32_t* const before = reinterpret_cast<uint32_t*>(shared + at.before);
  float *const router = reinterpret_cast<float*>(shared + at.router), *const dT = reinterpret_cast<float*>(shared + at.dT);
  float *const a = reinterpret_cast<float*>(shared + at.a), *const da = reinterpret_cast<float*>(shared + at.da);
  float* const row_scale = reinterpret_cast<float*>(shared + at.row_scale);
  float *const ubar = reinterpret_cast<float*>(shared + at.center), *const along = reinterpret_cast<float*>(shared + at.along);
  Weight* const weight = reinterpret_cast<Weight*>(shared + at.weight);
  T *const x = reinterpret_cast<T*>(shared + at.x), *const ring = reinterpret_cast<T*>(shared + at.ring);
  float *const dz = reinterpret_cast<float*>(ring), *const shares = dz + r * DZ_STRIDE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const T* const x_lane = x + lane * x_stride(kr);
  const bool centre_z = p.center && k > 1;  // else x is centred already

  load_router(p, router, ubar);
  for (int i = threadIdx.x; i < kr; i += THREADS) dT[i] = 0;
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(ring);
  sort_columns(p.index, p.k * r, d, scratch, [&](int rank, int column, int position) {
    order[rank] = make_int2(column, (k == 1 ? 0 : position / r << 16) | position % r);
    if (p.row_scale) row_scale[rank] = __ldg(p.row_scale + position);
  });
  for (int w = threadIdx.x; w <= sort_words(d); w += THREADS) before[w] = scratch[w];
  __syncthreads();
  if (p.router_form == RouterForm::constants)
    for (int i = threadIdx.x; i < k * TOKENS; i += THREADS) a[i] = router[i / TOKENS];

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * TOKENS; first < p.N; first += static_cast<int64_t>(gridDim.x) * TOKENS) {
    const int tokens = static_cast<int>(min(static_cast<int64_t>(TOKENS), p.N - first));
    const T* const dy = static_cast<const T*>(p.dy) + first * p.dy_stride;

    // 1. route
    for (int n = warp; n < TOKENS; n += WARPS) {
      const T* const from = static_cast<const T*>(p.x) + (n < tokens ? first + n : first) * kr;
      for (int i = 8 * lane; i < kr; i += 8 * 32) copy_async<16>(x + n * x_stride(kr) + i, from + i, n < tokens);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (p.router_form != RouterForm::constants)
      sum_over_positions<T>(a, shares, k, r, [&](int i, int b, float sum) {
        const uint4 v = *reinterpret_cast<const uint4*>(x_lane + i * r + b);
        const float2* const T_i = reinterpret_cast<const float2*>(router + (p.router_rows == 1 ? 0 : i * r) + b);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 u = unpack<T>(word(v, w)), v = T_i[w];
          sum = fmaf(v.y, u.y, fmaf(v.x, u.x, sum));
        }
        return sum;
      });
    if (p.router_form == RouterForm::bounded) {  // x is u, a is <T, u>
      sum_over_positions<T>(da, shares, 1, r, [&](int, int b, float sum) {
        const uint4 v = *reinterpret_cast<const uint4*>(x_lane + b);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 u = unpack<T>(word(v, w));
          sum = fmaf(u.y, u.y, fmaf(u.x, u.x, sum));
        }
        return sum;
      });
      if (warp == 0) {
        const Weight own(a[lane], da[lane], r);
        weight[lane] = own;
        a[lane] = 1 + own.tanh;
      }
      __syncthreads();
    }
    if (centre_z)  // <w, u>
      sum_over_positions<T>(along, shares, 1, r, [&](int, int b, float sum) {
        for (int i = 0; i < k; ++i) {
          const uint4 v = *reinterpret_cast<const uint4*>(x_lane + i * r + b);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 u = unpack<T>(word(v, e)), w = reinterpret_cast<const float2*>(ubar + r + b)[e];
            sum = fmaf(router[i], fmaf(w.y, u.y, w.x * u.x), sum);
          }
        }
        return sum;
      });
    float unscale = 1;
    if constexpr (std::is_same_v<T, __half>) {  // |z| <= sum_i |a_i| 65504: above 1, keep z within float16
      float size = 0;
      for (int i = 0; i < k; ++i) size += fabsf(a[i * TOKENS + lane]);
      if (centre_z) size += fabsf(along[lane]) * size_of_center(ubar, r);
      const float power = power_of_two_above(size, 0, 15);
      unscale = 1 / power;
      if (warp == 0 && lane < tokens)
        reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.scale)[first + lane] = power;
    }
    T* const z_out = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + plan.z) + first * r;
    for (int b = 16 * warp; b < r; b += 16 * WARPS) {
      float z[16] = {};
      for (int i = 0; i < k; ++i) {
        const float a_i = a[i * TOKENS + lane] * unscale;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (b + 8 * half < r) {
            const uint4 v = *reinterpret_cast<const uint4*>(x_lane + i * r + b + 8 * half);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const float2 u = unpack<T>(word(v, w));
              z[8 * half + 2 * w] = fmaf(a_i, u.x, z[8 * half + 2 * w]);
              z[8 * half + 2 * w + 1] = fmaf(a_i, u.y, z[8 * half + 2 * w + 1]);
            }
          }
      }
      if (centre_z)
#pragma unroll
        for (int e = 0; e < 16; ++e)
          if (b + e < r) z[e] = fmaf(-along[lane] * unscale, ubar[b + e], z[e]);
      uint32_t own[2][4];
#pragma unroll
      for (int w = 0; w < 8; ++w) own[w / 4][w % 4] = pack<T>(z[2 * w], z[2 * w + 1]);
      store_rows(z_out + b, r, own, true, b + 8 < r, tokens);
    }

    // 2. dz: row tile (part, 16 tokens) and share of the columns of this warp
    const int row_tiles = 2 * s, ways = WARPS / row_tiles, tile = warp % row_tiles, way = warp / row_tiles;
    const bool works = way < ways;
    const int j = tile / 2, n = tile % 2 * ROWS + g;
    const T* const rows = dy + n * p.dy_stride + static_cast<int64_t>(j) * ds + 8 * t;
    auto load = [&](uint4 (&v)[2], int c) {
      v[0] = v[1] = make_uint4(0, 0, 0, 0);
      if (works && c + 8 * t < ds) {
        if (n < tokens) v[0] = __ldg(reinterpret_cast<const uint4*>(rows + c));
        if (n + 8 < tokens) v[1] = __ldg(reinterpret_cast<const uint4*>(rows + c + 8 * p.dy_stride));
      }
    };
    float c[4 * CHUNKS][4] = {};
    const int step = INNER * ways, stages = (ds + STAGE - 1) / STAGE;
    uint4 ahead[2];
    load(ahead, way * INNER);
    fill_stage<T, BT>(ring, p.B, 0, ds, q);
    for (int st = 0; st < stages; ++st) {
      if (st + 1 < stages) {
        fill_stage<T, BT>(ring + (st + 1) % STAGES * STAGE * B_stride(q), p.B, (st + 1) * STAGE, ds, q);
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      __syncthreads();
      const T* const stage = ring + st % STAGES * STAGE * B_stride(q);
      for (int c0 = way * INNER; works && c0 < STAGE; c0 += step) {
        const uint4 now[2] = {ahead[0], ahead[1]};
        load(ahead, c0 + step < STAGE ? st * STAGE + c0 + step : (st + 1) * STAGE + way * INNER);
        const T* const row = stage + (c0 + lane % 8 + lane / 8 % 2 * 8) * B_stride(q) + lane / 16 * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t av[4] = {word(now[0], 2 * half), word(now[1], 2 * half), word(now[0], 2 * half + 1),
                                  word(now[1], 2 * half + 1)};
#pragma unroll
          for (int m = 0; m < 4 * CHUNKS; m += 2)
            if (8 * m < q) {
              uint32_t b[4];
              // Where q ends in the middle of a pair of tiles the second repeats the first, and is not used.
              ldmatrix_transposed(b, row + 16 * half * B_stride(q) + 8 * m - (8 * m + 8 < q ? 0 : lane / 16 * 8));
              mma<T>(c[m], av, b[0], b[1]);
              mma<T>(c[m + 1], av, b[2], b[3]);
            }
        }
      }
      __syncthreads();
    }
    for (int w = 0; w < ways; ++w) {  // the shares of the columns, one after another
      if (w == way) {
#pragma unroll
        for (int m = 0; m < 4 * CHUNKS; ++m)
          if (8 * m < q)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float* const to = dz + (j * q + 8 * m + 2 * t + e % 2) * DZ_STRIDE + n + e / 2 * 8;
              const float v = p.scaling * c[m][e];
              *to = w == 0 ? v : *to + v;
            }
      }
      __syncthreads();
    }

    // 3. da, dT
    auto centre_dz = [&] {  // dz becomes P^T dz
      sum_over_positions<T>(along, shares, 1, r, [&](int, int b, float sum) {
        for (int i = b; i < b + 8; ++i) sum = fmaf(ubar[i], dz[i * DZ_STRIDE + lane], sum);
        return sum;
      });
      for (int b = 8 * warp; b < r; b += 8 * WARPS)
        for (int i = b; i < b + 8; ++i) dz[i * DZ_STRIDE + lane] -= along[lane] * ubar[r + i];
    };
    if (centre_z) centre_dz();
    sum_over_positions<T>(da, shares, k, r, [&](int i, int b, float sum) {
      const uint4 v = *reinterpret_cast<const uint4*>(x_lane + i * r + b);
      const float* const dz_b = dz + b * DZ_STRIDE + lane;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 u = unpack<T>(word(v, w));
        sum = fmaf(dz_b[(2 * w + 1) * DZ_STRIDE], u.y, fmaf(dz_b[2 * w * DZ_STRIDE], u.x, sum));
      }
      return sum;
    });
    // dz becomes what every x_i gets; P, of which dT is the sum with u, takes the place of da
    if (p.router_form == RouterForm::bounded) {
      const WeightGradient gradient(weight[lane], da[lane], r);
      __syncthreads();
      if (warp == 0) da[lane] = gradient.P;
      for (int b = 8 * warp; b < r; b += 8 * WARPS) {
        const uint4 v = *reinterpret_cast<const uint4*>(x_lane + b);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float2 u = unpack<T>(word(v, e / 2));
          float& dx = dz[(b + e) * DZ_STRIDE + lane];
          dx = fmaf(a[lane], dx, fmaf(gradient.P, router[b + e], gradient.Q * (e % 2 ? u.y : u.x)));
        }
      }
      __syncthreads();
    }
    if (p.center && k == 1) centre_dz();
    for (int i = warp; i < k && p.router_form == RouterForm::constants; i += WARPS) {
      float sum = da[i * TOKENS + lane];
#pragma unroll
      for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == 0) dT[i] += sum;
    }
    for (int i = 2 * threadIdx.x; i < kr && p.router_form != RouterForm::constants; i += 2 * THREADS) {
      float2 sum = *reinterpret_cast<const float2*>(dT + i);
      const float* const da_i = da + i / r * TOKENS;
#pragma unroll 8
      for (int n = 0; n < TOKENS; ++n) {
        const float2 u = unpack<T>(*reinterpret_cast<const uint32_t*>(x + n * x_stride(kr) + i));
        sum.x = fmaf(da_i[n], u.x, sum.x);
        sum.y = fmaf(da_i[n], u.y, sum.y);
      }
      *reinterpret_cast<float2*>(dT + i) = sum;
    }
    __syncthreads();  // x is done with

    // 4. dy0
    T* const dy0 = static_cast<T*>(p.dy0) + first * d;
    T* const buffer = x + warp * TOKENS * TILE_STRIDE;
    for (int w = (d + TILE_COLUMNS - 1) / TILE_COLUMNS - 1 - warp; w >= 0; w -= WARPS) {
      const int column = w * TILE_COLUMNS + 2 * lane;
      const bool inside = column < d;
      const T* from = dy + (inside ? column : 0);
      if (tokens == TOKENS && (w + 1) * TILE_COLUMNS <= d) {
#pragma unroll 8
        for (int n = 0; n < TOKENS; ++n, from += p.dy_stride) copy_async<4>(buffer + n * TILE_STRIDE + 2 * lane, from);
      } else {
        for (int n = 0; n < TOKENS; ++n) {
          copy_async<4>(buffer + n * TILE_STRIDE + 2 * lane, from, inside && n < tokens);
          if (n + 1 < tokens) from += p.dy_stride;
        }
      }
      commit_copies();
      wait_for_copies<0>();
      __syncwarp();
      const int end = before[min(2 * w + 2, sort_words(d))];
      T* const row = buffer + lane * TILE_STRIDE - w * TILE_COLUMNS;
#pragma unroll 2
      for (int rank = before[2 * w]; rank < end; ++rank) {
        const int2 entry = order[rank];
        const int i = entry.y >> 16, position = entry.y & 0xffff;
        T* const to = row + entry.x;
        float dx = dz[position * DZ_STRIDE + lane];
        if (p.router_form != RouterForm::bounded) dx *= a[i * TOKENS + lane];
        if (p.router_form == RouterForm::linear)
          dx = fmaf(da[i * TOKENS + lane], router[(p.router_rows == 1 ? 0 : i * r) + position], dx);
        if (p.row_scale) dx *= row_scale[rank];
        *to = from_float<T>(to_float(*to) + dx);
      }
      __syncwarp();
      if (inside) {
        T* to = dy0 + column;
#pragma unroll 8
        for (int n = 0; n < tokens; ++n, to += d)
          __stcs(reinterpret_cast<uint32_t*>(to), *reinterpret_cast<const uint32_t*>(buffer + n * TILE_STRIDE + 2 * lane));
      }
      __syncwarp();
    }
    __syncthreads();
  }

  const int entries = router_size(p), sums = p.router_form == RouterForm::constants ? entries : kr;
  float* const out = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.dT) +
                     static_cast<int64_t>(blockIdx.x) * entries;
  for (int i = threadIdx.x; i < entries; i += THREADS) {
    float sum = 0;
    for (int c = i; c < sums; c += entries) sum += dT[c];
    out[i] = sum;
  }
#endif
}

}  // namespace

size_t backward_rows_shared_memory(const AdaptBackwardProblem& p) { return Layout(p).bytes; }

const char* backward_rows(const AdaptBackwardProblem& p, const BackwardPlan& plan, cudaStream_t stream) {
  return with_tensor_types(p.dtype, p.B_dtype, p.r / p.s, [&](auto t, auto b, auto chunks) {
    return launch(adapt_backward_rows<decltype(t), decltype(b), chunks.value>, dim3(plan.blocks), THREADS,
                  backward_rows_shared_memory(p), stream, p, plan);
  });
}

}  // namespace idlora::cuda
