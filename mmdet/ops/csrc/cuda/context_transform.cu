// Linear layers of the global context block's transform on CUDA: cuBLAS.
#include "../context_transform.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <utility>

namespace mmdet {
namespace {

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return at::addmm(bias, input, weight.t());
}

std::pair<at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight) {
  return {at::mm(grad, weight), at::mm(grad.t(), input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_transform", &context_transform<linear>);
  m.impl("context_transform_backward", &context_transform_backward<linear_backward>);
}

}  // namespace mmdet
