// Gradients of the global context ops. In Python they took a GPU's host longer than the GPU took for the work.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace mmdet {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

// An op's kernels below autograd.
template <typename Signature, typename... Args>
auto call(const char* name, const Args&... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>().call(args...);
}

Optional optional(const Tensor& tensor) {
  return tensor.defined() ? Optional(tensor) : std::nullopt;
}

// In the dtype of an input, which saved_data remembers.
Tensor cast(const Tensor& grad, AutogradContext* ctx, const char* dtype) {
  return grad.to(ctx->saved_data[dtype].toScalarType());
}

std::tuple<Tensor, Tensor> pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return call<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>(
      "mmdet::context_pool", x, weight, bias);
}

struct Pool : torch::autograd::Function<Pool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const auto [context, attention] = pool(x, weight, bias);
    ctx->mark_non_differentiable({attention});
    ctx->save_for_backward({x, weight, bias, context, attention});
    return {context, attention};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight] =
        call<std::tuple<Tensor, Tensor>(
            const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "mmdet::context_pool_backward", grads[0], Optional(), saved[0], saved[1], saved[3], saved[4]);
    return {grad_x, grad_weight, at::zeros_like(saved[2])};
  }
};

std::tuple<Tensor, Tensor> transform(
    const Tensor& context, const Tensor& first_weight, const Tensor& first_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias, double eps) {
  return call<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
      "mmdet::context_transform", context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias,
      eps);
}

struct Transform : torch::autograd::Function<Transform> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& context, const Tensor& first_weight, const Tensor& first_bias,
      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias,
      double eps) {
    const auto [output, hidden] =
        transform(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
    ctx->mark_non_differentiable({hidden});
    ctx->save_for_backward({context, first_weight, norm_weight, norm_bias, last_weight, hidden});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["first_bias"] = first_bias.scalar_type();
    ctx->saved_data["last_bias"] = last_bias.scalar_type();
    return {output, hidden};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto [context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias] =
        call<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
            const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
            double)>(
            "mmdet::context_transform_backward", grads[0], saved[0], saved[5], saved[1], saved[2], saved[3], saved[4],
            ctx->saved_data["eps"].toDouble());
    return {
        context.to(saved[0].scalar_type()), first_weight.to(saved[1].scalar_type()),
        cast(first_bias, ctx, "first_bias"), norm_weight.to(saved[2].scalar_type()),
        norm_bias.to(saved[3].scalar_type()), last_weight.to(saved[4].scalar_type()),
        cast(last_bias, ctx, "last_bias"), Tensor()};
  }
};

Tensor fuse(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity, bool relu) {
  return call<Tensor(const Tensor&, const Optional&, const Optional&, const Optional&, bool)>(
      "mmdet::context_fuse", x, scale, shift, identity, relu);
}

struct Fuse : torch::autograd::Function<Fuse> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity,
      bool relu) {
    const auto output = fuse(x, scale, shift, identity, relu);
    ctx->save_for_backward({scale ? x : Tensor(), scale.value_or(Tensor()), relu ? output : Tensor()});
    if (shift) {
      ctx->saved_data["shift"] = shift->scalar_type();
    }
    if (identity) {
      ctx->saved_data["identity"] = identity->scalar_type();
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &output = saved[2];
    auto [grad_x, masked, grad_scale, grad_shift] =
        call<std::tuple<Tensor, Tensor, Tensor, Tensor>(
            const Tensor&, const Optional&, const Optional&, const Optional&)>(
            "mmdet::context_fuse_backward", grads[0], optional(x), optional(scale), optional(output));
    if (!output.defined()) {
      masked = grads[0];
    }
    const auto& data = ctx->saved_data;
    return {
        scale.defined() ? grad_x : masked, scale.defined() ? grad_scale.to(scale.scalar_type()) : Tensor(),
        data.count("shift") ? cast(grad_shift, ctx, "shift") : Tensor(),
        data.count("identity") ? cast(masked, ctx, "identity") : Tensor(), Tensor()};
  }
};

template <typename... Tensors>
bool differentiates(const Tensors&... tensors) {
  const auto requires_grad = [](const Optional& tensor) { return tensor && tensor->requires_grad(); };
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

std::tuple<Tensor, Tensor> pool_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (!differentiates(x, weight, bias)) {
    return pool(x, weight, bias);
  }
  const auto outputs = Pool::apply(x, weight, bias);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> transform_autograd(
    const Tensor& context, const Tensor& first_weight, const Tensor& first_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias, double eps) {
  if (!differentiates(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias)) {
    return transform(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
  }
  const auto outputs =
      Transform::apply(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
  return {outputs[0], outputs[1]};
}

Tensor fuse_autograd(
    const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity, bool relu) {
  return differentiates(x, scale, shift, identity) ? Fuse::apply(x, scale, shift, identity, relu)
                                                   : fuse(x, scale, shift, identity, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, Autograd, m) {
  m.impl("context_pool", &pool_autograd);
  m.impl("context_transform", &transform_autograd);
  m.impl("context_fuse", &fuse_autograd);
}

}  // namespace mmdet
