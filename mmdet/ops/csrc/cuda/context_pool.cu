// Global context pooling on CUDA: each map is read, and each gradient written, once. Half precision is accumulated in
// float32.
#include "context_stream.cuh"
#include "context_tiles.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace mmdet {
namespace {

// grad_x = grad_map (zeros without) + attention times the context's gradient + the logits' gradient times the weight.
template <typename scalar_t, typename T, int kPack>
__device__ __forceinline__ Pack<scalar_t, kPack> add_grads(
    Pack<scalar_t, kPack> map, T a, const Pack<T, kPack>& u, T b, const Pack<T, kPack>& v) {
  for (int j = 0; j < kPack; ++j) {
    map.value[j] = static_cast<scalar_t>(fma(b, v.value[j], fma(a, u.value[j], static_cast<T>(map.value[j]))));
  }
  return map;
}

// (N, C, P).
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) contiguous_grad_kernel(
    int64_t packs, int64_t channels, int64_t area, const scalar_t* grad_map, const T* attention, const T* grad_logits,
    const T* grad, const T* weight, scalar_t* output) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < packs; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = divide(i * kPack, area), n = divide(row, channels);
    const int64_t position = n * area + i * kPack - row * area;
    const auto map = load_or<kPack>(grad_map, i * kPack, scalar_t(0));
    store(output + i * kPack, add_grads(map, grad[row], load<kPack>(attention + position), weight[row - n * channels],
                                        load<kPack>(grad_logits + position)));
  }
}

// (N, P, C).
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) channels_last_grad_kernel(
    const __grid_constant__ Rows rows, const scalar_t* __restrict__ grad_map, const T* __restrict__ attention,
    const T* __restrict__ grad_logits, const T* __restrict__ grad, const T* __restrict__ weight,
    scalar_t* __restrict__ output) {
  const Place place(rows);
  if (!place.inside) {
    return;
  }
  Pack<scalar_t, kPack> maps[kUnderWay];
  T a[kUnderWay], b[kUnderWay];
#pragma unroll
  for (int i = 0; i < kUnderWay; ++i) {
    if (i * rows.slices < place.left) {
      maps[i] = load_or<kPack>(grad_map, (place.start + i * rows.stride) * kPack, scalar_t(0));
      a[i] = attention[place.row + i * rows.slices];
      b[i] = grad_logits[place.row + i * rows.slices];
    }
  }
  const auto u = load<kPack>(grad + (place.image * rows.columns + place.column) * kPack);
  const auto v = load<kPack>(weight + place.column * kPack);
#pragma unroll
  for (int i = 0; i < kUnderWay; ++i) {
    if (i * rows.slices < place.left) {
      forget_conversions(maps[i]);
      store(output + (place.start + i * rows.stride) * kPack, add_grads(maps[i], a[i], u, b[i], v));
    }
  }
}

// Of a block that takes a pack of channels with each thread.
inline int64_t stream_threads(int64_t channels, int64_t pack) {
  return divide_up(channels / pack, kWarp) * kWarp;
}

// A map, contiguous or channels_last, and how it is cut into tiles.
struct Plan {
  int64_t images, channels, area, width, tiles;
  int64_t limit, bytes;                                 // of shared memory: of any tile, of these; 0: they do not fit
  bool channels_last, packs, streamed;                  // streamed: a tile passes through registers
};

template <typename scalar_t>
Plan plan_tiles(const at::Tensor& x, const at::Tensor& weight) {
  Plan plan{x.size(0), x.size(1), x.size(2) * x.size(3)};
  plan.channels_last = layout_of(x) == at::MemoryFormat::ChannelsLast;
  plan.packs = in_packs<scalar_t>(plan.channels_last ? plan.channels : plan.area, x, weight);
  const int64_t pack = plan.packs ? 16 / sizeof(scalar_t) : 1, position = plan.channels * sizeof(scalar_t);
  // Two blocks at a time on a multiprocessor, so that one computes while the other reads.
  int available = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device()));
  plan.limit = (available - (16 << 10)) / 2;
  plan.streamed = plan.channels_last && plan.channels <= kThreads * pack;
  if (plan.streamed) {  // as many blocks as there can be at a time, or a few less
    const int64_t blocks = multiprocessors() * 512 / stream_threads(plan.channels, pack);
    plan.width = std::max<int64_t>(divide_up(plan.area, std::max<int64_t>(blocks / plan.images, 1)), kBatch);
  } else if (plan.channels_last) {
    plan.width = std::clamp<int64_t>(std::min(kTileBytes, plan.limit) / position, 8, kMaxWidth);
  } else {  // a power of two of packs
    plan.width = std::min<int64_t>(kRowBytes / sizeof(scalar_t), kWarp * pack);
    while (plan.width > pack && plan.width * position > plan.limit) {
      plan.width /= 2;
    }
  }
  plan.bytes = plan.width * position > plan.limit ? 0 : plan.width * position;
  plan.tiles = divide_up(plan.area, plan.width);
  return plan;
}

