// What the global context kernels share: passes over channels_last maps, results of tiles, the sum of partial sums.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

#include "../context_block.h"
#include "device.cuh"
#include "pack.cuh"

namespace mmdet {

constexpr int kThreads = 256;
constexpr int kBatch = 8;     // packs that a thread has under way
constexpr int kUnderWay = 2;  // the same, where it reads and writes once

// How blocks pass over channels_last maps: threads side by side take a pack of channels each, `wide` of them a
// position, and a thread takes `steps` positions, `slices` apart.
struct Rows {
  int64_t area, columns, groups, chunks;  // packs of a position; blocks that share one, and blocks over positions
  int wide, slices, steps;
  int stride;  // packs from one of a thread's positions to the next

  Rows(int64_t images, int64_t channels, int64_t area, int pack, int steps)
      : area(area), columns(channels / pack), steps(steps) {
    wide = static_cast<int>(std::min<int64_t>(columns, kThreads));
    slices = kThreads / wide;
    groups = divide_up(columns, wide);
    chunks = divide_up(area, slices * steps);
    stride = static_cast<int>(slices * columns);
  }
};

// What a thread of a block takes.
struct Place {
  int64_t image, column, row;  // the first position's number among those of all images
  int64_t start;               // and that of its pack
  int left;                    // of the image's positions, from that one on
  bool inside;

  __device__ Place(const Rows& rows) {
    const int64_t chunk = divide(blockIdx.x, rows.groups);
    const int slice = threadIdx.x / rows.wide, lane = threadIdx.x - slice * rows.wide;
    image = divide(chunk, rows.chunks);
    column = (blockIdx.x - chunk * rows.groups) * rows.wide + lane;
    const int64_t first = (chunk - image * rows.chunks) * rows.slices * rows.steps + slice;
    row = image * rows.area + first;
    start = row * rows.columns + column;
    left = static_cast<int>(min(rows.area - first, static_cast<int64_t>(rows.slices) * rows.steps));
    inside = slice < rows.slices && column < rows.columns;
  }
};

template <typename T>
__device__ T add_lanes(T sum) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, offset);
  }
  return sum;
}

// `value` where there is no data.
template <int kPack, typename T>
__device__ __forceinline__ Pack<T, kPack> load_or(const T* data, int64_t offset, T value) {
  Pack<T, kPack> pack;
  for (int j = 0; j < kPack; ++j) {
    pack.value[j] = value;
  }
  return data ? load<kPack>(data + offset) : pack;
}

// Where a tile's results go. Backward there are no tops and totals, but the attention and the pooled context.
template <typename T>
struct Results {
  T *positions, *parts;  // (N, P): logits or their gradients; (tiles, C)
  T *tops, *totals;      // (tiles): maximum of the logits, sum of their exponentials
  const T *attention, *context;
};

// The parts of a softmax: each has its own maximum (`tops`) and sum of exponentials (`totals`), and weighs by both.
template <typename T>
struct Softmax {
  const T *tops = nullptr, *totals = nullptr;
  T* logits = nullptr;  // (groups, area), becomes the softmax
  int64_t area = 0;
};

// (groups, count, C) -> (groups, C), in an order that does not vary. A block sums 32 channels, a warp some parts.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp) sum_parts_kernel(
    int64_t count, int64_t channels, int64_t blocks, const T* parts, Softmax<T> softmax, T* output) {
  __shared__ T sums[kWarp][kWarp];
  const int rows = blockDim.y;
  const int64_t group = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t thread = threadIdx.y * kWarp + threadIdx.x, threads = rows * kWarp;
  const int64_t first = group * count, c = block * kWarp + threadIdx.x;
  T top = 0, total = 1;
  if (softmax.tops) {
    top = softmax.tops[first];
    for (int64_t i = threadIdx.x; i < count; i += kWarp) {
      top = max(top, softmax.tops[first + i]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      top = max(top, __shfl_xor_sync(0xffffffff, top, offset));
    }
    total = 0;
    for (int64_t i = threadIdx.x; i < count; i += kWarp) {
      total = fma(softmax.totals[first + i], exp(softmax.tops[first + i] - top), total);
    }
    total = add_lanes(total);
    for (int64_t p = block * threads + thread; p < softmax.area; p += blocks * threads) {
      T& logit = softmax.logits[group * softmax.area + p];
      logit = exp(logit - top) / total;
    }
  }
  T sum = 0;
  if (c < channels) {
#pragma unroll 8
    for (int64_t i = first + threadIdx.y; i < first + count; i += rows) {
      const T weight = softmax.tops ? exp(softmax.tops[i] - top) : T(1);
      sum = fma(weight, parts[i * channels + c], sum);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < channels) {
    for (int row = 1; row < rows; ++row) {
      sum += sums[row][threadIdx.x];
    }
    output[group * channels + c] = sum / total;
  }
}

template <typename T>
void sum_parts(
    int64_t groups, int64_t count, int64_t channels, const T* parts, T* output, const Softmax<T>& softmax = {}) {
  const int64_t blocks = divide_up(channels, kWarp);
  const int rows = count < 512 ? 8 : kWarp;
  sum_parts_kernel<<<groups * blocks, dim3(kWarp, rows), 0, c10::cuda::getCurrentCUDAStream()>>>(
      count, channels, blocks, parts, softmax, output);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdet
