// From tensors to problem structs, and back to the default kernels: what the bindings of CPU and CUDA share.
//
// A native kernel reads
//     if (!fits(p, y0, index, ...)) return call_default<Tensor>("idlora::default_cluster_gather", y0, index, ...);
// Whatever it does not serve goes to the default kernel in Python: float64, and wrong arguments, for which that kernel
// raises the error that names op and argument. So `fits` only answers yes or no.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "idlora/problems.h"

namespace idlora {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- back to the default kernels ------------------------------------------------------------------------------------

// Raises what a default kernel has raised since the last call, if anything (bindings.cpp).
void raise_kept();

template <class Result>
struct Unbox {
  static constexpr size_t count = 1;
  static Result from(StableIValue* stack) { return torch::stable::detail::to<Result>(stack[0]); }
};
template <class... Results>
struct Unbox<std::tuple<Results...>> {
  static constexpr size_t count = sizeof...(Results);
  static std::tuple<Results...> from(StableIValue* stack) {
    return torch::stable::detail::unbox_to_tuple<Results...>(stack);
  }
};

template <>
struct Unbox<void> {
  static constexpr size_t count = 0;
};

template <class Result, class... Arguments>
Result call_default(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), Unbox<Result>::count)> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (std::is_void_v<Result>) {
    raise_kept();
  } else {
    Result result = Unbox<Result>::from(stack.data());
    raise_kept();
    return result;
  }
}

// ---- tensors --------------------------------------------------------------------------------------------------------

inline std::optional<Dtype> native_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: return std::nullopt;
  }
}

// A new tensor on the device of t, by default in its dtype. Not torch::stable::new_empty, whose way through the
// dispatcher is felt in every layer of every decoded token.
inline Tensor allocate(const Tensor& t, Sizes sizes, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = strides.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const auto number = torch::stable::detail::from(dtype.value_or(t.scalar_type()));
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(number), device_type, device_index,
                                                  &result));
  return Tensor(result);
}

// The leading dimensions of t, but its last `dropped` ones, and then `last`.
inline std::vector<int64_t> leading(const Tensor& t, Sizes last, int64_t dropped = 1) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end() - dropped);
  sizes.insert(sizes.end(), last.begin(), last.end());
  return sizes;
}

// Checks arguments one after the other; once one does not fit, none does.
class Check {
 public:
  // t: the activation, [..., at least `dims` dimensions].
  Check(const Tensor& t, int64_t dims, Dtype& dtype) : device_(t.device()) {
    const auto native = native_dtype(t);
    ok_ = t.dim() >= dims && native.has_value();
    if (ok_) dtype_ = dtype = *native;
  }

  explicit operator bool() const { return ok_; }
  Check& require(bool condition) {
    ok_ = ok_ && condition;
    return *this;
  }

  // Of these sizes on the activation's device, in its dtype or float32. Made contiguous.
  Check& parameter(Tensor& t, Sizes sizes, Dtype& dtype) {
    const auto native = ok_ ? native_dtype(t) : std::nullopt;
    require(native && (*native == dtype_ || *native == Dtype::float32));
    if (ok_) dtype = *native;
    return tensor(t, sizes);
  }
  Check& parameter(std::optional<Tensor>& t, Sizes sizes, Dtype& dtype) {
    return t ? parameter(*t, sizes, dtype) : *this;
  }

  // [k, r] int32 with k * r <= d.
  Check& index(Tensor& t, int64_t d, int64_t& k, int64_t& r) {
    if (!require(t.scalar_type() == ScalarType::Int && t.dim() == 2)) return *this;
    k = t.size(0), r = t.size(1);
    return require(k >= 1 && r >= 1 && k * r <= d).tensor(t, {k, r});
  }

  // [k, r] float32, or none.
  Check& row_scale(std::optional<Tensor>& t, int64_t k, int64_t r) {
    return t ? require(t->scalar_type() == ScalarType::Float).tensor(*t, {k, r}) : *this;
  }

  // [k, r], or [1, r] for all clusters, as a bounded one is; static: [k], or [1].
  template <class Problem>
  Check& router(Tensor& t, Problem& p, bool bounded) {
    if (!require(!bounded || (t.dim() == 2 && t.size(0) == 1))) return *this;
    if (!require((t.dim() == 1 || t.dim() == 2) && (t.size(0) == p.k || t.size(0) == 1))) return *this;
    p.router_rows = t.size(0);
    p.router_form = bounded ? RouterForm::bounded : t.dim() == 1 ? RouterForm::constants : RouterForm::linear;
    return t.dim() == 1 ? parameter(t, {p.router_rows}, p.router_dtype)
                           : parameter(t, {p.router_rows, p.r}, p.router_dtype);
  }

  // [d/s, r/s] for one s.
  Check& B(Tensor& t, int64_t d, int64_t r, int64_t& s, Dtype& dtype) {
    if (!require(t.dim() == 2 && t.size(1) >= 1 && r >= 1 && r % t.size(1) == 0)) return *this;
    s = r / t.size(1);
    return require(t.size(0) * s == d).parameter(t, {t.size(0), t.size(1)}, dtype);
  }

