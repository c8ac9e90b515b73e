// The operators as torch sees them: schemas, allocation, filling the params, dtype switch, registration. With
// checks.h the only file that knows torch. roialign_ext/ops.py gives the operators their gradients and fake kernels.
#if defined(ROIALIGN_EXT_WITH_CUDA) || defined(ROIALIGN_EXT_EMULATED)
#include "cuda/launch.h"
#endif
#ifndef ROIALIGN_EXT_EMULATED
#include "cpu/kernels.h"
#include "cpu/match.h"
#include "cpu/nms.h"
#endif
#include "checks.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef ROIALIGN_EXT_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace roialign {
namespace {

constexpr double kLevelEps = 1e-6;              // torchvision's
constexpr int64_t kMaxSamplingRatio = 1 << 24;  // sample indices stay exact in float32

// Layout: read off the strides once.

// A channel stride of 1 under a longer column stride. Where one channel or one cell makes the two layouts the same,
// the map counts as NCHW.
bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && map.stride(3) > 1; }

at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The map itself where the kernels can read it: neighbouring channels (channels_last) or neighbouring columns (NCHW)
// lie next to each other, other strides are free. Else a copy.
Tensor in_layout(const Tensor& map, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  if (map.stride(dim) == 1 || map.size(dim) == 1) {
    return map;
  }
  return map.contiguous(memory_format(channels_last));
}

// Asks for huge pages under large fresh tensors. PyTorch's CPU allocator gives memory back to the system when a tensor
// is freed, so every call would fault in its output 4 KiB at a time: half the time of the forward.
void prefer_huge_pages(const Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  if (tensor.is_cpu() && first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish; refusal changes nothing
  }
#endif
}

Tensor empty_in_layout(at::IntArrayRef sizes, const at::TensorOptions& options, bool channels_last) {
  Tensor tensor = at::empty(sizes, options.memory_format(memory_format(channels_last)));
  prefer_huge_pages(tensor);
  return tensor;
}

// Devices: how each runs a kernel, once its tensors are checked and made.

#if defined(ROIALIGN_EXT_WITH_CUDA) || defined(ROIALIGN_EXT_EMULATED)

// The device of the tensors for as long as this lives, and its current stream.
class Cuda {
 public:
  static constexpr bool kChecksRows = false;
  explicit Cuda(at::Device device) : guard_(device) {}

  template <typename Params>
  void forward(const Params& params) const {
    check(cuda::roi_align_forward(params, stream()));
  }
  template <typename Params>
  void backward(const Params& params) const {
    check(cuda::roi_align_backward(params, stream()));
  }
  template <typename Params>
  void assign_levels(const Params& params) const {
    check(cuda::assign_levels(params, stream()));
  }

 private:
#ifdef ROIALIGN_EXT_EMULATED
  using Guard = at::Device;  // the kernels run on CPU tensors, for the tests
  static cudaStream_t stream() { return nullptr; }
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

  template <typename Params>
  void forward(const Params& params) const {
    cpu::roi_align_forward(params, parallel_for);
  }
  template <typename Params>
  void backward(const Params& params) const {
    cpu::roi_align_backward(params, parallel_for);
  }
  template <typename Params>
  void assign_levels(const Params& params) const {
    cpu::assign_levels(params);
  }
};

#endif

// Calls: what both directions check and tell the kernels.

// Half boxes are read as float32; boxes and levels are small, so a copy of either costs nothing that shows.
Tensor as_kernel_boxes(const Tensor& boxes) {
  return (boxes.scalar_type() == at::kDouble ? boxes : boxes.to(at::kFloat)).contiguous();
}

// One call of the forward or the backward, checked but for the tensors that differ between the two.
struct Call {
  Pooling pooling;
  at::ArrayRef<double> spatial_scales;  // [L, 2]: y, x
  Tensor boxes;                         // [K, 5] as the kernels read them
  std::optional<Tensor> levels;         // [K] int64

  Call(const char* who, const Tensor& boxes_, const std::optional<Tensor>& levels_, at::IntArrayRef map_sizes,
       int64_t num_images, int64_t num_channels, at::IntArrayRef output_size, at::ArrayRef<double> spatial_scales_,
       int64_t sampling_ratio, bool aligned, int64_t canonical_level, double canonical_scale, bool channels_last)
      : spatial_scales(spatial_scales_), boxes(as_kernel_boxes(boxes_)) {
    const int64_t num_levels = static_cast<int64_t>(map_sizes.size()) / 2;
    check_levels(who, levels_, boxes);
    check_maps(who, map_sizes, boxes.size(0));
    check_scales(who, spatial_scales, num_levels);
    const int k_min = num_levels == 1 || levels_.has_value() ? 0 : check_rule_fits(who, spatial_scales);
    pooling = {check_rule(who, num_levels, k_min, canonical_level, canonical_scale, kLevelEps),
               check_int(who, "rows of `boxes`", boxes.size(0), 0, kMaxInt),
               check_int(who, "images", num_images, 0, kMaxInt),
               check_int(who, "channels", num_channels, 0, kMaxInt),
               check_int(who, "`output_size`", output_size[0], 1, kMaxInt),
               check_int(who, "`output_size`", output_size[1], 1, kMaxInt),
               check_int(who, "`sampling_ratio`", std::max<int64_t>(sampling_ratio, 0), 0, kMaxSamplingRatio),
               aligned,
               channels_last};
    check_int(who, "the product of `output_size`", int64_t(pooling.bins_y) * pooling.bins_x, 1, kMaxInt);
    if (levels_.has_value()) {
      levels = levels_->to(at::kLong).contiguous();
    }
  }

