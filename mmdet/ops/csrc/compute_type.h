// In which dtype kernels compute.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmdet {

// float64 if an input is, else float32, whatever half precision they have.
template <typename... Inputs>
at::ScalarType compute_type(const Inputs&... inputs) {
  return ((inputs.scalar_type() == at::kDouble) || ...) ? at::kDouble : at::kFloat;
}

}  // namespace mmdet
