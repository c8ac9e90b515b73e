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

// The gradient of the boxes, and the derivative of pooling along tangents of the boxes.
template <typename scalar_t, typename box_t>
void roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename scalar_t, typename box_t>
void roi_align_tangent(const BoxMotionParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

// Max pooling: the forward writes the winners, the others read them. Gather reads the maps at the winners.
template <typename scalar_t, typename box_t>
void roi_max_forward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename scalar_t, typename box_t>
void roi_max_gather(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename scalar_t, typename box_t>
void roi_max_backward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename scalar_t, typename box_t>
void roi_max_backward_boxes(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for);

template <typename box_t>
void assign_levels(const AssignLevelsParams<box_t>& params);

template <typename box_t>
void nms(const NmsParams<box_t>& params);

// The instruction set the kernels run with: "avx512", "avx2" or "baseline". At first the best that machine and build
// have, or the lower one that ROIALIGN_EXT_CPU_CAPABILITY names. Setting one that they lack returns false.
const char* capability();
bool set_capability(const char* name);

}  // namespace roialign::cpu
