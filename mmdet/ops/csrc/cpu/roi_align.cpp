// RoIAlign on the CPU. Average pooling of bilinear samples on a grid is separable, so a RoI is two short lists of
// weights, one for rows and one for columns, built once and used for all channels.
#include "../roi_align.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace mmdet {
namespace {

// Bin b of one axis sums weight[t] * cells[t] for t in [begin[b], begin[b + 1]).
template <typename T>
struct Axis {
  std::vector<int> begin;
  std::vector<int> cell;
  std::vector<T> weight;
};

template <typename T>
Axis<T> make_axis(const RoiSamples<T>& samples, int bins, int extent) {
  Axis<T> axis;
  axis.begin.reserve(bins + 1);
  axis.begin.push_back(0);
  const auto add = [&axis](int cell, T weight) {
    if (weight == T(0)) {
      return;
    }
    // Neighbouring samples share cells: merge with one of the last two entries of this bin.
    const int size = static_cast<int>(axis.cell.size());
    for (int t = size - 1; t >= std::max(size - 2, axis.begin.back()); --t) {
      if (axis.cell[t] == cell) {
        axis.weight[t] += weight;
        return;
      }
    }
    axis.cell.push_back(cell);
    axis.weight.push_back(weight);
  };
  for (int b = 0; b < bins; ++b) {
    for (int i = 0; i < samples.grid; ++i) {
      const auto tap = linear_tap(samples.at(b, i), extent);
      add(tap.low, tap.weight_low / samples.grid);
      add(tap.high, tap.weight_high / samples.grid);
    }
    axis.begin.push_back(static_cast<int>(axis.cell.size()));
  }
  return axis;
}

// One RoI, ready for all channels. `columns` are the feature columns it touches; x.cell holds positions in them.
// A dense RoI touches (nearly) all columns of a range, which are then read as one contiguous run.
template <typename T>
struct Roi {
  int64_t image;
  Axis<T> y;
  Axis<T> x;
  std::vector<int> columns;
  bool dense;
};

template <typename T>
void compact_columns(Roi<T>& roi) {
  auto& columns = roi.columns;
  columns = roi.x.cell;
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  const size_t range = columns.empty() ? 0 : columns.back() - columns.front() + 1;
  roi.dense = range <= 3 * columns.size();
  if (roi.dense) {
    const int first = columns.empty() ? 0 : columns.front();
    columns.resize(range);
    for (size_t j = 0; j < range; ++j) {
      columns[j] = first + static_cast<int>(j);
    }
  }
  for (int& cell : roi.x.cell) {
    cell = roi.dense ? cell - columns.front()
                     : static_cast<int>(std::lower_bound(columns.begin(), columns.end(), cell) - columns.begin());
  }
}

template <typename T>
std::vector<Roi<T>> make_rois(
    const at::Tensor& rois, double spatial_scale, at::IntArrayRef input_size, int height, int width,
    int sampling_ratio, bool aligned) {
  const T* boxes = rois.const_data_ptr<T>();
  std::vector<Roi<T>> result(rois.size(0));
  for (int64_t k = 0; k < rois.size(0); ++k) {
    const T image = boxes[5 * k];
    TORCH_CHECK_INDEX(
        image >= T(0) && image < T(input_size[0]), "roi_align: rois[", k, "] names image ", image, " of a batch of ",
        input_size[0]);
  }
  at::parallel_for(0, rois.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* box = boxes + 5 * k;
      const T scale = static_cast<T>(spatial_scale);
      auto& roi = result[k];
      roi.image = static_cast<int64_t>(box[0]);
      roi.x = make_axis(roi_samples(box[1], box[3], scale, width, sampling_ratio, aligned), width, input_size[3]);
      roi.y = make_axis(roi_samples(box[2], box[4], scale, height, sampling_ratio, aligned), height, input_size[2]);
      compact_columns(roi);
    }
  });
  return result;
}

// One channel of one RoI: rows are blended first (contiguous, so it vectorises), columns afterwards.
template <typename T>
void pool_plane(const Roi<T>& roi, const T* plane, int64_t stride, int height, int width, T* blend, T* output) {
  const int size = static_cast<int>(roi.columns.size());
  for (int h = 0; h < height; ++h) {
    std::fill_n(blend, size, T(0));
    for (int t = roi.y.begin[h]; t < roi.y.begin[h + 1]; ++t) {
      const T weight = roi.y.weight[t];
      const T* row = plane + roi.y.cell[t] * stride;
      if (roi.dense) {
        const T* run = row + (size ? roi.columns[0] : 0);
        for (int j = 0; j < size; ++j) {
          blend[j] += weight * run[j];
        }
      } else {
        for (int j = 0; j < size; ++j) {
          blend[j] += weight * row[roi.columns[j]];
        }
      }
    }
    for (int w = 0; w < width; ++w) {
      T sum = 0;
      for (int t = roi.x.begin[w]; t < roi.x.begin[w + 1]; ++t) {
        sum += roi.x.weight[t] * blend[roi.x.cell[t]];
      }
      *output++ = sum;
    }
  }
}

