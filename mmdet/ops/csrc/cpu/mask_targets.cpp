// Mask targets on the CPU: the rows of a crop are blended, then their columns, as in roi_align. Sums are in float64, in
// which those of 0, 1 and float32 weights are exact: where half of a bin is covered, rounding does not decide.
#include "../mask_targets.h"
#include "roi_axis.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace mmdet {
namespace {

MMDET_SIMD void add_row(int64_t size, double weight, const uint8_t* row, double* __restrict__ sums) {
  for (int64_t i = 0; i < size; ++i) {
    sums[i] += row[i] != 0 ? weight : 0.0;
  }
}

// One box: `count` samples a bin, rows and columns of the image.
void sample(
    const Crop& crop, const Axis<double>& y, const Axis<double>& x, double count, int size, std::vector<double>& blend,
    bool* target) {
  // The part of the crop that the box's columns touch.
  const auto [least, most] = std::minmax_element(x.cell.begin(), x.cell.end());
  const int first = x.cell.empty() ? 0 : std::clamp(*least - crop.left, 0, crop.columns);
  const int end = x.cell.empty() ? 0 : std::clamp(*most + 1 - crop.left, first, crop.columns);
  blend.resize(crop.columns);
  for (int h = 0; h < size; ++h) {
    std::fill(blend.begin() + first, blend.begin() + end, 0.0);
    for (int t = y.begin[h]; t < y.begin[h + 1]; ++t) {
      const int row = y.cell[t] - crop.top;
      if (row >= 0 && row < crop.rows) {
        const uint8_t* pixels = crop.pixels + static_cast<int64_t>(row) * crop.columns;
        add_row(end - first, y.weight[t], pixels + first, blend.data() + first);
      }
    }
    for (int w = 0; w < size; ++w) {
      double sum = 0;
      for (int t = x.begin[w]; t < x.begin[w + 1]; ++t) {
        const int column = x.cell[t] - crop.left;
        sum += column >= 0 && column < crop.columns ? x.weight[t] * blend[column] : 0;
      }
      *target++ = sum >= 0.5 * std::max(1.0, count);
    }
  }
}

at::Tensor mask_targets(
    const at::Tensor& pixels, const at::Tensor& crops, const at::Tensor& boxes, const at::Tensor& matched,
    int64_t height, int64_t width, int64_t size) {
  check_mask_targets(pixels, crops, boxes, matched, height, width, size);
  const auto bytes = pixels.contiguous(), table = crops.contiguous(), objects = matched.contiguous();
  const int64_t* rows = table.const_data_ptr<int64_t>();
  for (int64_t g = 0; g < crops.size(0); ++g) {
    TORCH_CHECK_INDEX(
        crop_fits(rows + g * kCropColumns, height, width, pixels.size(0)), "mask_targets: crops[", g,
        "] leaves the image or the pixels");
  }
  const int64_t* object = objects.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < matched.size(0); ++k) {
    TORCH_CHECK_INDEX(
        object[k] >= 0 && object[k] < crops.size(0), "mask_targets: matched[", k, "] names object ", object[k], " of ",
        crops.size(0));
  }
  auto targets = at::empty({boxes.size(0), size, size}, boxes.options().dtype(at::kBool));
  const auto type = compute_type(boxes);
  const auto coordinates = boxes.to(type).contiguous();
  AT_DISPATCH_FLOATING_TYPES(type, "mask_targets", [&] {
    const scalar_t* corners = coordinates.const_data_ptr<scalar_t>();
    at::parallel_for(0, boxes.size(0), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> blend;
      for (int64_t k = begin; k < end; ++k) {
        const scalar_t* box = corners + 4 * k;
        const auto x = mask_samples(box[0], box[2], size), y = mask_samples(box[1], box[3], size);
        sample(
            Crop(bytes.const_data_ptr<uint8_t>(), rows + object[k] * kCropColumns), make_axis<double>(y, size, height),
            make_axis<double>(x, size, width), static_cast<double>(x.grid) * y.grid, size, blend,
            targets.mutable_data_ptr<bool>() + k * size * size);
      }
    });
  });
  return targets;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("mask_targets", &mask_targets);
}

}  // namespace mmdet
