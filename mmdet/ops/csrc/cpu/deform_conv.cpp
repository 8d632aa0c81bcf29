// Deformable convolution on the CPU. A tap of the kernel reads a bilinear sample at every position, one vector of
// channels. The samples of a strip of positions are brought into columns, which the weight multiplies group by group.
#include "../layout.h"
#include "transpose.h"
#include "vectors.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace mmdet {
namespace {

constexpr int64_t kColumnBytes = 4 << 20;  // of a strip, which stays in the cache

// Channels of one group and one part.
struct Segment {
  int64_t group, part, first, count;
};

// Sizes. A part is the channels that share an offset.
struct Geometry {
  int64_t images, channels, height, width, groups, planes, kernel_height, kernel_width, taps, parts;
  int64_t out_channels, out_height, out_width, area, stride, padding, strip;
  std::vector<Segment> segments;

  Geometry(
      const at::Tensor& x, const at::Tensor& offset, const std::optional<at::Tensor>& mask, const at::Tensor& weight,
      int64_t stride, int64_t padding)
      : stride(stride), padding(padding) {
    const char* op = "deform_conv2d";
    TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be (N, C, H, W), got ", x.sizes());
    TORCH_CHECK_VALUE(weight.dim() == 4, op, ": weight must be (out, C / groups, kh, kw), got ", weight.sizes());
    TORCH_CHECK_VALUE(
        stride > 0 && padding >= 0, op, ": stride must be positive and padding not negative, got ", stride, " and ",
        padding);
    TORCH_CHECK_TYPE(
        x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": x must be float32 or float64, got ",
        x.scalar_type());
    images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
    out_channels = weight.size(0), planes = weight.size(1);
    kernel_height = weight.size(2), kernel_width = weight.size(3), taps = kernel_height * kernel_width;
    groups = planes > 0 ? channels / planes : 0;
    TORCH_CHECK_VALUE(
        groups > 0 && groups * planes == channels && out_channels % groups == 0, op, ": a weight of ", weight.sizes(),
        " does not divide ", channels, " channels into groups");
    out_height = (height + 2 * padding - kernel_height) / stride + 1;
    out_width = (width + 2 * padding - kernel_width) / stride + 1;
    TORCH_CHECK_VALUE(
        height + 2 * padding >= kernel_height && width + 2 * padding >= kernel_width && taps > 0, op, ": a map of ",
        height, " x ", width, " is smaller than a kernel of ", kernel_height, " x ", kernel_width);
    area = out_height * out_width;
    parts = offset.dim() == 4 ? offset.size(1) / (2 * taps) : 0;
    TORCH_CHECK_VALUE(
        parts > 0 && channels % parts == 0 &&
            offset.sizes() == at::IntArrayRef({images, parts * taps * 2, out_height, out_width}),
        op, ": offset must be (", images, ", ", 2 * taps, " times a divisor of ", channels, ", ", out_height, ", ",
        out_width, "), got ", offset.sizes());
    TORCH_CHECK_VALUE(
        !mask || mask->sizes() == at::IntArrayRef({images, parts * taps, out_height, out_width}), op,
        ": mask must be (", images, ", ", parts * taps, ", ", out_height, ", ", out_width, "), got ",
        mask ? mask->sizes() : at::IntArrayRef());
    for (const auto* tensor : {&offset, &weight, mask ? &*mask : &x}) {
      TORCH_CHECK_TYPE(
          tensor->scalar_type() == x.scalar_type(), op, ": all must have the dtype of x, ", x.scalar_type(), ", got ",
          tensor->scalar_type());
    }
    strip = std::clamp<int64_t>(kColumnBytes / (taps * channels * x.element_size()), 1, area);
    const int64_t shared = channels / parts;
    for (int64_t c = 0, end = 0; c < channels; c = end) {
      const int64_t group = c / planes, part = c / shared;
      end = std::min((group + 1) * planes, (part + 1) * shared);
      segments.push_back({group, part, c, end - c});
    }
  }
};

// A bilinear sample: the cells around it, above left, above right, below left and below right, -1 outside the map.
template <typename T>
struct Sample {
  std::array<int64_t, 4> cells{-1, -1, -1, -1};
  std::array<T, 4> weights{};
  T y = 0, x = 0, mask = 0;  // fractions of a cell below and right of the first
};

template <typename T>
Sample<T> make_sample(const Geometry& g, T y, T x, T mask) {
  Sample<T> sample;
  sample.mask = mask;
  if (!(y > T(-2) && y < T(g.height + 1) && x > T(-2) && x < T(g.width + 1))) {
    return sample;  // nor what is NaN
  }
  const T top = std::floor(y), left = std::floor(x);
  y = sample.y = y - top;
  x = sample.x = x - left;
  sample.weights = {(1 - y) * (1 - x) * mask, (1 - y) * x * mask, y * (1 - x) * mask, y * x * mask};
  for (int k = 0; k < 4; ++k) {
    const int64_t row = static_cast<int64_t>(top) + k / 2, column = static_cast<int64_t>(left) + k % 2;
    if (row >= 0 && row < g.height && column >= 0 && column < g.width) {
      sample.cells[k] = row * g.width + column;
    }
  }
  return sample;
}

// A strip of positions of one image. Columns are (groups, positions, taps, channels of a group).
template <typename T>
struct Strip {
  const Geometry& g;
  int64_t image, first, count;
  int64_t cell, row;               // where the image begins in (N, H * W, C) and in (N, parts, taps, area)
  const T* cells;                  // of the image
  std::vector<Sample<T>> samples;  // (positions, parts, taps)
  std::vector<T> zeros;            // a cell outside the map

