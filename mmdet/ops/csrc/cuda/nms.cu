// Greedy NMS on CUDA: a block takes all boxes of a group, 64 at a time, and keeps those that overlap none it has kept.
// Soft-NMS: one block.
#include "../nms.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace mmdet {
namespace {

using Word = unsigned long long;  // a bit for each box of a tile

constexpr int kTile = 64;
constexpr int kThreads = 1024;
constexpr int kStrips = kThreads / kTile;  // threads that share a box of a tile

// Whether b, which comes after a, has to go if a is kept.
template <typename T>
__device__ __forceinline__ bool overlaps(const T* a, const T* b, T threshold) {
  const T area_a = product(a[2] - a[0], a[3] - a[1]), area_b = product(b[2] - b[0], b[3] - b[1]);
  const T inter = intersection(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]);
  return inter / (area_a + area_b - inter) > threshold;
}

// Boxes come by group, in each by decreasing score. A block takes the groups that begin among 64 boxes, one after
// another; `kept` has the boxes that it has kept of a group, from where the group begins.
template <typename T>
__global__ void __launch_bounds__(kThreads) nms_kernel(
    int64_t size, const T* boxes, const int64_t* groups, const bool* valid, T threshold, T* kept, bool* keep) {
  __shared__ T tile[kTile][4];
  __shared__ Word later[kTile];  // the later boxes of the tile that a box removes
  __shared__ Word removed;
  const int lane = threadIdx.x % kTile, strip = threadIdx.x / kTile;
  const int64_t begin = blockIdx.x * int64_t{kTile}, end = min(begin + kTile, size);
  const auto same_group = [&](int64_t i, int64_t j) { return !groups || groups[i] == groups[j]; };
  for (int64_t start = begin; start < end; ++start) {
    if (start > 0 && same_group(start - 1, start)) {
      continue;
    }
    int64_t count = 0;
    for (int64_t first = start; first < size && same_group(first, start); first += kTile) {
      const int64_t i = first + lane;
      const bool inside = i < size && same_group(i, start);
      if (threadIdx.x == 0) {
        removed = 0;
      }
      if (strip == 0) {
        later[lane] = 0;
        for (int side = 0; side < 4; ++side) {
          tile[lane][side] = inside ? boxes[4 * i + side] : T(0);
        }
      }
      __syncthreads();
      bool gone = !inside || !valid[i];
      if (inside) {
#pragma unroll 4
        for (int64_t j = strip; j < count; j += kStrips) {
          gone |= overlaps(kept + 4 * (start + j), tile[lane], threshold);
        }
      }
      Word word = 0;
      for (int b = strip; b < kTile; b += kStrips) {
        if (b > lane && overlaps(tile[lane], tile[b], threshold)) {
          word |= Word(1) << b;
        }
      }
      if (gone) {
        atomicOr(&removed, Word(1) << lane);
      }
      if (word) {
        atomicOr(&later[lane], word);
      }
      __syncthreads();
      Word alive = 0;  // every thread settles the tile by itself
      for (Word left = ~removed; left;) {
        const int b = __ffsll(left) - 1;
        alive |= Word(1) << b;
        left &= ~(later[b] | Word(1) << b);
      }
      if (strip == 0 && alive >> lane & 1) {
        const int64_t place = start + count + __popcll(alive & ((Word(1) << lane) - 1));
        for (int side = 0; side < 4; ++side) {
          kept[4 * place + side] = tile[lane][side];
        }
        keep[i] = true;
      }
      count += __popcll(alive);
      __syncthreads();  // before others read what was kept, and the tile is overwritten
    }
  }
}

