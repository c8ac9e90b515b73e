// The operators as torch sees them: schemas, allocation, registration. With call.h, checks.h and memory.h the only
// file that knows torch. roialign_ext/autograd.py gives the operators their gradients and fake kernels.
#if defined(ROIALIGN_EXT_WITH_CUDA) || defined(ROIALIGN_EXT_EMULATED)
#include "cuda/launch.h"
#endif
#ifndef ROIALIGN_EXT_EMULATED
#include "cpu/kernels.h"
#include "cpu/match.h"
#endif
#include "call.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>
#include <torch/version.h>
#ifdef ROIALIGN_EXT_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace roialign {
namespace {

// Devices: how each runs a kernel, once its tensors are checked and made.

#define ROIALIGN_FOR_EACH_KERNEL(X) \
  X(roi_align_forward)              \
  X(roi_align_backward)             \
  X(roi_align_backward_boxes)       \
  X(roi_align_tangent)              \
  X(roi_max_forward)                \
  X(roi_max_gather)                 \
  X(roi_max_backward)               \
  X(roi_max_backward_boxes)

#if defined(ROIALIGN_EXT_WITH_CUDA) || defined(ROIALIGN_EXT_EMULATED)

// The device of the tensors for as long as this lives, and its current stream.
class Cuda {
 public:
  static constexpr bool kChecksRows = false;
  explicit Cuda(at::Device device) : guard_(device) {}

#define ROIALIGN_RUN(kernel)                \
  template <typename Params>                \
  void kernel(const Params& params) const { \
    check(cuda::kernel(params, stream()));  \
  }
  ROIALIGN_FOR_EACH_KERNEL(ROIALIGN_RUN)
  ROIALIGN_RUN(assign_levels)
  ROIALIGN_RUN(nms)
#undef ROIALIGN_RUN
  static int64_t nms_progress_size(int64_t num_boxes) { return cuda::nms_progress_size(num_boxes); }

 private:
#ifdef ROIALIGN_EXT_EMULATED
  using Guard = at::Device;  // the kernels run on CPU tensors, for the tests
  static cudaStream_t stream() { return emulation::current_stream; }
  static void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "an emulated kernel failed"); }
#else
  using Guard = c10::cuda::CUDAGuard;
  static cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }
  static void check(cudaError_t error) { C10_CUDA_CHECK(error); }
#endif
  Guard guard_;
};

#endif

#ifndef ROIALIGN_EXT_EMULATED

// Hands pieces to whichever thread is free, because RoIs and levels differ in cost.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t num_pieces = (count + grain - 1) / grain;
  const int64_t num_threads = std::min<int64_t>(at::get_num_threads(), num_pieces);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(grain); begin < count; begin = next.fetch_add(grain)) {
      work(begin, std::min(begin + grain, count));
    }
  });
}

class Cpu {
 public:
  static constexpr bool kChecksRows = true;
  explicit Cpu(at::Device) {}

#define ROIALIGN_RUN(kernel)                \
  template <typename Params>                \
  void kernel(const Params& params) const { \
    cpu::kernel(params, parallel_for);      \
  }
  ROIALIGN_FOR_EACH_KERNEL(ROIALIGN_RUN)
#undef ROIALIGN_RUN
  template <typename Params>
  void assign_levels(const Params& params) const {
    cpu::assign_levels(params);
  }
  template <typename Params>
  void nms(const Params& params) const {
    cpu::nms(params);
  }
  static int64_t nms_progress_size(int64_t) { return 0; }
};

#endif

template <typename Device>
void check_rows_of(const char* who, const Call& call) {
  if constexpr (Device::kChecksRows) {
    const auto check = call.boxes.scalar_type() == at::kDouble ? check_rows<double> : check_rows<float>;
    check(who, call.boxes, call.levels, call.pooling.num_images, call.pooling.rule.num_levels);
  }
}

// What every operator is told of the pooling, as its schema ends.
#define ROIALIGN_POOLING_ARGS                                                                         \
  at::ArrayRef<double> spatial_scales, int64_t sampling_ratio, bool aligned, int64_t canonical_level, \
      double canonical_scale
#define ROIALIGN_POOLING spatial_scales, sampling_ratio, aligned, canonical_level, canonical_scale

// A call that reads maps, and these as the kernels read them.
template <typename Device>
struct CallOnFeatures {
  const char* who;
  Device device;
  std::vector<int64_t> map_sizes;  // [L, 2]: height, width
  Call call;

