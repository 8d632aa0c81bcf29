// Geometry and checks of RoIAlign that the CPU and the CUDA kernel share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>

#include <cmath>

namespace mmdet {

// Sampling points of one RoI along one axis, in feature cells: bin b has the points
// start + b * bin + (i + 0.5) * bin / grid for i in [0, grid).
template <typename T>
struct RoiSamples {
  T start;
  T bin;
  int grid;

  C10_HOST_DEVICE T at(int b, int i) const {
    return start + b * bin + (i + T(0.5)) * bin / grid;
  }
};

// Bounds the work that a diverged network's box can ask for; no feature map is that wide.
constexpr int kMaxAdaptiveGrid = 4096;

template <typename T>
C10_HOST_DEVICE inline RoiSamples<T> roi_samples(
    T low, T high, T spatial_scale, int bins, int sampling_ratio, bool aligned) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = low * spatial_scale - offset;
  T size = high * spatial_scale - offset - start;
  if (!aligned && !(size >= T(1))) {
    size = T(1);
  }
  const T bin = size / bins;
  int grid = sampling_ratio;
  if (sampling_ratio <= 0) {  // NaN and empty RoIs have no points
    grid = !(bin > T(0)) ? 0 : bin < T(kMaxAdaptiveGrid) ? static_cast<int>(std::ceil(bin)) : kMaxAdaptiveGrid;
  }
  return {start, bin, grid};
}

// Linear interpolation at a point of an axis with `extent` cells. Points up to one cell outside take the border's
// value, points further out (and NaN) are worth zero.
template <typename T>
struct LinearTap {
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

inline void check_roi_align(
    const at::Tensor& input, const at::Tensor& rois, int64_t height, int64_t width, int64_t sampling_ratio) {
  TORCH_CHECK_VALUE(input.dim() == 4, "roi_align: input must be (N, C, H, W), got ", input.sizes());
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be (K, 5) [image, x1, y1, x2, y2], got ", rois.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(input.scalar_type()), "roi_align: input must be floating point, got ", input.scalar_type());
  TORCH_CHECK_TYPE(
      at::isFloatingType(rois.scalar_type()), "roi_align: rois must be floating point, got ", rois.scalar_type());
  TORCH_CHECK_VALUE(
      input.device() == rois.device(), "roi_align: input is on ", input.device(), " but rois on ", rois.device());
  TORCH_CHECK_VALUE(
      height > 0 && width > 0, "roi_align: output size must be positive, got ", height, " x ", width);
  TORCH_CHECK_VALUE(sampling_ratio >= 0, "roi_align: sampling_ratio must not be negative, got ", sampling_ratio);
}

}  // namespace mmdet