  // Of these sizes on the activation's device. Made contiguous.
  Check& tensor(Tensor& t, Sizes sizes) {
    require(t.sizes().equals(sizes) && t.device() == device_);
    if (ok_ && !t.is_contiguous()) t = torch::stable::contiguous(t);
    return *this;
  }

  // The leading dimensions of t [..., d] as one: N rows, `stride` elements apart, of d >= 1. Copied where that takes
  // more than one stride.
  Check& rows(Tensor& t, int64_t& N, int64_t& d, int64_t& stride) {
    if (!require(t.dim() >= 1)) return *this;
    d = t.size(-1);
    if (!require(d >= 1 && d <= std::numeric_limits<int32_t>::max())) return *this;
    N = t.numel() / d;
    const auto sizes = t.sizes(), strides = t.strides();
    bool regular = strides.back() == 1 || d == 1;
    stride = d;
    std::optional<int64_t> expected;  // stride of the next dimension outwards
    for (int64_t i = t.dim() - 2; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (!expected) expected = stride = strides[i];
      regular = regular && strides[i] == *expected;
      *expected *= sizes[i];
    }
    if (!regular && N > 0) t = torch::stable::contiguous(t), stride = d;
    return *this;
  }

 private:
  bool ok_ = false;
  Dtype dtype_ = Dtype::float32;
  torch::stable::Device device_;
};

// ---- problems -------------------------------------------------------------------------------------------------------

// Whether of x its sum over the clusters is kept: with one weight for all of them. Then the last dimensions of what is
// kept are [r], else [k, r].
template <class Problem>
bool keeps_sum(const Problem& p) {
  return p.router_form == RouterForm::bounded || (p.router_form == RouterForm::constants && p.router_rows == 1);
}

inline const float* data(const std::optional<Tensor>& row_scale) {
  return row_scale ? row_scale->const_data_ptr<float>() : nullptr;
}
template <class Problem>
std::vector<int64_t> kept_sizes(const Problem& p) {
  return keeps_sum(p) ? std::vector<int64_t>{p.r} : std::vector<int64_t>{p.k, p.r};
}

// Whether the native kernels serve these arguments; fills everything in p but the outputs. Tensors that the kernels
// cannot read as they are are replaced by contiguous copies, which the caller keeps alive.

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

inline bool fits(RbScaleProblem& p, Tensor& x, Tensor& router, bool bounded) {
  Check check(x, 2, p.dtype);
  if (!check) return false;
  p.k = x.size(-2), p.r = x.size(-1);
  check.require(p.k >= 1 && p.r >= 1 && p.k * p.r <= std::numeric_limits<int32_t>::max());
  if (!check.tensor(x, x.sizes()).router(router, p, bounded)) return false;
  p.N = x.numel() / (p.k * p.r);
  p.x = x.const_data_ptr();
  p.router = router.const_data_ptr();
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
                 double scaling, bool bias_in_y0, std::optional<Tensor>& row_scale, bool bounded) {
  Check check(y0, 1, p.dtype);
  check.require(bias || !bias_in_y0).rows(y0, p.N, p.d, p.y0_stride).index(index, p.d, p.k, p.r);
  check.router(router, p, bounded).B(B, p.d, p.r, p.s, p.B_dtype);
  if (!check.parameter(bias, {p.d}, p.bias_dtype).row_scale(row_scale, p.k, p.r)) return false;
  p.x_clusters = keeps_sum(p) ? 1 : p.k;
  p.y0 = y0.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.router = router.const_data_ptr();
  p.B = B.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.row_scale = data(row_scale);
  p.scaling = scaling;
  p.bias_in_y0 = bias_in_y0;
  p.variant = Variant::automatic;
  return true;
}

inline bool fits(AdaptBackwardProblem& p, Tensor& dy, Tensor& x, Tensor& index, Tensor& router, Tensor& B,
                 double scaling, std::optional<Tensor>& row_scale, bool bounded) {
  Check check(dy, 1, p.dtype);
  check.require(x.scalar_type() == dy.scalar_type()).rows(dy, p.N, p.d, p.dy_stride).index(index, p.d, p.k, p.r);
  if (!check || !check.router(router, p, bounded) || !check.tensor(x, leading(dy, kept_sizes(p)))) return false;
  if (!check.B(B, p.d, p.r, p.s, p.B_dtype).row_scale(row_scale, p.k, p.r)) return false;
  p.x_clusters = keeps_sum(p) ? 1 : p.k;
  p.dy = dy.const_data_ptr();
  p.x = x.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.router = router.const_data_ptr();
  p.B = B.const_data_ptr();
  p.row_scale = data(row_scale);
  p.scaling = scaling;
  p.variant = Variant::automatic;
  return true;
}

}  // namespace idlora
