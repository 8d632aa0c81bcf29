// Global context pooling on CUDA of channels_last maps whose positions fit a block's registers.
#pragma once

#include <limits>

#include "context_block.cuh"

namespace mmdet {

// Sums of kBatch values over a warp; lane / 4 tells of which. Each step a lane hands on half of what it has.
template <typename T>
__device__ __forceinline__ T add_lanes_of_batch(int lane, T* values) {
  static_assert(kBatch == 8);
#pragma unroll
  for (int kept = kBatch / 2, offset = kWarp / 2; kept > 0; kept /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const T given = upper ? values[i] : values[i + kept], own = upper ? values[i + kept] : values[i];
      values[i] = own + __shfl_xor_sync(0xffffffff, given, offset);
    }
  }
  values[0] += __shfl_xor_sync(0xffffffff, values[0], 2);
  return values[0] + __shfl_xor_sync(0xffffffff, values[0], 1);
}

// (N, P, C) of up to kThreads packs of channels: a thread takes one, of some positions at a time, which stay in its
// registers until they are weighed. A lane weighs the position lane / 4 of a batch.
template <typename scalar_t, typename T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(
    int64_t channels, int64_t area, int64_t tiles, int full, const scalar_t* __restrict__ x,
    const T* __restrict__ weight, Results<T> results) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps == 8);
  __shared__ Pack<T, 2> sums[2][kBatch][kWarps / 2];  // two, so that one barrier is enough for each
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, own = lane / 4;
  const int64_t n = blockIdx.x / tiles, first = n * area + blockIdx.x % tiles * full, c = thread * kPack;
  const int width = static_cast<int>(min(static_cast<int64_t>(full), (n + 1) * area - first));
  const bool inside = c < channels;
  for (int i = thread; i < 2 * kBatch * kWarps / 2; i += blockDim.x) {
    sums[0][0][i] = {};  // the block may have fewer warps
  }
  __syncthreads();
  int turn = 0;
  const auto add_batch = [&](T* values) {  // the sum of the value `own` over all threads
    const T sum = add_lanes_of_batch(lane, values);
    if (lane % 4 == 0) {
      sums[turn][own][warp / 2].value[warp % 2] = sum;
    }
    __syncthreads();
    const auto two = sums[turn][own][lane % 4];
    turn ^= 1;
    T total = two.value[0] + two.value[1];
    total += __shfl_xor_sync(0xffffffff, total, 2);
    return total + __shfl_xor_sync(0xffffffff, total, 1);
  };
  x += first * channels + c;
  Pack<T, kPack> w = {}, sum = {};
  T mean = 0;
  if (inside) {
    w = load<kPack>(weight + (kBackward ? n * channels : 0) + c);
  }
  if (kBackward) {  // as for a position: of a single one the two are equal to the last bit
    T means[kBatch] = {};
    for (int j = 0; inside && j < kPack; ++j) {
      means[0] = fma(w.value[j], results.context[n * channels + c + j], means[0]);
    }
    mean = __shfl_sync(0xffffffff, add_batch(means), 0);
  }
  T top = std::numeric_limits<T>::lowest(), total = 0;  // finite: logits of -infinity weigh nothing
  for (int start = 0; start < width; start += kBatch) {
    Words<scalar_t, kPack> words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // behind the last position that one once more, which weighs nothing
      words[i] = inside ? load_words<kPack>(x + min(start + i, width - 1) * channels) : Words<scalar_t, kPack>{};
    }
    const bool there = start + own < width;
    const T attention = kBackward && there ? results.attention[first + start + own] : T(0);
    Pack<T, kPack> packs[kBatch];
    T values[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      packs[i] = unpack<T, scalar_t, kPack>(words[i]);
      for (int j = 0; j < kPack; ++j) {
        values[i] = fma(w.value[j], packs[i].value[j], values[i]);
      }
    }
    const T value = add_batch(values);
    T share = attention * (value - mean), scale = 1;
    if (!kBackward) {
      T higher = there ? max(top, value) : top;
      for (int offset = kWarp / 2; offset >= 4; offset /= 2) {
        higher = max(higher, __shfl_xor_sync(0xffffffff, higher, offset));
      }
      share = there ? exp(value - higher) : T(0);
      scale = exp(top - higher);  // of what was summed below another maximum
      top = higher;
      total = fma(total, scale, share);
    }
    if (there && warp == 0 && lane % 4 == 0) {
      results.positions[first + start + own] = kBackward ? share : value;
    }
    for (int j = 0; j < kPack; ++j) {
      sum.value[j] *= scale;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const T factor = __shfl_sync(0xffffffff, share, 4 * i);
      for (int j = 0; j < kPack; ++j) {
        sum.value[j] = fma(factor, packs[i].value[j], sum.value[j]);
      }
    }
  }
  if (inside) {
    store(results.parts + blockIdx.x * channels + c, sum);
  }
  if (!kBackward && warp == 0) {
    for (int offset = kWarp / 2; offset >= 4; offset /= 2) {
      total += __shfl_xor_sync(0xffffffff, total, offset);
    }
    if (lane == 0) {
      results.tops[blockIdx.x] = top;
      results.totals[blockIdx.x] = total;
    }
  }
}

}  // namespace mmdet