template <typename scalar_t, typename T, bool kBackward>
void run_tiles(const Plan& plan, const scalar_t* x, const T* weight, const Results<T>& results) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t blocks = plan.images * plan.tiles;
  const int bytes = static_cast<int>(plan.bytes);
  // The same for all tiles: another thread may set it between here and the launch.
  const auto allow = [&](auto kernel) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.limit)));
  };
  with_pack<scalar_t>(plan.packs, [&](auto pack) {
    if (plan.streamed) {
      stream_kernel<scalar_t, T, pack, kBackward><<<blocks, stream_threads(plan.channels, pack), 0, stream>>>(
          plan.channels, plan.area, plan.tiles, static_cast<int>(plan.width), x, weight, results);
    } else if (plan.channels_last) {
      const auto kernel = channels_last_kernel<scalar_t, T, pack, kBackward>;
      allow(kernel);
      kernel<<<blocks, kThreads, bytes, stream>>>(
          plan.channels, plan.area, plan.tiles, static_cast<int>(plan.width), bytes > 0, x, weight, results);
    } else {
      const auto kernel = contiguous_kernel<scalar_t, T, pack, kBackward>;
      const int columns = static_cast<int>(plan.width) / pack;
      allow(kernel);
      kernel<<<blocks, dim3(columns, kThreads / columns), bytes, stream>>>(
          plan.channels, plan.area, plan.tiles, bytes > 0, x, weight, results);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// The bias moves all logits alike, which changes no softmax.
std::tuple<at::Tensor, at::Tensor> context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_context_pool(x, weight, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto features = x.contiguous(layout_of(x)), w = cast(weight, type).contiguous();
  const auto options = x.options().dtype(type);
  auto context = at::empty({x.size(0), x.size(1)}, options);
  auto attention = at::empty({x.size(0), x.size(2) * x.size(3)}, options);
  if (x.numel() == 0) {
    return {context.zero_(), attention.zero_()};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_pool", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Plan plan = plan_tiles<scalar_t>(features, w);
    auto parts = at::empty({plan.images * plan.tiles, plan.channels}, options);
    auto softmax = at::empty({2, plan.images * plan.tiles}, options);
    acc_t *logits = attention.mutable_data_ptr<acc_t>(), *tops = softmax.mutable_data_ptr<acc_t>();
    acc_t* totals = tops + plan.images * plan.tiles;
    run_tiles<scalar_t, acc_t, false>(
        plan, features.const_data_ptr<scalar_t>(), w.const_data_ptr<acc_t>(),
        {logits, parts.mutable_data_ptr<acc_t>(), tops, totals, nullptr, nullptr});
    sum_parts<acc_t>(
        plan.images, plan.tiles, plan.channels, parts.const_data_ptr<acc_t>(), context.mutable_data_ptr<acc_t>(),
        {tops, totals, logits, plan.area});
  });
  return {context, attention};
}

// The formula stands at the CPU kernel.
std::tuple<at::Tensor, at::Tensor> context_pool_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_map, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& context, const at::Tensor& attention) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  const auto layout = layout_of(x);
  const auto features = x.contiguous(layout), w = cast(weight, type).contiguous(), g = cast(grad, type).contiguous();
  const auto c = context.contiguous(), a = attention.contiguous();
  const auto outer = grad_map ? cast(*grad_map, x.scalar_type()).contiguous(layout) : at::Tensor();
  auto grad_logits = at::empty_like(a);
  auto grad_weight = at::empty(weight.sizes(), w.options());
  auto grad_x = at::empty(x.sizes(), x.options().memory_format(layout));
  if (x.numel() == 0) {
    return {grad_x, at::zeros_like(weight)};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_pool_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Plan plan = plan_tiles<scalar_t>(features, g);
    auto parts = at::empty({plan.images * plan.tiles, plan.channels}, w.options());
    const acc_t *pg = g.const_data_ptr<acc_t>(), *pa = a.const_data_ptr<acc_t>(), *pw = w.const_data_ptr<acc_t>();
    acc_t* pl = grad_logits.mutable_data_ptr<acc_t>();
    run_tiles<scalar_t, acc_t, true>(
        plan, features.const_data_ptr<scalar_t>(), pg,
        {pl, parts.mutable_data_ptr<acc_t>(), nullptr, nullptr, pa, c.const_data_ptr<acc_t>()});
    acc_t* out_weight = grad_weight.mutable_data_ptr<acc_t>();
    sum_parts<acc_t>(1, plan.images * plan.tiles, plan.channels, parts.const_data_ptr<acc_t>(), out_weight);
    const int64_t row = plan.channels_last ? plan.channels : plan.area;
    with_pack<scalar_t>(in_packs<scalar_t>(row, outer, a, g, w), [&](auto pack) {
      const auto stream = c10::cuda::getCurrentCUDAStream();
      const scalar_t* start = grad_map ? outer.const_data_ptr<scalar_t>() : nullptr;
      scalar_t* out = grad_x.mutable_data_ptr<scalar_t>();
      if (plan.channels_last) {
        const Rows rows(plan.images, plan.channels, plan.area, pack, kUnderWay);
        const int64_t blocks = plan.images * rows.chunks * rows.groups;
        channels_last_grad_kernel<scalar_t, acc_t, pack><<<blocks, kThreads, 0, stream>>>(
            rows, start, pa, pl, pg, pw, out);
      } else {
        const int64_t count = x.numel() / pack, blocks = std::min<int64_t>(divide_up(count, kThreads), 1 << 20);
        contiguous_grad_kernel<scalar_t, acc_t, pack><<<blocks, kThreads, 0, stream>>>(
            count, plan.channels, plan.area, start, pa, pl, pg, pw, out);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {grad_x, cast(grad_weight, weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_pool", &context_pool);
  m.impl("context_pool_backward", &context_pool_backward);
}

}  // namespace mmdet
