// Greedy NMS on CUDA: all overlaps at once as bits, then one block walks through them. Soft-NMS: one block.
#include "../nms.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace mmdet {
namespace {

using Word = unsigned long long;  // the overlaps of one box with 64 others

constexpr int kBits = 64;
constexpr int kThreads = 1024;
constexpr int64_t kMaxWords = 5888;  // the removed flags, 46 KiB of shared memory

// Bit b of mask[i * words + column] says that box i suppresses box column * 64 + b, which comes after it.
// Words left of the diagonal are not written.
template <typename T>
__global__ void overlap_kernel(int64_t size, const T* boxes, const int64_t* groups, T threshold, Word* mask) {
  const int64_t row = blockIdx.y, column = blockIdx.x;
  if (row > column) {
    return;
  }
  __shared__ T others[kBits][5];
  __shared__ int64_t other_groups[kBits];
  const int lane = threadIdx.x;
  const int64_t other = column * kBits + lane;
  if (other < size) {
    const T* box = boxes + 4 * other;
    for (int side = 0; side < 4; ++side) {
      others[lane][side] = box[side];
    }
    others[lane][4] = product(box[2] - box[0], box[3] - box[1]);
    other_groups[lane] = groups ? groups[other] : 0;
  }
  __syncthreads();
  const int64_t i = row * kBits + lane;
  if (i >= size) {
    return;
  }
  const T* box = boxes + 4 * i;
  const T area = product(box[2] - box[0], box[3] - box[1]);
  const int64_t group = groups ? groups[i] : 0;
  const int count = static_cast<int>(size - column * kBits < kBits ? size - column * kBits : kBits);
  Word word = 0;
  for (int b = row == column ? lane + 1 : 0; b < count; ++b) {
    const T* that = others[b];
    const T inter = intersection(box[0], box[1], box[2], box[3], that[0], that[1], that[2], that[3]);
    if (group == other_groups[b] && inter / (area + that[4] - inter) > threshold) {
      word |= Word(1) << b;
    }
  }
  mask[i * gridDim.x + column] = word;
}

// One block. Boxes come by decreasing score; a box that nothing kept removes is kept and removes what it overlaps.
__global__ void select_kernel(int64_t size, int words, const Word* mask, const bool* valid, bool* keep) {
  extern __shared__ Word removed[];
  __shared__ Word diagonal[kBits];
  for (int j = threadIdx.x; j < words; j += blockDim.x) {
    Word word = 0;
    for (int b = 0; b < kBits && j * int64_t(kBits) + b < size; ++b) {
      word |= Word(!valid[j * int64_t(kBits) + b]) << b;
    }
    removed[j] = word;
  }
  for (int j = 0; j < words; ++j) {
    const int64_t first = j * int64_t(kBits);
    const int count = static_cast<int>(size - first < kBits ? size - first : kBits);
    if (threadIdx.x < count) {
      diagonal[threadIdx.x] = mask[(first + threadIdx.x) * words + j];
    }
    __syncthreads();
    Word word = removed[j];  // every thread settles these 64 boxes by itself
    for (int b = 0; b < count; ++b) {
      if (!(word >> b & 1)) {
        word |= diagonal[b];
      }
    }
    if (threadIdx.x < count) {
      keep[first + threadIdx.x] = !(word >> threadIdx.x & 1);
    }
    for (int later = j + 1 + threadIdx.x; later < words; later += blockDim.x) {
      Word flags = removed[later];
      for (int b = 0; b < count; ++b) {
        if (!(word >> b & 1)) {
          flags |= mask[(first + b) * words + later];
        }
      }
      removed[later] = flags;
    }
    __syncthreads();
  }
}

at::Tensor nms(
    const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups,
    double iou_threshold) {
  check_nms("nms", boxes, scores);
  check_groups(boxes, groups);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t size = boxes.size(0), words = (size + kBits - 1) / kBits;
  if (size == 0) {
    return at::empty({0}, boxes.options().dtype(at::kLong));
  }
  TORCH_CHECK_VALUE(words <= kMaxWords, "nms: at most ", kMaxWords * kBits, " boxes on CUDA, got ", size);
  // NaN would sort first: it goes last here, and is not valid.
  const auto nan = scores.isnan();
  const auto order = std::get<1>(
      scores.masked_fill(nan, -std::numeric_limits<double>::infinity()).sort(/*stable=*/true, 0, /*descending=*/true));
  const auto valid = nan.index_select(0, order).logical_not();
  const auto type = boxes.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto sorted = boxes.to(type).index_select(0, order);
  const auto sorted_groups = groups ? groups->index_select(0, order) : at::Tensor();
  const auto mask = at::empty({size, words}, boxes.options().dtype(at::kLong));
  auto keep = at::empty({size}, boxes.options().dtype(at::kBool));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Word* bits = reinterpret_cast<Word*>(mask.mutable_data_ptr<int64_t>());
  AT_DISPATCH_FLOATING_TYPES(type, "nms", [&] {
    overlap_kernel<scalar_t><<<dim3(words, words), kBits, 0, stream>>>(
        size, sorted.const_data_ptr<scalar_t>(), groups ? sorted_groups.const_data_ptr<int64_t>() : nullptr,
        round_down<scalar_t>(iou_threshold), bits);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  select_kernel<<<1, kThreads, words * sizeof(Word), stream>>>(
      size, static_cast<int>(words), bits, valid.const_data_ptr<bool>(), keep.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return order.masked_select(keep);  // the one wait for the GPU
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
  const auto type = boxes.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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
