// Arithmetic that rounds alike on CPU and GPU: both keep the same boxes, and sample the same points.
#pragma once

#include <c10/macros/Macros.h>

namespace mmdet {

// A product that is never contracted into a fused multiply-add.
C10_HOST_DEVICE inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

C10_HOST_DEVICE inline double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace mmdet
