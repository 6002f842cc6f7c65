// Which instruction set runs.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace idlora::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  const char* name;
  bool bfloat16_products;  // the processor's, which the caller's matrix product uses
};

Choice choose() {
  const Choice baseline{&baseline::kernels, "baseline", false};
#ifdef IDLORA_X86
  const char* const asked = std::getenv("IDLORA_CPU_CAPABILITY");
  const bool at_most_avx2 = asked && std::strcmp(asked, "avx2") == 0;
  if (asked && std::strcmp(asked, "baseline") == 0) return baseline;
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && !at_most_avx2) return {&avx512::kernels, "avx512", bool(__builtin_cpu_supports("avx512bf16"))};
  if (avx2) return {&avx2::kernels, "avx2", false};
#endif
  return baseline;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const char* capability() { return chosen().name; }

// Measured on a Zen 4: torch's product takes some 15 microseconds to start and is then twice as fast; but in the
// forward pass y is read and written once more for it, which a narrow or shallow product does not make up for.
bool prefers_gemm_backward(Dtype dtype, int64_t N, int64_t d, int64_t q) {
  return dtype == Dtype::bfloat16 && chosen().bfloat16_products && N * d * q >= 4 << 20;
}
bool prefers_gemm_forward(Dtype dtype, int64_t N, int64_t d, int64_t q) {
  return prefers_gemm_backward(dtype, N, d, q) && d >= 1024 && q >= 32;
}

void cluster_gather(const GatherProblem& p, const Parallel& parallel) { chosen().kernels->cluster_gather(p, parallel); }
void rb_scale(const RbScaleProblem& p, const Parallel& parallel) { chosen().kernels->rb_scale(p, parallel); }
void shared_gemm(const SharedGemmProblem& p, const Parallel& parallel) {
  chosen().kernels->shared_gemm(p, true, parallel);
}
void shared_gemm_before_gemm(const SharedGemmProblem& p, const Parallel& parallel) {
  chosen().kernels->shared_gemm(p, false, parallel);
}
void adapt(const AdaptProblem& p, const Parallel& parallel) { chosen().kernels->adapt(p, nullptr, parallel); }
void adapt_before_gemm(const AdaptProblem& p, float* z, const Parallel& parallel) {
  chosen().kernels->adapt(p, z, parallel);
}
void adapt_backward(const AdaptBackwardProblem& p, const Parallel& parallel) {
  chosen().kernels->adapt_backward(p, nullptr, parallel);
}
void adapt_backward_after_gemm(const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel) {
  chosen().kernels->adapt_backward(p, dz, parallel);
}

}  // namespace idlora::cpu
