// The gradient of RoIAlign on CUDA.
#include "roi_align.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace mmdet {
namespace {

constexpr int64_t kElements = 512;  // of a tile that does not pass through shared memory: some RoIs take long

// Adds with atomics, in any order.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(
    const RoiTiles tiles, const scalar_t* grad, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, const __grid_constant__ Pyramid<T> grad_features) {
  visit_elements(tiles, rois, levels, options, [&](int64_t i, const auto& roi, int64_t plane, int bin_y, int bin_x) {
    T* cells = grad_features.data[roi.level] + plane;
    const T value = static_cast<T>(grad[i]);
    visit_bin(roi, options.levels[roi.level], bin_y, bin_x, [&](const auto& offsets, const auto& weights) {
      for (int j = 0; j < 4; ++j) {
        if (weights[j] != T(0)) {
          atomicAdd(cells + offsets[j], weights[j] * value);
        }
      }
    });
  });
}

// Adds with atomics, in any order. A thread takes one channel of one row of bins, and adds up what neighbouring samples
// give a column of the feature first.
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 2) scatter_tiles_kernel(
    const RoiTiles tiles, const scalar_t* grad, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, const __grid_constant__ Pyramid<T> grad_features) {
  __shared__ SharedRoi<T> roi;
  scalar_t* tile = reinterpret_cast<scalar_t*>(shared_memory);
  const unsigned bins = options.height * options.width;
  for (int64_t t = blockIdx.x; t < tiles.count; t += gridDim.x) {
    const auto [k, first, count] = tiles.at(t);
    const unsigned lanes = count, channels = lanes * kPack;
    share_roi(k, rois, levels, options, roi);
    const scalar_t* source = grad + (k * options.channels + first * kPack) * bins;
    for (unsigned i = threadIdx.x; i < lanes * bins; i += kThreads) {
      store(tile + tile_offset<kPack>(i / bins, bins) + i % bins * kPack, load<kPack>(source + i * kPack));
    }
    __syncthreads();
    const Level& level = options.levels[roi.level];
    T* feature = grad_features.data[roi.level] + roi.image * level.image + first * kPack;
    for (unsigned i = threadIdx.x; i < channels * options.height; i += kThreads) {
      const int h = i / channels, c = i % channels;
      const scalar_t* values = tile + tile_offset<kPack>(c / kPack, bins) + c % kPack * bins + h * options.width;
      const auto add = [&](int column, T sum) {
        if (sum == T(0)) {  // also where there is no such column
          return;
        }
        T* cells = feature + c + column * level.column;
        for (int iy = 0; iy < roi.y.points.grid; ++iy) {
          const auto row = roi.y.at(h, iy);
          if (row.weight_low != T(0)) {
            atomicAdd(cells + row.low * level.row, row.weight_low * roi.share * sum);
          }
          if (row.weight_high != T(0)) {
            atomicAdd(cells + row.high * level.row, row.weight_high * roi.share * sum);
          }
        }
      };
      int column = 0;
      T sum = 0, next = 0;  // of this column and of the one to its right
      for (int w = 0; w < options.width; ++w) {
        const T value = static_cast<T>(values[w]);
        for (int ix = 0; ix < roi.x.points.grid; ++ix) {
          const auto tap = roi.x.at(w, ix);
          if (tap.low != column) {
            add(column, sum);
            sum = next;
            if (tap.low != column + 1) {
              add(column + 1, sum);
              sum = 0;
            }
            next = 0;
            column = tap.low;
          }
          if (tap.weight_low != T(0)) {
            sum += tap.weight_low * value;
          }
          if (tap.weight_high != T(0)) {
            next += tap.weight_high * value;
          }
        }
      }
      add(column, sum);
      add(column + 1, next);
    }
    __syncthreads();
  }
}

// What a tap gives one cell.
template <typename T>
__device__ T weight_of(const LinearTap<T>& tap, int cell) {
  return (tap.low == cell ? tap.weight_low : T(0)) + (tap.high == cell ? tap.weight_high : T(0));
}

