// The list of the kernels that this module ships, and what the CUDA runtime says about them.
#include "resources.h"

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace idlora::cuda {
namespace {

struct Kernel {
  const char* name;
  const void* function;
};
std::vector<Kernel>& kernels() {
  static std::vector<Kernel> list;
  return list;
}

std::string demangle(const char* name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? readable : name;
  std::free(readable);
  return result;
}

constexpr int MAX_DEVICES = 64;

}  // namespace

std::vector<KernelResources> kernel_resources() {
  std::vector<KernelResources> list;
  for (const Kernel& kernel : kernels()) {
    cudaFuncAttributes a;
    const cudaError_t error = cudaFuncGetAttributes(&a, kernel.function);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    list.push_back({demangle(kernel.name), a.numRegs, static_cast<int>(a.sharedSizeBytes),
                    static_cast<int>(a.localSizeBytes), a.maxThreadsPerBlock, a.binaryVersion});
  }
  return list;
}

const char* unusable(int device) {
  static const char* reasons[MAX_DEVICES];
  static std::atomic<bool> asked[MAX_DEVICES];  // whoever asks first, the answer is the same
  if (device < 0 || device >= MAX_DEVICES) return "more devices than expected";
  if (!asked[device]) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
      cudaFuncAttributes attributes;
      error = cudaFuncGetAttributes(&attributes, kernels().front().function);
      cudaSetDevice(current);
    }
    cudaGetLastError();
    reasons[device] = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    asked[device] = true;
  }
  return reasons[device];
}

}  // namespace idlora::cuda

// nvcc has every kernel register itself when the module loads. The linker (--wrap) leads these calls here first, so the
// list above is what ships and nobody has to keep it.
extern "C" {
void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
void __wrap___cudaRegisterFunction(void** module, const char* function, char* device_function, const char* name,
                                   int thread_limit, uint3* tid, uint3* bid, dim3* block, dim3* grid, int* warp_size) {
  idlora::cuda::kernels().push_back({name, function});
  __real___cudaRegisterFunction(module, function, device_function, name, thread_limit, tid, bid, block, grid,
                                warp_size);
}
}
