// RoIAlign on CUDA. The geometry is that of the CPU kernel. Threads run over channels in channels_last features and
// over bins in features stored plane by plane, so that neighbours read neighbouring cells.
#include "../roi_align.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

namespace mmdet {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 8;

struct Options {
  int num_levels;
  int images, channels, height, width;  // height x width bins
  int sampling_ratio;
  bool aligned;
  bool channels_last;
  Level levels[kMaxLevels];
  double spatial_scales[kMaxLevels];
};

// Pointers to the levels of a pyramid.
template <typename T>
struct Pyramid {
  T* data[kMaxLevels];
};

template <typename T>
struct Roi {
  int level;  // -1: pools zeros
  int64_t image;
  RoiSamples<T> x;
  RoiSamples<T> y;
};

template <typename T>
__device__ Roi<T> make_roi(int64_t k, const T* rois, const int64_t* levels, const Options& options) {
  const T* box = rois + 5 * k;
  CUDA_KERNEL_ASSERT(
      box[0] >= T(0) && box[0] < T(options.images) && "roi_align: a RoI names an image outside the batch");
  const int64_t i = levels ? levels[k] : 0;
  Roi<T> roi;
  roi.level = i >= 0 && i < options.num_levels && options.levels[i].height * options.levels[i].width > 0
      ? static_cast<int>(i) : -1;
  roi.image = static_cast<int64_t>(box[0]);
  if (roi.level >= 0) {
    const T scale = static_cast<T>(options.spatial_scales[roi.level]);
    roi.x = roi_samples(box[1], box[3], scale, options.width, options.sampling_ratio, options.aligned);
    roi.y = roi_samples(box[2], box[4], scale, options.height, options.sampling_ratio, options.aligned);
  }
  return roi;
}

// What thread `index` of all K * C * height * width computes.
struct Place {
  int64_t roi;
  int channel, bin_y, bin_x;
};

__device__ inline Place make_place(int64_t index, const Options& options) {
  const int bins = options.height * options.width;
  const int64_t size = static_cast<int64_t>(options.channels) * bins;
  const int64_t within = index % size;
  const int channel = static_cast<int>(options.channels_last ? within % options.channels : within / bins);
  const int bin = static_cast<int>(options.channels_last ? within / options.channels : within % bins);
  return {index / size, channel, bin / options.width, bin % options.width};
}

// Calls visit(offset of the feature cell, weight) for every sample corner of a bin.
template <typename T, typename Visit>
__device__ void visit_bin(const Roi<T>& roi, const Place& place, const Level& level, Visit visit) {
  const int64_t plane = roi.image * level.image + place.channel * level.channel;
  const T share = T(1) / (T(roi.x.grid) * T(roi.y.grid));
  for (int iy = 0; iy < roi.y.grid; ++iy) {
    const auto row = linear_tap(roi.y.at(place.bin_y, iy), static_cast<int>(level.height));
    const int64_t low = plane + row.low * level.row, high = plane + row.high * level.row;
    for (int ix = 0; ix < roi.x.grid; ++ix) {
      const auto column = linear_tap(roi.x.at(place.bin_x, ix), static_cast<int>(level.width));
      // Corners of weight zero are not read: they may hold NaN, and outside the map they are not there.
      const auto corner = [&](int64_t offset, T weight) {
        if (weight != T(0)) {
          visit(offset, weight * share);
        }
      };
      corner(low + column.low * level.column, row.weight_low * column.weight_low);
      corner(low + column.high * level.column, row.weight_low * column.weight_high);
      corner(high + column.low * level.column, row.weight_high * column.weight_low);
      corner(high + column.high * level.column, row.weight_high * column.weight_high);
    }
  }
}

template <typename scalar_t, typename T>
__global__ void pool_kernel(
    int64_t size, const __grid_constant__ Pyramid<const scalar_t> features, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, scalar_t* output) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const Place place = make_place(i, options);
    const auto roi = make_roi(place.roi, rois, levels, options);
    T sum = 0;
    if (roi.level >= 0) {
      const scalar_t* cells = features.data[roi.level];
      visit_bin(roi, place, options.levels[roi.level], [&](int64_t offset, T weight) {
        sum += weight * static_cast<T>(cells[offset]);
      });
    }
    const int64_t plane = place.roi * options.channels + place.channel;
    output[(plane * options.height + place.bin_y) * options.width + place.bin_x] = static_cast<scalar_t>(sum);
  }
}

// Adds with atomics, in any order.
template <typename scalar_t, typename T>
__global__ void scatter_kernel(
    int64_t size, const scalar_t* grad, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, const __grid_constant__ Pyramid<T> grad_features) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const Place place = make_place(i, options);
    const auto roi = make_roi(place.roi, rois, levels, options);
    if (roi.level < 0) {
      continue;
    }
    const int64_t plane = place.roi * options.channels + place.channel;
    const T value = static_cast<T>(grad[(plane * options.height + place.bin_y) * options.width + place.bin_x]);
    T* cells = grad_features.data[roi.level];
    visit_bin(roi, place, options.levels[roi.level], [&](int64_t offset, T weight) {
      atomicAdd(cells + offset, weight * value);
    });
  }
}

