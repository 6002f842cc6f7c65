// What all kernels share: number formats, error messages, device properties.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "idlora/problems.h"

namespace idlora::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// An element of a small tensor (router, bias, gradients of parameters) whose dtype is known at run time only.
__device__ __forceinline__ float load_as_float(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float16: return __half2float(static_cast<const __half*>(p)[i]);
    case Dtype::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}
__device__ __forceinline__ void store_from_float(void* p, Dtype dtype, int64_t i, float v) {
  switch (dtype) {
    case Dtype::float16: static_cast<__half*>(p)[i] = __float2half_rn(v); break;
    case Dtype::bfloat16: static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v); break;
    default: static_cast<float*>(p)[i] = v;
  }
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
auto with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float16: return f(__half{});
    case Dtype::bfloat16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}

// A bounded router's weight 1 + tanh(t) for u, from <T, u> and <u, u>, and what its gradient needs.
struct Weight {
  float inverse, t, tanh;  // 1 / rms(u), 4 <T, u> / rms(u)

  __device__ __forceinline__ Weight(float product, float square, int64_t r)
      : inverse(1 / sqrtf(square / static_cast<float>(r) + TINY_SQUARE)), t(ROUTER_GAIN * inverse * product),
        tanh(tanhf(t)) {}
};

// What an x_i gets, a dz + P T + Q u, from that and dt = <dz, u> (1 - tanh^2).
struct WeightGradient {
  float P, Q;

  __device__ __forceinline__ WeightGradient(const Weight& w, float dz_u, int64_t r) {
    const float dt = dz_u * (1 - w.tanh) * (1 + w.tanh);
    P = ROUTER_GAIN * dt * w.inverse;
    Q = -dt * w.t * w.inverse * w.inverse / static_cast<float>(r);
  }
};

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Launches with as much dynamic shared memory as asked for; null, or what went wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return message(cudaGetLastError());
}

struct Device {
  int sms, shared_per_block, l2_bytes, arch;  // arch: 10 * major + minor
};
// Of the current device; asked once a device.
const Device& current_device();

// Entries of the router and of its gradient.
template <class Problem>
__host__ __device__ __forceinline__ int router_size(const Problem& p) {
  return static_cast<int>(p.router_form == RouterForm::constants ? p.router_rows : p.router_rows * p.r);
}

// Whether what adapt keeps is P sum_i x_i or sum_i x_i, and not x as it is.
__device__ __forceinline__ bool keeps_sum(const AdaptProblem& p) { return p.x_clusters == 1 && (p.k > 1 || p.center); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace idlora::cuda
