// Overlap and checks of NMS that the CPU and the CUDA kernels share.
#pragma once

#include "compute_type.h"
#include "exact.h"

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

namespace mmdet {

// Intersection of two xyxy boxes. Written so that the compiler can vectorise it.
template <typename T>
C10_HOST_DEVICE inline T intersection(T ax1, T ay1, T ax2, T ay2, T bx1, T by1, T bx2, T by2) {
  const T x1 = ax1 < bx1 ? bx1 : ax1;
  const T y1 = ay1 < by1 ? by1 : ay1;
  const T x2 = bx2 < ax2 ? bx2 : ax2;
  const T y2 = by2 < ay2 ? by2 : ay2;
  const T width = T(0) < x2 - x1 ? x2 - x1 : T(0);
  const T height = T(0) < y2 - y1 ? y2 - y1 : T(0);
  return product(width, height);
}

// The largest T that is not above `threshold`: `iou > threshold` in T is then what it is in double.
template <typename T>
inline T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold
      ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
      : rounded;
}

// What soft-NMS makes of a score, given the overlap with the box just kept; NaN is a dropped box.
enum class Decay { kLinear, kGaussian, kNaive };

template <typename T>
struct SoftNms {
  Decay method;
  T iou_threshold;
  T sigma;
  T min_score;

  C10_HOST_DEVICE T operator()(T score, T inter, T outer) const {
    const T ratio = inter / outer, iou = ratio > T(0) ? ratio : T(0);  // zero for boxes without area, and for NaN
    if (method == Decay::kGaussian) {
      return score * std::exp(-product(iou, iou) / sigma);
    }
    if (!(iou > iou_threshold)) {
      return score;
    }
    return method == Decay::kLinear ? score * (T(1) - iou) : std::numeric_limits<T>::quiet_NaN();
  }
};

template <typename T>
inline SoftNms<T> make_soft_nms(double iou_threshold, double sigma, double min_score, std::string_view method) {
  const bool known = method == "linear" || method == "gaussian" || method == "naive";
  TORCH_CHECK_VALUE(known, "soft_nms: method must be 'linear', 'gaussian' or 'naive', got '", method, "'");
  TORCH_CHECK_VALUE(static_cast<T>(sigma) > T(0), "soft_nms: sigma must be positive, got ", sigma);
  const auto decay = method == "linear" ? Decay::kLinear : method == "gaussian" ? Decay::kGaussian : Decay::kNaive;
  return {decay, round_down<T>(iou_threshold), static_cast<T>(sigma), static_cast<T>(min_score)};
}

inline void check_nms(const char* op, const at::Tensor& boxes, const at::Tensor& scores) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes must be (N, 4), got ", boxes.sizes());
  TORCH_CHECK_VALUE(
      scores.dim() == 1 && scores.size(0) == boxes.size(0), op, ": scores must be (", boxes.size(0), ",), got ",
      scores.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(boxes.scalar_type()) && at::isFloatingType(scores.scalar_type()), op,
      ": boxes and scores must be floating point, got ", boxes.scalar_type(), " and ", scores.scalar_type());
  TORCH_CHECK_VALUE(
      boxes.device() == scores.device(), op, ": boxes are on ", boxes.device(), " but scores on ", scores.device());
}

inline void check_groups(const at::Tensor& boxes, const std::optional<at::Tensor>& groups) {
  if (groups) {
    TORCH_CHECK_VALUE(
        groups->dim() == 1 && groups->size(0) == boxes.size(0), "nms: groups must be (", boxes.size(0), ",), got ",
        groups->sizes());
    TORCH_CHECK_TYPE(groups->scalar_type() == at::kLong, "nms: groups must be int64, got ", groups->scalar_type());
    TORCH_CHECK_VALUE(
        boxes.device() == groups->device(), "nms: boxes are on ", boxes.device(), " but groups on ", groups->device());
  }
}

}  // namespace mmdet