  CallOnFeatures(TensorList features_, const Tensor& boxes, const std::optional<Tensor>& levels,
                 at::IntArrayRef output_size, ROIALIGN_POOLING_ARGS)
      : who(check(features_, boxes)),
        device(boxes.device()),
        map_sizes(sizes_of(features_)),
        call(who, boxes, levels, map_sizes, features_[0].size(0), features_[0].size(1), output_size, ROIALIGN_POOLING,
             is_channels_last(features_[0])),
        features(features_) {
    check_rows_of<Device>(who, call);
  }

  at::MemoryFormat format() const { return memory_format(call.pooling.channels_last); }

  Tensor empty_pooled(const at::TensorOptions& options) const {
    return empty_output({call.pooling.num_rois, call.pooling.num_channels, call.pooling.bins_y, call.pooling.bins_x},
                        options, format());
  }

  std::vector<Tensor> maps() const {
    std::vector<Tensor> result;
    for (const Tensor& map : features) {
      result.push_back(in_layout(map, call.pooling.channels_last));
    }
    return result;
  }

 private:
  TensorList features;

  static const char* check(TensorList features, const Tensor& boxes) {
    const char* who = name_of_call(static_cast<int64_t>(features.size()));
    check_features(who, features);
    check_boxes(who, boxes, 5, features[0].device());
    return who;
  }

  static std::vector<int64_t> sizes_of(TensorList features) {
    std::vector<int64_t> sizes;
    for (const Tensor& map : features) {
      sizes.insert(sizes.end(), {map.size(2), map.size(3)});
    }
    return sizes;
  }
};

// Makes the gradient of every level; run(call, device, gradients, grad_output in their layout) fills them.
template <typename Device, typename Run>
std::vector<Tensor> make_grad_features(const Tensor& grad_output, const Tensor& boxes,
                                       const std::optional<Tensor>& levels, int64_t num_images,
                                       at::IntArrayRef map_sizes, ROIALIGN_POOLING_ARGS, bool channels_last,
                                       const Run& run) {
  const int64_t num_levels = static_cast<int64_t>(map_sizes.size()) / 2;
  const char* who = name_of_call(num_levels);
  TORCH_CHECK_VALUE(map_sizes.size() % 2 == 0, who, ": `map_sizes` must hold a height and a width for each level, got ",
                    map_sizes.size(), " numbers");
  check_int(who, "levels of `map_sizes`", num_levels, 1, kMaxLevels);
  check_float(who, "`grad_output`", grad_output);
  check_boxes(who, boxes, 5, grad_output.device());
  check_pooled(who, "`grad_output`", grad_output, boxes);
  const Device device(boxes.device());
  const Call call(who, boxes, levels, map_sizes, num_images, grad_output.size(1), grad_output.sizes().slice(2),
                  ROIALIGN_POOLING, channels_last);
  check_rows_of<Device>(who, call);

  std::vector<Tensor> grad_features;
  int64_t num_cells = 0;
  for (int64_t l = 0; l < num_levels; ++l) {
    grad_features.push_back(empty_in_layout({num_images, grad_output.size(1), map_sizes[2 * l], map_sizes[2 * l + 1]},
                                            grad_output.options(), memory_format(channels_last)));
    num_cells += grad_features.back().numel();
  }
  if (boxes.size(0) == 0) {
    for (Tensor& grad : grad_features) {
      grad.zero_();
    }
  } else if (num_cells > 0) {
    run(call, device, grad_features, grad_output.contiguous(memory_format(channels_last)));
  }
  return grad_features;
}

// Makes the gradient of the boxes; run(call, gradient as the kernels write it) fills it.
template <typename Device, typename Run>
Tensor make_grad_boxes(const CallOnFeatures<Device>& on, const Tensor& boxes, const Run& run) {
  const Pooling& pooling = on.call.pooling;
  const bool is_empty = pooling.num_images == 0 || pooling.num_channels == 0;
  Tensor grad = is_empty ? at::zeros_like(on.call.boxes) : at::empty_like(on.call.boxes);
  if (grad.numel() > 0 && !is_empty) {
    run(grad);
  }
  return grad.to(boxes.scalar_type());
}

template <typename scalar_t, typename box_t>
BoxMotionParams<scalar_t, box_t> with_motion(const RoIAlignParams<scalar_t, box_t>& params, const Tensor& motion) {
  return {params, static_cast<box_t*>(motion.data_ptr())};
}

