// What the CUDA runtime knows about the kernels of this module.
#pragma once

#include <string>
#include <vector>

namespace idlora::cuda {

struct KernelResources {
  std::string name;
  int registers, shared_bytes, local_bytes, max_threads;
  int architecture;  // of the code that runs: 10 * major + minor
};

// Of every kernel, on the current device. Throws std::runtime_error where there is none.
std::vector<KernelResources> kernel_resources();

// Why the kernels cannot run on this device (too old a driver, not an architecture that was built), or null. Cached.
const char* unusable(int device);

}  // namespace idlora::cuda
