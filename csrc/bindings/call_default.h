// Back to the default kernels in Python: a native kernel that does not serve its arguments reads
//     return call_default<Tensor>("idlora::default_cluster_gather", y0, index, ...);
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>

namespace idlora {

// Raises what a default kernel has raised since the last call, if anything (module.cpp).
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

}  // namespace idlora