template <typename scalar_t, typename box_t>
MaxParams<scalar_t, box_t> with_winners(const RoIAlignParams<scalar_t, box_t>& params, const Tensor& argmax,
                                        const Tensor& grad_boxes = {}) {
  return {params, static_cast<int32_t*>(argmax.data_ptr()),
          grad_boxes.defined() ? static_cast<box_t*>(grad_boxes.data_ptr()) : nullptr};
}

// The operators.

template <typename Device>
Tensor roi_align_forward(TensorList features, const Tensor& boxes, const std::optional<Tensor>& levels,
                         at::IntArrayRef output_size, ROIALIGN_POOLING_ARGS) {
  const CallOnFeatures<Device> on(features, boxes, levels, output_size, ROIALIGN_POOLING);
  Tensor output = on.empty_pooled(features[0].options());
  if (output.numel() > 0) {
    on.call.with_params(on.maps(), output, [&](const auto& params) { on.device.roi_align_forward(params); });
  }
  return output;
}

template <typename Device>
std::vector<Tensor> roi_align_backward(const Tensor& grad_output, const Tensor& boxes,
                                       const std::optional<Tensor>& levels, int64_t num_images,
                                       at::IntArrayRef map_sizes, ROIALIGN_POOLING_ARGS, bool channels_last) {
  const auto run = [](const Call& call, const Device& device, const std::vector<Tensor>& grads, const Tensor& pooled) {
    call.with_params(grads, pooled, [&](const auto& params) { device.roi_align_backward(params); });
  };
  return make_grad_features<Device>(grad_output, boxes, levels, num_images, map_sizes, ROIALIGN_POOLING, channels_last,
                                    run);
}

template <typename Device>
Tensor roi_align_backward_boxes(const Tensor& grad_output, TensorList features, const Tensor& boxes,
                                const std::optional<Tensor>& levels, ROIALIGN_POOLING_ARGS) {
  const char* who = name_of_call(static_cast<int64_t>(features.size()));
  check_pooled(who, "`grad_output`", grad_output, boxes);
  const CallOnFeatures<Device> on(features, boxes, levels, grad_output.sizes().slice(2), ROIALIGN_POOLING);
  check_grad_of(who, grad_output, boxes, features);
  return make_grad_boxes(on, boxes, [&](const Tensor& grad) {
    on.call.with_params(on.maps(), grad_output.contiguous(on.format()),
                        [&](const auto& params) { on.device.roi_align_backward_boxes(with_motion(params, grad)); });
  });
}

template <typename Device>
Tensor roi_align_tangent(TensorList features, const Tensor& boxes, const Tensor& box_tangents,
                         const std::optional<Tensor>& levels, at::IntArrayRef output_size, ROIALIGN_POOLING_ARGS) {
  const CallOnFeatures<Device> on(features, boxes, levels, output_size, ROIALIGN_POOLING);
  TORCH_CHECK_VALUE(box_tangents.sizes() == boxes.sizes() && box_tangents.device() == boxes.device(), on.who,
                    ": `box_tangents` must be like `boxes`, ", name_of_shape(boxes), " on ", boxes.device(), ", got ",
                    name_of_shape(box_tangents), " on ", box_tangents.device());
  check_float(on.who, "`box_tangents`", box_tangents);
  const Tensor tangents = box_tangents.to(on.call.boxes.scalar_type()).contiguous();
  Tensor output = on.empty_pooled(features[0].options());
  if (output.numel() > 0) {
    on.call.with_params(on.maps(), output,
                        [&](const auto& params) { on.device.roi_align_tangent(with_motion(params, tangents)); });
  }
  return output;
}

template <typename Device>
std::tuple<Tensor, Tensor> roi_max_forward(TensorList features, const Tensor& boxes,
                                           const std::optional<Tensor>& levels, at::IntArrayRef output_size,
                                           ROIALIGN_POOLING_ARGS) {
  const CallOnFeatures<Device> on(features, boxes, levels, output_size, ROIALIGN_POOLING);
  check_samples_count(on.who, on.map_sizes, sampling_ratio);
  Tensor output = on.empty_pooled(features[0].options());
  Tensor argmax = on.empty_pooled(features[0].options().dtype(at::kInt));
  if (output.numel() > 0) {
    on.call.with_params(on.maps(), output,
                        [&](const auto& params) { on.device.roi_max_forward(with_winners(params, argmax)); });
  }
  return {output, argmax};
}

