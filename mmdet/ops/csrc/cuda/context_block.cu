// Global context pooling and fusion on CUDA. Half precision is accumulated in float32.
#include "../context_block.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace mmdet {
namespace {

constexpr int kThreads = 256;  // a power of two
constexpr int kColumns = 32;   // positions of a block, read side by side
constexpr int kSlices = 8;     // threads that share the channels of a position

template <typename T>
__device__ T block_sum(T value) {
  __shared__ T parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    __syncthreads();
  }
  return parts[0];
}

// (N, C, P), weight -> (N, P): sum over channels, plus bias where there is one. The weight of image n begins at
// n * weight_stride. A block of kColumns x kSlices threads does kColumns positions.
template <typename scalar_t, typename T>
__global__ void sum_channels_kernel(
    int64_t channels, int64_t area, int64_t tiles, const scalar_t* x, const T* weight, int64_t weight_stride,
    const T* bias, T* output) {
  __shared__ T parts[kSlices][kColumns];
  const int64_t n = blockIdx.x / tiles, p = blockIdx.x % tiles * kColumns + threadIdx.x;
  T sum = 0;
  if (p < area) {
    for (int64_t c = threadIdx.y; c < channels; c += kSlices) {
      sum += weight[n * weight_stride + c] * static_cast<T>(x[(n * channels + c) * area + p]);
    }
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && p < area) {
    T total = bias ? *bias : T(0);
    for (int slice = 0; slice < kSlices; ++slice) {
      total += parts[slice][threadIdx.x];
    }
    output[n * area + p] = total;
  }
}

// In the kernels below a block does one channel of one image, a row of `area` positions.

// (N, C, P), (N, P) -> (N, C): sum over positions.
template <typename scalar_t, typename T, typename out_t>
__global__ void sum_positions_kernel(
    int64_t channels, int64_t area, const scalar_t* x, const T* weight, out_t* output) {
  const int64_t row = blockIdx.x;
  x += row * area;
  weight += row / channels * area;
  T sum = 0;
  for (int64_t p = threadIdx.x; p < area; p += blockDim.x) {
    sum += static_cast<T>(x[p]) * weight[p];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    output[row] = static_cast<out_t>(sum);
  }
}

template <typename scalar_t, typename T>
__global__ void pool_grad_kernel(
    int64_t channels, int64_t area, const T* attention, const T* grad, const T* grad_logits, const T* weight,
    scalar_t* output) {
  const int64_t row = blockIdx.x, map = row / channels * area;
  const T g = grad[row], w = weight[row % channels];
  for (int64_t p = threadIdx.x; p < area; p += blockDim.x) {
    output[row * area + p] = static_cast<scalar_t>(attention[map + p] * g + grad_logits[map + p] * w);
  }
}

template <typename scalar_t, typename T>
__global__ void fuse_kernel(int64_t area, const scalar_t* x, const T* scale, const T* shift, scalar_t* output) {
  const int64_t row = blockIdx.x;
  const T m = scale ? scale[row] : T(1), a = shift ? shift[row] : T(0);
  for (int64_t p = row * area + threadIdx.x; p < (row + 1) * area; p += blockDim.x) {
    output[p] = static_cast<scalar_t>(static_cast<T>(x[p]) * m + a);
  }
}

template <typename scalar_t, typename T>
__global__ void fuse_grad_kernel(
    int64_t area, const scalar_t* grad, const scalar_t* x, const T* scale, scalar_t* grad_x, T* grad_scale) {
  const int64_t row = blockIdx.x;
  const T m = scale[row];
  T sum = 0;
  for (int64_t p = row * area + threadIdx.x; p < (row + 1) * area; p += blockDim.x) {
    const T g = static_cast<T>(grad[p]);
    sum += g * static_cast<T>(x[p]);
    grad_x[p] = static_cast<scalar_t>(g * m);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    grad_scale[row] = sum;
  }
}

