// The CUDA kernels as torch ops: outputs allocated, device guarded, launched on torch's current stream. Empty in a build
// without CUDA.
#ifdef IDLORA_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call_default.h"
#include "fits.h"
#include "idlora/cuda.h"
#include "resources.h"

// In libtorch_cuda, which a CPU build of torch lacks: the module loads there too, and this stays null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace idlora {
namespace {

const char* unusable(const Tensor& t) { return t.is_cuda() ? cuda::unusable(t.get_device_index()) : "not on a GPU"; }

template <class Problem>
void launch(const char* op, const char* (*kernel)(const Problem&, void*), const Problem& p, const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const char* error = kernel(p, stream);
  STD_TORCH_CHECK(error == nullptr, "idlora::", op, ": ", error);
}

using Guard = torch::stable::accelerator::DeviceGuard;

Tensor cluster_gather(Tensor y0, Tensor index, std::optional<Tensor> bias, std::optional<Tensor> row_scale) {
  GatherProblem p{};
  if (unusable(y0) || !fits(p, y0, index, bias, row_scale))
    return call_default<Tensor>("idlora::default_cluster_gather", y0, index, bias, row_scale);
  Guard guard(y0.get_device_index());
  Tensor x = allocate(y0, leading(y0, {p.k, p.r}));
  p.x = x.mutable_data_ptr();
  launch("cluster_gather", cuda::launch_cluster_gather, p, y0);
  return x;
}

Tensor rb_scale(Tensor x, Tensor router, bool bounded, std::optional<Tensor> center) {
  RbScaleProblem p{};
  if (unusable(x) || !fits(p, x, router, bounded, center))
    return call_default<Tensor>("idlora::default_rb_scale", x, router, bounded, center);
  Guard guard(x.get_device_index());
  Tensor z = allocate(x, leading(x, {p.r}, 2), ScalarType::Float);
  p.z = z.mutable_data_ptr<float>();
  launch("rb_scale", cuda::launch_rb_scale, p, x);
  return z;
}

Tensor shared_gemm(Tensor y0, Tensor z, Tensor B, std::optional<Tensor> bias, double scaling) {
  SharedGemmProblem p{};
  if (unusable(y0) || !fits(p, y0, z, B, bias, scaling))
    return call_default<Tensor>("idlora::default_shared_gemm", y0, z, B, bias, scaling);
  Guard guard(y0.get_device_index());
  Tensor y = allocate(y0, y0.sizes());
  p.y = y.mutable_data_ptr();
  launch("shared_gemm", cuda::launch_shared_gemm, p, y0);
  return y;
}

std::tuple<Tensor, Tensor> adapt(Tensor y0, Tensor index, Tensor router, Tensor B, std::optional<Tensor> bias,
                                 double scaling, bool bias_in_y0, std::optional<Tensor> row_scale, bool bounded,
                                 std::optional<Tensor> center, bool save_x) {
  AdaptProblem p{};
  if (unusable(y0) || !fits(p, y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center))
    return call_default<std::tuple<Tensor, Tensor>>("idlora::default_adapt", y0, index, router, B, bias, scaling,
                                                    bias_in_y0, row_scale, bounded, center, save_x);
  Guard guard(y0.get_device_index());
  Tensor y = allocate(y0, y0.sizes());
  Tensor x = allocate(y0, save_x ? leading(y0, kept_sizes(p)) : std::vector<int64_t>{0});
  p.y = y.mutable_data_ptr();
  p.x = save_x ? x.mutable_data_ptr() : nullptr;
  launch("adapt", cuda::launch_adapt, p, y0);
  return {y, x};
}

std::tuple<Tensor, Tensor, Tensor> adapt_backward(Tensor dy, Tensor x, Tensor index, Tensor router, Tensor B,
                                                  double scaling, std::optional<Tensor> row_scale, bool bounded,
                                                  std::optional<Tensor> center) {
  AdaptBackwardProblem p{};
  if (unusable(dy) || !fits(p, dy, x, index, router, B, scaling, row_scale, bounded, center))
    return call_default<std::tuple<Tensor, Tensor, Tensor>>("idlora::default_adapt_backward", dy, x, index, router, B,
                                                            scaling, row_scale, bounded, center);
  Guard guard(dy.get_device_index());
  Tensor dy0 = allocate(dy, dy.sizes());
  Tensor drouter = allocate(router, router.sizes());
  Tensor dB = allocate(B, B.sizes());
  const auto bytes = static_cast<int64_t>(cuda::adapt_backward_workspace(p));
  Tensor workspace = allocate(dy, {bytes}, ScalarType::Byte);
  p.dy0 = dy0.mutable_data_ptr();
  p.drouter = drouter.mutable_data_ptr();
  p.dB = dB.mutable_data_ptr();
  p.workspace = workspace.mutable_data_ptr();
  launch("adapt_backward", cuda::launch_adapt_backward, p, dy);
  return {dy0, drouter, dB};
}

}  // namespace
}  // namespace idlora

STABLE_TORCH_LIBRARY_IMPL(idlora, CUDA, m) {
  m.impl("cluster_gather", TORCH_BOX(&idlora::cluster_gather));
  m.impl("rb_scale", TORCH_BOX(&idlora::rb_scale));
  m.impl("shared_gemm", TORCH_BOX(&idlora::shared_gemm));
  m.impl("adapt", TORCH_BOX(&idlora::adapt));
  m.impl("adapt_backward", TORCH_BOX(&idlora::adapt_backward));
}

void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("kernel_resources", [] {
    py::list kernels;
    for (const auto& k : idlora::cuda::kernel_resources()) {
      py::dict kernel;
      kernel["name"] = k.name;
      kernel["registers"] = k.registers;
      kernel["shared_bytes"] = k.shared_bytes;
      kernel["local_bytes"] = k.local_bytes;
      kernel["max_threads"] = k.max_threads;
      kernel["architecture"] = k.architecture;
      kernels.append(kernel);
    }
    return kernels;
  }, "Every CUDA kernel's registers, static shared memory and local memory (spills), on the current device.");
  m.def("unusable", [](int device) -> std::optional<std::string> {
    const char* reason = idlora::cuda::unusable(device);
    return reason ? std::optional<std::string>(reason) : std::nullopt;
  }, "Why the CUDA kernels cannot run on this device, or None.");
}
#endif  // IDLORA_CUDA
