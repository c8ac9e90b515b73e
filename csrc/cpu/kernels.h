// What the host calls on a CPU. Knows no torch: threads are handed in.
#pragma once

#include "params.h"

#include <functional>

namespace roialign::cpu {

// Calls work(begin, end) for pieces of [0, count) on several threads. Every piece is handed out once; which thread
// takes it is open, so a piece must own all that it writes.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work)>;

template <typename scalar_t, typename box_t>
void roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename scalar_t, typename box_t>
void roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename box_t>
void assign_levels(const AssignLevelsParams<box_t>& params);

}  // namespace roialign::cpu
