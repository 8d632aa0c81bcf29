// RoIAlign on CUDA: one thread a bin of a channel. The geometry is that of the CPU kernel.
#include "../roi_align.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

namespace mmdet {
namespace {

constexpr int kThreads = 256;

struct Shape {
  int64_t images, channels;
  int input_height, input_width, height, width;
};

struct Options {
  double spatial_scale;
  int sampling_ratio;
  bool aligned;
};

// Calls visit(offset of the feature cell, weight) for every sample corner of bin `index` of the output (K, C, h, w).
template <typename T, typename Visit>
__device__ void visit_bin(int64_t index, const T* rois, const Shape& shape, const Options& options, Visit visit) {
  const int w = index % shape.width;
  const int h = index / shape.width % shape.height;
  const int64_t c = index / shape.width / shape.height % shape.channels;
  const T* box = rois + index / shape.width / shape.height / shape.channels * 5;
  CUDA_KERNEL_ASSERT(box[0] >= T(0) && box[0] < T(shape.images) && "roi_align: a RoI names an image outside the batch");
  const T scale = static_cast<T>(options.spatial_scale);
  const auto x = roi_samples(box[1], box[3], scale, shape.width, options.sampling_ratio, options.aligned);
  const auto y = roi_samples(box[2], box[4], scale, shape.height, options.sampling_ratio, options.aligned);
  const int64_t plane =
      (static_cast<int64_t>(box[0]) * shape.channels + c) * shape.input_height * shape.input_width;
  const T share = T(1) / (T(x.grid) * T(y.grid));
  for (int iy = 0; iy < y.grid; ++iy) {
    const auto row = linear_tap(y.at(h, iy), shape.input_height);
    const int64_t low = plane + static_cast<int64_t>(row.low) * shape.input_width;
    const int64_t high = plane + static_cast<int64_t>(row.high) * shape.input_width;
    for (int ix = 0; ix < x.grid; ++ix) {
      const auto column = linear_tap(x.at(w, ix), shape.input_width);
      // Corners of weight zero are not read: they may hold NaN, and outside the map they are not there.
      const auto corner = [&](int64_t offset, T weight) {
        if (weight != T(0)) {
          visit(offset, weight * share);
        }
      };
      corner(low + column.low, row.weight_low * column.weight_low);
      corner(low + column.high, row.weight_low * column.weight_high);
      corner(high + column.low, row.weight_high * column.weight_low);
      corner(high + column.high, row.weight_high * column.weight_high);
    }
  }
}

template <typename scalar_t, typename T>
__global__ void pool_kernel(
    int64_t size, const scalar_t* input, const T* rois, Shape shape, Options options, scalar_t* output) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    T sum = 0;
    visit_bin(i, rois, shape, options, [&](int64_t offset, T weight) {
      sum += weight * static_cast<T>(input[offset]);
    });
    output[i] = static_cast<scalar_t>(sum);
  }
}

template <typename scalar_t, typename T>
__global__ void scatter_kernel(
    int64_t size, const scalar_t* grad, const T* rois, Shape shape, Options options, T* grad_input) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const T value = static_cast<T>(grad[i]);
    visit_bin(i, rois, shape, options, [&](int64_t offset, T weight) {
      atomicAdd(grad_input + offset, weight * value);
    });
  }
}

int blocks_for(int64_t size) {
  return static_cast<int>(std::min<int64_t>((size + kThreads - 1) / kThreads, 1 << 20));
}

Shape make_shape(at::IntArrayRef input_size, int64_t height, int64_t width) {
  return {
      input_size[0], input_size[1], static_cast<int>(input_size[2]), static_cast<int>(input_size[3]),
      static_cast<int>(height), static_cast<int>(width)};
}

at::Tensor roi_align(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t height, int64_t width,
    int64_t sampling_ratio, bool aligned) {
  check_roi_align(input, rois, height, width, sampling_ratio);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto features = input.contiguous();
  auto output = at::empty({rois.size(0), input.size(1), height, width}, input.options());
  if (features.numel() == 0 || output.numel() == 0) {
    return output.zero_();
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "roi_align", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto boxes = rois.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
    pool_kernel<scalar_t, acc_t><<<blocks_for(output.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        output.numel(), features.const_data_ptr<scalar_t>(), boxes.const_data_ptr<acc_t>(),
        make_shape(input.sizes(), height, width), Options{spatial_scale, static_cast<int>(sampling_ratio), aligned},
        output.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

at::Tensor roi_align_backward(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, at::IntArrayRef input_size,
    int64_t sampling_ratio, bool aligned) {
  at::globalContext().alertNotDeterministic("mmdet::roi_align_backward on CUDA");  // atomics add in any order
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto grads = grad.contiguous();
  // Atomics and sums in float32 for half precision.
  auto output = at::zeros(
      input_size, grad.options().dtype(grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  if (output.numel() == 0 || grads.numel() == 0) {
    return output.to(grad.scalar_type());
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "roi_align_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto boxes = rois.to(output.scalar_type()).contiguous();
    scatter_kernel<scalar_t, acc_t><<<blocks_for(grads.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        grads.numel(), grads.const_data_ptr<scalar_t>(), boxes.const_data_ptr<acc_t>(),
        make_shape(input_size, grad.size(2), grad.size(3)),
        Options{spatial_scale, static_cast<int>(sampling_ratio), aligned}, output.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("roi_align", &roi_align);
  m.impl("roi_align_backward", &roi_align_backward);
}

}  // namespace mmdet
