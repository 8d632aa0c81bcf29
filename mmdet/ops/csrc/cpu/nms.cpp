// Greedy NMS and soft-NMS on the CPU.
#include "../nms.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace mmdet {
namespace {

constexpr int64_t kPairs = 1 << 20;  // comparisons worth a thread

// Boxes in visiting order, one array a coordinate so that the loops over them vectorise.
template <typename T>
struct BoxArrays {
  std::vector<T> x1, y1, x2, y2, area;

  BoxArrays(const T* boxes, const std::vector<int64_t>& order) {
    const size_t size = order.size();
    for (auto* array : {&x1, &y1, &x2, &y2, &area}) {
      array->resize(size);
    }
    for (size_t i = 0; i < size; ++i) {
      const T* box = boxes + 4 * order[i];
      x1[i] = box[0];
      y1[i] = box[1];
      x2[i] = box[2];
      y2[i] = box[3];
      area[i] = (box[2] - box[0]) * (box[3] - box[1]);
    }
  }
};

// Indices of the boxes whose score is a number, by decreasing score, equal scores by index.
template <typename T>
std::vector<int64_t> order_by_score(const T* scores, int64_t size) {
  std::vector<int64_t> order;
  order.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isnan(scores[i])) {
      order.push_back(i);
    }
  }
  std::stable_sort(order.begin(), order.end(), [scores](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

// Greedy suppression among the boxes [begin, end).
template <typename T>
void suppress(const BoxArrays<T>& boxes, int64_t begin, int64_t end, T threshold, int* removed) {
  const T *x1 = boxes.x1.data(), *y1 = boxes.y1.data(), *x2 = boxes.x2.data(), *y2 = boxes.y2.data();
  const T* area = boxes.area.data();
  for (int64_t i = begin; i < end; ++i) {
    if (removed[i]) {
      continue;
    }
    const T ax1 = x1[i], ay1 = y1[i], ax2 = x2[i], ay2 = y2[i], a = area[i];
    for (int64_t j = i + 1; j < end; ++j) {
      const T inter = intersection(ax1, ay1, ax2, ay2, x1[j], y1[j], x2[j], y2[j]);
      removed[j] |= inter / (a + area[j] - inter) > threshold;
    }
  }
}

at::Tensor nms(
    const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups,
    double iou_threshold) {
  check_nms("nms", boxes, scores);
  check_groups(boxes, groups);
  const auto type = compute_type(boxes);
  const auto coordinates = boxes.to(type).contiguous();
  // float64 holds every score exactly, whatever the boxes' dtype.
  const auto ranks = scores.to(at::kDouble).contiguous();
  std::vector<int64_t> order = order_by_score(ranks.const_data_ptr<double>(), boxes.size(0));
  const int64_t size = static_cast<int64_t>(order.size());

  // Boxes of a group are visited together: `places` are positions in `order`, group by group.
  std::vector<int64_t> places(size), visit(size), bounds{0};
  std::iota(places.begin(), places.end(), 0);
  if (groups) {
    const auto group = groups->contiguous();
    const int64_t* ids = group.const_data_ptr<int64_t>();
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return ids[order[a]] < ids[order[b]]; });
    for (int64_t i = 1; i < size; ++i) {
      if (ids[order[places[i]]] != ids[order[places[i - 1]]]) {
        bounds.push_back(i);
      }
    }
  }
  bounds.push_back(size);
  std::transform(places.begin(), places.end(), visit.begin(), [&](int64_t place) { return order[place]; });

  std::vector<int> removed(size, 0);
  AT_DISPATCH_FLOATING_TYPES(type, "nms", [&] {
    const BoxArrays<scalar_t> arrays(coordinates.const_data_ptr<scalar_t>(), visit);
    const scalar_t threshold = round_down<scalar_t>(iou_threshold);
    const int64_t num_groups = static_cast<int64_t>(bounds.size()) - 1;
    const int64_t pairs = (size / num_groups) * (size / num_groups);
    at::parallel_for(0, num_groups, kPairs / (pairs + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        suppress(arrays, bounds[g], bounds[g + 1], threshold, removed.data());
      }
    });
  });

  std::vector<char> kept(size, 0);
  for (int64_t i = 0; i < size; ++i) {
    kept[places[i]] = !removed[i];
  }
  auto keep = at::empty({std::count(kept.begin(), kept.end(), 1)}, boxes.options().dtype(at::kLong));
  int64_t* next = keep.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i) {
    if (kept[i]) {
      *next++ = order[i];
    }
  }
  return keep;
}

template <typename T>
int64_t soft_nms_loop(
    const T* boxes, const T* scores, int64_t size, const SoftNms<T>& decay, T* kept_scores, int64_t* keep) {
  std::vector<int64_t> left = order_by_score(scores, size);
  const BoxArrays<T> arrays(boxes, left);
  std::vector<T> current(left.size());
  std::transform(left.begin(), left.end(), current.begin(), [scores](int64_t i) { return scores[i]; });
  std::vector<int64_t> alive(left.size());
  std::iota(alive.begin(), alive.end(), 0);
  const auto drop = [&] {
    std::erase_if(alive, [&](int64_t i) { return !(current[i] >= decay.min_score); });
  };
  int64_t count = 0;
  for (drop(); !alive.empty(); drop()) {
    // The highest score now, the lowest index among equals.
    const int64_t best = *std::max_element(alive.begin(), alive.end(), [&](int64_t a, int64_t b) {
      return current[a] < current[b] || (current[a] == current[b] && left[a] > left[b]);
    });
    kept_scores[count] = current[best];
    keep[count++] = left[best];
    for (int64_t i : alive) {
      const T inter = intersection(
          arrays.x1[best], arrays.y1[best], arrays.x2[best], arrays.y2[best], arrays.x1[i], arrays.y1[i],
          arrays.x2[i], arrays.y2[i]);
      current[i] = decay(current[i], inter, arrays.area[best] + arrays.area[i] - inter);
    }
    current[best] = std::numeric_limits<T>::quiet_NaN();
  }
  return count;
}

std::tuple<at::Tensor, at::Tensor> soft_nms(
    const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, double sigma, double min_score,
    std::string_view method) {
  check_nms("soft_nms", boxes, scores);
  const auto type = compute_type(boxes, scores);
  const auto coordinates = boxes.to(type).contiguous();
  const auto initial = scores.to(type).contiguous();
  auto kept_scores = at::empty({boxes.size(0)}, initial.options());
  auto keep = at::empty({boxes.size(0)}, initial.options().dtype(at::kLong));
  int64_t count = 0;
  AT_DISPATCH_FLOATING_TYPES(type, "soft_nms", [&] {
    count = soft_nms_loop<scalar_t>(
        coordinates.const_data_ptr<scalar_t>(), initial.const_data_ptr<scalar_t>(), boxes.size(0),
        make_soft_nms<scalar_t>(iou_threshold, sigma, min_score, method), kept_scores.mutable_data_ptr<scalar_t>(),
        keep.mutable_data_ptr<int64_t>());
  });
  return {kept_scores.slice(0, 0, count).to(scores.scalar_type(), false, true), keep.slice(0, 0, count).clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("nms", &nms);
  m.impl("soft_nms", &soft_nms);
}

}  // namespace mmdet
