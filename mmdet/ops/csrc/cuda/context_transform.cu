// The transform of a global context block on CUDA: two kernels, the second of which normalises before its product.
#include "context_transform.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

namespace mmdet {
namespace {

using at::Tensor;
constexpr int kRows = 2;  // of a weight that a warp takes together

// A layer norm with a ReLU behind it; a block of `linear` normalises its images itself. Without, `weight` is null.
template <typename W, typename T>
struct Norm {
  const W *weight = nullptr, *bias = nullptr;
  T eps = 0;
  T *active = nullptr, *means = nullptr, *inverses = nullptr;  // (N, K), (N,), (N,): what is kept of it
};

// (N, K), (R, K), (R,) -> (N, R), normalised before if there is a norm: a block has as many warps as it takes images.
template <typename W, typename T, int kPack, bool kNormed>
__global__ void __launch_bounds__(kImages<T>* kWarp) linear_kernel(
    int64_t images, int64_t rows, int64_t size, const T* __restrict__ input, const W* __restrict__ weight,
    const W* __restrict__ bias, const __grid_constant__ Norm<W, T> norm, T* __restrict__ output) {
  __shared__ T means[kImages<T>], inverses[kImages<T>];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t first = blockIdx.y * kImages<T>, row = (blockIdx.x * kImages<T> + warp) * kRows;
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
  T sums[kRows][kImages<T>] = {};
#pragma unroll 4
  for (int64_t k = lane * kPack; k < size; k += kWarp * kPack) {
    Pack<T, kPack> w[kRows], scale, shift;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      w[r] = load_as<kPack, T>(weight + min(row + r, rows - 1) * size + k);
    }
    if (kNormed) {
      scale = load_as<kPack, T>(norm.weight + k);
      shift = load_as<kPack, T>(norm.bias + k);
    }
#pragma unroll
    for (int i = 0; i < kImages<T>; ++i) {
      const int64_t start = min(first + i, images - 1) * size + k;
      auto x = load<kPack>(input + start);
      for (int j = 0; j < kPack; ++j) {
        if (kNormed) {
          const T value = fma((x.value[j] - means[i]) * inverses[i], scale.value[j], shift.value[j]);
          x.value[j] = value < T(0) ? T(0) : value;  // NaN stays
        }
        for (int r = 0; r < kRows; ++r) {
          sums[r][i] = fma(w[r].value[j], x.value[j], sums[r][i]);
        }
      }
      if (kNormed && row == 0) {
        store(norm.active + start, x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kImages<T>; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T sum = add_lanes(sums[r][i]);
      if (lane == 0 && first + i < images && row + r < rows) {
        output[(first + i) * rows + row + r] = sum + static_cast<T>(bias[row + r]);
      }
    }
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
    const dim3 blocks(divide_up(rows, kRows * kImages<T>), divide_up(images, kImages<T>));
    kernel<<<blocks, dim3(kWarp, kImages<T>), 0, c10::cuda::getCurrentCUDAStream()>>>(
        images, rows, size, x, w, bias.const_data_ptr<W>(), norm, output.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// What is returned is described at the CPU kernel.
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

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_transform", &context_transform);
}

}  // namespace mmdet
