// Autograd of the global context ops. It is C++ because formulas in Python take longer than a GPU does for the kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "context_block.h"

namespace mmdet {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
template <int kSize>
using Tensors = decltype(std::tuple_cat(std::declval<std::array<Tensor, kSize>>()));

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Optional optional(const Tensor& tensor) {
  return tensor.defined() ? Optional(tensor) : std::nullopt;
}

// The ops themselves, below autograd, and their backward passes, which have no derivative: these go through autograd,
// which says so, if one may be asked for.
namespace op {

class BelowAutogradUnlessRecorded {
 public:
  BelowAutogradUnlessRecorded() {
    if (!at::GradMode::is_enabled()) {
      guard_.emplace();
    }
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

Tensors<2> context_pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  static const auto op = find_op<decltype(context_pool)>("mmdet::context_pool");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, weight, bias);
}

Tensors<2> context_pool_backward(
    const Tensor& grad, const Optional& grad_map, const Tensor& x, const Tensor& weight, const Tensor& context,
    const Tensor& attention) {
  static const auto op = find_op<decltype(context_pool_backward)>("mmdet::context_pool_backward");
  const BelowAutogradUnlessRecorded guard;
  return op.call(grad, grad_map, x, weight, context, attention);
}

Tensors<5> context_transform(
    const Tensor& context, const Tensor& first_weight, const Tensor& first_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias, double eps) {
  static const auto op = find_op<decltype(context_transform)>("mmdet::context_transform");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
}

Tensors<7> context_transform_backward(
    const Tensor& grad, const Tensor& context, const Tensor& hidden, const Tensor& active, const Tensor& mean,
    const Tensor& inverse, const Tensor& first_weight, const Tensor& norm_weight, const Tensor& last_weight) {
  static const auto op = find_op<decltype(context_transform_backward)>("mmdet::context_transform_backward");
  const BelowAutogradUnlessRecorded guard;
  return op.call(grad, context, hidden, active, mean, inverse, first_weight, norm_weight, last_weight);
}

Tensor context_fuse(
    const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity, bool relu) {
  static const auto op = find_op<decltype(context_fuse)>("mmdet::context_fuse");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, scale, shift, identity, relu);
}

Tensors<4> context_fuse_backward(
    const Tensor& grad, const Optional& x, const Optional& scale, const Optional& output) {
  static const auto op = find_op<decltype(context_fuse_backward)>("mmdet::context_fuse_backward");
  const BelowAutogradUnlessRecorded guard;
  return op.call(grad, x, scale, output);
}

}  // namespace op

bool has_tangent(const Tensor& tensor) {
  return tensor._fw_grad(0).defined();
}

bool has_tangent(const Optional& tensor) {
  return tensor && has_tangent(*tensor);
}

// In either mode; the forward one ends in an error, and not in a derivative of zero.
template <typename... Inputs>
bool is_differentiated(const Inputs&... inputs) {
  return torch::autograd::compute_requires_grad(inputs...) || (has_tangent(inputs) || ...);
}

// What has no gradient leaves a forward function by a pointer: compiled autograd takes no mark_non_differentiable.

// Context and x, whose gradient as an output is added in the pass that writes the pooling's.
struct Pool : Function<Pool> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor* attention) {
    // Once for both passes; the op refuses integers.
    const auto converted = weight.is_floating_point() ? cast(weight, compute_type(x)) : weight;
    Tensor context;
    std::tie(context, *attention) = op::context_pool(x, converted, bias);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, converted, bias, context, *attention});
    return {context, x};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &grad = grads[0], &grad_map = grads[1];
    if (!grad.defined()) {
      return {grad_map, Tensor(), Tensor(), Tensor()};
    }
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight] =
        op::context_pool_backward(grad, optional(grad_map), saved[0], saved[1], saved[3], saved[4]);
    return {grad_x, grad_weight, ctx->needs_input_grad(2) ? at::zeros_like(saved[2]) : Tensor(), Tensor()};
  }
};

// Context, attention and x.
Tensors<3> pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (!is_differentiated(x, weight, bias)) {
    return std::tuple_cat(op::context_pool(x, weight, bias), std::tuple(x));
  }
  Tensor attention;
  const auto outputs = Pool::apply(x, weight, bias, &attention);
  return {outputs[0], attention, outputs[1]};
}

