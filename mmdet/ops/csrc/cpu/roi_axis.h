// The bins of a RoI along one axis as weights of cells, on the CPU.
#pragma once

#include "../roi_align.h"

#include <algorithm>
#include <vector>

namespace mmdet {

// Bin b of one axis sums weight[t] * cells[t] for t in [begin[b], begin[b + 1]).
template <typename T>
struct Axis {
  std::vector<int> begin;
  std::vector<int> cell;
  std::vector<T> weight;
};

template <typename T, typename S>
Axis<T> make_axis(const RoiSamples<S>& samples, int bins, int extent) {
  Axis<T> axis;
  axis.begin.reserve(bins + 1);
  axis.begin.push_back(0);
  const auto add = [&axis](int cell, T weight) {
    if (weight == T(0)) {
      return;
    }
    // Neighbouring samples share cells: merge with one of the last two entries of this bin.
    const int size = static_cast<int>(axis.cell.size());
    for (int t = size - 1; t >= std::max(size - 2, axis.begin.back()); --t) {
      if (axis.cell[t] == cell) {
        axis.weight[t] += weight;
        return;
      }
    }
    axis.cell.push_back(cell);
    axis.weight.push_back(weight);
  };
  for (int b = 0; b < bins; ++b) {
    for (int i = 0; i < samples.grid; ++i) {
      const auto tap = linear_tap(samples.at(b, i), extent);
      add(tap.low, T(tap.weight_low));
      add(tap.high, T(tap.weight_high));
    }
    axis.begin.push_back(static_cast<int>(axis.cell.size()));
  }
  return axis;
}

}  // namespace mmdet
