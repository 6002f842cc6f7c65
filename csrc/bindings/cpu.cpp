// The CPU kernels as torch ops.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "call_default.h"
#include "fits.h"
#include "idlora/cpu.h"

namespace idlora {
namespace {

using torch::stable::transpose;

cpu::Parallel torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// out = beta * out + alpha * A B, by torch's own product.
void addmm(Tensor& out, double beta, double alpha, const Tensor& A, const Tensor& B) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), A.get(), B.get(), beta, alpha));
}

// t as a contiguous matrix of `columns` columns; in another dtype, a copy.
Tensor matrix(const Tensor& t, int64_t columns) { return torch::stable::view(t, {t.numel() / columns, columns}); }
Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// y [N, d] += scaling * concat_j(z^(j) B^T): on [N * s, d/s] and [N * s, r/s] it is one product.
void add_product(Tensor& y, const Tensor& z, const Tensor& B, double scaling) {
  const ScalarType dtype = y.scalar_type();
  Tensor parts = matrix(y, B.size(0));
  addmm(parts, 1, scaling, in_dtype(matrix(z, B.size(1)), dtype), transpose(in_dtype(B, dtype), 0, 1));
}

Tensor cluster_gather(Tensor y0, Tensor index, std::optional<Tensor> bias, std::optional<Tensor> row_scale) {
  GatherProblem p{};
  if (!fits(p, y0, index, bias, row_scale))
    return call_default<Tensor>("idlora::default_cluster_gather", y0, index, bias, row_scale);
  Tensor x = allocate(y0, leading(y0, {p.k, p.r}));
  p.x = x.mutable_data_ptr();
  cpu::cluster_gather(p, torch_threads());
  return x;
}

Tensor rb_scale(Tensor x, Tensor router, bool bounded, std::optional<Tensor> center) {
  RbScaleProblem p{};
  if (!fits(p, x, router, bounded, center))
    return call_default<Tensor>("idlora::default_rb_scale", x, router, bounded, center);
  Tensor z = allocate(x, leading(x, {p.r}, 2), ScalarType::Float);
  p.z = z.mutable_data_ptr<float>();
  cpu::rb_scale(p, torch_threads());
  return z;
}

Tensor shared_gemm(Tensor y0, Tensor z, Tensor B, std::optional<Tensor> bias, double scaling) {
  SharedGemmProblem p{};
  if (!fits(p, y0, z, B, bias, scaling))
    return call_default<Tensor>("idlora::default_shared_gemm", y0, z, B, bias, scaling);
  Tensor y = allocate(y0, y0.sizes());
  p.y = y.mutable_data_ptr();
  if (cpu::prefers_gemm_forward(p.dtype, p.N, p.d, p.r / p.s)) {
    cpu::shared_gemm_before_gemm(p, torch_threads());
    add_product(y, z, B, scaling);
  } else {
    cpu::shared_gemm(p, torch_threads());
  }
  return y;
}

// y may be y0 itself: what a token's z is made of is read before anything of that token is written.
void adapt_into(Tensor& y, AdaptProblem& p, const Tensor& B) {
  p.y = y.mutable_data_ptr();
  if (cpu::prefers_gemm_forward(p.dtype, p.N, p.d, p.r / p.s)) {
    Tensor z = allocate(y, {p.N, p.r}, ScalarType::Float);
    cpu::adapt_before_gemm(p, z.mutable_data_ptr<float>(), torch_threads());
    add_product(y, z, B, p.scaling);
  } else {
    cpu::adapt(p, torch_threads());
  }
}

