// Division that rounds up: into how many parts of `b` what has `a` is cut.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace mmdet {

C10_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mmdet
