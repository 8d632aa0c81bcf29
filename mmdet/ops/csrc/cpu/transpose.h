// Feature maps from contiguous to channels_last layout and back, several times as fast as a strided copy.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "../divide.h"

namespace mmdet {

constexpr int64_t kTile = 16, kStrip = 256;  // channels and cells of a tile, cells of a task

template <typename T>
inline __attribute__((always_inline)) void transpose_tile(
    const T* source, int64_t source_row, int64_t rows, int64_t columns, T* target, int64_t target_row) {
  T tile[kTile][kTile];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      tile[c][r] = source[r * source_row + c];
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      target[c * target_row + r] = tile[c][r];
    }
  }
}

// Planes (N, C, P) to cells (N, P, C), or the other way round.
template <bool to_cells, typename T>
void transpose(const T* source, int64_t images, int64_t channels, int64_t area, T* target) {
  const int64_t strips = divide_up(area, kStrip);
  at::parallel_for(0, images * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % strips * kStrip, image = i / strips * channels * area;
      for (int64_t c = 0; c < channels; c += kTile) {
        for (int64_t p = first; p < std::min(first + kStrip, area); p += kTile) {
          const int64_t height = std::min(kTile, channels - c), width = std::min(kTile, area - p);
          const int64_t plane = image + c * area + p, cell = image + p * channels + c;
          const T* from = source + (to_cells ? plane : cell);
          T* to = target + (to_cells ? cell : plane);
          const int64_t from_row = to_cells ? area : channels, to_row = to_cells ? channels : area;
          if (height == kTile && width == kTile) {  // constants make it several times as fast
            transpose_tile(from, from_row, kTile, kTile, to, to_row);
          } else {
            transpose_tile(from, from_row, to_cells ? height : width, to_cells ? width : height, to, to_row);
          }
        }
      }
    }
  });
}

template <bool to_cells>
at::Tensor transpose(const at::Tensor& map) {
  const auto layout = to_cells ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  auto output = at::empty(map.sizes(), map.options().memory_format(layout));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "transpose", [&] {
    transpose<to_cells>(
        map.const_data_ptr<scalar_t>(), map.size(0), map.size(1), map.size(2) * map.size(3),
        output.mutable_data_ptr<scalar_t>());
  });
  return output;
}

// (N, C, H, W) of any strides in channels_last layout; a single channel is that as it is.
inline at::Tensor in_cells(const at::Tensor& map) {
  if (map.size(1) == 1) {
    return map.contiguous();
  }
  return map.is_contiguous(at::MemoryFormat::ChannelsLast) ? map : transpose<true>(map.contiguous());
}

// What lies channels_last, plane by plane.
inline at::Tensor in_planes(const at::Tensor& cells) {
  return transpose<false>(cells);
}

}  // namespace mmdet