template <typename Device>
Tensor roi_max_gather(TensorList features, const Tensor& argmax, const Tensor& boxes,
                      const std::optional<Tensor>& levels, ROIALIGN_POOLING_ARGS) {
  const char* who = name_of_call(static_cast<int64_t>(features.size()));
  check_pooled(who, "`argmax`", argmax, boxes);
  const CallOnFeatures<Device> on(features, boxes, levels, argmax.sizes().slice(2), ROIALIGN_POOLING);
  check_argmax(who, argmax, boxes, features[0].size(1));
  check_samples_count(who, on.map_sizes, sampling_ratio);
  Tensor output = on.empty_pooled(features[0].options());
  if (output.numel() > 0) {
    const Tensor winners = argmax.contiguous(on.format());
    on.call.with_params(on.maps(), output,
                        [&](const auto& params) { on.device.roi_max_gather(with_winners(params, winners)); });
  }
  return output;
}

template <typename Device>
std::vector<Tensor> roi_max_backward(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                                     const std::optional<Tensor>& levels, int64_t num_images, at::IntArrayRef map_sizes,
                                     ROIALIGN_POOLING_ARGS, bool channels_last) {
  const auto run = [&](const Call& call, const Device& device, const std::vector<Tensor>& grads, const Tensor& pooled) {
    const Tensor winners = argmax.contiguous(memory_format(channels_last));
    call.with_params(grads, pooled,
                     [&](const auto& params) { device.roi_max_backward(with_winners(params, winners)); });
  };
  const char* who = name_of_call(static_cast<int64_t>(map_sizes.size()) / 2);
  check_pooled(who, "`grad_output`", grad_output, boxes);
  check_argmax(who, argmax, boxes, grad_output.size(1));
  check_same_bins(who, grad_output, argmax);
  check_samples_count(who, map_sizes, sampling_ratio);
  return make_grad_features<Device>(grad_output, boxes, levels, num_images, map_sizes, ROIALIGN_POOLING, channels_last,
                                    run);
}

template <typename Device>
Tensor roi_max_backward_boxes(const Tensor& grad_output, const Tensor& argmax, TensorList features, const Tensor& boxes,
                              const std::optional<Tensor>& levels, ROIALIGN_POOLING_ARGS) {
  const char* who = name_of_call(static_cast<int64_t>(features.size()));
  check_pooled(who, "`grad_output`", grad_output, boxes);
  const CallOnFeatures<Device> on(features, boxes, levels, grad_output.sizes().slice(2), ROIALIGN_POOLING);
  check_grad_of(who, grad_output, boxes, features);
  check_argmax(who, argmax, boxes, features[0].size(1));
  check_same_bins(who, grad_output, argmax);
  check_samples_count(who, on.map_sizes, sampling_ratio);
  return make_grad_boxes(on, boxes, [&](const Tensor& grad) {
    const Tensor winners = argmax.contiguous(on.format());
    on.call.with_params(on.maps(), grad_output.contiguous(on.format()), [&](const auto& params) {
      on.device.roi_max_backward_boxes(with_winners(params, winners, grad));
    });
  });
}

template <typename Device>
Tensor assign_levels(const Tensor& boxes, int64_t num_levels, int64_t k_min, int64_t canonical_level,
                     double canonical_scale, double eps) {
  const char* who = "assign_levels";
  check_boxes(who, boxes, 4, boxes.device());
  const LevelRule rule = check_rule(who, num_levels, k_min, canonical_level, canonical_scale, eps);
  const Device device(boxes.device());
  const Tensor rows = as_kernel_boxes(boxes);
  Tensor levels = at::empty({boxes.size(0)}, boxes.options().dtype(at::kLong));
  const auto run = [&](auto params) {
    using box_t = typename decltype(params)::box_t;
    params = {rows.const_data_ptr<box_t>(), levels.mutable_data_ptr<int64_t>(), rule, rows.size(0)};
    device.assign_levels(params);
  };
  if (levels.numel() > 0) {
    rows.scalar_type() == at::kDouble ? run(AssignLevelsParams<double>{}) : run(AssignLevelsParams<float>{});
  }
  return levels;
}

// `x > value` in double precision is `x > this` for every x of the type.
template <typename box_t>
box_t largest_not_above(double value) {
  const box_t rounded = static_cast<box_t>(value);
  return rounded > value ? std::nextafter(rounded, -std::numeric_limits<box_t>::infinity()) : rounded;
}