  // Of tensors of all images.
  Strip(const Geometry& g, int64_t image, int64_t first, const T* cells, const T* offset, const T* mask)
      : g(g),
        image(image),
        first(first),
        count(std::min(g.strip, g.area - first)),
        cell(image * g.height * g.width * g.channels),
        row(image * g.parts * g.taps * g.area),
        cells(cells + cell),
        samples(count * g.parts * g.taps),
        zeros(g.channels) {
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t position = first + p;
        const T y = static_cast<T>(position / g.out_width * g.stride - g.padding);
        const T x = static_cast<T>(position % g.out_width * g.stride - g.padding);
        for (int64_t i = 0; i < g.parts * g.taps; ++i) {
          const int64_t tap = i % g.taps;
          samples[p * g.parts * g.taps + i] = make_sample<T>(
              g, y + tap / g.kernel_width + offset[2 * (row + i * g.area) + position],
              x + tap % g.kernel_width + offset[2 * (row + i * g.area) + g.area + position],
              mask ? mask[row + i * g.area + position] : T(1));
        }
      }
    });
  }

  const Sample<T>& sample(int64_t p, int64_t part, int64_t tap) const {
    return samples[(p * g.parts + part) * g.taps + tap];
  }

  // Of the first channel of a segment.
  int64_t column(int64_t p, int64_t tap, const Segment& s) const {
    return ((s.group * count + p) * g.taps + tap) * g.planes + s.first - s.group * g.planes;
  }

  std::array<const T*, 4> corners(const Sample<T>& sample, const Segment& s) const {
    std::array<const T*, 4> result;
    for (int k = 0; k < 4; ++k) {
      result[k] = sample.cells[k] < 0 ? zeros.data() : cells + sample.cells[k] * g.channels + s.first;
    }
    return result;
  }

  void sample_columns(T* columns) const {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          for (const auto& s : g.segments) {
            const auto& point = sample(p, s.part, tap);
            const auto [a, b, c, d] = corners(point, s);
            const auto& weights = point.weights;
            T* output = columns + column(p, tap, s);
            for_vectors<T>(s.count, [&, a = a, b = b, c = c, d = d](int64_t i, int64_t n) {
              auto sum = Vec<T>(weights[0]) * Vec<T>::loadu(a + i, n);
              sum = at::vec::fmadd(Vec<T>(weights[1]), Vec<T>::loadu(b + i, n), sum);
              sum = at::vec::fmadd(Vec<T>(weights[2]), Vec<T>::loadu(c + i, n), sum);
              at::vec::fmadd(Vec<T>(weights[3]), Vec<T>::loadu(d + i, n), sum).store(output + i, n);
            });
          }
        }
      }
    });
  }

  // From the gradients of the columns those of offset and mask, of all images: products with the corners tell all.
  void offset_grads(const T* grad_columns, T* grad_offset, T* grad_mask) const {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          for (auto s = g.segments.begin(); s != g.segments.end();) {
            const int64_t part = s->part;
            const auto& point = sample(p, part, tap);
            std::array<Vec<T>, 4> sums{};
            for (; s != g.segments.end() && s->part == part; ++s) {
              const auto around = corners(point, *s);
              const T* grad = grad_columns + column(p, tap, *s);
              for_vectors<T>(s->count, [&](int64_t i, int64_t n) {
                const auto value = Vec<T>::loadu(grad + i, n);
                for (int k = 0; k < 4; ++k) {
                  sums[k] = at::vec::fmadd(value, Vec<T>::loadu(around[k] + i, n), sums[k]);
                }
              });
            }
            const T a = sum_lanes(sums[0]), b = sum_lanes(sums[1]), c = sum_lanes(sums[2]), d = sum_lanes(sums[3]);
            const T y = point.y, x = point.x;
            const int64_t own = row + (part * g.taps + tap) * g.area, position = first + p;
            grad_offset[2 * own + position] = point.mask * ((1 - x) * (c - a) + x * (d - b));
            grad_offset[2 * own + g.area + position] = point.mask * ((1 - y) * (b - a) + y * (d - c));
            if (grad_mask) {
              grad_mask[own + position] = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d);
            }
          }
        }
      }
    });
  }

  // To grad_cells (N, H * W, C). A thread owns channels, and takes the samples in order: the sums do not vary.
  void add_cell_grads(const T* grad_columns, T* grad_cells) const {
    at::parallel_for(0, g.channels, 16, [&](int64_t begin, int64_t end) {
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          for (const auto& s : g.segments) {
            const int64_t from = std::max(begin, s.first), size = std::min(end, s.first + s.count) - from;
            const auto& point = sample(p, s.part, tap);
            const T* grad = grad_columns + column(p, tap, s) + from - s.first;
            for (int k = 0; size > 0 && k < 4; ++k) {
              if (point.cells[k] >= 0) {
                T* target = grad_cells + cell + point.cells[k] * g.channels + from;
                for_vectors<T>(size, [&](int64_t i, int64_t n) {
                  const auto value = Vec<T>::loadu(grad + i, n), sum = Vec<T>::loadu(target + i, n);
                  at::vec::fmadd(Vec<T>(point.weights[k]), value, sum).store(target + i, n);
                });
              }
            }
          }
        }
      }
    });
  }
};

