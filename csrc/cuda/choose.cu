// Which kernel serves a problem: plain, or tensor cores for prefill or decode.
#include "common.cuh"
#include "idlora/cuda.h"
#include "variants.h"

namespace idlora::cuda {
namespace {

constexpr int64_t DECODE_TOKENS = 64;
constexpr int MAX_DEVICES = 64;

const char* const DOES_NOT_FIT =
    "this variant needs float16 or bfloat16, sm_80 or later, rows of y0, B and x that start on 16 bytes, parts of B "
    "and y0 that are multiples of 8 elements, and shared memory for its tile; use Variant::automatic";

}  // namespace

const Device& current_device() {
  static Device devices[MAX_DEVICES];  // zero, then the same values whoever writes them
  int id = 0;
  cudaGetDevice(&id);
  Device& device = devices[id % MAX_DEVICES];
  if (device.arch == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, id);
    cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&device.l2_bytes, cudaDevAttrL2CacheSize, id);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    device.arch = 10 * major + minor;
  }
  return device;
}

Variant choose(const SharedGemmProblem& p) {
  if (p.variant != Variant::automatic) return p.variant;
  return fits_prefill(p) ? Variant::prefill : Variant::plain;
}

Variant choose(const AdaptProblem& p) {
  if (p.variant != Variant::automatic) return p.variant;
  if (p.N <= DECODE_TOKENS && fits_decode(p)) return Variant::decode;
  return fits_prefill(p) ? Variant::prefill : Variant::plain;
}

Variant choose(const AdaptBackwardProblem& p) {
  if (p.variant != Variant::automatic) return p.variant;
  return fits_tensor(p) ? Variant::prefill : Variant::plain;
}

const char* launch_shared_gemm(const SharedGemmProblem& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.N == 0) return nullptr;
  if (choose(p) == Variant::plain) return plain_shared_gemm(p, s);
  return fits_prefill(p) ? prefill_shared_gemm(p, s) : DOES_NOT_FIT;
}

const char* launch_adapt(const AdaptProblem& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.N == 0) return nullptr;
  switch (choose(p)) {
    case Variant::plain: return plain_adapt(p, s);
    case Variant::decode: return fits_decode(p) ? decode_adapt(p, s) : DOES_NOT_FIT;
    default: return fits_prefill(p) ? prefill_adapt(p, s) : DOES_NOT_FIT;
  }
}

const char* launch_adapt_backward(const AdaptBackwardProblem& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (choose(p) == Variant::plain) return plain_adapt_backward(p, s);
  return fits_tensor(p) ? tensor_adapt_backward(p, s) : DOES_NOT_FIT;
}

size_t adapt_backward_workspace(const AdaptBackwardProblem& p) {
  return choose(p) == Variant::plain ? plain_adapt_backward_workspace(p) : tensor_adapt_backward_workspace(p);
}

}  // namespace idlora::cuda
