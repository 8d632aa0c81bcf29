// Checks and geometry of mask targets that the CPU and the CUDA kernel share.
#pragma once

#include "roi_align.h"

#include <limits>

namespace mmdet {

constexpr int kCropColumns = 5;  // of the table of crops: first pixel, x1, y1, x2, y2

// The mask of one object, cut out of its image; empty outside.
struct Crop {
  const uint8_t* pixels;
  int left, top, columns, rows;

  C10_HOST_DEVICE Crop(const uint8_t* all, const int64_t* row)
      : pixels(all + row[0]),
        left(static_cast<int>(row[1])),
        top(static_cast<int>(row[2])),
        columns(static_cast<int>(row[3] - row[1])),
        rows(static_cast<int>(row[4] - row[2])) {}
};

// Whether a crop lies within its image, and its pixels within `count`. Of 31 bits each, height and width overflow
// nothing.
C10_HOST_DEVICE inline bool crop_fits(const int64_t* row, int64_t height, int64_t width, int64_t count) {
  return row[0] >= 0 && 0 <= row[1] && row[1] <= row[3] && row[3] <= width && 0 <= row[2] && row[2] <= row[4] &&
      row[4] <= height && row[0] <= count - (row[3] - row[1]) * (row[4] - row[2]);
}

// As in roi_align of the whole image's bitmap, pixel by pixel a cell.
template <typename T>
C10_HOST_DEVICE inline RoiSamples<T> mask_samples(T low, T high, int size) {
  return roi_samples(low, high, T(1), size, RoiRule{});
}

inline void check_mask_targets(
    const at::Tensor& pixels, const at::Tensor& crops, const at::Tensor& boxes, const at::Tensor& matched,
    int64_t height, int64_t width, int64_t size) {
  TORCH_CHECK_VALUE(
      pixels.dim() == 1 && crops.dim() == 2 && crops.size(1) == kCropColumns,
      "mask_targets: pixels must be (B,) and crops (G, 5), got ", pixels.sizes(), " and ", crops.sizes());
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(1) == 4 && matched.dim() == 1 && matched.size(0) == boxes.size(0),
      "mask_targets: boxes must be (P, 4) and matched (P,), got ", boxes.sizes(), " and ", matched.sizes());
  TORCH_CHECK_TYPE(
      pixels.scalar_type() == at::kByte && crops.scalar_type() == at::kLong && matched.scalar_type() == at::kLong,
      "mask_targets: pixels must be uint8, crops and matched int64, got ", pixels.scalar_type(), ", ",
      crops.scalar_type(), " and ", matched.scalar_type());
  TORCH_CHECK_TYPE(
      at::isFloatingType(boxes.scalar_type()), "mask_targets: boxes must be floating point, got ",
      boxes.scalar_type());
  TORCH_CHECK_VALUE(
      pixels.device() == boxes.device() && crops.device() == boxes.device() && matched.device() == boxes.device(),
      "mask_targets: boxes are on ", boxes.device(), ", but pixels, crops and matched on ", pixels.device(), ", ",
      crops.device(), " and ", matched.device());
  TORCH_CHECK_VALUE(
      height > 0 && width > 0 && size > 0, "mask_targets: height, width and size must be positive, got ", height, ", ",
      width, " and ", size);
  constexpr int kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(
      height <= kMost && width <= kMost, "mask_targets: height and width must be at most ", kMost, ", got ", height,
      " and ", width);
}

}  // namespace mmdet