// (out, C / groups, kh, kw) to (groups, out / groups, columns of a group)
at::Tensor weight_by_groups(const at::Tensor& weight, const Geometry& g) {
  const auto parts = weight.reshape({g.groups, g.out_channels / g.groups, g.planes, g.taps});
  return parts.transpose(2, 3).reshape({g.groups, g.out_channels / g.groups, g.taps * g.planes});
}

// (N, out, H, W) as (N, groups, out / groups, positions)
at::Tensor map_by_groups(const at::Tensor& map, const Geometry& g) {
  return map.flatten(2).unflatten(1, {g.groups, g.out_channels / g.groups});
}

// body(strip)
template <typename T, typename F>
void for_strips(
    const Geometry& g, const at::Tensor& cells, const at::Tensor& offset, const at::Tensor& mask, const F& body) {
  for (int64_t n = 0; n < g.images; ++n) {
    for (int64_t first = 0; first < g.area; first += g.strip) {
      body(Strip<T>(
          g, n, first, cells.const_data_ptr<T>(), offset.const_data_ptr<T>(),
          mask.defined() ? mask.const_data_ptr<T>() : nullptr));
    }
  }
}

template <typename T>
at::Tensor sample_columns(const Strip<T>& strip, const at::TensorOptions& options) {
  auto columns = at::empty({strip.g.groups, strip.count, strip.g.taps * strip.g.planes}, options);
  strip.sample_columns(columns.template mutable_data_ptr<T>());
  return columns;
}

