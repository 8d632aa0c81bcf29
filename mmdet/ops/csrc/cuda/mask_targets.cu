// Mask targets on CUDA: a thread samples one bin. Sums are in float64, as on the CPU.
#include "../divide.h"
#include "../mask_targets.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

namespace mmdet {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

// The sum over a row's samples of one bin, zero if the row lies outside of the crop.
template <typename T>
__device__ double row_sum(const Crop& crop, int row, const RoiSamples<T>& x, int bin, int width) {
  if (row < crop.top || row >= crop.top + crop.rows) {
    return 0;
  }
  const uint8_t* pixels = crop.pixels + static_cast<int64_t>(row - crop.top) * crop.columns;
  const auto value = [&](int cell, T weight) {
    const int column = cell - crop.left;
    return column >= 0 && column < crop.columns && pixels[column] ? double(weight) : 0.0;
  };
  double sum = 0;
  for (int i = 0; i < x.grid; ++i) {
    const auto tap = linear_tap(x.at(bin, i), width);
    sum += value(tap.low, tap.weight_low) + value(tap.high, tap.weight_high);
  }
  return sum;
}

template <typename T>
__global__ void mask_targets_kernel(
    int64_t count, const uint8_t* pixels, int64_t num_pixels, const int64_t* crops, int64_t num_crops, const T* boxes,
    const int64_t* matched, int height, int width, int size, bool* targets) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += step) {
    const int64_t k = i / (size * size);
    const int bin_x = i % size, bin_y = i / size % size;
    CUDA_KERNEL_ASSERT(matched[k] >= 0 && matched[k] < num_crops);
    const int64_t* row = crops + matched[k] * kCropColumns;
    CUDA_KERNEL_ASSERT(crop_fits(row, height, width, num_pixels));
    const Crop crop(pixels, row);
    const T* box = boxes + 4 * k;
    const auto x = mask_samples(box[0], box[2], size), y = mask_samples(box[1], box[3], size);
    double sum = 0;
    for (int j = 0; j < y.grid; ++j) {
      const auto tap = linear_tap(y.at(bin_y, j), height);
      if (tap.weight_low != T(0)) {
        sum += tap.weight_low * row_sum(crop, tap.low, x, bin_x, width);
      }
      if (tap.weight_high != T(0)) {
        sum += tap.weight_high * row_sum(crop, tap.high, x, bin_x, width);
      }
    }
    targets[i] = sum >= 0.5 * max(1.0, double(x.grid) * y.grid);
  }
}

at::Tensor mask_targets(
    const at::Tensor& pixels, const at::Tensor& crops, const at::Tensor& boxes, const at::Tensor& matched,
    int64_t height, int64_t width, int64_t size) {
  check_mask_targets(pixels, crops, boxes, matched, height, width, size);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto bytes = pixels.contiguous(), table = crops.contiguous(), objects = matched.contiguous();
  const auto type = compute_type(boxes);
  const auto coordinates = boxes.to(type).contiguous();
  auto targets = at::empty({boxes.size(0), size, size}, boxes.options().dtype(at::kBool));
  const int64_t count = targets.numel();
  if (count == 0) {
    return targets;
  }
  const int64_t blocks = std::min(divide_up(count, kThreads), kMaxBlocks);
  AT_DISPATCH_FLOATING_TYPES(type, "mask_targets", [&] {
    mask_targets_kernel<scalar_t><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        count, bytes.const_data_ptr<uint8_t>(), bytes.size(0), table.const_data_ptr<int64_t>(), crops.size(0),
        coordinates.const_data_ptr<scalar_t>(), objects.const_data_ptr<int64_t>(), height, width, size,
        targets.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return targets;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("mask_targets", &mask_targets);
}

}  // namespace mmdet
