// Greedy NMS on CUDA, in one kernel of as many blocks as run at a time. In turns, a block settles the next 256 boxes of
// a group, 64 at a time, and all blocks remove what these overlap from the rest of the groups. Soft-NMS: one block.
#include "../divide.h"
#include "../nms.h"
#include "device.cuh"
#include "pack.cuh"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace mmdet {
namespace {

using Word = unsigned long long;  // a bit for each box of a tile

constexpr int kTile = 64;
constexpr int kChunk = 4 * kTile;
constexpr int kThreads = 1024;
constexpr int kStrips = kThreads / kTile;  // threads that share a box

template <typename T>
using Box = Pack<T, 4>;

// Whether b, which comes after a, has to go if a is kept.
template <typename T>
__device__ __forceinline__ bool overlaps(const Box<T>& first, const Box<T>& second, T threshold) {
  const T *a = first.value, *b = second.value;
  const T inter = intersection(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]);
  if (inter == T(0) && threshold >= T(0)) {  // most do not meet
    return false;
  }
  const T area_a = product(a[2] - a[0], a[3] - a[1]), area_b = product(b[2] - b[0], b[3] - b[1]);
  return inter / (area_a + area_b - inter) > threshold;
}

// What the blocks work on, by group and in each by decreasing score.
template <typename T>
struct Work {
  int64_t size;
  const T* given;                 // (size, 4), in any order
  const int64_t *order, *starts;  // where a box is in `given`, and where its group begins; null: there is but one group
  bool *gone, *keep;              // boxes that can't be kept, and those that are
  Box<T> *boxes, *kept;           // the latter from where their group begins
  int64_t *before, *after;        // where a group begins: how many are kept before and after the last turn
  int64_t* groups;                // (2, size): where the groups of this turn and those of the next begin
  int* counts;                    // of groups in each turn, zeros at first

  __device__ bool in_group(int64_t i, int64_t start) const {
    return i < size && (!starts || starts[i] == start);
  }

  __device__ int64_t* groups_of(int turn) const {
    return groups + turn % 2 * size;
  }

  __device__ void add_group(int turn, int64_t start) const {
    groups_of(turn)[atomicAdd(counts + turn, 1)] = start;
  }
};

