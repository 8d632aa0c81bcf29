// Checks and layout of the global context ops that the CPU and the CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <optional>

#include "compute_type.h"
#include "divide.h"
#include "layout.h"

namespace mmdet {

// `to` is dispatched even if there is nothing to do.
inline at::Tensor cast(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// (N, C) in the computing type, undefined where there is none.
inline at::Tensor per_channel(const std::optional<at::Tensor>& given, at::ScalarType type) {
  return given ? cast(*given, type).contiguous() : at::Tensor();
}

// A gradient in the dtype and the sizes of what it belongs to.
inline at::Tensor like(const at::Tensor& grad, const at::Tensor& given) {
  const auto part = cast(grad, given.scalar_type());
  return part.sym_sizes() == given.sym_sizes() ? part : part.view_symint(given.sym_sizes());
}

inline void check_feature_map(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be (N, C, H, W), got ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op, ": x must be floating point, got ", x.scalar_type());
}

inline c10::DimVector without_ones(at::IntArrayRef sizes) {
  c10::DimVector kept;
  std::copy_if(sizes.begin(), sizes.end(), std::back_inserter(kept), [](int64_t size) { return size != 1; });
  return kept;
}

// With `parameter` sizes of 1 do not count: the weight of a 1x1 convolution is a matrix.
inline void check_operand(
    const char* op, const char* name, const at::Tensor& operand, const at::Tensor& x, at::IntArrayRef sizes,
    bool parameter = false) {
  const bool fits =
      operand.sizes() == sizes || (parameter && without_ones(operand.sizes()) == without_ones(sizes));
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must be ", sizes, ", got ", operand.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(operand.scalar_type()), op, ": ", name, " must be floating point, got ",
      operand.scalar_type());
  TORCH_CHECK_VALUE(
      operand.device() == x.device(), op, ": x is on ", x.device(), " but ", name, " on ", operand.device());
}

inline void check_context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_feature_map("context_pool", x);
  check_operand("context_pool", "weight", weight, x, {x.size(1)}, true);
  check_operand("context_pool", "bias", bias, x, {1});
}

inline void check_context_transform(
    const at::Tensor& context, const at::Tensor& first_weight, const at::Tensor& first_bias,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& last_weight,
    const at::Tensor& last_bias) {
  const char* op = "context_transform";
  TORCH_CHECK_VALUE(context.dim() == 2, op, ": context must be (N, C), got ", context.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(context.scalar_type()), op, ": context must be floating point, got ", context.scalar_type());
  const int64_t channels = context.size(1), planes = first_weight.size(0);
  TORCH_CHECK_VALUE(planes > 0, op, ": first_weight must have a row at least, got ", first_weight.sizes());
  check_operand(op, "first_weight", first_weight, context, {planes, channels}, true);
  check_operand(op, "first_bias", first_bias, context, {planes});
  check_operand(op, "norm_weight", norm_weight, context, {planes}, true);
  check_operand(op, "norm_bias", norm_bias, context, {planes}, true);
  check_operand(op, "last_weight", last_weight, context, {channels, planes}, true);
  check_operand(op, "last_bias", last_bias, context, {channels});
}

inline void check_context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& identity) {
  check_feature_map("context_fuse", x);
  if (scale) {
    check_operand("context_fuse", "scale", *scale, x, {x.size(0), x.size(1)});
  }
  if (shift) {
    check_operand("context_fuse", "shift", *shift, x, {x.size(0), x.size(1)});
  }
  if (identity) {
    check_operand("context_fuse", "identity", *identity, x, x.sizes());
  }
}

}  // namespace mmdet