std::tuple<Tensor, Tensor> adapt(Tensor y0, Tensor index, Tensor router, Tensor B, std::optional<Tensor> bias,
                                 double scaling, bool bias_in_y0, std::optional<Tensor> row_scale, bool bounded,
                                 std::optional<Tensor> center, bool save_x) {
  AdaptProblem p{};
  if (!fits(p, y0, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center))
    return call_default<std::tuple<Tensor, Tensor>>("idlora::default_adapt", y0, index, router, B, bias, scaling,
                                                    bias_in_y0, row_scale, bounded, center, save_x);
  Tensor y = allocate(y0, y0.sizes());
  Tensor x = allocate(y0, save_x ? leading(y0, kept_sizes(p)) : std::vector<int64_t>{0});
  p.x = save_x ? x.mutable_data_ptr() : nullptr;
  adapt_into(y, p, B);
  return {y, x};
}

void adapt_(Tensor y0, Tensor index, Tensor router, Tensor B, std::optional<Tensor> bias, double scaling,
            bool bias_in_y0, std::optional<Tensor> row_scale, bool bounded, std::optional<Tensor> center) {
  AdaptProblem p{};
  Tensor y = y0.is_contiguous() ? y0 : torch::stable::contiguous(y0);
  if (!fits(p, y, index, router, B, bias, scaling, bias_in_y0, row_scale, bounded, center))
    return call_default<void>("idlora::default_adapt_", y0, index, router, B, bias, scaling, bias_in_y0, row_scale,
                              bounded, center);
  adapt_into(y, p, B);
  if (y.get() != y0.get()) torch::stable::copy_(y0, y);
}

std::tuple<Tensor, Tensor, Tensor> adapt_backward(Tensor dy, Tensor x, Tensor index, Tensor router, Tensor B,
                                                  double scaling, std::optional<Tensor> row_scale, bool bounded,
                                                  std::optional<Tensor> center) {
  AdaptBackwardProblem p{};
  if (!fits(p, dy, x, index, router, B, scaling, row_scale, bounded, center))
    return call_default<std::tuple<Tensor, Tensor, Tensor>>("idlora::default_adapt_backward", dy, x, index, router, B,
                                                            scaling, row_scale, bounded, center);
  Tensor dy0 = allocate(dy, dy.sizes()), drouter = allocate(router, router.sizes()), dB = allocate(B, B.sizes());
  p.dy0 = dy0.mutable_data_ptr();
  p.drouter = drouter.mutable_data_ptr();
  p.dB = dB.mutable_data_ptr();
  const int64_t ds = B.size(0), q = B.size(1);
  if (dy.is_contiguous() && cpu::prefers_gemm_backward(p.dtype, p.N, p.d, q)) {
    const ScalarType dtype = dy.scalar_type();
    const Tensor parts = matrix(dy, ds);
    Tensor dz = allocate(dy, {p.N * p.s, q}), narrow_dB = B.scalar_type() == dtype ? dB : allocate(dy, {ds, q});
    addmm(dz, 0, scaling, parts, in_dtype(B, dtype));
    const auto not_yet = p.x_clusters > 1 ? center : std::nullopt;  // else x is the sum, and centred
    const Tensor z =
        in_dtype(rb_scale(torch::stable::view(x, {p.N, p.x_clusters, p.r}), router, bounded, not_yet), dtype);
    addmm(narrow_dB, 0, scaling, transpose(parts, 0, 1), matrix(z, q));
    if (B.scalar_type() != dtype) dB = in_dtype(narrow_dB, B.scalar_type());
    cpu::adapt_backward_after_gemm(p, dz.const_data_ptr(), torch_threads());
  } else {
    cpu::adapt_backward(p, torch_threads());
  }
  return {dy0, drouter, dB};
}

}  // namespace
}  // namespace idlora

STABLE_TORCH_LIBRARY_IMPL(idlora, CPU, m) {
  m.impl("cluster_gather", TORCH_BOX(&idlora::cluster_gather));
  m.impl("rb_scale", TORCH_BOX(&idlora::rb_scale));
  m.impl("shared_gemm", TORCH_BOX(&idlora::shared_gemm));
  m.impl("adapt", TORCH_BOX(&idlora::adapt));
  m.impl("adapt_", TORCH_BOX(&idlora::adapt_));
  m.impl("adapt_backward", TORCH_BOX(&idlora::adapt_backward));
}