Tensors<2> context_pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto [context, attention, map] = pool(x, weight, bias);
  return {context, attention};
}

Tensors<2> context_pool_and_map(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto [context, attention, map] = pool(x, weight, bias);
  return {context, map};
}

struct Transform : Function<Transform> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& context, const Tensor& first_weight, const Tensor& first_bias,
      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias,
      double eps, Tensors<5>* outputs) {
    *outputs =
        op::context_transform(context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
    const auto& [output, hidden, active, mean, inverse] = *outputs;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, hidden, active, mean,
         inverse});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    if (!grads[0].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const auto parts = op::context_transform_backward(
        grads[0], saved[0], saved[7], saved[8], saved[9], saved[10], saved[1], saved[3], saved[5]);
    size_t i = 0;
    const auto keep = [&](const Tensor& part) {
      if (ctx->needs_input_grad(i)) {
        result[i] = like(part, saved[i]);
      }
      ++i;
    };
    std::apply([&](const auto&... part) { (keep(part), ...); }, parts);
    return result;
  }
};

Tensors<5> context_transform(
    const Tensor& context, const Tensor& first_weight, const Tensor& first_bias, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& last_weight, const Tensor& last_bias, double eps) {
  if (!is_differentiated(
          context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias)) {
    return op::context_transform(
        context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps);
  }
  Tensors<5> outputs;
  std::get<0>(outputs) = Transform::apply(
      context, first_weight, first_bias, norm_weight, norm_bias, last_weight, last_bias, eps, &outputs);
  return outputs;
}

struct Fuse : Function<Fuse> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity,
      bool relu) {
    auto output = op::context_fuse(x, scale, shift, identity, relu);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({scale ? x : Tensor(), scale.value_or(Tensor()), relu ? output : Tensor()});
    // Dtypes alone: neither is needed itself.
    if (shift) {
      ctx->saved_data["shift"] = shift->scalar_type();
    }
    if (identity) {
      ctx->saved_data["identity"] = identity->scalar_type();
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    const auto& grad = grads[0];
    if (!grad.defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &output = saved[2];
    const auto shift = ctx->saved_data.find("shift"), identity = ctx->saved_data.find("identity");
    const auto none = ctx->saved_data.end();
    size_t edge = 0;  // of the inputs that there were
    const auto needed = [&](bool given) { return given && ctx->needs_input_grad(edge++); };
    const bool of_x = needed(true), of_scale = needed(scale.defined()), of_shift = needed(shift != none);
    const bool of_identity = needed(identity != none), scaled = scale.defined() && (of_x || of_scale);
    auto masked = grad;
    if (scaled || of_shift || output.defined()) {
      const auto parts = op::context_fuse_backward(
          grad, scaled ? Optional(x) : std::nullopt, scaled ? Optional(scale) : std::nullopt, optional(output));
      masked = output.defined() ? std::get<1>(parts) : grad;
      result[0] = scaled && of_x ? std::get<0>(parts) : Tensor();
      result[1] = of_scale ? cast(std::get<2>(parts), scale.scalar_type()) : Tensor();
      result[2] = of_shift ? cast(std::get<3>(parts), shift->second.toScalarType()) : Tensor();
    }
    result[0] = of_x && !scaled ? masked : result[0];
    result[3] = of_identity ? cast(masked, identity->second.toScalarType()) : Tensor();
    return result;
  }
};

Tensor context_fuse(
    const Tensor& x, const Optional& scale, const Optional& shift, const Optional& identity, bool relu) {
  return is_differentiated(x, scale, shift, identity) ? Fuse::apply(x, scale, shift, identity, relu)
                                                          : op::context_fuse(x, scale, shift, identity, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, Autograd, m) {
  m.impl("context_pool", &context_pool);
  m.impl("context_transform", &context_transform);
  m.impl("context_fuse", &context_fuse);
}

// Of parts that have kernels, since an op with one of its own must not return what it was given.
TORCH_LIBRARY_IMPL(mmdet, CompositeImplicitAutograd, m) {
  m.impl("context_pool_and_map", &context_pool_and_map);
}

}  // namespace mmdet
