// Geometry and checks of RoIAlign that the CPU and the CUDA kernel share.
#pragma once

#include "compute_type.h"
#include "exact.h"
#include "layout.h"

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>

#include <cmath>
#include <optional>

namespace mmdet {

// Sampling points of one RoI along one axis, in feature cells: bin b has the points
// start + b * bin + (i + 0.5) * bin / grid for i in [0, grid).
template <typename T>
struct RoiSamples {
  T start;
  T bin;
  int grid;

  C10_HOST_DEVICE T at(int b, int i) const {
    return start + product(T(b), bin) + product(i + T(0.5), bin) / grid;
  }
};

// Bounds the work that a diverged network's box can ask for; no feature map is that wide.
constexpr int kMaxGrid = 4096;

// What holds for the RoIs of all levels.
struct RoiRule {
  int sampling_ratio = 0;
  bool aligned = true;
  double shift = 0;         // cells to the right and down
  double finest_scale = 0;  // pixels; 0: the level of a RoI is given, or there is but one

  RoiRule() = default;
  RoiRule(int64_t sampling_ratio, bool aligned, double shift, std::optional<double> finest_scale)
      : sampling_ratio(static_cast<int>(sampling_ratio)),
        aligned(aligned),
        shift(shift),
        finest_scale(finest_scale.value_or(0)) {}
};

template <typename T>
C10_HOST_DEVICE inline RoiSamples<T> roi_samples(T low, T high, T spatial_scale, int bins, const RoiRule& rule) {
  const T offset = static_cast<T>((rule.aligned ? 0.5 : 0.0) - rule.shift);
  const T start = product(low, spatial_scale) - offset;
  T size = product(high, spatial_scale) - offset - start;
  if (!rule.aligned && size < T(1)) {
    size = T(1);
  }
  const T bin = size / bins;
  int grid = rule.sampling_ratio;
  if (grid <= 0) {  // NaN and empty RoIs have no points
    grid = !(bin > T(0)) ? 0 : bin < T(kMaxGrid) ? static_cast<int>(std::ceil(bin)) : kMaxGrid;
  }
  return {start, bin, grid};
}

// The level of RoI k [image, x1, y1, x2, y2] if that is given, else by its size (FPN, arXiv 1612.03144, equation 1): 0
// where sqrt(area) is below twice the finest scale, and one up with each doubling; -1 where that is NaN.
template <typename T>
C10_HOST_DEVICE inline int64_t roi_level(
    int64_t k, const T* rois, const int64_t* given, int num_levels, const RoiRule& rule) {
  if (given || rule.finest_scale == 0) {
    return given ? given[k] : 0;
  }
  const T* box = rois + 5 * k + 1;
  const T side = std::sqrt(product(box[2] - box[0], box[3] - box[1]));
  const T level = std::floor(std::log2(side / static_cast<T>(rule.finest_scale) + T(1e-6)));
  return std::isnan(level) ? -1 : level < T(0) ? 0 : level < T(num_levels) ? static_cast<int>(level) : num_levels - 1;
}

// Linear interpolation at a point of an axis with `extent` cells. Points up to one cell outside take the border's
// value, points further out (and NaN) are worth zero. GPUs read a tap of floats at once.
template <typename T>
struct alignas(16) LinearTap {
  int low;
  int high;
  T weight_low;
  T weight_high;
};

template <typename T>
C10_HOST_DEVICE inline LinearTap<T> linear_tap(T point, int extent) {
  if (!(point >= T(-1) && point <= T(extent))) {
    return {0, 0, T(0), T(0)};
  }
  if (point <= T(0)) {
    return {0, 0, T(1), T(0)};
  }
  const int low = static_cast<int>(point);
  if (low >= extent - 1) {
    return {extent - 1, extent - 1, T(1), T(0)};
  }
  const T fraction = point - low;
  return {low, low + 1, T(1) - fraction, fraction};
}

// How a level of the pyramid (N, C, H, W) lies in memory, in elements; all levels of a call lie alike.
struct Level {
  int64_t height;
  int64_t width;
  int64_t image;    // steps to the next image, channel, row and column
  int64_t channel;
  int64_t row;
  int64_t column;
};

inline Level make_level(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t area = height * width;
  return channels_last ? Level{height, width, channels * area, 1, channels * width, channels}
                       : Level{height, width, channels * area, area, width, 1};
}

inline void check_roi_align(
    at::TensorList features, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, int64_t sampling_ratio,
    std::optional<double> finest_scale) {
  TORCH_CHECK_VALUE(!features.empty(), "roi_align: at least one level is needed");
  TORCH_CHECK_VALUE(
      features.size() == spatial_scales.size(), "roi_align: ", features.size(), " levels, but ",
      spatial_scales.size(), " spatial scales");
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be (K, 5) [image, x1, y1, x2, y2], got ",
      rois.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(rois.scalar_type()), "roi_align: rois must be floating point, got ", rois.scalar_type());
  const auto& first = features[0];
  for (const auto& input : features) {
    TORCH_CHECK_VALUE(input.dim() == 4, "roi_align: input must be (N, C, H, W), got ", input.sizes());
    TORCH_CHECK_TYPE(
        at::isFloatingType(input.scalar_type()), "roi_align: input must be floating point, got ", input.scalar_type());
    TORCH_CHECK_VALUE(
        input.device() == rois.device(), "roi_align: input is on ", input.device(), " but rois on ", rois.device());
    TORCH_CHECK_VALUE(
        input.size(0) == first.size(0) && input.size(1) == first.size(1), "roi_align: levels of ", first.sizes(),
        " and of ", input.sizes(), " differ in images or channels");
    TORCH_CHECK_TYPE(
        input.scalar_type() == first.scalar_type(), "roi_align: levels must have one dtype, got ", first.scalar_type(),
        " and ", input.scalar_type());
  }
  TORCH_CHECK_VALUE(
      height > 0 && width > 0, "roi_align: output size must be positive, got ", height, " x ", width);
  TORCH_CHECK_VALUE(
      sampling_ratio >= 0 && sampling_ratio <= kMaxGrid, "roi_align: sampling_ratio must be 0 to ", kMaxGrid, ", got ",
      sampling_ratio);
  TORCH_CHECK_VALUE(
      levels || finest_scale || features.size() == 1, "roi_align: ", features.size(),
      " levels, but neither the level of each RoI nor finest_scale");
  TORCH_CHECK_VALUE(
      !finest_scale || *finest_scale > 0, "roi_align: finest_scale must be positive, got ", finest_scale.value_or(0));
  if (levels) {
    TORCH_CHECK_VALUE(
        levels->dim() == 1 && levels->size(0) == rois.size(0), "roi_align: levels must be (", rois.size(0),
        ",), got ", levels->sizes());
    TORCH_CHECK_TYPE(
        levels->scalar_type() == at::kLong, "roi_align: levels must be int64, got ", levels->scalar_type());
    TORCH_CHECK_VALUE(
        levels->device() == rois.device(), "roi_align: levels are on ", levels->device(), " but rois on ",
        rois.device());
  }
}

}  // namespace mmdet