// The transpose of pool_plane.
template <typename T>
void scatter_plane(const Roi<T>& roi, const T* grad, int64_t stride, int height, int width, T* blend, T* plane) {
  const int size = static_cast<int>(roi.columns.size());
  for (int h = 0; h < height; ++h) {
    std::fill_n(blend, size, T(0));
    for (int w = 0; w < width; ++w) {
      const T value = *grad++;
      for (int t = roi.x.begin[w]; t < roi.x.begin[w + 1]; ++t) {
        blend[roi.x.cell[t]] += roi.x.weight[t] * value;
      }
    }
    for (int t = roi.y.begin[h]; t < roi.y.begin[h + 1]; ++t) {
      const T weight = roi.y.weight[t];
      T* row = plane + roi.y.cell[t] * stride;
      if (roi.dense) {
        T* run = row + (size ? roi.columns[0] : 0);
        for (int j = 0; j < size; ++j) {
          run[j] += weight * blend[j];
        }
      } else {
        for (int j = 0; j < size; ++j) {
          row[roi.columns[j]] += weight * blend[j];
        }
      }
    }
  }
}

// Half-precision inputs are computed in float32.
at::ScalarType compute_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor roi_align(
    const at::Tensor& input, const at::Tensor& rois, double spatial_scale, int64_t height, int64_t width,
    int64_t sampling_ratio, bool aligned) {
  check_roi_align(input, rois, height, width, sampling_ratio);
  const auto features = input.to(compute_type(input)).contiguous();
  const auto boxes = rois.to(features.scalar_type()).contiguous();
  const int64_t num_rois = rois.size(0), channels = input.size(1), area = input.size(2) * input.size(3);
  if (area == 0 || channels == 0) {
    return at::zeros({num_rois, channels, height, width}, input.options());
  }
  auto output = at::empty({num_rois, channels, height, width}, features.options());
  AT_DISPATCH_FLOATING_TYPES(features.scalar_type(), "roi_align", [&] {
    const auto prepared = make_rois<scalar_t>(
        boxes, spatial_scale, input.sizes(), height, width, sampling_ratio, aligned);
    const scalar_t* planes = features.const_data_ptr<scalar_t>();
    scalar_t* pooled = output.mutable_data_ptr<scalar_t>();
    // Channel by channel, so that a feature plane stays in cache while all RoIs read it.
    at::parallel_for(0, channels * num_rois, 64, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> blend(input.size(3));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i / num_rois, k = i % num_rois;
        const auto& roi = prepared[k];
        pool_plane(
            roi, planes + (roi.image * channels + c) * area, input.size(3), height, width, blend.data(),
            pooled + (k * channels + c) * height * width);
      }
    });
  });
  return output.to(input.scalar_type());
}

at::Tensor roi_align_backward(
    const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, at::IntArrayRef input_size,
    int64_t sampling_ratio, bool aligned) {
  const auto grads = grad.to(compute_type(grad)).contiguous();
  const auto boxes = rois.to(grads.scalar_type()).contiguous();
  auto output = at::zeros(input_size, grads.options());
  const int64_t images = input_size[0], channels = input_size[1], area = input_size[2] * input_size[3];
  const int64_t height = grad.size(2), width = grad.size(3);
  if (output.numel() == 0) {
    return output.to(grad.scalar_type());
  }
  AT_DISPATCH_FLOATING_TYPES(grads.scalar_type(), "roi_align_backward", [&] {
    const auto prepared = make_rois<scalar_t>(
        boxes, spatial_scale, input_size, height, width, sampling_ratio, aligned);
    const scalar_t* pooled = grads.const_data_ptr<scalar_t>();
    scalar_t* planes = output.mutable_data_ptr<scalar_t>();
    // One thread owns a plane, and takes the RoIs in order: no races, and the same sums for any number of threads.
    at::parallel_for(0, images * channels, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> blend(input_size[3]);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / channels, c = i % channels;
        for (size_t k = 0; k < prepared.size(); ++k) {
          if (prepared[k].image == n) {
            scatter_plane(
                prepared[k], pooled + (k * channels + c) * height * width, input_size[3], height, width,
                blend.data(), planes + i * area);
          }
        }
      }
    });
  });
  return output.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("roi_align", &roi_align);
  m.impl("roi_align_backward", &roi_align_backward);
}

}  // namespace mmdet
