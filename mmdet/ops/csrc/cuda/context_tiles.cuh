// The tiles of global context pooling on CUDA that lie in shared memory: a block keeps a few positions with all their
// channels, since a position's weight needs all of them, and then weighs them. In the forward pass weights are
// exponentials of the logits, in the backward pass the logits' gradients.
#pragma once

#include <limits>

#include "context_block.cuh"

namespace mmdet {

constexpr int kRows = 4;            // positions that a warp has under way
constexpr int kMaxWidth = 64;       // positions of a tile
constexpr int64_t kRowBytes = 128;  // of a channel in a tile, where the layout is contiguous
constexpr int64_t kTileBytes = 1 << 16;

// Replaces each position's dot product in `share` by its weight; the first warp does. `position` is the tile's first.
template <typename T, bool kBackward>
__device__ void weigh(int thread, int width, T* share, T mean, int64_t position, const Results<T>& results) {
  if (thread < kWarp) {
    T top = std::numeric_limits<T>::lowest(), total = 0;  // finite: logits of -infinity weigh nothing
    if (!kBackward) {
      for (int i = thread; i < width; i += kWarp) {
        top = max(top, share[i]);
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        top = max(top, __shfl_xor_sync(0xffffffff, top, offset));
      }
    }
    for (int i = thread; i < width; i += kWarp) {
      const T value = share[i];
      share[i] = kBackward ? results.attention[position + i] * (value - mean) : exp(value - top);
      results.positions[position + i] = kBackward ? share[i] : value;
      total += share[i];
    }
    if (!kBackward) {
      total = add_lanes(total);
      if (thread == 0) {
        results.tops[blockIdx.x] = top;
        results.totals[blockIdx.x] = total;
      }
    }
  }
  __syncthreads();
}

// (N, C, P): thread (x, y) reads the x-th pack of the tile's positions in every blockDim.y-th channel.
template <typename scalar_t, typename T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kThreads) contiguous_kernel(
    int64_t channels, int64_t area, int64_t tiles, bool staged, const scalar_t* x, const T* weight,
    Results<T> results) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ T sums[kThreads * kPack], means[kThreads], share[kMaxWidth];
  auto* tile = reinterpret_cast<Pack<scalar_t, kPack>*>(memory);
  const int columns = blockDim.x, rows = blockDim.y, thread = threadIdx.y * columns + threadIdx.x;
  const int full = columns * kPack;
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * full;
  const int width = static_cast<int>(min(static_cast<int64_t>(full), area - first));
  const bool inside = threadIdx.x * kPack < width;
  x += n * channels * area + first + threadIdx.x * kPack;
  const T* context = kBackward ? results.context + n * channels : nullptr;
  weight += kBackward ? n * channels : 0;

  T sum[kPack] = {}, mean = 0;
  for (int64_t begin = threadIdx.y; begin < channels; begin += rows * kBatch) {
    Pack<scalar_t, kPack> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = begin + i * rows;
      if (inside && c < channels) {
        batch[i] = load<kPack>(x + c * area);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = begin + i * rows;
      const T w = c < channels ? weight[c] : T(0);
      if (inside && c < channels) {
        if (staged) {
          tile[c * columns + threadIdx.x] = batch[i];
        }
        for (int j = 0; j < kPack; ++j) {
          sum[j] = fma(w, static_cast<T>(batch[i].value[j]), sum[j]);
        }
      }
      if (kBackward && c < channels) {  // as for a position: of a single one the two are equal to the last bit
        mean = fma(w, context[c], mean);
      }
    }
  }
  for (int j = 0; j < kPack; ++j) {
    sums[thread * kPack + j] = sum[j];
  }
  means[thread] = mean;
  __syncthreads();
  mean = 0;
  if (thread < width) {
    T total = 0;
    for (int row = 0; row < rows; ++row) {
      total += sums[row * full + thread];
      mean += means[row * columns];
    }
    share[thread] = total;
  }
  __syncthreads();
  weigh<T, kBackward>(thread, width, share, mean, n * area + first, results);

  T part[kPack];
  for (int j = 0; j < kPack; ++j) {
    part[j] = inside ? share[threadIdx.x * kPack + j] : T(0);
  }
  // All threads of a warp take all steps, as the shuffles ask.
