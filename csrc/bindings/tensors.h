// Tensors through torch's stable interface: new ones, and checks of those that a kernel is given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "idlora/problems.h"

namespace idlora {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

  // [2, r] float32 beside a router that is not linear, or none.
  template <class Problem>
  Check& center(std::optional<Tensor>& t, const Problem& p) {
    if (!t || !require(p.router_form != RouterForm::linear && t->scalar_type() == ScalarType::Float)) return *this;
    return tensor(*t, {2, p.r});
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

}  // namespace idlora
