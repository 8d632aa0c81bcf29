// Global context pooling and fusion on the CPU. Sums run over short float32 runs that are then added in float64.
#include "../context_block.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

namespace mmdet {
namespace {

constexpr int64_t kRun = 512;       // positions whose sums are kept at hand
constexpr int64_t kChannels = 32;   // channels added before going to float64
constexpr int64_t kLanes = 16;      // independent sums, so that a dot product vectorises
constexpr int64_t kGrain = 1 << 15; // elements worth a thread

int64_t rows_per_task(int64_t row_size) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_size));
}

template <typename T>
double dot(const T* a, const T* b, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kRun) {
    const int64_t run = std::min(kRun, size - begin);
    const int64_t even = run / kLanes * kLanes;
    const T *pa = a + begin, *pb = b + begin;
    std::array<T, kLanes> lanes{};
    for (int64_t i = 0; i < even; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += pa[i + lane] * pb[i + lane];
      }
    }
    for (int64_t i = even; i < run; ++i) {
      lanes[i - even] += pa[i] * pb[i];
    }
    for (const T lane : lanes) {
      total += lane;
    }
  }
  return total;
}

// (N, C, P), (N or 1, C) -> (N, P): sum over channels of weight times x, plus bias.
template <typename T>
void sum_channels(const at::Tensor& x, const T* weight, bool weight_per_image, T bias, T* output) {
  const int64_t images = x.size(0), channels = x.size(1), area = x.size(2) * x.size(3);
  const int64_t runs = (area + kRun - 1) / kRun;
  const T* data = x.const_data_ptr<T>();
  at::parallel_for(0, images * runs, rows_per_task(kRun * channels), [&](int64_t begin, int64_t end) {
    std::array<T, kRun> part;
    std::array<double, kRun> total;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / runs, first = task % runs * kRun;
      const int64_t run = std::min(kRun, area - first);
      const T* w = weight + (weight_per_image ? n * channels : 0);
      std::fill_n(total.begin(), run, static_cast<double>(bias));
      for (int64_t group = 0; group < channels; group += kChannels) {
        std::fill_n(part.begin(), run, T(0));
        for (int64_t c = group; c < std::min(channels, group + kChannels); ++c) {
          const T* row = data + (n * channels + c) * area + first;
          for (int64_t p = 0; p < run; ++p) {
            part[p] += w[c] * row[p];
          }
        }
        for (int64_t p = 0; p < run; ++p) {
          total[p] += part[p];
        }
      }
      std::copy_n(total.begin(), run, output + n * area + first);
    }
  });
}

// (N, C, P), (N, P) -> (N, C): sum over positions of weight times x.
template <typename T>
void sum_positions(const at::Tensor& x, const T* weight, T* output) {
  const int64_t channels = x.size(1), area = x.size(2) * x.size(3);
  const T* data = x.const_data_ptr<T>();
  at::parallel_for(0, x.size(0) * channels, rows_per_task(area), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      output[i] = static_cast<T>(dot(data + i * area, weight + i / channels * area, area));
    }
  });
}

std::tuple<at::Tensor, at::Tensor> context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_context_pool(x, weight, bias);
  const auto type = compute_type(x);
  const auto features = x.to(type).contiguous();
  const auto w = weight.to(type).contiguous(), b = bias.to(type);
  auto logits = at::empty({x.size(0), x.size(2) * x.size(3)}, features.options());
  auto pooled = at::empty({x.size(0), x.size(1)}, features.options());
  at::Tensor attention;
  AT_DISPATCH_FLOATING_TYPES(type, "context_pool", [&] {
    sum_channels(
        features, w.const_data_ptr<scalar_t>(), false, *b.const_data_ptr<scalar_t>(),
        logits.mutable_data_ptr<scalar_t>());
    attention = at::softmax(logits, 1);
    sum_positions(features, attention.const_data_ptr<scalar_t>(), pooled.mutable_data_ptr<scalar_t>());
  });
  return {pooled.to(x.scalar_type()), attention};
}