  // Calls run(params), once; the forward reads `maps` and writes `pooled`, the backward the other way round.
  template <typename Run>
  void with_params(const std::vector<Tensor>& maps, const Tensor& pooled, const Run& run) const {
#define ROIALIGN_CASE(scalar_t, box_t)                                     \
  if (pooled.scalar_type() == c10::CppTypeToScalarType<scalar_t>::value && \
      boxes.scalar_type() == c10::CppTypeToScalarType<box_t>::value) {     \
    return run(params<scalar_t, box_t>(maps, pooled));                     \
  }
    ROIALIGN_FOR_EACH_TYPE(ROIALIGN_CASE)
#undef ROIALIGN_CASE
    TORCH_INTERNAL_ASSERT(false, "dtypes are checked before params are made");
  }

 private:
  template <typename scalar_t, typename box_t>
  RoIAlignParams<scalar_t, box_t> params(const std::vector<Tensor>& maps, const Tensor& pooled) const {
    RoIAlignParams<scalar_t, box_t> params{pooling};
    for (size_t l = 0; l < maps.size(); ++l) {
      const Tensor& map = maps[l];
      params.levels[l] = {static_cast<scalar_t*>(map.data_ptr()),
                          map.stride(0),
                          map.stride(1),
                          map.stride(2),
                          map.stride(3),
                          static_cast<int>(map.size(2)),
                          static_cast<int>(map.size(3)),
                          spatial_scales[2 * l],
                          spatial_scales[2 * l + 1]};
    }
    params.boxes = boxes.const_data_ptr<box_t>();
    params.roi_levels = levels.has_value() ? levels->const_data_ptr<int64_t>() : nullptr;
    params.pooled = static_cast<scalar_t*>(pooled.data_ptr());
    return params;
  }
};

template <typename Device>
void check_rows_of(const char* who, const Call& call) {
  if constexpr (Device::kChecksRows) {
    const auto check = call.boxes.scalar_type() == at::kDouble ? check_rows<double> : check_rows<float>;
    check(who, call.boxes, call.levels, call.pooling.num_images, call.pooling.rule.num_levels);
  }
}

// The operators.

template <typename Device>
Tensor roi_align_forward(TensorList features, const Tensor& boxes, const std::optional<Tensor>& levels,
                         at::IntArrayRef output_size, at::ArrayRef<double> spatial_scales, int64_t sampling_ratio,
                         bool aligned, int64_t canonical_level, double canonical_scale) {
  const char* who = name_of_call(static_cast<int64_t>(features.size()));
  check_features(who, features);
  check_boxes(who, boxes, 5, features[0].device());
  const Device device(boxes.device());
  const bool channels_last = is_channels_last(features[0]);
  std::vector<int64_t> map_sizes;
  for (const Tensor& map : features) {
    map_sizes.insert(map_sizes.end(), {map.size(2), map.size(3)});
  }
  const Call call(who, boxes, levels, map_sizes, features[0].size(0), features[0].size(1), output_size, spatial_scales,
                  sampling_ratio, aligned, canonical_level, canonical_scale, channels_last);
  check_rows_of<Device>(who, call);

  Tensor output = empty_in_layout({boxes.size(0), features[0].size(1), output_size[0], output_size[1]},
                                  features[0].options(), channels_last);
  if (output.numel() > 0) {
    std::vector<Tensor> maps;
    for (const Tensor& map : features) {
      maps.push_back(in_layout(map, channels_last));
    }
    call.with_params(maps, output, [&](const auto& params) { device.forward(params); });
  }
  return output;
}

