// Schemas of all ops. Kernels stand beside their TORCH_LIBRARY_IMPL blocks in cpu/ and cuda/; fake kernels in ../*.py,
// autograd formulas there or in context_autograd.cpp.
#include <Python.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

// Importing mmdet._C only has to load the library: its static initialisers register the ops.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

static void pass_by(torch::Library& library) {
  for (const char* op :
       {"roi_align", "nms", "soft_nms", "context_pool", "context_transform", "context_fuse", "paste_masks",
        "mask_targets", "deform_conv2d"}) {
    library.impl(op, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY(mmdet, m) {
  m.def(
      "roi_align(Tensor[] features, Tensor rois, Tensor? levels, float[] spatial_scales, SymInt height, SymInt width, "
      "int sampling_ratio, bool aligned, float shift, float? finest_scale) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, float[] spatial_scales, SymInt[] sizes, "
      "bool channels_last, int sampling_ratio, bool aligned, float shift, float? finest_scale) -> Tensor[]");
  m.def("nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> Tensor");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, float iou_threshold, float sigma, float min_score, str method) -> "
      "(Tensor, Tensor)");
  m.def(
      "paste_masks(Tensor masks, Tensor boxes, int height, int width, float threshold) -> (Tensor, Tensor)");
  m.def(
      "mask_targets(Tensor pixels, Tensor crops, Tensor boxes, Tensor matched, int height, int width, int size) -> "
      "Tensor");
  m.def(
      "deform_conv2d(Tensor x, Tensor offset, Tensor? mask, Tensor weight, int stride, int padding) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor x, Tensor offset, Tensor? mask, Tensor weight, int stride, "
      "int padding) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("context_pool(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  m.def("context_pool_and_map(Tensor(a) x, Tensor weight, Tensor bias) -> (Tensor, Tensor(a))");
  m.def(
      "context_pool_backward(Tensor grad, Tensor? grad_map, Tensor x, Tensor weight, Tensor context, "
      "Tensor attention) -> (Tensor, Tensor)");
  m.def(
      "context_transform(Tensor context, Tensor first_weight, Tensor first_bias, Tensor norm_weight, Tensor norm_bias, "
      "Tensor last_weight, Tensor last_bias, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "context_transform_backward(Tensor grad, Tensor context, Tensor hidden, Tensor active, Tensor mean, "
      "Tensor inverse, Tensor first_weight, Tensor norm_weight, Tensor last_weight) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("context_fuse(Tensor x, Tensor? scale, Tensor? shift, Tensor? identity, bool relu) -> Tensor");
  m.def(
      "context_fuse_backward(Tensor grad, Tensor? x, Tensor? scale, Tensor? output) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

// Backward passes have no derivative, and say so when one is asked for.
TORCH_LIBRARY_IMPL(mmdet, Autograd, m) {
  for (const char* op :
       {"roi_align_backward", "deform_conv2d_backward", "context_pool_backward", "context_transform_backward",
        "context_fuse_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

// Autocast passes all ops by: they take a half-precision feature map with float32 RoIs and weights as they come, and
// accumulate in float32.
TORCH_LIBRARY_IMPL(mmdet, AutocastCPU, m) {
  pass_by(m);
}

TORCH_LIBRARY_IMPL(mmdet, AutocastCUDA, m) {
  pass_by(m);
}
