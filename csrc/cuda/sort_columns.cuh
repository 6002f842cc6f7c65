// The gathered columns in ascending order, so that neighbouring lanes read neighbouring sectors of y0.
#pragma once

#include "common.cuh"

namespace idlora::cuda {

__host__ __device__ constexpr int sort_words(int d) { return (d + 31) / 32; }
__host__ __device__ constexpr size_t sort_bytes(int d) { return (2 * sort_words(d) + 1) * sizeof(uint32_t); }

// Calls put(rank, column, position) for each of the `count` entries: `column` is the rank-th smallest, index[position].
// The entries are distinct, so a column's rank is the number of marked bits before it. All threads of the block call it;
// `scratch` holds sort_bytes(d) and begins with the ranks at columns 0, 32, 64, .. and behind the last; a barrier must come
// before the results are read.
template <class Put>
__device__ void sort_columns(const int32_t* index, int count, int d, uint32_t* scratch, Put&& put) {
  const int words = sort_words(d), lane = threadIdx.x % 32;
  uint32_t *const before = scratch, *const bits = scratch + words + 1;
  for (int w = threadIdx.x; w < words; w += blockDim.x) bits[w] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < count; p += blockDim.x) atomicOr(&bits[index[p] / 32], 1u << index[p] % 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t total = 0;
    for (int w0 = 0; w0 < words; w0 += 32) {
      const uint32_t own = w0 + lane < words ? __popc(bits[w0 + lane]) : 0;
      uint32_t sum = own;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const uint32_t left = __shfl_up_sync(~0u, sum, o);
        if (lane >= o) sum += left;
      }
      if (w0 + lane < words) before[w0 + lane] = total + sum - own;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) before[words] = total;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < count; p += blockDim.x) {
    const int column = index[p];
    put(static_cast<int>(before[column / 32] + __popc(bits[column / 32] & ((1u << column % 32) - 1))), column, p);
  }
}

}  // namespace idlora::cuda
