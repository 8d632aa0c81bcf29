// The transform of a global context block on CUDA, for a handful of images: a product takes as long as its weight takes
// to come, so each weight is read in the dtype that it has and once for several images.
#include "context_block.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace mmdet {
namespace {

using at::Tensor;
template <typename T>
constexpr int kImages = 32 / sizeof(T);  // that a thread takes together
template <typename T>
constexpr int kFew = kImages<T> / 2;  // the same, where all multiprocessors should have some

// A layer norm with a ReLU behind it; a block of `linear` normalises its images itself. Without, `weight` is null.
template <typename W, typename T>
struct Norm {
  const W *weight = nullptr, *bias = nullptr;
  T eps = 0;
  T *active = nullptr, *means = nullptr, *inverses = nullptr;  // (N, K), (N,), (N,): what is kept of it
};

// (N, K), (R, K), (R,) -> (N, R), normalised before if there is a norm: a warp takes two rows of the weight for some
// images, a block as many warps as images.
template <typename W, typename T, int kPack, bool kNormed>
__global__ void __launch_bounds__(kFew<T>* kWarp) linear_kernel(
    int64_t images, int64_t rows, int64_t size, const T* __restrict__ input, const W* __restrict__ weight,
    const W* __restrict__ bias, const __grid_constant__ Norm<W, T> norm, T* __restrict__ output) {
  __shared__ T means[kFew<T>], inverses[kFew<T>];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t first = blockIdx.y * kFew<T>, row = (blockIdx.x * kFew<T> + warp) * 2, other = min(row + 1, rows - 1);
  if (kNormed) {
    const int64_t n = min(first + warp, images - 1);
    T sum = 0;
    for (int64_t k = lane; k < size; k += kWarp) {
      sum += input[n * size + k];
    }
    const T mean = add_lanes(sum) / size;
    sum = 0;
    for (int64_t k = lane; k < size; k += kWarp) {
      sum = fma(input[n * size + k] - mean, input[n * size + k] - mean, sum);
    }
    const T inverse = rsqrt(add_lanes(sum) / size + norm.eps);
    if (lane == 0) {
      means[warp] = mean;
      inverses[warp] = inverse;
      if (blockIdx.x == 0) {
        norm.means[n] = mean;
        norm.inverses[n] = inverse;
      }
    }
    __syncthreads();
  }
  if (row >= rows) {
    return;
  }
  T sums[2][kFew<T>] = {};
#pragma unroll 4
  for (int64_t k = lane * kPack; k < size; k += kWarp * kPack) {
    const auto w = load_as<kPack, T>(weight + row * size + k), v = load_as<kPack, T>(weight + other * size + k);
    Pack<T, kPack> scale, shift;
    if (kNormed) {
      scale = load_as<kPack, T>(norm.weight + k);
      shift = load_as<kPack, T>(norm.bias + k);
    }
#pragma unroll
    for (int i = 0; i < kFew<T>; ++i) {
      const int64_t start = min(first + i, images - 1) * size + k;
      auto x = load<kPack>(input + start);
      for (int j = 0; j < kPack; ++j) {
        if (kNormed) {
          const T value = fma((x.value[j] - means[i]) * inverses[i], scale.value[j], shift.value[j]);
          x.value[j] = value < T(0) ? T(0) : value;  // NaN stays
        }
        sums[0][i] = fma(w.value[j], x.value[j], sums[0][i]);
        sums[1][i] = fma(v.value[j], x.value[j], sums[1][i]);
      }
      if (kNormed && row == 0) {
        store(norm.active + start, x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFew<T>; ++i) {
    sums[0][i] = add_lanes(sums[0][i]);
    sums[1][i] = add_lanes(sums[1][i]);
    if (lane == 0 && first + i < images) {
      output[(first + i) * rows + row] = sums[0][i] + static_cast<T>(bias[row]);
      if (row + 1 < rows) {
        output[(first + i) * rows + row + 1] = sums[1][i] + static_cast<T>(bias[row + 1]);
      }
    }
  }
}

// The gradient of the input: (N, R), (R, K) -> (N, K). A block of 32 x 32 threads takes 32 columns for some images.
template <typename W, typename T>
__global__ void __launch_bounds__(kWarp* kWarp) grad_input_kernel(
    int64_t images, int64_t rows, int64_t size, const T* __restrict__ grad, const W* __restrict__ weight, T* output) {
  __shared__ T parts[kImages<T>][kWarp][kWarp];
  const int64_t k = blockIdx.x * kWarp + threadIdx.x, first = blockIdx.y * kImages<T>;
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
  const int64_t n = first + threadIdx.y;
  if (threadIdx.y < kImages<T> && n < images && k < size) {
    T sum = 0;
    for (int row = 0; row < kWarp; ++row) {
      sum += parts[threadIdx.y][row][threadIdx.x];
    }
    output[n * size + k] = sum;
  }
}

// The gradients of weight and bias: (N, R), (N, K) -> (R, K), (R,).
template <typename W, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) grad_weight_kernel(
    int64_t images, int64_t rows, int64_t size, const T* __restrict__ grad, const T* __restrict__ input,
    W* grad_weight, W* grad_bias) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kPack, row = divide(i, size), k = i - row * size;
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

// f(a type of parameters, the computing type): they are read as they are if all are alike, and no wider.
template <typename F>
void with_types(at::ScalarType compute, std::initializer_list<at::ScalarType> parameters, const F& f) {
  const auto type = *parameters.begin();
  const bool alike = std::all_of(parameters.begin(), parameters.end(), [=](auto other) { return other == type; });
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, alike && (compute == at::kDouble) == (type == at::kDouble) ? type : compute,
      "context_transform", [&] { f(scalar_t(), at::opmath_type<scalar_t>()); });
}

template <typename W>
Tensor as(const Tensor& tensor) {
  return cast(tensor, c10::CppTypeToScalarType<W>::value).contiguous();
}

// Packs of four columns, where these can be read so.
template <typename F>
void with_columns(int64_t size, std::initializer_list<const void*> data, const F& f) {
  const bool aligned = std::all_of(
      data.begin(), data.end(), [](const void* part) { return reinterpret_cast<uintptr_t>(part) % 32 == 0; });
  if (size % 4 == 0 && aligned) {
    f(std::integral_constant<int, 4>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

template <typename W, typename T>
void linear(
    const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& output, const Norm<W, T>& norm = {}) {
  const int64_t images = input.size(0), size = input.size(1), rows = output.size(1);
  const T* x = input.const_data_ptr<T>();
  const W* w = weight.const_data_ptr<W>();
  with_columns(size, {x, w, norm.weight, norm.bias, norm.active}, [&](auto pack) {
    const auto kernel = norm.weight ? linear_kernel<W, T, pack, true> : linear_kernel<W, T, pack, false>;
    const dim3 blocks(divide_up(rows, 2 * kFew<T>), divide_up(images, kFew<T>));
    kernel<<<blocks, dim3(kWarp, kFew<T>), 0, c10::cuda::getCurrentCUDAStream()>>>(
        images, rows, size, x, w, bias.const_data_ptr<W>(), norm, output.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// Gradients of input, weight and bias.
template <typename W, typename T>
void linear_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& grad_input,
    const Tensor& grad_weight, const Tensor& grad_bias) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t images = input.size(0), size = input.size(1), rows = grad.size(1);
  const T *g = grad.const_data_ptr<T>(), *x = input.const_data_ptr<T>();
  const dim3 blocks(divide_up(size, kWarp), divide_up(images, kImages<T>));
  grad_input_kernel<W, T><<<blocks, dim3(kWarp, kWarp), 0, stream>>>(
      images, rows, size, g, weight.const_data_ptr<W>(), grad_input.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  W* out = grad_weight.mutable_data_ptr<W>();
  with_columns(size, {x, out}, [&](auto pack) {
    grad_weight_kernel<W, T, pack><<<divide_up(rows * size / pack, kThreads), kThreads, 0, stream>>>(
        images, rows, size, g, x, out, grad_bias.mutable_data_ptr<W>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// What is returned is described at the CPU kernel, here and below.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> context_transform(
    const Tensor& context, const Tensor& first_weight, const Tensor& first_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias, double eps) {
  check_context_transform(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias);
  const c10::cuda::CUDAGuard guard(context.device());
  const int64_t images = context.size(0), channels = context.size(1), planes = first_weight.size(0);
  const auto options = context.options().dtype(compute_type(context));
  const auto output = at::empty({images, channels}, options), hidden = at::empty({images, planes}, options);
  const auto active = at::empty_like(hidden), mean = at::empty({images, 1}, options), inverse = at::empty_like(mean);
  if (output.numel() == 0) {
    return {output, hidden, active, mean, inverse};
  }
  with_types(
      compute_type(context),
      {first_weight.scalar_type(), first_bias.scalar_type(), norm_weight.scalar_type(), norm_bias.scalar_type(),
       last_weight.scalar_type(), last_bias.scalar_type()},
      [&](auto parameter, auto computed) {
        using W = decltype(parameter);
        using T = decltype(computed);
        linear<W, T>(as<T>(context), as<W>(first_weight), as<W>(first_bias), hidden);
        const Tensor weight = as<W>(norm_weight), bias = as<W>(norm_bias);
        const Norm<W, T> norm{
            weight.const_data_ptr<W>(), bias.const_data_ptr<W>(), static_cast<T>(eps), active.mutable_data_ptr<T>(),
            mean.mutable_data_ptr<T>(), inverse.mutable_data_ptr<T>()};
        linear<W, T>(hidden, as<W>(last_weight), as<W>(last_bias), output, norm);
      });
  return {output, hidden, active, mean, inverse};
}

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
  m.impl("context_transform", &context_transform);
  m.impl("context_transform_backward", &context_transform_backward);
}

}  // namespace mmdet