#pragma unroll 4
  for (int64_t begin = 0; begin < channels; begin += rows) {
    const int64_t c = begin + threadIdx.y;
    T total = 0;
    if (inside && c < channels) {
      const auto pack = staged ? tile[c * columns + threadIdx.x] : load<kPack>(x + c * area);
      for (int j = 0; j < kPack; ++j) {
        total = fma(part[j], static_cast<T>(pack.value[j]), total);
      }
    }
    for (int offset = columns / 2; offset > 0; offset /= 2) {
      total += __shfl_down_sync(0xffffffff, total, offset, columns);
    }
    if (threadIdx.x == 0 && c < channels) {
      results.parts[blockIdx.x * channels + c] = total;
    }
  }
}

// (N, P, C) of more channels: a tile lies in one piece. A warp takes the dot products of some positions, a thread then
// sums a pack of channels over some positions.
template <typename scalar_t, typename T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kThreads) channels_last_kernel(
    int64_t channels, int64_t area, int64_t tiles, int full, bool staged, const scalar_t* x, const T* weight,
    Results<T> results) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Pack<T, kPack> sums[kThreads];
  __shared__ T share[kMaxWidth], mean;
  auto* tile = reinterpret_cast<scalar_t*>(memory);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * full;
  const int width = static_cast<int>(min(static_cast<int64_t>(full), area - first));
  x += (n * area + first) * channels;
  weight += kBackward ? n * channels : 0;

  const int64_t columns = channels / kPack, packs = staged ? width * columns : 0;
  for (int64_t begin = thread; begin < packs; begin += kThreads * kBatch) {
    Pack<scalar_t, kPack> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i * kThreads < packs) {
        batch[i] = load<kPack>(x + (begin + i * kThreads) * kPack);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i * kThreads < packs) {
        store(tile + (begin + i * kThreads) * kPack, batch[i]);
      }
    }
  }
  __syncthreads();
  const scalar_t* source = staged ? tile : x;

  for (int p = warp * kRows; p < width; p += kThreads / kWarp * kRows) {
    T sum[kRows] = {};
#pragma unroll 2
    for (int64_t c = lane * kPack; c < channels; c += kWarp * kPack) {
      const auto w = load<kPack>(weight + c);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const auto pack = load<kPack>(source + min(p + i, width - 1) * channels + c);
        for (int j = 0; j < kPack; ++j) {
          sum[i] = fma(w.value[j], static_cast<T>(pack.value[j]), sum[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] = add_lanes(sum[i]);
      if (lane == 0 && p + i < width) {
        share[p + i] = sum[i];
      }
    }
  }
  if (kBackward && warp == 0) {  // as for a position: of a single one the two are equal to the last bit
    T sum = 0;
    for (int64_t c = lane * kPack; c < channels; c += kWarp * kPack) {
      for (int j = 0; j < kPack; ++j) {
        sum = fma(weight[c + j], results.context[n * channels + c + j], sum);
      }
    }
    sum = add_lanes(sum);
    if (lane == 0) {
      mean = sum;
    }
  }
  __syncthreads();
  weigh<T, kBackward>(thread, width, share, kBackward ? mean : T(0), n * area + first, results);

  for (int64_t begin = 0; begin < columns; begin += kThreads) {
    const int wide = static_cast<int>(min(columns - begin, static_cast<int64_t>(kThreads)));
    const int slices = kThreads / wide, slice = thread / wide;
    const int64_t c = (begin + thread % wide) * kPack;
    Pack<T, kPack> sum = {};
    if (slice < slices) {
#pragma unroll 4
      for (int p = slice; p < width; p += slices) {
        const auto pack = load<kPack>(source + p * channels + c);
        for (int j = 0; j < kPack; ++j) {
          sum.value[j] = fma(share[p], static_cast<T>(pack.value[j]), sum.value[j]);
        }
      }
    }
    sums[thread] = sum;
    __syncthreads();
    if (slice == 0) {
      for (int other = 1; other < slices; ++other) {
        const auto more = sums[other * wide + thread];
        for (int j = 0; j < kPack; ++j) {
          sum.value[j] += more.value[j];
        }
      }
      store(results.parts + blockIdx.x * channels + c, sum);
    }
    __syncthreads();
  }
}

}  // namespace mmdet