// With attention a, pooled context c and its gradient g: the logits' gradient is a_p (x_p . g - c . g).
std::tuple<at::Tensor, at::Tensor> context_pool_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& attention) {
  const auto type = compute_type(x);
  const auto features = x.to(type).contiguous();
  const auto g = grad.to(type).contiguous(), w = weight.to(type).contiguous(), a = attention.contiguous();
  const int64_t images = x.size(0), channels = x.size(1), area = x.size(2) * x.size(3);
  auto grad_logits = at::empty({images, area}, features.options());
  auto grad_weight = at::empty({images, channels}, features.options());
  auto grad_x = at::empty(x.sizes(), features.options());
  AT_DISPATCH_FLOATING_TYPES(type, "context_pool_backward", [&] {
    const scalar_t *pg = g.const_data_ptr<scalar_t>(), *pw = w.const_data_ptr<scalar_t>();
    const scalar_t* pa = a.const_data_ptr<scalar_t>();
    scalar_t* pl = grad_logits.mutable_data_ptr<scalar_t>();
    scalar_t* px = grad_x.mutable_data_ptr<scalar_t>();
    sum_channels(features, pg, true, scalar_t(0), pl);
    for (int64_t n = 0; n < images; ++n) {
      const double mean = dot(pl + n * area, pa + n * area, area);
      for (int64_t p = n * area; p < (n + 1) * area; ++p) {
        pl[p] = pa[p] * static_cast<scalar_t>(pl[p] - mean);
      }
    }
    sum_positions(features, pl, grad_weight.mutable_data_ptr<scalar_t>());
    at::parallel_for(0, images * channels, rows_per_task(area), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t *ra = pa + i / channels * area, *rl = pl + i / channels * area;
        const scalar_t gc = pg[i], wc = pw[i % channels];
        for (int64_t p = 0; p < area; ++p) {
          px[i * area + p] = ra[p] * gc + rl[p] * wc;
        }
      }
    });
  });
  return {grad_x.to(x.scalar_type()), grad_weight.sum(0).to(weight.scalar_type())};
}

at::Tensor context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift) {
  check_context_fuse(x, scale, shift);
  const auto type = compute_type(x);
  const auto features = x.to(type).contiguous();
  const auto mul = scale ? scale->to(type).contiguous() : at::Tensor();
  const auto add = shift ? shift->to(type).contiguous() : at::Tensor();
  const int64_t area = x.size(2) * x.size(3);
  auto output = at::empty(x.sizes(), features.options());
  AT_DISPATCH_FLOATING_TYPES(type, "context_fuse", [&] {
    const scalar_t* px = features.const_data_ptr<scalar_t>();
    const scalar_t* pm = scale ? mul.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* pa = shift ? add.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* po = output.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * x.size(1), rows_per_task(area), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t m = pm ? pm[i] : scalar_t(1), a = pa ? pa[i] : scalar_t(0);
        for (int64_t p = i * area; p < (i + 1) * area; ++p) {
          po[p] = px[p] * m + a;
        }
      }
    });
  });
  return output.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> context_fuse_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale) {
  const auto type = compute_type(x);
  const auto features = x.to(type).contiguous(), g = grad.to(type).contiguous(), mul = scale.to(type).contiguous();
  const int64_t area = x.size(2) * x.size(3);
  auto grad_x = at::empty(x.sizes(), features.options());
  auto grad_scale = at::empty(scale.sizes(), features.options());
  AT_DISPATCH_FLOATING_TYPES(type, "context_fuse_backward", [&] {
    const scalar_t *px = features.const_data_ptr<scalar_t>(), *pg = g.const_data_ptr<scalar_t>();
    const scalar_t* pm = mul.const_data_ptr<scalar_t>();
    scalar_t* out_x = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* out_scale = grad_scale.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * x.size(1), rows_per_task(area), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out_scale[i] = static_cast<scalar_t>(dot(pg + i * area, px + i * area, area));
        for (int64_t p = i * area; p < (i + 1) * area; ++p) {
          out_x[p] = pg[p] * pm[i];
        }
      }
    });
  });
  return {grad_x.to(x.scalar_type()), grad_scale.to(scale.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("context_pool", &context_pool);
  m.impl("context_pool_backward", &context_pool_backward);
  m.impl("context_fuse", &context_fuse);
  m.impl("context_fuse_backward", &context_fuse_backward);
}

}  // namespace mmdet
