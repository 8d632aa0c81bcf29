// The end of a global context block on CUDA: scale, shift, identity and ReLU in one pass. Half precision is computed
// and accumulated in float32.
#include "context_block.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace mmdet {
namespace {

constexpr int kThreads = 256;
constexpr int kSlices = kThreads / kWarp;  // warps of a block
constexpr int kSteps = 16;                 // positions that a thread adds up, where the layout is channels_last

template <typename scalar_t, typename T, int kPack, bool kChannelsLast>
__global__ void fuse_kernel(
    int64_t packs, int64_t channels, int64_t area, const scalar_t* x, const T* scale, const T* shift,
    const scalar_t* identity, bool relu, scalar_t* output) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < packs; i += int64_t{gridDim.x} * kThreads) {
    Pack<T, kPack> m, a;
    if (kChannelsLast) {
      const int64_t row = divide(i * kPack, channels), n = divide(row, area);
      const int64_t c = i * kPack - row * channels + n * channels;
      m = load<kPack>(scale + c);
      a = load<kPack>(shift + c);
    } else {
      const int64_t row = divide(i * kPack, area);
      for (int j = 0; j < kPack; ++j) {
        m.value[j] = scale[row];
        a.value[j] = shift[row];
      }
    }
    auto pack = load<kPack>(x + i * kPack);
    Pack<scalar_t, kPack> other = {};
    if (identity) {
      other = load<kPack>(identity + i * kPack);
    }
    for (int j = 0; j < kPack; ++j) {
      T value = fma(static_cast<T>(pack.value[j]), m.value[j], a.value[j]);
      value += static_cast<T>(other.value[j]);
      pack.value[j] = static_cast<scalar_t>(relu && value < T(0) ? T(0) : value);  // NaN stays
    }
    store(output + i * kPack, pack);
  }
}

// Maps of the backward pass; null where they are not asked for.
template <typename scalar_t>
struct Maps {
  const scalar_t *grad, *x, *output;
  scalar_t *grad_x, *masked;
};

// One pack: gradient through the ReLU, its products with x, the gradient of x.
template <typename scalar_t, typename T, int kPack>
__device__ __forceinline__ void fuse_grad(
    const Maps<scalar_t>& maps, int64_t i, const Pack<T, kPack>& scale, Pack<T, kPack>& sum, Pack<T, kPack>& dot) {
  auto grad = load<kPack>(maps.grad + i);
  if (maps.output) {
    const auto y = load<kPack>(maps.output + i);
    for (int j = 0; j < kPack; ++j) {
      grad.value[j] = static_cast<T>(y.value[j]) > T(0) ? grad.value[j] : static_cast<scalar_t>(T(0));
    }
    store(maps.masked + i, grad);
  }
  for (int j = 0; j < kPack; ++j) {
    sum.value[j] += static_cast<T>(grad.value[j]);
  }
  if (maps.x) {
    const auto x = load<kPack>(maps.x + i);
    for (int j = 0; j < kPack; ++j) {
      const T g = static_cast<T>(grad.value[j]);
      dot.value[j] = fma(g, static_cast<T>(x.value[j]), dot.value[j]);
      grad.value[j] = static_cast<scalar_t>(g * scale.value[j]);
    }
    store(maps.grad_x + i, grad);
  }
}

// (N, C, P): a block sums a row, one channel of an image. `dots` is null without scale.
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) contiguous_grad_kernel(
    int64_t area, Maps<scalar_t> maps, const T* scale, T* sums, T* dots) {
  __shared__ T parts[2][kThreads];
  const int64_t row = blockIdx.x;
  Pack<T, kPack> factor, sum = {}, dot = {};
  for (int j = 0; j < kPack; ++j) {
    factor.value[j] = scale[row];
  }
  for (int64_t p = threadIdx.x * kPack; p < area; p += kThreads * kPack) {
    fuse_grad(maps, row * area + p, factor, sum, dot);
  }
  parts[0][threadIdx.x] = parts[1][threadIdx.x] = 0;
  for (int j = 0; j < kPack; ++j) {
    parts[0][threadIdx.x] += sum.value[j];
    parts[1][threadIdx.x] += dot.value[j];
  }
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      parts[0][threadIdx.x] += parts[0][threadIdx.x + half];
      parts[1][threadIdx.x] += parts[1][threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    sums[row] = parts[0][0];
    if (dots) {
      dots[row] = parts[1][0];
    }
  }
}

// (N, P, C): a warp goes along a pack of channels for each lane, its steps over positions; a block's warps, over
// kSlices * kSteps positions, are added at last.
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) channels_last_grad_kernel(
    int64_t channels, int64_t area, int64_t tiles, int64_t groups, Maps<scalar_t> maps, const T* scale, T* sums,
    T* dots) {
  __shared__ Pack<T, kPack> parts[2][kSlices][kWarp];
  const int64_t tile = blockIdx.x / groups, n = tile / tiles;
  const int64_t c = (blockIdx.x % groups * kWarp + threadIdx.x) * kPack;
  const int64_t first = tile % tiles * kSlices * kSteps;
  const int64_t last = min(first + kSlices * kSteps, area);
  Pack<T, kPack> factor = {}, sum = {}, dot = {};
  if (c < channels) {
    factor = load<kPack>(scale + n * channels + c);
    for (int64_t p = first + threadIdx.y; p < last; p += kSlices) {
      fuse_grad(maps, (n * area + p) * channels + c, factor, sum, dot);
    }
  }
  parts[0][threadIdx.y][threadIdx.x] = sum;
  parts[1][threadIdx.y][threadIdx.x] = dot;
  __syncthreads();
  if (threadIdx.y == 0 && c < channels) {
    for (int slice = 1; slice < kSlices; ++slice) {
      for (int j = 0; j < kPack; ++j) {
        sum.value[j] += parts[0][slice][threadIdx.x].value[j];
        dot.value[j] += parts[1][slice][threadIdx.x].value[j];
      }
    }
    store(sums + tile * channels + c, sum);
    if (dots) {
      store(dots + tile * channels + c, dot);
    }
  }
}