at::Tensor deform_conv2d(
    const at::Tensor& x, const at::Tensor& offset, const std::optional<at::Tensor>& mask, const at::Tensor& weight,
    int64_t stride, int64_t padding) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Geometry g(x, offset, mask, weight, stride, padding);
  const auto cells = in_cells(x), offsets = offset.contiguous(), kernel = weight_by_groups(weight, g);
  const auto masks = mask ? mask->contiguous() : at::Tensor();
  auto output = at::empty(
      {g.images, g.out_channels, g.out_height, g.out_width}, x.options().memory_format(layout_of(x)));
  const auto target = map_by_groups(output, g);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_conv2d", [&] {
    for_strips<scalar_t>(g, cells, offsets, masks, [&](const Strip<scalar_t>& strip) {
      const auto columns = sample_columns(strip, x.options());
      target[strip.image].narrow(2, strip.first, strip.count).copy_(at::bmm(kernel, columns.transpose(1, 2)));
    });
  });
  return output;
}

// Gradients of x, offset, mask (empty without) and weight.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> deform_conv2d_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& offset, const std::optional<at::Tensor>& mask,
    const at::Tensor& weight, int64_t stride, int64_t padding) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Geometry g(x, offset, mask, weight, stride, padding);
  const auto cells = in_cells(x), offsets = offset.contiguous(), kernel = weight_by_groups(weight, g);
  const auto masks = mask ? mask->contiguous() : at::Tensor(), source = map_by_groups(grad, g);
  auto grad_cells = at::zeros({g.images, g.height, g.width, g.channels}, x.options()).permute({0, 3, 1, 2});
  auto grad_offset = at::empty(offset.sizes(), x.options()), grad_kernel = at::zeros(kernel.sizes(), x.options());
  auto grad_mask = at::empty(mask ? mask->sizes() : at::IntArrayRef({0}), x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_conv2d_backward", [&] {
    scalar_t *pc = grad_cells.mutable_data_ptr<scalar_t>(), *po = grad_offset.mutable_data_ptr<scalar_t>();
    scalar_t* pm = mask ? grad_mask.mutable_data_ptr<scalar_t>() : nullptr;
    for_strips<scalar_t>(g, cells, offsets, masks, [&](const Strip<scalar_t>& strip) {
      const auto part = source[strip.image].narrow(2, strip.first, strip.count);
      grad_kernel.baddbmm_(part, sample_columns(strip, x.options()));
      const auto grad_columns = at::bmm(part.transpose(1, 2), kernel);
      const scalar_t* columns = grad_columns.const_data_ptr<scalar_t>();
      strip.offset_grads(columns, po, pm);
      strip.add_cell_grads(columns, pc);
    });
  });
  const auto grad_weight = grad_kernel.unflatten(2, {g.taps, g.planes}).transpose(2, 3).contiguous();
  const bool channels_last = is_channels_last(x);
  return {channels_last ? grad_cells : in_planes(grad_cells), grad_offset, grad_mask, grad_weight.view(weight.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("deform_conv2d", &deform_conv2d);
  m.impl("deform_conv2d_backward", &deform_conv2d_backward);
}

}  // namespace mmdet
