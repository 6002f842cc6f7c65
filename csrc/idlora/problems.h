// What crosses from host to kernels: sizes, strides, pointers. No torch, no CUDA headers, plain C layout (ctypes reads it).
//
// Symbols (arXiv 2602.20727): N tokens, d out-features, k clusters, r rows a cluster (rank), s rank-boost factor,
// ds = d / s and q = r / s the sides of B. Strides count elements. Tensors without a stride are contiguous.
//
// Dtypes: `dtype` is any; the others are `dtype` or float32. d, k, r, s fit an int; N and strides need not.
// N = 0 is valid: outputs that are sums over tokens become zero.
//
// A static router is the a_i themselves, constants: router_rows of them. With one for all clusters (router_rows = 1) the
// gradients need of x no more than its sum over the clusters, so this is what is kept: x_clusters = 1 instead of k.
// So does a bounded router (router_rows = 1), which gives all clusters one weight a token, of u = sum_i x_i:
//   a = 1 + tanh(t), t = 4 <T, u> / rms(u);  z = a u
//   dt = <dz, u> (1 - tanh(t)^2);  every x_i gets a dz + P T + Q u, dT = sum_n P u,
//   P = 4 dt / rms(u), Q = -dt t / (r rms(u)^2)
//
// row_scale, [k, r] or null: c of x_ij = c_ij (y0 - bias)[index_ij].
//
// center, [2, r] or null, not with a linear router: ubar and w. P u = u - ubar <w, u> takes the place of u = sum_i a_i x_i,
// of a bounded router before it is weighed. What is kept with x_clusters = 1 is P u, of one constant P sum_i x_i. Then
// every x_i gets P^T of what it would get, P^T g = g - w <ubar, g>; with k constants da_i = <P^T dz, x_i>.
#pragma once

#include <cstddef>
#include <cstdint>

namespace idlora {

enum class Dtype : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

// linear a_i = <T_i, x_i>; constants: the router is the a_i themselves; bounded: one weight a token, see above.
enum class RouterForm : int32_t { linear = 0, constants = 1, bounded = 2 };

// Which kernel runs. `automatic` chooses by shape, alignment and device; the others are for tests and profiling and fail
// with a message where they cannot serve the problem.
//   plain     any shape, dtype and architecture: float32 arithmetic, no tensor cores
//   prefill   tensor cores, tiles of 32 tokens (training, prefill); in the backward pass the only tensor-core variant
//   decode    tensor cores, tiles of 16 tokens spread over column slices (N <= 64)
enum class Variant : int32_t { automatic = 0, plain = 1, prefill = 2, decode = 3 };

// The factor 4, and what the mean square of u is above: see idlora_ext/ops/bounded_router.py.
constexpr float ROUTER_GAIN = 4, TINY_SQUARE = 1e-24f;

// x_ij = c_ij (y0 - bias)[index_ij]
struct GatherProblem {
  int64_t N, d, k, r;
  int64_t y0_stride;     // between rows
  const void* y0;        // [N, d]   dtype
  const int32_t* index;  // [k, r]   distinct entries in [0, d)
  const void* bias;      // [d]      bias_dtype, or null
  const float* row_scale;
  void* x;               // [N, k, r] dtype
  Dtype dtype, bias_dtype;
};

// a_i = <T_i, x_i>, z = sum_i a_i x_i
struct RbScaleProblem {
  int64_t N, k, r;
  int64_t router_rows;  // k, or 1: one vector, or constant, shared by all clusters
  const void* x;        // [N, k, r] dtype
  const void* router;   // [router_rows, r] router_dtype; constants: [router_rows]
  const float* center;
  float* z;             // [N, r]
  Dtype dtype, router_dtype;
  RouterForm router_form;
};

// y = y0 + bias + scaling * concat_j(z^(j) B^T), j = 1..s
struct SharedGemmProblem {
  int64_t N, d, r, s;
  int64_t y0_stride;
  const void* y0;    // [N, d]    dtype
  const float* z;    // [N, r]
  const void* B;     // [ds, q]   B_dtype
  const void* bias;  // [d]       bias_dtype, or null
  void* y;           // [N, d]    dtype
  float scaling;
  Dtype dtype, B_dtype, bias_dtype;
  Variant variant;
};

// y = y0 + bias + scaling * concat_j(B z^(j)), z = sum_i <T_i, x_i> x_i, x_i = y0[index_i]
// With bias_in_y0: x_i = (y0 - bias)[index_i], and nothing is added.
struct AdaptProblem {
  int64_t N, d, k, r, s;
  int64_t router_rows, x_clusters;
  int64_t y0_stride;
  const void* y0;        // [N, d]    dtype
  const int32_t* index;  // [k, r]
  const void* router;    // [router_rows, r] router_dtype; constants: [router_rows]
  const void* B;         // [ds, q]   B_dtype
  const void* bias;      // [d]       bias_dtype, or null
  const float* row_scale;
  const float* center;
  void* y;               // [N, d]    dtype
  void* x;               // [N, x_clusters, r] dtype, or null: not kept
  float scaling;
  Dtype dtype, router_dtype, B_dtype, bias_dtype;
  RouterForm router_form;
  int32_t bias_in_y0;
  Variant variant;
};

// dz^(j) = scaling B^T dy^(j);  da_i = <dz, x_i>
// dB = scaling sum_n sum_j dy^(j) z^(j)^T;  dT_i = sum_n da_i x_i;  dy0 = dy, then dy0[index_i] += a_i dz + da_i T_i
// Constants: the gradient of a_i is sum_n da_i, and dy0[index_i] += a_i dz.
struct AdaptBackwardProblem {
  int64_t N, d, k, r, s;
  int64_t router_rows, x_clusters;
  int64_t dy_stride;
  const void* dy;        // [N, d]    dtype
  const void* x;         // [N, x_clusters, r] dtype
  const int32_t* index;  // [k, r]
  const void* router;    // [router_rows, r] router_dtype; constants: [router_rows]
  const void* B;         // [ds, q]   B_dtype
  const float* row_scale;
  const float* center;
  void* dy0;             // [N, d]    dtype
  void* drouter;         // as router
  void* dB;              // [ds, q]   B_dtype
  void* workspace;       // adapt_backward_workspace() bytes, 16-byte aligned, not initialised
  float scaling;
  Dtype dtype, router_dtype, B_dtype;
  RouterForm router_form;
  Variant variant;
};

}  // namespace idlora