// The order of the scores, best first, and along it whether suppression keeps the box.
template <typename Device>
std::tuple<Tensor, Tensor> nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
                               double iou_threshold) {
  const char* who = "nms";
  check_boxes(who, boxes, 4, boxes.device());
  check_per_box(who, "`scores`", scores, boxes);
  const Device device(boxes.device());
  const Tensor order = at::argsort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  Tensor rows = order, sorted_groups, by_group;
  if (groups.has_value()) {
    check_integers(who, "`groups`", *groups);
    check_per_box(who, "`groups`", *groups, boxes);
    const Tensor of_order = groups->to(at::kLong).index_select(0, order);
    std::tie(sorted_groups, by_group) = at::sort(of_order, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    rows = order.index_select(0, by_group);
  }
  const Tensor sorted_boxes = as_kernel_boxes(boxes).index_select(0, rows);
  const Tensor keep = at::empty({boxes.size(0)}, boxes.options().dtype(at::kBool));
  const Tensor progress = at::zeros({Device::nms_progress_size(boxes.size(0))}, order.options());
  const auto run = [&](auto type) {
    using box_t = decltype(type);
    device.nms(NmsParams<box_t>{sorted_boxes.const_data_ptr<box_t>(),
                                groups.has_value() ? sorted_groups.const_data_ptr<int64_t>() : nullptr, boxes.size(0),
                                largest_not_above<box_t>(iou_threshold), keep.mutable_data_ptr<bool>(),
                                static_cast<unsigned long long*>(progress.data_ptr())});
  };
  if (keep.numel() > 0) {
    sorted_boxes.scalar_type() == at::kDouble ? run(double()) : run(float());
  }
  return {order, groups.has_value() ? at::empty_like(keep).scatter_(0, by_group, keep) : keep};
}

template <typename Device>
void implement(torch::Library& library) {
#define ROIALIGN_IMPL(name) library.impl(#name, &name<Device>);
  ROIALIGN_FOR_EACH_KERNEL(ROIALIGN_IMPL)
#undef ROIALIGN_IMPL
  library.impl("assign_levels", &assign_levels<Device>);
  library.impl("nms", &nms<Device>);
}

#ifndef ROIALIGN_EXT_EMULATED

std::tuple<Tensor, Tensor> match(const Tensor& ground_truth, const Tensor& boxes) {
  const char* who = "match";
  check_boxes(who, ground_truth, 4, boxes.device());
  check_boxes(who, boxes, 4, boxes.device());
  TORCH_CHECK_VALUE(ground_truth.size(0) > 0, who, ": `ground_truth` must have at least one row, got none");
  const Tensor rows = as_kernel_boxes(boxes);
  const Tensor truth = ground_truth.to(rows.scalar_type()).contiguous();
  Tensor overlap = at::empty({rows.size(0)}, rows.options());
  Tensor best = at::empty({rows.size(0)}, rows.options().dtype(at::kLong));
  const auto run = [&](auto type) {
    using box_t = decltype(type);
    cpu::match<box_t>({truth.const_data_ptr<box_t>(), rows.const_data_ptr<box_t>(), truth.size(0), rows.size(0),
                       overlap.mutable_data_ptr<box_t>(), best.mutable_data_ptr<int64_t>()});
  };
  rows.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {overlap, best};
}

#endif

// Registration.

#ifdef ROIALIGN_EXT_EMULATED
#define ROIALIGN_NAMESPACE roialign_ext_emulated
#else
#define ROIALIGN_NAMESPACE roialign_ext
#endif
#define ROIALIGN_LIBRARY(name, library) TORCH_LIBRARY(name, library)
#define ROIALIGN_LIBRARY_IMPL(name, key, library) TORCH_LIBRARY_IMPL(name, key, library)

ROIALIGN_LIBRARY(ROIALIGN_NAMESPACE, library) {
// What every pooling operator is told last, and which maps a backward makes.
#define ROIALIGN_POOLING \
  "float[] spatial_scales, int sampling_ratio, bool aligned, int canonical_level, float canonical_scale"
#define ROIALIGN_MAPS "SymInt num_images, SymInt[] map_sizes"
  const auto define = [&library](const char* schema) { library.def(schema, {at::Tag::pt2_compliant_tag}); };
  define("roi_align_forward(Tensor[] features, Tensor boxes, Tensor? levels, SymInt[2] output_size, " ROIALIGN_POOLING
         ") -> Tensor");
  define("roi_align_backward(Tensor grad_output, Tensor boxes, Tensor? levels, " ROIALIGN_MAPS ", " ROIALIGN_POOLING
         ", bool channels_last) -> Tensor[]");
  define(
      "roi_align_backward_boxes(Tensor grad_output, Tensor[] features, Tensor boxes, Tensor? levels, " ROIALIGN_POOLING
      ") -> Tensor");
  define(
      "roi_align_tangent(Tensor[] features, Tensor boxes, Tensor box_tangents, Tensor? levels, "
      "SymInt[2] output_size, " ROIALIGN_POOLING ") -> Tensor");
  define("roi_max_forward(Tensor[] features, Tensor boxes, Tensor? levels, SymInt[2] output_size, " ROIALIGN_POOLING
         ") -> (Tensor, Tensor)");
  define("roi_max_backward(Tensor grad_output, Tensor argmax, Tensor boxes, Tensor? levels, " ROIALIGN_MAPS
         ", " ROIALIGN_POOLING ", bool channels_last) -> Tensor[]");
  define(
      "roi_max_backward_boxes(Tensor grad_output, Tensor argmax, Tensor[] features, Tensor boxes, Tensor? "
      "levels, " ROIALIGN_POOLING ") -> Tensor");
  define("roi_max_gather(Tensor[] features, Tensor argmax, Tensor boxes, Tensor? levels, " ROIALIGN_POOLING
         ") -> Tensor");
  define(
      "assign_levels(Tensor boxes, int num_levels, int k_min, int canonical_level, float canonical_scale, "
      "float eps) -> Tensor");
  define("nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> (Tensor, Tensor)");
#undef ROIALIGN_POOLING
#undef ROIALIGN_MAPS
#ifndef ROIALIGN_EXT_EMULATED
  library.def("match(Tensor ground_truth, Tensor boxes) -> (Tensor, Tensor)");
#endif
}

// The derivatives are Python's (autograd.py). Whoever wants one of a bare operator gets an error, not zeros.
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, Autograd, library) {
#define ROIALIGN_REFUSE(name) library.impl(#name, torch::autograd::autogradNotImplementedFallback());
  ROIALIGN_FOR_EACH_KERNEL(ROIALIGN_REFUSE)
#undef ROIALIGN_REFUSE
}

