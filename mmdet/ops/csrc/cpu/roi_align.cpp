// RoIAlign on the CPU. Average pooling of bilinear samples on a grid is separable, so a RoI is two short lists of
// weights, one for rows and one for columns, built once and used for all channels. Rows are blended first. A cell is a
// vector of channels, and all loops run over channels: features that are stored plane by plane are brought into that
// layout before, and their gradient out of it after.
#include "roi_axis.h"
#include "simd.h"
#include "transpose.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace mmdet {
namespace {

// One RoI, ready for all channels. `columns` are the feature columns it touches; x.cell holds positions in them.
// A dense RoI touches all columns of a range, which are then read as one contiguous run.
template <typename T>
struct Roi {
  int64_t image;
  int64_t level;  // -1: pools zeros
  Axis<T> y;
  Axis<T> x;
  std::vector<int> columns;
  bool dense;
  T count;  // samples of a bin, by which is divided last: the mean of zeros and as many ones is a half, not less
};

template <typename T>
void compact_columns(Roi<T>& roi) {
  auto& columns = roi.columns;
  columns = roi.x.cell;
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  roi.dense = !columns.empty() && columns.back() - columns.front() + 1 == static_cast<int>(columns.size());
  for (int& cell : roi.x.cell) {
    cell = static_cast<int>(std::lower_bound(columns.begin(), columns.end(), cell) - columns.begin());
  }
}

template <typename T>
std::vector<Roi<T>> make_rois(
    const at::Tensor& rois, const std::optional<at::Tensor>& levels, at::ArrayRef<double> spatial_scales,
    const std::vector<Level>& pyramid, int64_t images, int height, int width, const RoiRule& rule) {
  const auto coordinates = rois.to(c10::CppTypeToScalarType<T>::value).contiguous();
  const auto assigned = levels ? levels->contiguous() : at::Tensor();
  const T* boxes = coordinates.template const_data_ptr<T>();
  const int64_t* given = levels ? assigned.template const_data_ptr<int64_t>() : nullptr;
  for (int64_t k = 0; k < rois.size(0); ++k) {
    const T image = boxes[5 * k];
    TORCH_CHECK_INDEX(
        image >= T(0) && image < T(images), "roi_align: rois[", k, "] names image ", image, " of a batch of ", images);
  }
  std::vector<Roi<T>> result(rois.size(0));
  at::parallel_for(0, rois.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* box = boxes + 5 * k;
      auto& roi = result[k];
      roi.image = static_cast<int64_t>(box[0]);
      roi.level = roi_level(k, boxes, given, static_cast<int>(pyramid.size()), rule);
      const bool known = roi.level >= 0 && roi.level < static_cast<int64_t>(pyramid.size());
      if (!known || pyramid[roi.level].height * pyramid[roi.level].width == 0) {
        roi.level = -1;
        continue;
      }
      const auto& level = pyramid[roi.level];
      const T scale = static_cast<T>(spatial_scales[roi.level]);
      const auto x = roi_samples(box[1], box[3], scale, width, rule);
      const auto y = roi_samples(box[2], box[4], scale, height, rule);
      roi.x = make_axis<T>(x, width, level.width);
      roi.y = make_axis<T>(y, height, level.height);
      roi.count = std::max(T(1), T(x.grid) * T(y.grid));
      compact_columns(roi);
    }
  });
  return result;
}

template <typename S, typename T>
inline __attribute__((always_inline)) void add_scaled(int64_t size, T weight, const S* x, T* __restrict__ y) {
  for (int64_t i = 0; i < size; ++i) {
    y[i] += weight * static_cast<T>(x[i]);
  }
}

// Some channels of one RoI from `cells`, its image's feature map, to output (height, width, channels).
template <typename S, typename T>
MMDET_SIMD void pool(
    const Roi<T>& roi, const S* cells, const Level& level, int64_t channels, int height, int width, T* blend,
    T* output) {
  const int64_t size = static_cast<int64_t>(roi.columns.size());
  std::fill_n(output, height * width * channels, T(0));
  for (int h = 0; h < height; ++h) {
    std::fill_n(blend, size * channels, T(0));
    for (int t = roi.y.begin[h]; t < roi.y.begin[h + 1]; ++t) {
      const S* row = cells + roi.y.cell[t] * level.row;
      if (roi.dense && channels == level.column) {
        add_scaled(size * channels, roi.y.weight[t], row + roi.columns[0] * level.column, blend);
      } else {
        for (int64_t j = 0; j < size; ++j) {
          add_scaled(channels, roi.y.weight[t], row + roi.columns[j] * level.column, blend + j * channels);
        }
      }
    }
    for (int w = 0; w < width; ++w, output += channels) {
      for (int t = roi.x.begin[w]; t < roi.x.begin[w + 1]; ++t) {
        add_scaled(channels, roi.x.weight[t], blend + roi.x.cell[t] * channels, output);
      }
    }
  }
}