at::Tensor nms(
    const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups,
    double iou_threshold) {
  check_nms("nms", boxes, scores);
  check_groups(boxes, groups);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t size = boxes.size(0);
  if (size == 0) {
    return at::empty({0}, boxes.options().dtype(at::kLong));
  }
  // NaN would sort first: it goes last here, and is not valid.
  const auto nan = scores.isnan();
  const auto by_score = std::get<1>(
      scores.masked_fill(nan, -std::numeric_limits<double>::infinity()).sort(/*stable=*/true, 0, /*descending=*/true));
  at::Tensor order = by_score, place, sorted_groups;  // by group; its place by score
  if (groups) {
    std::tie(sorted_groups, place) = groups->index_select(0, by_score).sort(/*stable=*/true, 0, /*descending=*/false);
    order = by_score.index_select(0, place);
  }
  const auto valid = nan.index_select(0, order).logical_not();
  const auto type = compute_type(boxes);
  const auto sorted = boxes.to(type).index_select(0, order);
  auto kept = at::empty_like(sorted);
  auto keep = at::zeros({size}, boxes.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(type, "nms", [&] {
    nms_kernel<scalar_t><<<(size + kTile - 1) / kTile, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        size, sorted.const_data_ptr<scalar_t>(), groups ? sorted_groups.const_data_ptr<int64_t>() : nullptr,
        valid.const_data_ptr<bool>(), round_down<scalar_t>(iou_threshold), kept.mutable_data_ptr<scalar_t>(),
        keep.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (groups) {
    keep = at::empty_like(keep).scatter_(0, place, keep);
  }
  return by_score.masked_select(keep);  // the one wait for the GPU
}

// The highest score, the lowest index among equals. No box is index < 0.
template <typename T>
struct Best {
  T score;
  int64_t index;

  __device__ bool beats(const Best& other) const {
    return index >= 0 &&
        (other.index < 0 || score > other.score || (score == other.score && index < other.index));
  }
};

// One block. `current` holds the scores as they are lowered, NaN for boxes that are kept or dropped.
template <typename T>
__global__ void soft_nms_kernel(
    int64_t size, const T* boxes, T* current, SoftNms<T> decay, T* kept_scores, int64_t* keep, int64_t* count) {
  __shared__ T best_scores[kThreads];
  __shared__ int64_t best_indices[kThreads];
  int64_t kept = 0;
  while (true) {
    Best<T> best{T(0), -1};
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const Best<T> here{current[i], current[i] >= decay.min_score ? i : -1};
      best = here.beats(best) ? here : best;
    }
    best_scores[threadIdx.x] = best.score;
    best_indices[threadIdx.x] = best.index;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        const Best<T> mine{best_scores[threadIdx.x], best_indices[threadIdx.x]};
        const Best<T> other{best_scores[threadIdx.x + half], best_indices[threadIdx.x + half]};
        if (other.beats(mine)) {
          best_scores[threadIdx.x] = other.score;
          best_indices[threadIdx.x] = other.index;
        }
      }
      __syncthreads();
    }
    best = {best_scores[0], best_indices[0]};
    if (best.index < 0) {
      break;
    }
    if (threadIdx.x == 0) {
      kept_scores[kept] = best.score;
      keep[kept] = best.index;
    }
    ++kept;
    const T* a = boxes + 4 * best.index;
    const T area = product(a[2] - a[0], a[3] - a[1]);
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {  // the same boxes as above: no thread shares them
      const T* b = boxes + 4 * i;
      const T inter = intersection(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]);
      const T outer = area + product(b[2] - b[0], b[3] - b[1]) - inter;
      // What fell below min_score stays out for good, even if a negative score would rise again.
      current[i] = i != best.index && current[i] >= decay.min_score ? decay(current[i], inter, outer)
                                                                    : std::numeric_limits<T>::quiet_NaN();
    }
    __syncthreads();  // all have read the best box before the next one is written
  }
  if (threadIdx.x == 0) {
    *count = kept;
  }
}

std::tuple<at::Tensor, at::Tensor> soft_nms(
    const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, double sigma, double min_score,
    std::string_view method) {
  check_nms("soft_nms", boxes, scores);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto type = compute_type(boxes, scores);
  const auto coordinates = boxes.to(type).contiguous();
  auto current = scores.to(type, /*non_blocking=*/false, /*copy=*/true).contiguous();
  auto kept_scores = at::empty({boxes.size(0)}, current.options());
  auto keep = at::empty({boxes.size(0)}, current.options().dtype(at::kLong));
  auto count = at::empty({1}, keep.options());
  AT_DISPATCH_FLOATING_TYPES(type, "soft_nms", [&] {
    soft_nms_kernel<scalar_t><<<1, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        boxes.size(0), coordinates.const_data_ptr<scalar_t>(), current.mutable_data_ptr<scalar_t>(),
        make_soft_nms<scalar_t>(iou_threshold, sigma, min_score, method), kept_scores.mutable_data_ptr<scalar_t>(),
        keep.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int64_t kept = count.item<int64_t>();
  return {kept_scores.slice(0, 0, kept).to(scores.scalar_type(), false, true), keep.slice(0, 0, kept).clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("nms", &nms);
  m.impl("soft_nms", &soft_nms);
}

}  // namespace mmdet
