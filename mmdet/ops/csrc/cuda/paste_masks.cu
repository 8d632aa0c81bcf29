// Pasting masks into boxes on CUDA: the GPU gives one bit a pixel of each box, the CPU makes the runs.
#include "../paste_masks.h"
#include "device.cuh"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

namespace mmdet {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 64;  // of one mask

template <typename T>
__device__ T cell_at(const T* mask, int size, int row, int column) {
  return row >= 0 && row < size && column >= 0 && column < size ? mask[row * size + column] : T(0);
}

// A warp takes half a word of bits, 32 pixels of one column of a region.
template <typename T>
__global__ void paste_kernel(
    const T* masks, int size, const T* boxes, const Region* regions, T threshold, unsigned int* bits) {
  const Region region = regions[blockIdx.x];
  const T* mask = masks + blockIdx.x * int64_t(size) * size;
  const T* box = boxes + 4 * int64_t(blockIdx.x);
  const int lane = threadIdx.x % kWarp;
  const int64_t halves = 2 * region.words();
  const int64_t step = gridDim.y * int64_t(blockDim.x / kWarp);
  int64_t half = blockIdx.y * int64_t(blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (; half < region.columns * halves; half += step) {
    const int64_t row = half % halves * kWarp + lane;
    const auto x = tap_of(region.left + half / halves, box[0], box[2] - box[0], size);
    const auto y = tap_of(region.top + row, box[1], box[3] - box[1], size);
    const T value = bilinear(
        cell_at(mask, size, y.cell, x.cell), cell_at(mask, size, y.cell, x.cell + 1),
        cell_at(mask, size, y.cell + 1, x.cell), cell_at(mask, size, y.cell + 1, x.cell + 1), y.first, y.second,
        x.first, x.second);
    const unsigned int reached = __ballot_sync(0xffffffffu, row < region.rows && value >= threshold);
    if (lane == 0) {
      bits[2 * region.first_word + half] = reached;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> paste_masks(
    const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width, double threshold) {
  check_paste(masks, boxes, height, width);
  const c10::cuda::CUDAGuard guard(masks.device());
  const auto type = compute_type(masks);
  const auto probabilities = masks.to(type).contiguous(), corners = boxes.to(type).contiguous();
  const int64_t count = masks.size(0);
  const auto host_corners = corners.cpu();
  std::vector<Region> regions(count);
  int64_t words = 0;
  AT_DISPATCH_FLOATING_TYPES(type, "paste_masks", [&] {
    const scalar_t* box = host_corners.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < count; ++i) {
      regions[i] = region_of(box + 4 * i, height, width);
      regions[i].first_word = words;
      words += regions[i].columns * regions[i].words();
    }
  });
  std::vector<std::string> texts(count);
  at::Tensor host_bits = at::empty({words}, at::TensorOptions().dtype(at::kLong));
  if (words > 0) {
    const int64_t region_bytes = count * static_cast<int64_t>(sizeof(Region));
    auto table = at::empty({region_bytes}, masks.options().dtype(at::kByte));
    const auto bits = at::empty({words}, masks.options().dtype(at::kLong));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(cudaMemcpyAsync(
        table.mutable_data_ptr<uint8_t>(), regions.data(), region_bytes, cudaMemcpyHostToDevice, stream));
    AT_DISPATCH_FLOATING_TYPES(type, "paste_masks", [&] {
      paste_kernel<scalar_t><<<dim3(count, kBlocks), kThreads, 0, stream>>>(
          probabilities.const_data_ptr<scalar_t>(), static_cast<int>(masks.size(1)),
          corners.const_data_ptr<scalar_t>(), reinterpret_cast<const Region*>(table.const_data_ptr<uint8_t>()),
          static_cast<scalar_t>(threshold), reinterpret_cast<unsigned int*>(bits.mutable_data_ptr<int64_t>()));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    host_bits.copy_(bits);
  }
  const auto* bits = reinterpret_cast<const uint64_t*>(host_bits.const_data_ptr<int64_t>());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Region& region = regions[i];
      RunLengths runs;
      for (int64_t x = 0; x < region.columns; ++x) {
        runs.add_column(
            bits + region.first_word + x * region.words(), region.rows, (region.left + x) * height + region.top);
      }
      texts[i] = runs.text(height * width);
    }
  });
  return joined(texts);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("paste_masks", &paste_masks);
}

}  // namespace mmdet