// Keeps boxes of the chunk of a group from which all is gone that overlaps what was kept before.
template <typename T>
__device__ void settle(const Work<T>& work, int64_t start, int64_t chunk, T threshold) {
  __shared__ Box<T> tile[kTile];
  __shared__ Word later[kTile];  // the later boxes of the tile that a box removes
  __shared__ Word removed;
  const int lane = threadIdx.x % kTile, strip = threadIdx.x / kTile;
  const int64_t before = chunk ? work.after[start] : 0;
  Box<T>* kept = work.kept + start;
  int64_t count = before;
  for (int64_t first = start + chunk; first < start + chunk + kChunk && work.in_group(first, start); first += kTile) {
    const int64_t i = first + lane;
    const bool inside = work.in_group(i, start);
    if (threadIdx.x == 0) {
      removed = 0;
    }
    if (strip == 0) {
      later[lane] = 0;
      tile[lane] = inside ? work.boxes[i] : Box<T>{};
    }
    __syncthreads();
    bool gone = !inside || work.gone[i];
    if (!gone) {
#pragma unroll 4
      for (int64_t j = before + strip; j < count; j += kStrips) {
        gone |= overlaps(kept[j], tile[lane], threshold);
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
    if (threadIdx.x < kWarp) {
      Word settled = removed;
#pragma unroll
      for (int b = 0; b < kTile; ++b) {
        settled |= settled >> b & 1 ? 0 : later[b];
      }
      __syncwarp();
      removed = settled;
    }
    __syncthreads();
    const Word alive = ~removed;
    if (strip == 0 && alive >> lane & 1) {
      kept[count + __popcll(alive & ((Word(1) << lane) - 1))] = tile[lane];
      work.keep[i] = true;
    }
    count += __popcll(alive);
    __syncthreads();  // before others read what was kept, and the tile is overwritten
  }
  if (threadIdx.x == 0) {
    work.before[start] = before;
    work.after[start] = count;
  }
}

// Removes what boxes kept of a chunk overlap from all that comes behind it in its group: a warp takes 32 boxes and, if
// these are few, one of several parts of those kept.
template <typename T>
__device__ void sweep(const Work<T>& work, int64_t chunk, T threshold) {
  const int64_t rest = work.size - chunk - kChunk, threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t parts = max(int64_t{1}, min(threads / rest, int64_t{kStrips}));
  const int64_t warps = divide_up(rest, kWarp) * parts, step = threads / kWarp;
  for (int64_t warp = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp; warp < warps; warp += step) {
    const int64_t batch = divide(warp, parts), i = chunk + kChunk + batch * kWarp + threadIdx.x % kWarp;
    if (i >= work.size || work.gone[i]) {
      continue;
    }
    const int64_t start = work.starts ? work.starts[i] : 0;
    if (i < start + chunk + kChunk) {
      continue;
    }
    const Box<T> box = work.boxes[i], *kept = work.kept + start;
    const int64_t end = work.after[start];
    bool gone = false;
#pragma unroll 4
    for (int64_t j = work.before[start] + warp - batch * parts; j < end; j += parts) {
      gone |= overlaps(kept[j], box, threshold);
    }
    if (gone) {
      work.gone[i] = true;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) nms_kernel(const __grid_constant__ Work<T> work, T threshold) {
  const auto grid = cooperative_groups::this_grid();
  for (int64_t i = grid.thread_rank(); i < work.size; i += grid.num_threads()) {
    const T* box = work.given + 4 * work.order[i];
    work.boxes[i] = {box[0], box[1], box[2], box[3]};
    if (work.starts ? work.starts[i] == i : i == 0) {
      work.add_group(0, i);
    }
  }
  grid.sync();
  for (int turn = 0;; ++turn) {
    const int64_t chunk = static_cast<int64_t>(turn) * kChunk;
    for (int group = blockIdx.x; group < work.counts[turn]; group += gridDim.x) {
      const int64_t start = work.groups_of(turn)[group];
      settle(work, start, chunk, threshold);
      if (threadIdx.x == 0 && work.in_group(start + chunk + kChunk, start)) {
        work.add_group(turn + 1, start);
      }
    }
    grid.sync();
    if (work.counts[turn + 1] == 0) {
      return;
    }
    sweep(work, chunk, threshold);
    grid.sync();
  }
}

template <typename T>
void run_nms(Work<T> work, T threshold) {
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nms_kernel<T>, kThreads, 0));
  const int64_t tiles = divide_up(work.size, kTile);
  void* arguments[] = {&work, &threshold};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      nms_kernel<T>, std::min(tiles, blocks * multiprocessors()), kThreads, arguments, 0,
      c10::cuda::getCurrentCUDAStream()));
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
  at::Tensor order = by_score, place, starts;  // by group; its place by score; where its group begins
  if (groups) {
    at::Tensor ids;
    std::tie(ids, place) = groups->index_select(0, by_score).sort(/*stable=*/true, 0, /*descending=*/false);
    order = by_score.index_select(0, place);
    starts = at::searchsorted(ids, ids);
  }
  const auto type = compute_type(boxes);
  const auto given = boxes.to(type).contiguous(), sorted = at::empty({2, size, 4}, given.options());
  const auto gone = nan.index_select(0, order), places = at::empty({4, size}, order.options());
  const auto counts = at::zeros({size / kChunk + 2}, order.options().dtype(at::kInt));
  auto keep = at::zeros_like(gone);
  AT_DISPATCH_FLOATING_TYPES(type, "nms", [&] {
    auto* data = reinterpret_cast<Box<scalar_t>*>(sorted.mutable_data_ptr<scalar_t>());
    int64_t* place_data = places.mutable_data_ptr<int64_t>();
    run_nms<scalar_t>(
        {size, given.const_data_ptr<scalar_t>(), order.const_data_ptr<int64_t>(),
         groups ? starts.const_data_ptr<int64_t>() : nullptr, gone.mutable_data_ptr<bool>(),
         keep.mutable_data_ptr<bool>(), data, data + size, place_data, place_data + size, place_data + 2 * size,
         counts.mutable_data_ptr<int>()},
        round_down<scalar_t>(iou_threshold));
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