// The transpose of pool.
template <typename T>
MMDET_SIMD void scatter(
    const Roi<T>& roi, const T* grad, const Level& level, int64_t channels, int height, int width, T* blend, T* cells) {
  const int64_t size = static_cast<int64_t>(roi.columns.size());
  for (int h = 0; h < height; ++h) {
    std::fill_n(blend, size * channels, T(0));
    for (int w = 0; w < width; ++w, grad += channels) {
      for (int t = roi.x.begin[w]; t < roi.x.begin[w + 1]; ++t) {
        add_scaled(channels, roi.x.weight[t], grad, blend + roi.x.cell[t] * channels);
      }
    }
    for (int t = roi.y.begin[h]; t < roi.y.begin[h + 1]; ++t) {
      T* row = cells + roi.y.cell[t] * level.row;
      if (roi.dense && channels == level.column) {
        add_scaled(size * channels, roi.y.weight[t], blend, row + roi.columns[0] * level.column);
      } else {
        for (int64_t j = 0; j < size; ++j) {
          add_scaled(channels, roi.y.weight[t], blend + j * channels, row + roi.columns[j] * level.column);
        }
      }
    }
  }
}

int64_t widest(const std::vector<Level>& pyramid) {
  int64_t width = 0;
  for (const auto& level : pyramid) {
    width = std::max(width, level.width);
  }
  return width;
}

at::Tensor roi_align(
    at::TensorList features, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
    double shift, std::optional<double> finest_scale) {
  check_roi_align(features, rois, levels, spatial_scales, height, width, sampling_ratio, finest_scale);
  const RoiRule rule(sampling_ratio, aligned, shift, finest_scale);
  const int64_t num_rois = rois.size(0), channels = features[0].size(1), bins = height * width;
  std::vector<at::Tensor> inputs;
  std::vector<Level> pyramid;
  for (const auto& feature : features) {
    inputs.push_back(in_cells(feature));
    pyramid.push_back(make_level(channels, feature.size(2), feature.size(3), true));
  }
  auto output = at::empty({num_rois, channels, height, width}, features[0].options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "roi_align", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto prepared = make_rois<T>(
        rois, levels, spatial_scales, pyramid, features[0].size(0), height, width, rule);
    scalar_t* pooled = output.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_rois, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> blend(widest(pyramid) * channels), result(bins * channels);
      for (int64_t k = begin; k < end; ++k) {
        const auto& roi = prepared[k];
        scalar_t* target = pooled + k * channels * bins;
        if (roi.level < 0) {
          std::fill_n(target, channels * bins, scalar_t(0));
          continue;
        }
        const auto& level = pyramid[roi.level];
        const scalar_t* cells = inputs[roi.level].const_data_ptr<scalar_t>() + roi.image * level.image;
        pool(roi, cells, level, channels, height, width, blend.data(), result.data());
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t b = 0; b < bins; ++b) {
            target[c * bins + b] = static_cast<scalar_t>(result[b * channels + c] / roi.count);
          }
        }
      }
    });
  });
  return output;
}

std::vector<at::Tensor> roi_align_backward(
    const at::Tensor& grad, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, at::IntArrayRef sizes, bool channels_last, int64_t sampling_ratio,
    bool aligned, double shift, std::optional<double> finest_scale) {
  const RoiRule rule(sampling_ratio, aligned, shift, finest_scale);
  const int64_t images = sizes[0], channels = sizes[1], height = grad.size(2), width = grad.size(3);
  const int64_t bins = height * width;
  const auto options = grad.options().dtype(compute_type(grad));
  std::vector<at::Tensor> outputs;
  std::vector<Level> pyramid;
  for (size_t i = 2; i < sizes.size(); i += 2) {
    pyramid.push_back(make_level(channels, sizes[i], sizes[i + 1], true));
    outputs.push_back(at::zeros({images, sizes[i], sizes[i + 1], channels}, options).permute({0, 3, 1, 2}));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "roi_align_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto prepared = make_rois<T>(rois, levels, spatial_scales, pyramid, images, height, width, rule);
    const scalar_t* pooled = grad.const_data_ptr<scalar_t>();
    // A thread owns channels, and takes the RoIs in order: no races, and the same sums for any number of threads.
    at::parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      std::vector<T> blend(widest(pyramid) * count), values(bins * count);
      for (size_t k = 0; k < prepared.size(); ++k) {
        const auto& roi = prepared[k];
        if (roi.level < 0) {
          continue;
        }
        for (int64_t i = 0; i < count; ++i) {
          const scalar_t* source = pooled + k * grad.stride(0) + (begin + i) * grad.stride(1);
          for (int64_t b = 0; b < bins; ++b) {
            const T value = static_cast<T>(source[b / width * grad.stride(2) + b % width * grad.stride(3)]);
            values[b * count + i] = value / roi.count;
          }
        }
        const auto& level = pyramid[roi.level];
        T* cells = outputs[roi.level].mutable_data_ptr<T>() + roi.image * level.image + begin;
        scatter(roi, values.data(), level, count, height, width, blend.data(), cells);
      }
    });
    for (size_t i = 0; i < outputs.size(); ++i) {
      outputs[i] = (channels_last ? outputs[i] : in_planes(outputs[i])).to(grad.scalar_type());
    }
  });
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("roi_align", &roi_align);
  m.impl("roi_align_backward", &roi_align_backward);
}

}  // namespace mmdet
