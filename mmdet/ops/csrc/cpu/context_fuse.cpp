// The end of a global context block on the CPU: scale, shift, identity and ReLU in one pass.
#include "context_block.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

namespace mmdet {
namespace {

constexpr int64_t kRun = 1024;  // elements added before going to float64

// Of a vector of channels; `value` where there are none.
template <typename T>
Vec<T> load(const T* channels, int64_t i, int64_t n, T value) {
  return channels ? Vec<T>::loadu(channels + i, n) : Vec<T>(value);
}

at::Tensor context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& identity, bool relu) {
  check_context_fuse(x, scale, shift, identity);
  const auto type = compute_type(x);
  const auto layout = layout_of(x);
  const auto features = x.to(type).contiguous(layout);
  const auto mul = per_channel(scale, type), add = per_channel(shift, type);
  const auto other = identity ? identity->to(type).contiguous(layout) : at::Tensor();
  const int64_t images = x.size(0), channels = x.size(1), area = x.size(2) * x.size(3);
  auto output = at::empty(x.sizes(), features.options().memory_format(layout));
  AT_DISPATCH_FLOATING_TYPES(type, "context_fuse", [&] {
    using V = Vec<scalar_t>;
    const scalar_t* px = features.const_data_ptr<scalar_t>();
    const scalar_t* pi = identity ? other.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t *pm = scale ? mul.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t *pa = shift ? add.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t one(1), zero(0);
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    const V lowest(relu ? scalar_t(0) : -std::numeric_limits<scalar_t>::infinity());
    const bool stream = exceeds_cache(output);
    const auto fuse = [&](int64_t i, int64_t n, const V& m, const V& a) {
      auto sum = at::vec::fmadd(V::loadu(px + i, n), m, a);
      sum = pi ? sum + V::loadu(pi + i, n) : sum;
      store(at::vec::maximum(sum, lowest), out + i, n, stream);
    };
    if (layout == at::MemoryFormat::ChannelsLast) {
      parallel_for(images * area, rows_per_task(channels), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t image = row / area * channels;
          for_vectors<scalar_t>(channels, [&](int64_t i, int64_t n) {
            fuse(row * channels + i, n, load(pm, image + i, n, one), load(pa, image + i, n, zero));
          });
        }
      });
    } else {
      parallel_for(images * channels, rows_per_task(area), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const V m(pm ? pm[row] : one), a(pa ? pa[row] : zero);
          for_vectors<scalar_t>(area, [&](int64_t i, int64_t n) { fuse(row * area + i, n, m, a); });
        }
      });
    }
  });
  return output.to(x.scalar_type());
}

// With `output` (of a ReLU) the gradient is that of its positive elements, and is returned as the second map; with x
// and scale the first is the gradient of x. Maps that are not asked for are empty, as is the gradient of scale.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> context_fuse_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& output) {
  const auto type = compute_type(grad);
  const auto layout = layout_of(x ? *x : output ? *output : grad);
  const auto read = [&](const std::optional<at::Tensor>& map) {
    return map ? map->to(type).contiguous(layout) : at::Tensor();
  };
  const auto g = read(grad), features = read(x), y = read(output), mul = per_channel(scale, type);
  const int64_t images = grad.size(0), channels = grad.size(1), area = grad.size(2) * grad.size(3);
  const auto options = g.options().memory_format(layout);
  auto grad_x = x ? at::empty(grad.sizes(), options) : at::empty({0}, g.options());
  auto masked = output ? at::empty(grad.sizes(), options) : at::empty({0}, g.options());
  auto grad_scale = at::empty({x ? images : 0, channels}, g.options());
  auto grad_shift = at::empty({images, channels}, g.options());
  if (grad.numel() == 0) {
    return {grad_x.to(grad.scalar_type()), masked.to(grad.scalar_type()), grad_scale.zero_(), grad_shift.zero_()};
  }
  AT_DISPATCH_FLOATING_TYPES(type, "context_fuse_backward", [&] {
    using V = Vec<scalar_t>;
    const scalar_t *pg = g.const_data_ptr<scalar_t>(), *px = x ? features.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t *py = output ? y.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t *pm = scale ? mul.const_data_ptr<scalar_t>() : nullptr, one(1);
    scalar_t *out_x = grad_x.mutable_data_ptr<scalar_t>(), *out_masked = masked.mutable_data_ptr<scalar_t>();
    scalar_t *out_scale = grad_scale.mutable_data_ptr<scalar_t>(), *out_shift = grad_shift.mutable_data_ptr<scalar_t>();
    const bool stream = exceeds_cache(g);
    const auto step = [&](int64_t i, int64_t n, const V& m, V& sum, V& dot) {
      const V zero(scalar_t(0));
      V value = V::loadu(pg + i, n);
      if (py) {  // NaN passes, as in PyTorch
        value = V::blendv(value, zero, V::loadu(py + i, n) <= zero);
        store(value, out_masked + i, n, stream);
      }
      if (px) {
        dot = at::vec::fmadd(value, V::loadu(px + i, n), dot);
        store<scalar_t>(value * m, out_x + i, n, stream);
      }
      sum = sum + value;
    };
    if (layout == at::MemoryFormat::ChannelsLast) {
      const Map map(g);
      std::vector<scalar_t> sums(images * map.tiles * channels), dots(x ? sums.size() : 0);
      for_tiles(map, [&](const Tile& tile) {
        scalar_t *ps = sums.data() + tile.index * channels, *pd = dots.data() + tile.index * channels;
        for (int64_t row = tile.offset; row < tile.offset + tile.width * channels; row += channels) {
          for_vectors<scalar_t>(channels, [&](int64_t i, int64_t n) {
            V sum = V::loadu(ps + i, n), dot = px ? V::loadu(pd + i, n) : sum;
            step(row + i, n, load(pm, tile.image * channels + i, n, one), sum, dot);
            sum.store(ps + i, n);
            if (px) {
              dot.store(pd + i, n);
            }
          });
        }
      });
      const auto one = [](int64_t, int64_t) { return 1.0; };
      sum_parts(sums.data(), images, map.tiles, channels, one, out_shift);
      if (px) {
        sum_parts(dots.data(), images, map.tiles, channels, one, out_scale);
      }
    } else {
      parallel_for(images * channels, rows_per_task(area), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          double total_sum = 0, total_dot = 0;
          for (int64_t first = 0; first < area; first += kRun) {
            V sum(scalar_t(0)), dot(scalar_t(0));
            for_vectors<scalar_t>(std::min(kRun, area - first), [&](int64_t i, int64_t n) {
              step(row * area + first + i, n, V(pm ? pm[row] : one), sum, dot);
            });
            total_sum += sum_lanes(sum);
            total_dot += sum_lanes(dot);
          }
          out_shift[row] = static_cast<scalar_t>(total_sum);
          if (px) {
            out_scale[row] = static_cast<scalar_t>(total_dot);
          }
        }
      });
    }
  });
  const auto own = grad.scalar_type();
  return {grad_x.to(own), masked.to(own), grad_scale, grad_shift};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("context_fuse", &context_fuse);
  m.impl("context_fuse_backward", &context_fuse_backward);
}

}  // namespace mmdet
