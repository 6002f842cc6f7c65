// From tensors to problem structs. fits(p, tensors ...) is whether the native kernels serve these arguments; it fills
// everything in p but the outputs. Tensors that the kernels cannot read as they are are replaced by contiguous copies,
// which the caller keeps alive.
//
// What does not fit goes to the default kernel: float64, and wrong arguments, for which that kernel raises the error
// that names op and argument. So `fits` only answers yes or no.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "idlora/problems.h"
#include "tensors.h"

namespace idlora {

// Whether of x its sum over the clusters is kept: with one weight for all of them. Then the last dimensions of what is
// kept are [r], else [k, r].
template <class Problem>
bool keeps_sum(const Problem& p) {
  return p.router_form == RouterForm::bounded || (p.router_form == RouterForm::constants && p.router_rows == 1);
}

inline const float* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }
template <class Problem>
std::vector<int64_t> kept_sizes(const Problem& p) {
  return keeps_sum(p) ? std::vector<int64_t>{p.r} : std::vector<int64_t>{p.k, p.r};
}

inline bool fits(GatherProblem& p, Tensor& y0, Tensor& index, std::optional<Tensor>& bias,
                 std::optional<Tensor>& row_scale) {
  Check check(y0, 1, p.dtype);
  check.rows(y0, p.N, p.d, p.y0_stride).index(index, p.d, p.k, p.r).parameter(bias, {p.d}, p.bias_dtype);
  if (!check.row_scale(row_scale, p.k, p.r)) return false;
  p.y0 = y0.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.row_scale = data(row_scale);
  return true;
}

inline bool fits(RbScaleProblem& p, Tensor& x, Tensor& router, bool bounded, std::optional<Tensor>& center) {
  Check check(x, 2, p.dtype);
  if (!check) return false;
  p.k = x.size(-2), p.r = x.size(-1);
  check.require(p.k >= 1 && p.r >= 1 && p.k * p.r <= std::numeric_limits<int32_t>::max());
  if (!check.tensor(x, x.sizes()).router(router, p, bounded).center(center, p)) return false;
  p.N = x.numel() / (p.k * p.r);
  p.x = x.const_data_ptr();
  p.router = router.const_data_ptr();
  p.center = data(center);
  return true;
}

inline bool fits(SharedGemmProblem& p, Tensor& y0, Tensor& z, Tensor& B, std::optional<Tensor>& bias, double scaling) {
  Check check(y0, 1, p.dtype);
  if (!check.require(z.dim() == y0.dim() && z.scalar_type() == ScalarType::Float)) return false;
  p.r = z.size(-1);
  check.rows(y0, p.N, p.d, p.y0_stride).tensor(z, leading(y0, {p.r})).B(B, p.d, p.r, p.s, p.B_dtype);
  if (!check.parameter(bias, {p.d}, p.bias_dtype)) return false;
  p.y0 = y0.const_data_ptr();
  p.z = z.const_data_ptr<float>();
  p.B = B.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.scaling = scaling;
  p.variant = Variant::automatic;
  return true;
}

inline bool fits(AdaptProblem& p, Tensor& y0, Tensor& index, Tensor& router, Tensor& B, std::optional<Tensor>& bias,
                 double scaling, bool bias_in_y0, std::optional<Tensor>& row_scale, bool bounded,
                 std::optional<Tensor>& center) {
  Check check(y0, 1, p.dtype);
  check.require(bias || !bias_in_y0).rows(y0, p.N, p.d, p.y0_stride).index(index, p.d, p.k, p.r);
  check.router(router, p, bounded).center(center, p).B(B, p.d, p.r, p.s, p.B_dtype);
  if (!check.parameter(bias, {p.d}, p.bias_dtype).row_scale(row_scale, p.k, p.r)) return false;
  p.x_clusters = keeps_sum(p) ? 1 : p.k;
  p.y0 = y0.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.router = router.const_data_ptr();
  p.B = B.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.row_scale = data(row_scale);
  p.center = data(center);
  p.scaling = scaling;
  p.bias_in_y0 = bias_in_y0;
  p.variant = Variant::automatic;
  return true;
}

inline bool fits(AdaptBackwardProblem& p, Tensor& dy, Tensor& x, Tensor& index, Tensor& router, Tensor& B,
                 double scaling, std::optional<Tensor>& row_scale, bool bounded, std::optional<Tensor>& center) {
  Check check(dy, 1, p.dtype);
  check.require(x.scalar_type() == dy.scalar_type()).rows(dy, p.N, p.d, p.dy_stride).index(index, p.d, p.k, p.r);
  if (!check || !check.router(router, p, bounded) || !check.tensor(x, leading(dy, kept_sizes(p)))) return false;
  if (!check.B(B, p.d, p.r, p.s, p.B_dtype).row_scale(row_scale, p.k, p.r).center(center, p)) return false;
  p.x_clusters = keeps_sum(p) ? 1 : p.k;
  p.dy = dy.const_data_ptr();
  p.x = x.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.router = router.const_data_ptr();
  p.B = B.const_data_ptr();
  p.row_scale = data(row_scale);
  p.center = data(center);
  p.scaling = scaling;
  p.variant = Variant::automatic;
  return true;
}

}  // namespace idlora