// Without atomics: a thread owns one channel of one row of a level, and takes the RoIs in order.
template <typename scalar_t, typename T>
__global__ void scatter_rows_kernel(
    int64_t num_rois, const scalar_t* grad, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, int own, T* grad_feature) {
  const Level& level = options.levels[own];
  const int64_t size = level.height * options.images * options.channels;
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t c = i % options.channels, row = i / options.channels;
    const int y = static_cast<int>(row % level.height);
    const int64_t image = row / level.height;
    T* cells = grad_feature + image * level.image + c * level.channel + y * level.row;
    for (int64_t k = 0; k < num_rois; ++k) {
      if (static_cast<int64_t>(rois[5 * k]) != image ||
          roi_level(k, rois, levels, options.num_levels, options.rule) != own) {
        continue;
      }
      const auto roi = make_roi(k, rois, levels, options);
      const scalar_t* values = grad + (k * options.channels + c) * options.height * options.width;
      for (int h = 0; h < options.height; ++h) {
        T weight = 0;
        for (int iy = 0; iy < roi.y.points.grid; ++iy) {
          weight += weight_of(roi.y.at(h, iy), y);
        }
        if (weight == T(0)) {
          continue;
        }
        for (int w = 0; w < options.width; ++w) {
          const T value = weight * roi.share * static_cast<T>(values[h * options.width + w]);
          for (int ix = 0; ix < roi.x.points.grid; ++ix) {
            const auto tap = roi.x.at(w, ix);
            if (tap.weight_low != T(0)) {
              cells[tap.low * level.column] += tap.weight_low * value;
            }
            if (tap.weight_high != T(0)) {
              cells[tap.high * level.column] += tap.weight_high * value;
            }
          }
        }
      }
    }
  }
}

std::vector<at::Tensor> roi_align_backward(
    const at::Tensor& grad, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, at::IntArrayRef sizes, bool channels_last, int64_t sampling_ratio,
    bool aligned, double shift, std::optional<double> finest_scale) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const RoiRule rule(sampling_ratio, aligned, shift, finest_scale);
  const auto options = make_options(sizes, spatial_scales, grad.size(2), grad.size(3), rule, channels_last);
  const auto grads = grad.contiguous();
  const auto assigned = levels ? levels->contiguous() : at::Tensor();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  std::vector<at::Tensor> outputs;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "roi_align_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;  // sums are float32 for half precision
    const auto type = c10::CppTypeToScalarType<acc_t>::value;
    Pyramid<acc_t> pyramid{};
    for (int i = 0; i < options.num_levels; ++i) {
      outputs.push_back(at::empty(
          {sizes[0], sizes[1], sizes[2 + 2 * i], sizes[3 + 2 * i]}, grad.options().dtype(type),
          memory_format(channels_last)).zero_());
      pyramid.data[i] = outputs[i].mutable_data_ptr<acc_t>();
    }
    const auto boxes = rois.to(type).contiguous();
    const acc_t* box_data = boxes.const_data_ptr<acc_t>();
    const int64_t* level_data = levels ? assigned.const_data_ptr<int64_t>() : nullptr;
    const scalar_t* grad_data = grads.const_data_ptr<scalar_t>();
    if (grads.numel() == 0) {
      return;
    }
    if (!at::globalContext().deterministicAlgorithms()) {
      const bool tiled = in_tiles<scalar_t>(
          rois.size(0), options, in_packs<scalar_t>(sizes[1], grads),
          [&](auto pack, const RoiTiles& tiles, int64_t bytes) {
            scatter_tiles_kernel<scalar_t, acc_t, pack><<<tiles.blocks(), kThreads, bytes, stream>>>(
                tiles, grad_data, box_data, level_data, options, pyramid);
          });
      if (!tiled) {
        const auto tiles = tiles_of_elements(rois.size(0), options, kElements);
        scatter_kernel<scalar_t, acc_t><<<tiles.blocks(), kThreads, 0, stream>>>(
            tiles, grad_data, box_data, level_data, options, pyramid);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
    for (int i = 0; i < options.num_levels; ++i) {
      if (outputs[i].numel() > 0) {
        const int64_t rows = sizes[0] * sizes[1] * sizes[2 + 2 * i];
        const int64_t blocks = std::min(divide_up(rows, kThreads), kMaxBlocks);
        scatter_rows_kernel<scalar_t, acc_t><<<blocks, kThreads, 0, stream>>>(
            rois.size(0), grad_data, box_data, level_data, options, i, pyramid.data[i]);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
    }
  });
  for (auto& output : outputs) {
    output = output.to(grad.scalar_type());
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("roi_align_backward", &roi_align_backward);
}

}  // namespace mmdet
