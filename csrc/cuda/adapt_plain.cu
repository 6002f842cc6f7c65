// adapt and shared_gemm for any shape, dtype and architecture, in float32 arithmetic. shared_gemm is adapt, given z.
//
// A block has up to 64 rows (token n, part j) of y, seen as [N s, d/s], and all of their columns, or a share of them
// where rows are few:
//   route    a warp a token: gather x, write it if it is kept, a_i, then z into shared memory as [q][rows];
//   product  128 columns at a time, B through shared memory, the next tile of it loaded during the product; y.
#include <algorithm>

#include "plain.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

using namespace plain;

struct Plan {
  int rows;      // a block's
  int held;      // of the q entries of a row of z, how many are in shared memory at a time; fewer than q is slow
  int splits;    // blocks that share the columns of the same rows
  int z_stride;  // of z in shared memory, from one inner entry to the next
  size_t shared;
};

// The product's tile of B; before it, each warp's copy of a token's x.
constexpr size_t TILE_BYTES = (INNER * B_STRIDE * sizeof(float) + 15) / 16 * 16;
constexpr int X_BYTES = TILE_BYTES / WARPS / 16 * 16;

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    plain_adapt_kernel(const __grid_constant__ AdaptProblem p, const float* given_z,
                       const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) float shared[];
  __shared__ int64_t y0_of[A_ROWS];  // where the row starts in y0,
  __shared__ int part_of[A_ROWS];    // and which columns of d it is: kept, as divisions are slow
  float *const tile = shared, *const z = shared + TILE_BYTES / sizeof(float);

  const int k = p.k, r = p.r, s = p.s, q = r / s, ds = p.d / s, kr = k * r;
  const int64_t first_row = blockIdx.x / plan.splits * static_cast<int64_t>(plan.rows);
  const int rows = static_cast<int>(min(static_cast<int64_t>(plan.rows), p.N * s - first_row));
  const int64_t first_token = first_row / s;
  const int first_part = static_cast<int>(first_row % s), tokens = (first_part + rows - 1) / s + 1;
  const int split = blockIdx.x % plan.splits;
  const T* const y0 = static_cast<const T*>(p.y0);

  if (threadIdx.x < rows) {
    const int part = first_part + static_cast<int>(threadIdx.x);
    part_of[threadIdx.x] = part % s * ds;
    y0_of[threadIdx.x] = (first_token + part / s) * p.y0_stride + part % s * ds;
  }
  for (int row = rows; row % 8 != 0; ++row)  // a warp multiplies eight rows, also where they are fewer
    for (int i = threadIdx.x; i < plan.held; i += THREADS) z[i * plan.z_stride + row] = 0;

  // Entries [i0, i0 + held) of the rows of z. `write_x`: this is the first time.
  auto stage_z = [&](int i0, bool write_x) {
    if (given_z) {
      for (int row = warp(); row < rows; row += WARPS)
        for (int i = i0 + lane(); i < min(q, i0 + plan.held); i += 32)
          z[(i - i0) * plan.z_stride + row] = given_z[(first_row + row) * q + i];
      return;
    }
    const bool sums = keeps_sum(p), cached = kr * static_cast<int64_t>(sizeof(T)) <= X_BYTES;
    T* const cache = reinterpret_cast<T*>(reinterpret_cast<char*>(tile) + warp() * X_BYTES);
    for (int t = warp(); t < tokens; t += WARPS) {
      const T* const row_of_y0 = y0 + (first_token + t) * p.y0_stride;
      auto gather = [&](int e) {
        const int column = __ldg(p.index + e);
        return moved(p, __ldg(row_of_y0 + column), p.bias && p.bias_in_y0, column, e);
      };
      // Of the blocks that see a token, the one with its first part and the first columns writes x.
      T* const x = write_x && p.x && t * s >= first_part
                       ? static_cast<T*>(p.x) + (first_token + t) * p.x_clusters * r
                       : nullptr;
      __syncwarp();  // the cache still holds the last token's x
      if (cached || x)
        copy<2>(kr, gather, [&](int e, T v) {
          if (cached) cache[e] = v;
          if (x && !sums) x[e] = v;
        });
      __syncwarp();
      auto to_z = [&](auto x_at) {
        const float along = route<T>(p, p.center, k, x_at, [&](int e, float value, bool first) {
          const int row = t * s + e / q - first_part, i = e % q - i0;
          if (row < 0 || row >= rows || i < 0 || i >= plan.held) return;
          float& entry = z[i * plan.z_stride + row];
          entry = first ? value : entry + value;
        });
        if (x && sums)
          for (int e = lane(); e < r; e += 32) {
            float sum = 0;
#pragma unroll 1
            for (int i = e; i < kr; i += r) sum += x_at(i);
            x[e] = from_float<T>(p.center ? fmaf(-along, __ldg(p.center + e), sum) : sum);
          }
      };
      if (cached)
        to_z([&](int e) { return to_float(cache[e]); });
      else
        to_z([&](int e) { return to_float(gather(e)); });
    }
  };

  const int tiles = (ds + COLUMNS - 1) / COLUMNS, share = (tiles + plan.splits - 1) / plan.splits;
  const int first_column = split * share * COLUMNS, end_column = min(ds, first_column + share * COLUMNS);
  Tile<float, COLUMNS, true> ahead;
  auto load_B = [&](int c0, int i0) {
    typed<T>(p.B, p.B_dtype, [&](auto B) {
      B += static_cast<int64_t>(c0) * q + i0;
      ahead.load([&](int c, int i) { return c0 + c < ds && i0 + i < q ? to_float(__ldg(B + c * q + i)) : 0.0f; });
    });
  };
  int staged = -plan.held;  // the first entry of z in shared memory
  for (int c0 = first_column; c0 < end_column; c0 += COLUMNS) {
    float sum[8][4] = {};
    for (int i0 = 0; i0 < q; i0 += INNER) {
      __syncthreads();
      if (i0 < staged || i0 >= staged + plan.held) {
        stage_z(i0, c0 == 0 && i0 == 0);
        staged = i0;
        load_B(c0, i0);
        __syncthreads();
      }
      ahead.store(tile, B_STRIDE);
      __syncthreads();
      if (i0 + INNER < q)
        load_B(c0, i0 + INNER);
      else if (c0 + COLUMNS < end_column)
        load_B(c0 + COLUMNS, 0);
      if (8 * warp() < rows)
        multiply<1>(sum, z + (i0 - staged) * plan.z_stride + 8 * warp(), plan.z_stride, tile, min(INNER, q - i0));
    }

    const float scaling = p.scaling;
    const int columns = ds - c0 - lane();  // from this lane's first to the end
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int u = 0; u < 4; ++u) sum[m][u] *= scaling;
    if (p.bias && !p.bias_in_y0)
      typed<T>(p.bias, p.bias_dtype, [&](auto bias) {
#pragma unroll
        for (int m = 0; m < 8; ++m)
          if (const int row = 8 * warp() + m; row < rows)
#pragma unroll
            for (int u = 0; u < 4; ++u)
              if (32 * u < columns) sum[m][u] += to_float(__ldg(bias + part_of[row] + c0 + lane() + 32 * u));
      });
    T* to = static_cast<T*>(p.y) + (first_row + 8 * warp()) * ds + c0 + lane();