#ifdef ROIALIGN_EXT_EMULATED
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, CPU, library) { implement<Cuda>(library); }
#else
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, CPU, library) {
  implement<Cpu>(library);
  library.impl("match", &match);
}
#endif
#ifdef ROIALIGN_EXT_WITH_CUDA
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, CUDA, library) { implement<Cuda>(library); }
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = ROIALIGN_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
#ifdef ROIALIGN_EXT_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  const std::string archs = ROIALIGN_EXT_CUDA_ARCHS;
#else
  info["cuda"] = pybind11::none();
  const std::string archs;
#endif
  pybind11::list arch_list;
  for (size_t begin = 0; begin < archs.size();) {
    const size_t end = std::min(archs.find(';', begin), archs.size());
    arch_list.append(archs.substr(begin, end - begin));
    begin = end + 1;
  }
  info["cuda_archs"] = arch_list;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
#ifdef ROIALIGN_EXT_EMULATED
  info["cpu_capability"] = pybind11::none();
#else
  info["cpu_capability"] = cpu::capability();
#endif
  return info;
}

int64_t launch_count() {
#if defined(ROIALIGN_EXT_WITH_CUDA) || defined(ROIALIGN_EXT_EMULATED)
  return cuda::launch_count;
#else
  return 0;
#endif
}

#ifndef ROIALIGN_EXT_EMULATED
// Python has no public way to ask.
bool has_forward_derivatives() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         has_forward_derivatives();
}
#endif

}  // namespace
}  // namespace roialign

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &roialign::build_info, "What was compiled: versions, architectures, compiler.");
#ifndef ROIALIGN_EXT_EMULATED
  module.def("is_transformed", &roialign::is_transformed,
             "Whether torch.func or forward-mode derivatives are at work.");
  module.def("has_forward_derivatives", &roialign::has_forward_derivatives,
             "Whether forward-mode derivatives are, of torch.func or not.");
  module.def("set_cpu_capability", &roialign::cpu::set_capability,
             "Runs the CPU kernels with an instruction set by name; false if machine or build lack it.");
  module.def("release_memory", &roialign::OutputMemory::release,
             "Frees the output memory that is kept for the next call; returns its bytes.");
#endif
  module.def("launch_count", &roialign::launch_count, "CUDA kernels started so far.");
}