// What a point of an axis gives one cell of it.
template <typename T>
__device__ T weight_at(T point, int extent, int cell) {
  const auto tap = linear_tap(point, extent);
  return (tap.low == cell ? tap.weight_low : T(0)) + (tap.high == cell ? tap.weight_high : T(0));
}

// Without atomics: a thread owns one channel of one row of a level, and takes the RoIs in order.
template <typename scalar_t, typename T>
__global__ void scatter_rows_kernel(
    int64_t num_rois, const scalar_t* grad, const T* rois, const int64_t* levels,
    const __grid_constant__ Options options, int own, T* grad_feature) {
  const Level& level = options.levels[own];
  const int extent_y = static_cast<int>(level.height), extent_x = static_cast<int>(level.width);
  const int64_t size = level.height * options.images * options.channels;
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t c = i % options.channels, row = i / options.channels;
    const int y = static_cast<int>(row % level.height);
    const int64_t image = row / level.height;
    T* cells = grad_feature + image * level.image + c * level.channel + y * level.row;
    for (int64_t k = 0; k < num_rois; ++k) {
      if ((levels ? levels[k] : 0) != own || static_cast<int64_t>(rois[5 * k]) != image) {
        continue;
      }
      const auto roi = make_roi(k, rois, levels, options);
      const T share = T(1) / (T(roi.x.grid) * T(roi.y.grid));
      const scalar_t* values = grad + (k * options.channels + c) * options.height * options.width;
      for (int h = 0; h < options.height; ++h) {
        T weight = 0;
        for (int iy = 0; iy < roi.y.grid; ++iy) {
          weight += weight_at(roi.y.at(h, iy), extent_y, y);
        }
        if (weight == T(0)) {
          continue;
        }
        for (int w = 0; w < options.width; ++w) {
          const T value = weight * share * static_cast<T>(values[h * options.width + w]);
          for (int ix = 0; ix < roi.x.grid; ++ix) {
            const auto tap = linear_tap(roi.x.at(w, ix), extent_x);
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

int blocks_for(int64_t size) {
  return static_cast<int>(std::min<int64_t>((size + kThreads - 1) / kThreads, 1 << 20));
}

// `sizes` is N, C, then H and W of each level.
Options make_options(
    at::IntArrayRef sizes, at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, int64_t sampling_ratio,
    bool aligned, bool channels_last) {
  const int num_levels = static_cast<int>(spatial_scales.size());
  TORCH_CHECK_VALUE(num_levels <= kMaxLevels, "roi_align: at most ", kMaxLevels, " levels on CUDA, got ", num_levels);
  Options options{
      num_levels, static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(height),
      static_cast<int>(width), static_cast<int>(sampling_ratio), aligned, channels_last, {}, {}};
  for (int i = 0; i < num_levels; ++i) {
    options.levels[i] = make_level(sizes[1], sizes[2 + 2 * i], sizes[3 + 2 * i], channels_last);
    options.spatial_scales[i] = spatial_scales[i];
  }
  return options;
}

at::Tensor roi_align(
    at::TensorList features, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  check_roi_align(features, rois, levels, spatial_scales, height, width, sampling_ratio);
  const c10::cuda::CUDAGuard guard(rois.device());
  const bool channels_last = is_channels_last(features[0]);
  std::vector<int64_t> sizes{features[0].size(0), features[0].size(1)};
  std::vector<at::Tensor> inputs;
  for (const auto& feature : features) {
    inputs.push_back(feature.contiguous(memory_format(channels_last)));
    sizes.insert(sizes.end(), {feature.size(2), feature.size(3)});
  }
  auto output = at::empty({rois.size(0), sizes[1], height, width}, features[0].options());
  if (output.numel() == 0) {
    return output;
  }
  const auto options = make_options(
      sizes, spatial_scales, height, width, sampling_ratio, aligned, channels_last);
  const auto assigned = levels ? levels->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "roi_align", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto boxes = rois.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
    Pyramid<const scalar_t> pyramid{};
    for (size_t i = 0; i < inputs.size(); ++i) {
      pyramid.data[i] = inputs[i].const_data_ptr<scalar_t>();
    }
    pool_kernel<scalar_t, acc_t><<<blocks_for(output.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        output.numel(), pyramid, boxes.const_data_ptr<acc_t>(), levels ? assigned.const_data_ptr<int64_t>() : nullptr,
        options, output.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::vector<at::Tensor> roi_align_backward(
    const at::Tensor& grad, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, at::IntArrayRef sizes, bool channels_last, int64_t sampling_ratio,
    bool aligned) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto options = make_options(
      sizes, spatial_scales, grad.size(2), grad.size(3), sampling_ratio, aligned, channels_last);
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
      scatter_kernel<scalar_t, acc_t><<<blocks_for(grads.numel()), kThreads, 0, stream>>>(
          grads.numel(), grad_data, box_data, level_data, options, pyramid);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
    for (int i = 0; i < options.num_levels; ++i) {
      if (outputs[i].numel() > 0) {
        scatter_rows_kernel<scalar_t, acc_t>
            <<<blocks_for(sizes[0] * sizes[1] * sizes[2 + 2 * i]), kThreads, 0, stream>>>(
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
  m.impl("roi_align", &roi_align);
  m.impl("roi_align_backward", &roi_align_backward);
}

}  // namespace mmdet
