// Passes over channels_last maps and the sum of partial sums, for the global context kernels.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

#include "../context_block.h"
#include "pack.cuh"

namespace mmdet {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kSteps = 16;     // positions that a thread takes, where the layout is channels_last
constexpr int kUnderWay = 2;  // of which it loads so many before it computes

// How a block passes over channels_last maps: threads side by side take a pack of channels each, `wide` of them a
// position, and go on by `slices` positions.
struct Rows {
  int64_t area, columns, groups, chunks;  // packs of a position; blocks that share one, and blocks over positions
  int wide, slices;

  Rows(int64_t channels, int64_t area, int pack) : area(area), columns(channels / pack) {
    wide = static_cast<int>(std::min<int64_t>(columns, kThreads));
    slices = kThreads / wide;
    groups = (columns + wide - 1) / wide;
    chunks = (area + slices * kSteps - 1) / (slices * kSteps);
  }
};

// What a thread of a block takes.
struct Place {
  int64_t image, column, first;
  bool inside;

  __device__ explicit Place(const Rows& rows) {
    const int64_t chunk = blockIdx.x / rows.groups;
    const int slice = threadIdx.x / rows.wide;
    image = chunk / rows.chunks;
    column = blockIdx.x % rows.groups * rows.wide + threadIdx.x % rows.wide;
    first = chunk % rows.chunks * rows.slices * kSteps + slice;
    inside = slice < rows.slices && column < rows.columns;
  }

  // The number of a step's position among those of all images; -1 behind the image's last.
  __device__ int64_t row(const Rows& rows, int step) const {
    const int64_t p = first + step * rows.slices;
    return p < rows.area ? image * rows.area + p : -1;
  }
};

// `value` where there is no data.
template <int kPack, typename T>
__device__ __forceinline__ Pack<T, kPack> load_or(const T* data, int64_t offset, T value) {
  Pack<T, kPack> pack;
  for (int j = 0; j < kPack; ++j) {
    pack.value[j] = value;
  }
  return data ? load<kPack>(data + offset) : pack;
}

// The parts of a softmax: each has its own maximum (`tops`) and sum of exponentials (`totals`), and weighs by both.
template <typename T>
struct Softmax {
  const T *tops = nullptr, *totals = nullptr;
  T* logits = nullptr;  // (groups, area), becomes the softmax
  int64_t area = 0;
};

template <typename T, typename F>
__device__ T reduce_block(T value, const F& combine) {
  __shared__ T warps[kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // an earlier result may still be read
  if (threadIdx.x == 0) {
    warps[threadIdx.y] = value;
  }
  __syncthreads();
  value = warps[threadIdx.x];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  return value;
}

// (groups, count, C) -> (groups, C), in an order that does not vary. A block of 32 x 32 threads sums 32 channels.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp) sum_parts_kernel(
    int64_t count, int64_t channels, int64_t blocks, const T* parts, Softmax<T> softmax, T* output) {
  __shared__ T sums[kWarp][kWarp + 1];
  const int64_t group = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t thread = threadIdx.y * kWarp + threadIdx.x, threads = kWarp * kWarp;
  const int64_t first = group * count, c = block * kWarp + threadIdx.x;
  T top = 0, total = 1;
  if (softmax.tops) {
    T mine = softmax.tops[first];
    for (int64_t i = thread; i < count; i += threads) {
      mine = max(mine, softmax.tops[first + i]);
    }
    top = reduce_block(mine, [](T a, T b) { return max(a, b); });
    mine = 0;
    for (int64_t i = thread; i < count; i += threads) {
      mine += softmax.totals[first + i] * exp(softmax.tops[first + i] - top);
    }
    total = reduce_block(mine, [](T a, T b) { return a + b; });
    for (int64_t p = block * threads + thread; p < softmax.area; p += blocks * threads) {
      T& logit = softmax.logits[group * softmax.area + p];
      logit = exp(logit - top) / total;
    }
  }
  T sum = 0;
  if (c < channels) {
    for (int64_t i = first + threadIdx.y; i < first + count; i += kWarp) {
      const T weight = softmax.tops ? exp(softmax.tops[i] - top) : T(1);
      sum += weight * parts[i * channels + c];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < channels) {
    sum = 0;
    for (int row = 0; row < kWarp; ++row) {
      sum += sums[row][threadIdx.x];
    }
    output[group * channels + c] = sum / total;
  }
}

template <typename T>
void sum_parts(
    int64_t groups, int64_t count, int64_t channels, const T* parts, T* output, const Softmax<T>& softmax = {}) {
  const int64_t blocks = (channels + kWarp - 1) / kWarp;
  sum_parts_kernel<<<groups * blocks, dim3(kWarp, kWarp), 0, c10::cuda::getCurrentCUDAStream()>>>(
      count, channels, blocks, parts, softmax, output);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdet
