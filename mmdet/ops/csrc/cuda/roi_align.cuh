// RoIs and their cut into blocks, for RoIAlign on CUDA. The geometry is that of the CPU kernel. In channels_last
// features a block takes one RoI and some channels: the bins' samples are found once, threads take neighbouring
// channels, and the block's part of the pooled features or of their gradient, which lies in one piece in memory, passes
// through shared memory. With features stored plane by plane, and outputs too large for that, threads of a block take
// neighbouring bins.
#pragma once

#include "../divide.h"
#include "../roi_align.h"
#include "device.cuh"
#include "pack.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace mmdet {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 8;
constexpr int kMaxTaps = kThreads / 2;  // of an axis that are kept; half a block finds them
constexpr int kMaxLanes = 64;
constexpr int64_t kTileBytes = 32 << 10;
constexpr int64_t kMaxBlocks = 1 << 20;

struct Options {
  int num_levels;
  int images, channels, height, width;  // height x width bins
  RoiRule rule;
  bool channels_last;
  Level levels[kMaxLevels];
  double spatial_scales[kMaxLevels];
};

// Pointers to the levels of a pyramid.
template <typename T>
struct Pyramid {
  T* data[kMaxLevels];
};

template <typename T>
struct RoiAxis {
  RoiSamples<T> points;
  int extent;

  __device__ LinearTap<T> at(int b, int i) const {
    return linear_tap(points.at(b, i), extent);
  }
};

// Not inlined, which would keep an axis in registers where it is hardly ever needed.
template <typename T>
__device__ __noinline__ LinearTap<T> find_tap(const RoiAxis<T>& axis, int b, int i) {
  return axis.at(b, i);
}

template <typename T>
struct KeptAxis : RoiAxis<T> {
  bool kept;  // whether all taps are: they are too many where a grid is large
  LinearTap<T> taps[kMaxTaps];

  __device__ LinearTap<T> at(int b, int i) const {
    return kept ? taps[b * this->points.grid + i] : find_tap<T>(*this, b, i);
  }
};

template <typename T, typename A = RoiAxis<T>>
struct Roi {
  int level;
  int64_t image;
  A x, y;
  T share;  // of a sample in its bin
};

// What the threads of a block share: in registers it would make fewer blocks run at a time.
template <typename T>
using SharedRoi = Roi<T, KeptAxis<T>>;

// A RoI that pools zeros has no samples.
template <typename T>
__device__ Roi<T> make_roi(int64_t k, const T* rois, const int64_t* levels, const Options& options) {
  const T* box = rois + 5 * k;
  CUDA_KERNEL_ASSERT(
      box[0] >= T(0) && box[0] < T(options.images) && "roi_align: a RoI names an image outside the batch");
  const int64_t i = roi_level(k, rois, levels, options.num_levels, options.rule);
  Roi<T> roi{};
  if (i >= 0 && i < options.num_levels && options.levels[i].height * options.levels[i].width > 0) {
    roi.level = static_cast<int>(i);
    roi.image = static_cast<int64_t>(box[0]);
    const Level& level = options.levels[i];
    const T scale = static_cast<T>(options.spatial_scales[i]);
    roi.x.points = roi_samples(box[1], box[3], scale, options.width, options.rule);
    roi.y.points = roi_samples(box[2], box[4], scale, options.height, options.rule);
    roi.x.extent = static_cast<int>(level.width);
    roi.y.extent = static_cast<int>(level.height);
    roi.share = T(1) / (T(roi.x.points.grid) * T(roi.y.points.grid));
  }
  return roi;
}

// To be followed by __syncthreads().
template <typename T>
__device__ void share_roi(
    int64_t k, const T* rois, const int64_t* levels, const Options& options, SharedRoi<T>& shared) {
  const auto roi = make_roi(k, rois, levels, options);
  const bool vertical = threadIdx.x < kMaxTaps;
  const RoiAxis<T> axis = vertical ? roi.y : roi.x;
  const int bins = vertical ? options.height : options.width, bin = threadIdx.x % kMaxTaps;
  KeptAxis<T>& target = vertical ? shared.y : shared.x;
  const bool kept = static_cast<int64_t>(bins) * axis.points.grid <= kMaxTaps;
  if (bin == 0) {
    static_cast<RoiAxis<T>&>(target) = axis;
    target.kept = kept;
  }
  if (threadIdx.x == 0) {
    shared.level = roi.level;
    shared.image = roi.image;
    shared.share = roi.share;
  }
  if (kept && bin < bins) {
#pragma unroll 1
    for (int i = 0; i < axis.points.grid; ++i) {
      target.taps[bin * axis.points.grid + i] = axis.at(bin, i);
    }
  }
}

// Calls visit(offsets in the plane, weights) of the four corners of every sample of a bin. Corners of weight zero must
// not be touched: they may hold NaN, and outside the map they are not there.
template <typename T, typename A, typename Visit>
__device__ void visit_bin(const Roi<T, A>& roi, const Level& level, int bin_y, int bin_x, Visit visit) {
  for (int iy = 0; iy < roi.y.points.grid; ++iy) {
    const auto row = roi.y.at(bin_y, iy);
    if (row.weight_low + row.weight_high == T(0)) {
      continue;
    }
    const int64_t low = row.low * level.row, high = row.high * level.row;
    const T weight_low = row.weight_low * roi.share, weight_high = row.weight_high * roi.share;
    for (int ix = 0; ix < roi.x.points.grid; ++ix) {
      const auto column = roi.x.at(bin_x, ix);
      if (column.weight_low + column.weight_high == T(0)) {
        continue;
      }
      const int64_t left = column.low * level.column, right = column.high * level.column;
      const int64_t offsets[] = {low + left, low + right, high + left, high + right};
      const T weights[] = {
          weight_low * column.weight_low, weight_low * column.weight_high,
          weight_high * column.weight_low, weight_high * column.weight_high};
      visit(offsets, weights);
    }
  }
}

// Some packs of channels of a RoI.
struct RoiTile {
  int64_t roi;
  int first, lanes;  // the first pack, and how many there are
};

// How (K, C, height, width) is cut in tiles, one for a block at a time.
struct RoiTiles {
  int64_t count;
  int packs, chunks, lanes;  // packs and tiles of a RoI, packs of a tile; the last one may have fewer

  RoiTiles(int64_t num_rois, int packs, int64_t most) : packs(packs) {
    chunks = static_cast<int>(divide_up(packs, most));
    lanes = static_cast<int>(divide_up(packs, chunks));
    count = num_rois * chunks;
  }

  __device__ RoiTile at(int64_t t) const {
    const int64_t roi = divide(t, chunks);
    const int first = static_cast<int>(t - roi * chunks) * lanes;
    return {roi, first, min(lanes, packs - first)};
  }

  int blocks() const {
    return static_cast<int>(std::min(count, kMaxBlocks));
  }
};

// Calls visit(i, RoI, offset of the plane, bin_y, bin_x) for this thread's elements i of (K, C, height, width).
template <typename T, typename Visit>
__device__ void visit_elements(
    const RoiTiles& tiles, const T* rois, const int64_t* levels, const Options& options, Visit visit) {
  __shared__ SharedRoi<T> roi;
  const unsigned width = options.width, bins = options.height * width;
  for (int64_t t = blockIdx.x; t < tiles.count; t += gridDim.x) {
    const auto [k, first, lanes] = tiles.at(t);
    share_roi(k, rois, levels, options, roi);
    __syncthreads();
    const Level& level = options.levels[roi.level];
    const int64_t plane = roi.image * level.image + first * level.channel;
    const unsigned size = lanes * bins;
    for (unsigned i = threadIdx.x; i < size; i += kThreads) {
      const unsigned lane = i / bins, bin = i % bins;
      visit((k * options.channels + first) * bins + i, roi, plane + lane * level.channel, bin / width, bin % width);
    }
    __syncthreads();
  }
}

extern __shared__ uint4 shared_memory[];

// Lanes of a tile are an odd number of packs apart, which spreads them over the banks of shared memory.
template <int kPack>
__device__ int tile_offset(int lane, int bins) {
  return lane * (bins | 1) * kPack;
}

// For visit_elements: tiles of some `size` elements.
inline RoiTiles tiles_of_elements(int64_t num_rois, const Options& options, int64_t size) {
  const int64_t bins = static_cast<int64_t>(options.height) * options.width;
  return RoiTiles(num_rois, options.channels, std::max<int64_t>(1, size / bins));
}

// Calls launch(pack, tiles, bytes of shared memory) if the features are channels_last and the bins of one pack fit in a
// tile; returns whether so.
template <typename scalar_t, typename F>
bool in_tiles(int64_t num_rois, const Options& options, bool packs, const F& launch) {
  bool fits = false;
  with_pack<scalar_t>(packs, [&](auto pack) {
    const int64_t bins = static_cast<int64_t>(options.height) * options.width, count = options.channels / pack;
    const int64_t bytes = (bins | 1) * pack * sizeof(scalar_t), most = std::min<int64_t>(kTileBytes / bytes, kMaxLanes);
    fits = options.channels_last && most > 0;
    if (fits) {
      const RoiTiles tiles(num_rois, count, most);
      launch(pack, tiles, tiles.lanes * bytes);
    }
  });
  return fits;
}

// `sizes` is N, C, then H and W of each level.
inline Options make_options(
    at::IntArrayRef sizes, at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, const RoiRule& rule,
    bool channels_last) {
  const int num_levels = static_cast<int>(spatial_scales.size());
  TORCH_CHECK_VALUE(num_levels <= kMaxLevels, "roi_align: at most ", kMaxLevels, " levels on CUDA, got ", num_levels);
  Options options{
      num_levels, static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(height),
      static_cast<int>(width), rule, channels_last, {}, {}};
  for (int i = 0; i < num_levels; ++i) {
    options.levels[i] = make_level(sizes[1], sizes[2 + 2 * i], sizes[3 + 2 * i], channels_last);
    options.spatial_scales[i] = spatial_scales[i];
  }
  return options;
}

}  // namespace mmdet
