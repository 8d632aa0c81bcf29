// The transform of a global context block, (N, C) -> (N, C): linear, layer norm, ReLU, linear. The linear layers differ
// by device: linear(input, weight, bias), and linear_backward(grad, input, weight), which returns the gradients of input
// and weight.
#pragma once

#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <tuple>

#include "context_block.h"

namespace mmdet {

inline void check_context_transform(
    const at::Tensor& context, const at::Tensor& first_weight, const at::Tensor& first_bias,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& last_weight,
    const at::Tensor& last_bias) {
  const char* op = "context_transform";
  TORCH_CHECK_VALUE(context.dim() == 2, op, ": context must be (N, C), got ", context.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(context.scalar_type()), op, ": context must be floating point, got ", context.scalar_type());
  const int64_t channels = context.size(1), planes = first_weight.size(0);
  check_operand(op, "first_weight", first_weight, context, {planes, channels});
  check_operand(op, "first_bias", first_bias, context, {planes});
  check_operand(op, "norm_weight", norm_weight, context, {planes});
  check_operand(op, "norm_bias", norm_bias, context, {planes});
  check_operand(op, "last_weight", last_weight, context, {channels, planes});
  check_operand(op, "last_bias", last_bias, context, {channels});
}

// The output, and what the layer norm gets.
template <auto linear>
std::tuple<at::Tensor, at::Tensor> context_transform(
    const at::Tensor& context, const at::Tensor& first_weight, const at::Tensor& first_bias,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& last_weight,
    const at::Tensor& last_bias, double eps) {
  check_context_transform(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = compute_type(context);
  const auto hidden = linear(context.to(type), first_weight.to(type), first_bias.to(type));
  const auto normal = std::get<0>(
      at::native_layer_norm(hidden, hidden.sizes().slice(1), norm_weight.to(type), norm_bias.to(type), eps));
  return {linear(normal.relu(), last_weight.to(type), last_bias.to(type)), hidden};
}

// Gradients of context and of the six parameters.
template <auto linear_backward>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
context_transform_backward(
    const at::Tensor& grad, const at::Tensor& context, const at::Tensor& hidden, const at::Tensor& first_weight,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& last_weight, double eps) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = compute_type(context);
  const auto size = hidden.sizes().slice(1);
  const auto weight = norm_weight.to(type), bias = norm_bias.to(type), g = grad.to(type);
  const auto [normal, mean, inverse] = at::native_layer_norm(hidden, size, weight, bias, eps);
  const auto active = normal.relu();
  const auto [grad_active, grad_last] = linear_backward(g, active, last_weight.to(type));
  const auto grad_normal = at::threshold_backward(grad_active, active, 0);
  const auto [grad_hidden, grad_weight, grad_bias] = at::native_layer_norm_backward(
      grad_normal, hidden, size, mean, inverse, weight, bias, {true, true, true});
  const auto [grad_context, grad_first] = linear_backward(grad_hidden, context.to(type), first_weight.to(type));
  return {grad_context, grad_first, grad_hidden.sum(0), grad_weight, grad_bias, grad_last, g.sum(0)};
}

}  // namespace mmdet