// (N, C) in the computing type, all `value` where there is none.
at::Tensor per_channel(const std::optional<at::Tensor>& given, const at::Tensor& x, double value) {
  const auto type = compute_type(x);
  return given ? given->to(type).contiguous() : at::full({x.size(0), x.size(1)}, value, x.options().dtype(type));
}

at::Tensor context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& identity, bool relu) {
  check_context_fuse(x, scale, shift, identity);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto layout = layout_of(x);
  const auto features = x.contiguous(layout), mul = per_channel(scale, x, 1), add = per_channel(shift, x, 0);
  const auto other = identity ? identity->to(x.scalar_type()).contiguous(layout) : at::Tensor();
  const int64_t channels = x.size(1), area = x.size(2) * x.size(3);
  auto output = at::empty(x.sizes(), x.options().memory_format(layout));
  if (x.numel() == 0) {
    return output;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_fuse", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const bool channels_last = layout == at::MemoryFormat::ChannelsLast;
    with_pack<scalar_t>(in_packs<scalar_t>(channels_last ? channels : area, features, mul, add, other), [&](auto pack) {
      const auto kernel = channels_last ? fuse_kernel<scalar_t, acc_t, pack, true>
                                        : fuse_kernel<scalar_t, acc_t, pack, false>;
      const int64_t count = x.numel() / pack, blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 1 << 20);
      kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          count, channels, area, features.const_data_ptr<scalar_t>(), mul.const_data_ptr<acc_t>(),
          add.const_data_ptr<acc_t>(), identity ? other.const_data_ptr<scalar_t>() : nullptr, relu,
          output.mutable_data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

// What is returned is described at the CPU kernel.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> context_fuse_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& output) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto layout = layout_of(x ? *x : output ? *output : grad);
  const auto g = grad.contiguous(layout), mul = per_channel(scale, grad, 1);
  const auto features = x ? x->contiguous(layout) : at::Tensor();
  const auto y = output ? output->contiguous(layout) : at::Tensor();
  const int64_t images = grad.size(0), channels = grad.size(1), area = grad.size(2) * grad.size(3);
  const auto options = grad.options().memory_format(layout);
  auto grad_x = x ? at::empty(grad.sizes(), options) : at::empty({0}, grad.options());
  auto masked = output ? at::empty(grad.sizes(), options) : at::empty({0}, grad.options());
  auto grad_scale = at::zeros({x ? images : 0, channels}, mul.options());
  auto grad_shift = at::zeros({images, channels}, mul.options());
  if (grad.numel() == 0) {
    return {grad_x, masked, grad_scale, grad_shift};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "context_fuse_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Maps<scalar_t> maps{
        g.const_data_ptr<scalar_t>(), x ? features.const_data_ptr<scalar_t>() : nullptr,
        output ? y.const_data_ptr<scalar_t>() : nullptr, x ? grad_x.mutable_data_ptr<scalar_t>() : nullptr,
        output ? masked.mutable_data_ptr<scalar_t>() : nullptr};
    const acc_t* pm = mul.const_data_ptr<acc_t>();
    acc_t* dots = x ? grad_scale.mutable_data_ptr<acc_t>() : nullptr;
    acc_t* sums = grad_shift.mutable_data_ptr<acc_t>();
    const bool channels_last = layout == at::MemoryFormat::ChannelsLast;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    with_pack<scalar_t>(in_packs<scalar_t>(channels_last ? channels : area, g, features, y, mul), [&](auto pack) {
      if (!channels_last) {
        contiguous_grad_kernel<scalar_t, acc_t, pack><<<images * channels, kThreads, 0, stream>>>(
            area, maps, pm, sums, dots);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        return;
      }
      const int64_t tiles = (area + kSlices * kSteps - 1) / (kSlices * kSteps);
      const int64_t groups = (channels + kWarp * pack - 1) / (kWarp * pack);
      auto parts = at::empty({x ? 2 : 1, images * tiles, channels}, mul.options());
      acc_t* part_sums = parts.mutable_data_ptr<acc_t>();
      acc_t* part_dots = x ? part_sums + images * tiles * channels : nullptr;
      channels_last_grad_kernel<scalar_t, acc_t, pack>
          <<<images * tiles * groups, dim3(kWarp, kSlices), 0, stream>>>(
              channels, area, tiles, groups, maps, pm, part_sums, part_dots);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      sum_parts<acc_t>(images, tiles, channels, part_sums, sums);
      if (x) {
        sum_parts<acc_t>(images, tiles, channels, part_dots, dots);
      }
    });
  });
  return {grad_x, masked, grad_scale, grad_shift};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_fuse", &context_fuse);
  m.impl("context_fuse_backward", &context_fuse_backward);
}

}  // namespace mmdet