template <typename scalar_t, typename T>
void sum_channels(const at::Tensor& x, const T* weight, int64_t weight_stride, const T* bias, T* output) {
  const int64_t area = x.size(2) * x.size(3), tiles = (area + kColumns - 1) / kColumns;
  sum_channels_kernel<<<x.size(0) * tiles, dim3(kColumns, kSlices), 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.size(1), area, tiles, x.const_data_ptr<scalar_t>(), weight, weight_stride, bias, output);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_context_pool(x, weight, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto features = x.contiguous(), w = weight.to(type).contiguous(), b = bias.to(type);
  const int64_t rows = x.size(0) * x.size(1), area = x.size(2) * x.size(3);
  auto logits = at::empty({x.size(0), area}, x.options().dtype(type));
  auto pooled = at::empty({x.size(0), x.size(1)}, x.options());
  if (x.numel() == 0) {
    return {pooled.zero_(), logits.zero_()};
  }
  at::Tensor attention;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_pool", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    sum_channels<scalar_t, acc_t>(
        features, w.const_data_ptr<acc_t>(), 0, b.const_data_ptr<acc_t>(), logits.mutable_data_ptr<acc_t>());
    attention = at::softmax(logits, 1);
    sum_positions_kernel<<<rows, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x.size(1), area, features.const_data_ptr<scalar_t>(), attention.const_data_ptr<acc_t>(),
        pooled.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {pooled, attention};
}

// The formula stands at the CPU kernel.
std::tuple<at::Tensor, at::Tensor> context_pool_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& attention) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto features = x.contiguous(), maps = attention.contiguous();
  const auto g = grad.to(type).contiguous(), w = weight.to(type).contiguous();
  const int64_t rows = x.size(0) * x.size(1), area = x.size(2) * x.size(3);
  auto projected = at::empty_like(maps);
  auto grad_weight = at::empty({x.size(0), x.size(1)}, maps.options());
  auto grad_x = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) {
    return {grad_x, at::zeros_like(weight)};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_pool_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    sum_channels<scalar_t, acc_t>(
        features, g.const_data_ptr<acc_t>(), x.size(1), nullptr, projected.mutable_data_ptr<acc_t>());
    const auto grad_logits = maps * (projected - (maps * projected).sum(1, /*keepdim=*/true));
    sum_positions_kernel<<<rows, kThreads, 0, stream>>>(
        x.size(1), area, features.const_data_ptr<scalar_t>(), grad_logits.const_data_ptr<acc_t>(),
        grad_weight.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    pool_grad_kernel<<<rows, kThreads, 0, stream>>>(
        x.size(1), area, maps.const_data_ptr<acc_t>(), g.const_data_ptr<acc_t>(), grad_logits.const_data_ptr<acc_t>(),
        w.const_data_ptr<acc_t>(), grad_x.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_x, grad_weight.sum(0).to(weight.scalar_type())};
}

at::Tensor context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift) {
  check_context_fuse(x, scale, shift);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto features = x.contiguous();
  const auto mul = scale ? scale->to(type).contiguous() : at::Tensor();
  const auto add = shift ? shift->to(type).contiguous() : at::Tensor();
  auto output = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) {
    return output;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_fuse", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const acc_t* pm = scale ? mul.const_data_ptr<acc_t>() : nullptr;
    const acc_t* pa = shift ? add.const_data_ptr<acc_t>() : nullptr;
    fuse_kernel<<<x.size(0) * x.size(1), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x.size(2) * x.size(3), features.const_data_ptr<scalar_t>(), pm, pa, output.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> context_fuse_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto features = x.contiguous(), g = grad.contiguous(), mul = scale.to(type).contiguous();
  auto grad_x = at::empty(x.sizes(), x.options());
  auto grad_scale = at::empty(scale.sizes(), mul.options());
  if (x.numel() == 0) {
    return {grad_x, at::zeros_like(scale)};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_fuse_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    fuse_grad_kernel<<<x.size(0) * x.size(1), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x.size(2) * x.size(3), g.const_data_ptr<scalar_t>(), features.const_data_ptr<scalar_t>(),
        mul.const_data_ptr<acc_t>(), grad_x.mutable_data_ptr<scalar_t>(), grad_scale.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_x, grad_scale.to(scale.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_pool", &context_pool);
  m.impl("context_pool_backward", &context_pool_backward);
  m.impl("context_fuse", &context_fuse);
  m.impl("context_fuse_backward", &context_fuse_backward);
}

}  // namespace mmdet