template <typename Device>
std::vector<Tensor> roi_align_backward(const Tensor& grad_output, const Tensor& boxes,
                                       const std::optional<Tensor>& levels, int64_t num_images,
                                       at::IntArrayRef map_sizes, at::ArrayRef<double> spatial_scales,
                                       int64_t sampling_ratio, bool aligned, int64_t canonical_level,
                                       double canonical_scale, bool channels_last) {
  const int64_t num_levels = static_cast<int64_t>(map_sizes.size()) / 2;
  const char* who = name_of_call(num_levels);
  TORCH_CHECK_VALUE(map_sizes.size() % 2 == 0, who, ": `map_sizes` must hold a height and a width for each level, got ",
                    map_sizes.size(), " numbers");
  check_int(who, "levels of `map_sizes`", num_levels, 1, kMaxLevels);
  check_float(who, "`grad_output`", grad_output);
  check_boxes(who, boxes, 5, grad_output.device());
  TORCH_CHECK_VALUE(grad_output.dim() == 4 && grad_output.size(0) == boxes.size(0), who,
                    ": `grad_output` must have shape (", boxes.size(0), ", C, P, Q), got ", name_of_shape(grad_output));
  const Device device(boxes.device());
  const Call call(who, boxes, levels, map_sizes, num_images, grad_output.size(1), grad_output.sizes().slice(2),
                  spatial_scales, sampling_ratio, aligned, canonical_level, canonical_scale, channels_last);
  check_rows_of<Device>(who, call);

  std::vector<Tensor> grad_features;
  int64_t num_cells = 0;
  for (int64_t l = 0; l < num_levels; ++l) {
    grad_features.push_back(empty_in_layout({num_images, grad_output.size(1), map_sizes[2 * l], map_sizes[2 * l + 1]},
                                            grad_output.options(), channels_last));
    num_cells += grad_features.back().numel();
  }
  if (boxes.size(0) == 0) {
    for (Tensor& grad : grad_features) {
      grad.zero_();
    }
  } else if (num_cells > 0) {
    const Tensor pooled = grad_output.contiguous(memory_format(channels_last));
    call.with_params(grad_features, pooled, [&](const auto& params) { device.backward(params); });
  }
  return grad_features;
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

template <typename Device>
void implement(torch::Library& library) {
  library.impl("roi_align_forward", &roi_align_forward<Device>);
  library.impl("roi_align_backward", &roi_align_backward<Device>);
  library.impl("assign_levels", &assign_levels<Device>);
}

#ifndef ROIALIGN_EXT_EMULATED

// Suppression on a CPU; elsewhere roialign_ext/detection/boxes.py does it in PyTorch.
template <typename box_t>
void keep_best(const Tensor& boxes, const Tensor& order, const std::optional<Tensor>& groups, double iou_threshold,
               const Tensor& keep) {
  cpu::nms<box_t>({boxes.const_data_ptr<box_t>(), order.const_data_ptr<int64_t>(),
                   groups.has_value() ? groups->const_data_ptr<int64_t>() : nullptr, boxes.size(0), iou_threshold,
                   keep.data_ptr<bool>()});
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double iou_threshold) {
  const char* who = "nms";
  check_boxes(who, boxes, 4, boxes.device());
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == boxes.size(0), who, ": `scores` must have shape (",
                    boxes.size(0), ",), one per box, got ", name_of_shape(scores));
  std::optional<Tensor> group_rows;
  if (groups.has_value()) {
    TORCH_CHECK_TYPE(at::isIntegralType(groups->scalar_type(), /*includeBool=*/false), who,
                     ": `groups` must be integers, got ", name_of_dtype(*groups));
    TORCH_CHECK_VALUE(groups->dim() == 1 && groups->size(0) == boxes.size(0), who, ": `groups` must have shape (",
                      boxes.size(0), ",), one per box, got ", name_of_shape(*groups));
    group_rows = groups->to(at::kLong).contiguous();
  }
  const Tensor rows = as_kernel_boxes(boxes);
  const Tensor order = at::argsort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const Tensor keep = at::empty({boxes.size(0)}, boxes.options().dtype(at::kBool));
  (rows.scalar_type() == at::kDouble ? keep_best<double> : keep_best<float>)(rows, order, group_rows, iou_threshold,
                                                                             keep);
  return order.masked_select(keep);
}

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
  library.def(
      "roi_align_forward(Tensor[] features, Tensor boxes, Tensor? levels, SymInt[2] output_size, "
      "float[] spatial_scales, int sampling_ratio, bool aligned, int canonical_level, float canonical_scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "roi_align_backward(Tensor grad_output, Tensor boxes, Tensor? levels, SymInt num_images, SymInt[] map_sizes, "
      "float[] spatial_scales, int sampling_ratio, bool aligned, int canonical_level, float canonical_scale, "
      "bool channels_last) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "assign_levels(Tensor boxes, int num_levels, int k_min, int canonical_level, float canonical_scale, float eps) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
#ifndef ROIALIGN_EXT_EMULATED
  library.def("match(Tensor ground_truth, Tensor boxes) -> (Tensor, Tensor)");
  library.def("nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> Tensor");
#endif
}

#ifdef ROIALIGN_EXT_EMULATED
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, CPU, library) { implement<Cuda>(library); }
#else
ROIALIGN_LIBRARY_IMPL(ROIALIGN_NAMESPACE, CPU, library) {
  implement<Cpu>(library);
  library.impl("match", &match);
  library.impl("nms", &nms);
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

}  // namespace
}  // namespace roialign

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &roialign::build_info, "What was compiled: versions, architectures, compiler.");
#ifndef ROIALIGN_EXT_EMULATED
  module.def("set_cpu_capability", &roialign::cpu::set_capability,
             "Runs the CPU kernels with an instruction set by name; false if machine or build lack it.");
#endif
  module.def("launch_count", &roialign::launch_count, "CUDA kernels started so far.");
}