#pragma unroll
    for (int half = 0; half < 8; half += 2) {
      T v[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if (const int row = 8 * warp() + half + m; row < rows) {
          const T* const from = static_cast<const T*>(p.y0) + y0_of[row] + c0 + lane();
#pragma unroll
          for (int u = 0; u < 4; ++u)
            if (32 * u < columns) v[m][u] = __ldg(from + 32 * u);
        }
#pragma unroll
      for (int m = 0; m < 2; ++m, to += ds)
        if (const int row = 8 * warp() + half + m; row < rows) {
#pragma unroll
          for (int u = 0; u < 4; ++u)
            if (32 * u < columns) to[32 * u] = from_float<T>(to_float(v[m][u]) + sum[half + m][u]);
        }
    }
  }
}

Plan plan_for(const AdaptProblem& p) {
  const Device& device = current_device();
  const int64_t q = p.r / p.s, limit = device.shared_per_block - 1024;  // less what is static
  Plan plan{};
  auto bytes = [&](int64_t held) { return int64_t{TILE_BYTES} + held * plan.z_stride * int64_t{sizeof(float)}; };
  for (plan.rows = A_ROWS;; plan.rows /= 2) {
    plan.z_stride = plan.rows + 4;
    if (plan.rows == 8 || bytes(q) <= limit) break;
  }
  const int64_t most = (limit - bytes(0)) / (plan.z_stride * int64_t{sizeof(float)});
  plan.held = static_cast<int>(q <= most ? q : most / INNER * INNER);
  plan.shared = static_cast<size_t>(bytes(plan.held));
  // Every block of the same rows routes them anew, so no more blocks than it takes to occupy all SMs.
  const int64_t tiles = ceil_div(p.d / p.s, COLUMNS), blocks = ceil_div(p.N * p.s, plan.rows);
  const int64_t splits = std::clamp<int64_t>(device.sms / blocks, 1, tiles);
  plan.splits = static_cast<int>(ceil_div(tiles, ceil_div(tiles, splits)));
  return plan;
}

const char* run(const AdaptProblem& p, const float* z, cudaStream_t stream) {
  const Plan plan = plan_for(p);
  const int64_t blocks = ceil_div(p.N * p.s, plan.rows) * plan.splits;
  return with_type(p.dtype, [&](auto t) {
    return launch(plain_adapt_kernel<decltype(t)>, dim3(static_cast<unsigned>(blocks)), THREADS, plan.shared, stream,
                  p, z, plan);
  });
}

}  // namespace

const char* plain_adapt(const AdaptProblem& p, cudaStream_t stream) { return run(p, nullptr, stream); }

const char* plain_shared_gemm(const SharedGemmProblem& g, cudaStream_t stream) {
  AdaptProblem p{};
  p.N = g.N, p.d = g.d, p.r = g.r, p.s = g.s, p.y0_stride = g.y0_stride;
  p.y0 = g.y0, p.B = g.B, p.bias = g.bias, p.y = g.y;
  p.scaling = g.scaling, p.dtype = g.dtype, p.B_dtype = g.B_dtype, p.bias_dtype = g.bias_dtype;
  return run(p, g.z, stream);
}

}  // namespace idlora::cuda
