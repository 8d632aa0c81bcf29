// How maps (N, C, H, W) lie in memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

namespace mmdet {

// Contiguous tensors of one channel are both; they count as planes.
inline bool is_channels_last(const at::Tensor& map) {
  return map.is_contiguous(at::MemoryFormat::ChannelsLast) && !map.is_contiguous();
}

inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// In which a map is read and its like written: any but channels_last is made contiguous.
inline at::MemoryFormat layout_of(const at::Tensor& map) {
  return memory_format(is_channels_last(map));
}

}  // namespace mmdet
