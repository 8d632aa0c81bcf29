// The gradient of a global context block's transform on CUDA: a kernel for each product, one for what lies between.
#include "context_transform.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

namespace mmdet {
namespace {

using at::Tensor;

// Of the backward pass of a product, (N, R), (N, K) and (R, K), the gradient of the input: 32 columns for some images.
template <typename W, typename T>
__device__ void find_grad_input(
    int64_t block, int64_t images, int64_t rows, int64_t size, const T* grad, const W* weight, T* grad_input) {
  __shared__ T parts[kImages<T>][kWarp][kWarp];
  const int64_t strips = divide_up(size, kWarp), batch = divide(block, strips);
  const int64_t k = (block - batch * strips) * kWarp + threadIdx.x, first = batch * kImages<T>, n = first + threadIdx.y;
  T sums[kImages<T>] = {};
  if (k < size) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kWarp) {
      const T w = static_cast<T>(weight[row * size + k]);
#pragma unroll
      for (int i = 0; i < kImages<T>; ++i) {
        sums[i] = fma(w, grad[min(first + i, images - 1) * rows + row], sums[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kImages<T>; ++i) {
    parts[i][threadIdx.y][threadIdx.x] = sums[i];
  }
  __syncthreads();
  if (threadIdx.y < kImages<T> && n < images && k < size) {
    T sum = 0;
    for (int row = 0; row < kWarp; ++row) {
      sum += parts[threadIdx.y][row][threadIdx.x];
    }
    grad_input[n * size + k] = sum;
  }
}

// The gradients of weight and bias: a thread takes a pack of the weight's columns.
template <typename W, typename T, int kPack>
__device__ void find_grad_weight(
    int64_t block, int64_t images, int64_t rows, int64_t size, const T* grad, const T* input, W* grad_weight,
    W* grad_bias) {
  const int64_t i = ((block * kWarp + threadIdx.y) * kWarp + threadIdx.x) * kPack, row = divide(i, size);
  const int64_t k = i - row * size;
  if (row >= rows) {
    return;
  }
  Pack<T, kPack> sum = {};
  T total = 0;
#pragma unroll 4
  for (int64_t n = 0; n < images; ++n) {
    const T g = grad[n * rows + row];
    const auto x = load<kPack>(input + n * size + k);
    for (int j = 0; j < kPack; ++j) {
      sum.value[j] = fma(g, x.value[j], sum.value[j]);
    }
    total += g;
  }
  Pack<W, kPack> rounded;
  for (int j = 0; j < kPack; ++j) {
    rounded.value[j] = static_cast<W>(sum.value[j]);
  }
  store(grad_weight + i, rounded);
  if (k == 0) {
    grad_bias[row] = static_cast<W>(total);
  }
}

// Both at a time, since neither has work for all multiprocessors: the first `blocks` blocks of 32 x 32 threads and the
// others.
template <typename W, typename T, int kPack>
__global__ void __launch_bounds__(kWarp* kWarp) linear_backward_kernel(
    int64_t blocks, int64_t images, int64_t rows, int64_t size, const T* __restrict__ grad,
    const T* __restrict__ input, const W* __restrict__ weight, T* grad_input, W* grad_weight, W* grad_bias) {
  if (blockIdx.x < blocks) {
    find_grad_input(blockIdx.x, images, rows, size, grad, weight, grad_input);
  } else {
    find_grad_weight<W, T, kPack>(blockIdx.x - blocks, images, rows, size, grad, input, grad_weight, grad_bias);
  }
}

// What a layer norm with a ReLU behind it has to do with one value.
template <typename T>
struct Value {
  T grad, normal;  // through the ReLU; normalised

  __device__ Value(int64_t i, T mean, T inverse, const T* grads, const T* hidden, const T* active)
      : grad(active[i] <= T(0) ? T(0) : grads[i]), normal((hidden[i] - mean) * inverse) {}
};

// The backward pass of both, in one block of 32 warps: each takes images, and all then sum over these. `grads` are
// those of `active`.
template <typename W, typename T>
__global__ void __launch_bounds__(kWarp* kWarp) grad_normalize_kernel(
    int64_t images, int64_t planes, const T* grads, const T* hidden, const T* active, const T* means,
    const T* inverses, const W* weight, T* grad_hidden, W* grad_weight, W* grad_bias) {
  for (int64_t n = threadIdx.y; n < images; n += kWarp) {
    T mean = 0, product = 0;
    for (int64_t p = threadIdx.x; p < planes; p += kWarp) {
      const Value<T> value(n * planes + p, means[n], inverses[n], grads, hidden, active);
      const T grad = value.grad * static_cast<T>(weight[p]);
      mean += grad;
      product = fma(grad, value.normal, product);
    }
    mean = add_lanes(mean) / planes;
    product = add_lanes(product) / planes;
    for (int64_t p = threadIdx.x; p < planes; p += kWarp) {
      const Value<T> value(n * planes + p, means[n], inverses[n], grads, hidden, active);
      const T grad = value.grad * static_cast<T>(weight[p]);
      grad_hidden[n * planes + p] = inverses[n] * (grad - mean - value.normal * product);
    }
  }
  for (int64_t p = threadIdx.y * kWarp + threadIdx.x; p < planes; p += kWarp * kWarp) {
    T sum = 0, product = 0;
#pragma unroll 4
    for (int64_t n = 0; n < images; ++n) {
      const Value<T> value(n * planes + p, means[n], inverses[n], grads, hidden, active);
      sum += value.grad;
      product = fma(value.grad, value.normal, product);
    }
    grad_weight[p] = static_cast<W>(product);
    grad_bias[p] = static_cast<W>(sum);
  }
}

// Gradients of input, weight and bias.
template <typename W, typename T>
void linear_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& grad_input,
    const Tensor& grad_weight, const Tensor& grad_bias) {
  const int64_t images = input.size(0), size = input.size(1), rows = grad.size(1);
  const int64_t blocks = divide_up(size, kWarp) * divide_up(images, kImages<T>);
  const T* x = input.const_data_ptr<T>();
  W* out = grad_weight.mutable_data_ptr<W>();
  with_columns(size, {x, out}, [&](auto pack) {
    const int64_t all = blocks + divide_up(rows * size / pack, kWarp * kWarp);
    linear_backward_kernel<W, T, pack><<<all, dim3(kWarp, kWarp), 0, c10::cuda::getCurrentCUDAStream()>>>(
        blocks, images, rows, size, grad.const_data_ptr<T>(), x, weight.const_data_ptr<W>(),
        grad_input.mutable_data_ptr<T>(), out, grad_bias.mutable_data_ptr<W>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// What is returned is described at the CPU kernel.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> context_transform_backward(
    const Tensor& grad, const Tensor& context, const Tensor& hidden, const Tensor& active, const Tensor& mean,
    const Tensor& inverse, const Tensor& first_weight, const Tensor& norm_weight, const Tensor& last_weight) {
  const c10::cuda::CUDAGuard guard(context.device());
  const int64_t images = context.size(0), channels = context.size(1), planes = hidden.size(1);
  const auto types = {first_weight.scalar_type(), norm_weight.scalar_type(), last_weight.scalar_type()};
  auto grad_context = at::empty({images, channels}, hidden.options());
  Tensor grad_first, grad_first_bias, grad_norm, grad_norm_bias, grad_last, grad_last_bias;
  with_types(compute_type(context), types, [&](auto parameter, auto computed) {
    using W = decltype(parameter);
    using T = decltype(computed);
    const auto options = hidden.options().dtype(c10::CppTypeToScalarType<W>::value);
    const bool empty = context.numel() == 0;
    const auto allocate = [&](at::IntArrayRef sizes) {
      return empty ? at::zeros(sizes, options) : at::empty(sizes, options);
    };
    grad_first = allocate(first_weight.sizes());
    grad_first_bias = allocate({planes});
    grad_norm = allocate(norm_weight.sizes());
    grad_norm_bias = allocate(norm_weight.sizes());
    grad_last = allocate(last_weight.sizes());
    grad_last_bias = allocate({channels});
    if (empty) {
      return;
    }
    const Tensor grads = at::empty({2, images, planes}, hidden.options()), weight = as<W>(norm_weight);
    const Tensor grad_active = grads[0], grad_hidden = grads[1];
    linear_backward<W, T>(as<T>(grad), active, as<W>(last_weight), grad_active, grad_last, grad_last_bias);
    grad_normalize_kernel<W, T><<<1, dim3(kWarp, kWarp), 0, c10::cuda::getCurrentCUDAStream()>>>(
        images, planes, grad_active.const_data_ptr<T>(), hidden.const_data_ptr<T>(), active.const_data_ptr<T>(),
        mean.const_data_ptr<T>(), inverse.const_data_ptr<T>(), weight.const_data_ptr<W>(),
        grad_hidden.mutable_data_ptr<T>(), grad_norm.mutable_data_ptr<W>(), grad_norm_bias.mutable_data_ptr<W>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    linear_backward<W, T>(
        grad_hidden, as<T>(context), as<W>(first_weight), grad_context, grad_first, grad_first_bias);
  });
  return {
      grad_context, cast(grad_first, first_weight.scalar_type()), cast(grad_first_bias, first_weight.scalar_type()),
      cast(grad_norm, norm_weight.scalar_type()), cast(grad_norm_bias, norm_weight.scalar_type()),
      cast(grad_last, last_weight.scalar_type()), cast(grad_last_bias, last_weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_transform_backward", &context_transform_backward);
}

}  // namespace mmdet
