// Pasting masks into boxes, and COCO run lengths: what the CPU and the CUDA kernel share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "compute_type.h"
#include "divide.h"

namespace mmdet {

constexpr int kWord = 64;  // pixels of one column in a word, the first in the lowest bit

// The pixels that a box can reach, cut to the image: rows [top, top + rows), columns likewise.
struct Region {
  int64_t left = 0, top = 0, columns = 0, rows = 0;
  int64_t first_word = 0;  // where its bits begin, column by column

  C10_HOST_DEVICE int64_t words() const {  // of one column
    return divide_up(rows, kWord);
  }
};

// One pixel of margin: outside the box padding has more than half the weight, so nothing reaches 0.5. A box without
// area, or with a coordinate that is not finite, has no pixels.
template <typename T>
Region region_of(const T* box, int64_t height, int64_t width) {
  const bool finite = std::all_of(box, box + 4, [](T side) { return std::isfinite(side); });
  if (!finite || !(box[2] > box[0] && box[3] > box[1])) {
    return {};
  }
  const auto low = [](T side, int64_t extent) {
    return std::clamp(static_cast<double>(std::floor(side)) - 1, 0.0, static_cast<double>(extent));
  };
  const auto high = [](T side, int64_t extent) {
    return std::clamp(static_cast<double>(std::ceil(side)) + 1, 0.0, static_cast<double>(extent));
  };
  Region region;
  region.left = static_cast<int64_t>(low(box[0], width));
  region.top = static_cast<int64_t>(low(box[1], height));
  region.columns = std::max<int64_t>(static_cast<int64_t>(high(box[2], width)) - region.left, 0);
  region.rows = std::max<int64_t>(static_cast<int64_t>(high(box[3], height)) - region.top, 0);
  return region;
}

// The two cells of an axis of the mask that a pixel lies between, and their weights.
template <typename T>
struct Tap {
  int cell;  // the first one, from -1; cells outside [0, size) are zero
  T first;
  T second;
};

// In the arithmetic of torch.nn.functional.grid_sample on a CPU with fused multiply-add, bit by bit: where a
// probability meets the threshold exactly, the last bit decides. std::fma says what is fused and what is not.
template <typename T>
C10_HOST_DEVICE inline Tap<T> tap_of(int64_t pixel, T low, T extent, int size) {
  const T grid = (static_cast<T>(pixel) + T(0.5) - low) / extent * T(2) - T(1);
  const T point = std::fma(grid + T(1), static_cast<T>(size) / T(2), T(-0.5));
  const T cell = std::floor(point);
  const T second = point - cell;
  const bool inside = cell >= T(-1) && cell < static_cast<T>(size);  // false for NaN
  return {inside ? static_cast<int>(cell) : size, T(1) - second, second};
}

// Of the cells a b (north) and c d (south).
template <typename T>
C10_HOST_DEVICE inline T bilinear(T a, T b, T c, T d, T north, T south, T west, T east) {
  return std::fma(d, south * east, std::fma(c, south * west, std::fma(b, north * east, a * (north * west))));
}

// COCO's RLE of one mask, built column by column (cocodataset.org/#format-data; its text form is that of
// pycocotools). Keeps where the mask changes in the image's pixels in column order, zeros first.
class RunLengths {
 public:
  // One column of the region as bits; its first pixel is number `start` of the image.
  void add_column(const uint64_t* bits, int64_t rows, int64_t start) {
    uint64_t before = 0;
    for (int64_t row = 0; row < rows; row += kWord) {
      const uint64_t word = *bits++;
      for (uint64_t change = word ^ (word << 1 | before); change; change &= change - 1) {
        toggle(start + row + std::countr_zero(change));
      }
      before = word >> (kWord - 1);
    }
    // Bits past the last row are zero, so only a column of whole words is still open.
    if (before) {
      toggle(start + rows);
    }
  }

  // Run lengths of an image of `area` pixels, as text: each as the difference to the last one of its kind, in
  // groups of five bits with a sixth that says whether more follow.
  std::string text(int64_t area) const {
    std::vector<int64_t> ends = changes_;
    if (ends.empty() || ends.back() != area) {
      ends.push_back(area);
    }
    std::string text;
    for (size_t i = 0; i < ends.size(); ++i) {
      int64_t value = run(ends, i) - (i > 2 ? run(ends, i - 2) : 0);
      bool more = true;
      while (more) {
        const int64_t group = value & 31;
        value >>= 5;
        more = value != (group & 16 ? -1 : 0);
        text.push_back(static_cast<char>(48 + (group | (more ? 32 : 0))));
      }
    }
    return text;
  }

 private:
  // A column that is full to the bottom of the image goes on at the top of the next one: no change there.
  void toggle(int64_t pixel) {
    if (!changes_.empty() && changes_.back() == pixel) {
      changes_.pop_back();
    } else {
      changes_.push_back(pixel);
    }
  }

  static int64_t run(const std::vector<int64_t>& ends, size_t i) {
    return ends[i] - (i > 0 ? ends[i - 1] : 0);
  }

  std::vector<int64_t> changes_;
};

// The texts one after the other as uint8, and the length of each.
inline std::tuple<at::Tensor, at::Tensor> joined(const std::vector<std::string>& texts) {
  size_t total = 0;
  for (const auto& text : texts) {
    total += text.size();
  }
  auto bytes = at::empty({static_cast<int64_t>(total)}, at::TensorOptions().dtype(at::kByte));
  auto lengths = at::empty({static_cast<int64_t>(texts.size())}, at::TensorOptions().dtype(at::kLong));
  uint8_t* byte = bytes.mutable_data_ptr<uint8_t>();
  int64_t* length = lengths.mutable_data_ptr<int64_t>();
  for (const auto& text : texts) {
    byte = std::copy(text.begin(), text.end(), byte);
    *length++ = static_cast<int64_t>(text.size());
  }
  return {bytes, lengths};
}

inline void check_paste(const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(
      masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.size(1) > 0,
      "paste_masks: masks must be (N, M, M), got ", masks.sizes());
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4, "paste_masks: boxes must be (",
      masks.size(0), ", 4), got ", boxes.sizes());
  TORCH_CHECK_TYPE(
      at::isFloatingType(masks.scalar_type()) && at::isFloatingType(boxes.scalar_type()),
      "paste_masks: masks and boxes must be floating point, got ", masks.scalar_type(), " and ", boxes.scalar_type());
  TORCH_CHECK_VALUE(
      masks.device() == boxes.device(), "paste_masks: masks are on ", masks.device(), " but boxes on ", boxes.device());
  TORCH_CHECK_VALUE(
      height > 0 && width > 0, "paste_masks: the image must have pixels, got height ", height, " and width ", width);
}

}  // namespace mmdet
