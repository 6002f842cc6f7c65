// The C library alone: a small adapt on the CPU and, where there is a GPU or the simulator, on CUDA, against the equations.
#include <cmath>
#include <cstdio>
#include <vector>

#include "idlora/problems.h"
#ifdef IDLORA_CUDA
#include <cuda_runtime_api.h>
#endif

using idlora::AdaptProblem;

extern "C" {
size_t idlora_sizeof(const char* name);
void idlora_cpu_adapt(const AdaptProblem* p);
const char* idlora_adapt(const AdaptProblem* p, void* stream);
}

namespace {

constexpr int N = 5, d = 24, k = 3, r = 4, s = 2;

// Well spread numbers in [-1, 1).
std::vector<float> numbers(size_t count, uint32_t seed) {
  std::vector<float> v(count);
  for (float& x : v) x = static_cast<int32_t>(seed = seed * 1664525u + 1013904223u) / 2147483648.0f;
  return v;
}

bool close(const std::vector<float>& y, const std::vector<double>& expected, const char* where) {
  double error = 0;
  for (size_t i = 0; i < y.size(); ++i) error = std::fmax(error, std::fabs(y[i] - expected[i]));
  std::printf("%s: largest error %.1e\n", where, error);
  return error < 1e-5;
}

}  // namespace

int main() {
  const auto y0 = numbers(N * d, 1), T = numbers(k * r, 2), B = numbers(d / s * (r / s), 3);
  std::vector<int32_t> index(k * r);
  for (int i = 0; i < k * r; ++i) index[i] = (7 * i + 3) % d;  // distinct: 7 and d have no common factor

  std::vector<double> expected(y0.begin(), y0.end());
  for (int n = 0; n < N; ++n) {
    double z[r] = {};
    for (int i = 0; i < k; ++i) {
      double a = 0;
      for (int j = 0; j < r; ++j) a += double(T[i * r + j]) * y0[n * d + index[i * r + j]];
      for (int j = 0; j < r; ++j) z[j] += a * y0[n * d + index[i * r + j]];
    }
    for (int column = 0; column < d; ++column)
      for (int j = 0; j < r / s; ++j)
        expected[n * d + column] += 0.7 * B[column % (d / s) * (r / s) + j] * z[column / (d / s) * (r / s) + j];
  }

  std::vector<float> y(N * d);
  AdaptProblem p{};
  p.N = N, p.d = d, p.k = k, p.r = r, p.s = s, p.router_rows = p.x_clusters = k, p.y0_stride = d, p.scaling = 0.7;
  p.y0 = y0.data(), p.index = index.data(), p.router = T.data(), p.B = B.data(), p.y = y.data();
  if (idlora_sizeof("AdaptProblem") != sizeof p) return 1;
  idlora_cpu_adapt(&p);
  bool ok = close(y, expected, "CPU");

#ifdef IDLORA_CUDA
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("CUDA: no GPU");
    return ok ? 0 : 1;
  }
  const auto to_device = [](const void* data, size_t bytes) {
    void* copy = nullptr;
    cudaMalloc(&copy, bytes);
    cudaMemcpy(copy, data, bytes, cudaMemcpyHostToDevice);
    return copy;
  };
  p.y0 = to_device(y0.data(), N * d * sizeof(float));
  p.index = static_cast<int32_t*>(to_device(index.data(), k * r * sizeof(int32_t)));
  p.router = to_device(T.data(), T.size() * sizeof(float));
  p.B = to_device(B.data(), B.size() * sizeof(float));
  p.y = to_device(std::vector<float>(N * d).data(), N * d * sizeof(float));
  const char* error = idlora_adapt(&p, nullptr);
  if (!error && cudaMemcpy(y.data(), p.y, N * d * sizeof(float), cudaMemcpyDeviceToHost) != cudaSuccess)
    error = cudaGetErrorString(cudaGetLastError());
  if (error) std::printf("CUDA: %s\n", error);
  ok = ok && !error && close(y, expected, "CUDA");
#endif
  return ok ? 0 : 1;
}
