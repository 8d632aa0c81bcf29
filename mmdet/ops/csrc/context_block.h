// Checks and layout of the global context ops that the CPU and the CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace mmdet {

// Half-precision inputs are computed in float32.
inline at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Layout in which a map is read and its like written: any but channels_last is made contiguous.
inline at::MemoryFormat layout_of(const at::Tensor& x) {
  const bool channels_last = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline void check_feature_map(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be (N, C, H, W), got ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op, ": x must be floating point, got ", x.scalar_type());
}

inline void check_operand(
    const char* op, const char* name, const at::Tensor& operand, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(operand.sizes() == sizes, op, ": ", name, " must be ", sizes, ", got ", operand.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(operand.scalar_type()), op, ": ", name, " must be floating point, got ",
      operand.scalar_type());
  TORCH_CHECK_VALUE(
      operand.device() == x.device(), op, ": x is on ", x.device(), " but ", name, " on ", operand.device());
}

inline void check_context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_feature_map("context_pool", x);
  check_operand("context_pool", "weight", weight, x, {x.size(1)});
  check_operand("context_pool", "bias", bias, x, {1});
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
