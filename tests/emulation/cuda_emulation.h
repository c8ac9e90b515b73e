// CUDA's execution model for g++: the part of it that the kernels in csrc/cuda use. Knows nothing of RoIs or torch.
//
// Every CUDA thread is a fiber, a call stack of its own. It runs alone until it reaches a barrier or a warp
// collective, so what one thread writes to shared memory reaches another only in an order that this file
// chooses, and it chooses badly on purpose:
//
//   launch → blocks one after another, from a random one on, in random strides; shared memory is NaN at the start
//     block → between two __syncthreads the warps one after another, in random order, each as far as it gets
//       warp → between two collectives the lanes one after another, in random order
//
// A missing barrier therefore shows up as a wrong value, at the latest under another seed
// (ROIALIGN_EXT_EMULATION_SEED). A barrier or collective that not all of its threads reach, which hangs a GPU or
// worse, throws std::runtime_error with the kernel's name and the source lines where its threads stand.
//
// What it can't show: time, fused multiply-adds, a GPU's weak memory order, code under #ifdef __CUDA_ARCH__.
#pragma once

#include "machine.h"

// Aligned like CUDA's, so that UndefinedBehaviorSanitizer reports a vector access that a GPU would trap on.
#define EMULATION_VECTORS(T, prefix)                                              \
  struct alignas(2 * sizeof(T)) prefix##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) prefix##4 { T x, y, z, w; }; \
  inline prefix##2 make_##prefix##2(T x, T y) { return {x, y}; }                  \
  inline prefix##4 make_##prefix##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float)
EMULATION_VECTORS(double, double)
EMULATION_VECTORS(int, int)
EMULATION_VECTORS(unsigned, uint)
EMULATION_VECTORS(short, short)
EMULATION_VECTORS(unsigned short, ushort)
#undef EMULATION_VECTORS

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}

// Keywords.

#define __global__
#define __device__
#define __host__
#define __constant__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// Thread-local stands for block-local: it needs no `static`, and the symbol table tells these variables from all
// others, which is how the emulator finds and poisons them.
#define __shared__ thread_local

namespace emulation {

// Stands for a CUDA graph: while one is captured, launches do not run; a replay runs them with the params they had.
struct Graph {
  bool is_capturing = false;
  std::vector<std::function<void()>> launches;
};
inline Graph graph;

// The stream that a caller has chosen. Streams run nothing here; a launch on another is an error.
inline cudaStream_t current_stream = nullptr;

// Stands for kernel<<<grid, block, shared_bytes, stream>>>(params).
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, cudaStream_t stream, const Params& params,
                   size_t shared_bytes = 0) {
  static_assert(sizeof(Params) <= 4096, "kernel arguments share 4 KiB");
  auto product = [](dim3 d) { return uint64_t{d.x} * d.y * d.z; };
  if (!product(grid) || !product(block) || product(block) > kMaxThreads || block.z > 64 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > 227 << 10 || stream != current_stream) return cudaErrorInvalidValue;

  const auto run = [=] {
    Machine& m = machine;
    m.kernel = reinterpret_cast<const void*>(kernel);
    m.params = &params;
    m.call = [](const void* kernel, const void* params) {
      reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
    };
    run_grid(grid, block, shared_bytes);
  };
  if (graph.is_capturing) {
    graph.launches.push_back(run);
  } else {
    run();
  }
  return cudaSuccess;
}

// Stands for `extern __shared__ T name[]`, which has no counterpart in C++.
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine.dynamic_shared.get());
}

// What a kernel calls.

inline int barrier(Site site, int value) {
  machine.current->value = value != 0;
  wait(State::kAtBarrier, site);
  return machine.barrier_count;
}

// Brings a value to the lanes of the mask; returns the values of all lanes of the warp.
template <typename T>
const uint64_t* exchange(unsigned mask, T value, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp collective moves at most 8 bytes");
  Thread& self = *machine.current;
  int thread = static_cast<int>(&self - machine.threads), lane = thread % kWarpSize;
  self.value = 0;
  std::memcpy(&self.value, &value, sizeof(T));
  self.mask = mask;
  if (!(mask >> lane & 1)) {
    machine.failure = "lane " + std::to_string(lane) + " calls " + site.call + " at " + site.file + ":" +
                      std::to_string(site.line) + " with a mask that does not name it";
  }
  wait(State::kAtCollective, site);
  return machine.collected + thread - lane;
}

inline int lane_id() { return static_cast<int>(machine.current - machine.threads) % kWarpSize; }

// The value of the source lane; of a lane outside the mask, which is undefined in CUDA, all bits set.
template <typename T>
T shuffled(unsigned mask, T value, int source, Site site) {
  uint64_t bits = exchange(mask, value, site)[source];
  if (!(mask >> source & 1)) bits = ~uint64_t{0};
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lanes of the mask for which the predicate on their value holds.
template <typename T, typename Predicate>
unsigned vote(unsigned mask, T value, Site site, Predicate predicate) {
  const uint64_t* values = exchange(mask, value, site);
  unsigned lanes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if ((mask >> lane & 1) && predicate(values[lane])) lanes |= 1u << lane;
  return lanes;
}

}  // namespace emulation

// For Python, which has the library and none of its headers.
extern "C" __attribute__((used, visibility("default"))) inline void emulation_work(uint64_t* out) {
  std::memcpy(out, &emulation::machine.work, sizeof(emulation::Work));
}
extern "C" __attribute__((used, visibility("default"))) inline void emulation_set_stream(uintptr_t stream) {
  emulation::current_stream = reinterpret_cast<cudaStream_t>(stream);
}
extern "C" __attribute__((used, visibility("default"))) inline void emulation_begin_capture() {
  emulation::graph = {true, {}};
}
extern "C" __attribute__((used, visibility("default"))) inline void emulation_end_capture() {
  emulation::graph.is_capturing = false;
}
extern "C" __attribute__((used, visibility("default"))) inline void emulation_replay() {
  for (const auto& launch : emulation::graph.launches) launch();
}

#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)
constexpr int warpSize = emulation::kWarpSize;

// Every call carries the line it was written on, as default arguments evaluated at the call.
#define EMULATION_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATION_SITE(call) (emulation::Site{call, file, line})

inline void __syncthreads(EMULATION_AT) { emulation::barrier(EMULATION_SITE("__syncthreads"), 0); }
inline int __syncthreads_count(int value, EMULATION_AT) {
  return emulation::barrier(EMULATION_SITE("__syncthreads_count"), value);
}
inline int __syncthreads_or(int value, EMULATION_AT) {
  return emulation::barrier(EMULATION_SITE("__syncthreads_or"), value) != 0;
}
inline int __syncthreads_and(int value, EMULATION_AT) {
  return emulation::barrier(EMULATION_SITE("__syncthreads_and"), value) == emulation::machine.num_threads;
}

inline void __syncwarp(unsigned mask = ~0u, EMULATION_AT) {
  emulation::exchange(mask, 0, EMULATION_SITE("__syncwarp"));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATION_AT) {
  int segment = emulation::lane_id() & -width;
  return emulation::shuffled(mask, value, segment | (source & (width - 1)), EMULATION_SITE("__shfl_sync"));
}
// A source outside the segment of `width` lanes is the lane itself.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_AT) {
  int lane = emulation::lane_id(), source = lane - static_cast<int>(delta);
  return emulation::shuffled(mask, value, source < (lane & -width) ? lane : source, EMULATION_SITE("__shfl_up_sync"));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_AT) {
  int lane = emulation::lane_id(), source = lane + static_cast<int>(delta);
  return emulation::shuffled(mask, value, source >= (lane & -width) + width ? lane : source,
                             EMULATION_SITE("__shfl_down_sync"));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, EMULATION_AT) {
  int lane = emulation::lane_id(), source = lane ^ bits;
  return emulation::shuffled(mask, value, source >= (lane & -width) + width ? lane : source,
                             EMULATION_SITE("__shfl_xor_sync"));
}
inline unsigned __ballot_sync(unsigned mask, int value, EMULATION_AT) {
  return emulation::vote(mask, value, EMULATION_SITE("__ballot_sync"), [](uint64_t other) { return other != 0; });
}
inline int __any_sync(unsigned mask, int value, EMULATION_AT) {
  return emulation::vote(mask, value, EMULATION_SITE("__any_sync"), [](uint64_t other) { return other != 0; }) != 0;
}
inline int __all_sync(unsigned mask, int value, EMULATION_AT) {
  return emulation::vote(mask, value, EMULATION_SITE("__all_sync"), [](uint64_t other) { return other != 0; }) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_AT) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return emulation::vote(mask, value, EMULATION_SITE("__match_any_sync"),
                         [bits](uint64_t other) { return other == bits; });
}
#undef EMULATION_AT
#undef EMULATION_SITE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

template <typename T>
T __ldg(const T* address) {
  ++emulation::machine.current->loads;
  emulation::machine.work.loaded_bytes += sizeof(T);
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// CUDA's min and max of floats ignore a NaN, unlike std::min and std::max.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
#define EMULATION_MIN_MAX(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX

// No thread runs between these two steps.
#define EMULATION_ATOMIC(name, result) \
  template <typename T>                \
  T name(T* address, T value) {        \
    T old = *address;                  \
    *address = result;                 \
    return old;                        \
  }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicMin, min(old, value))
EMULATION_ATOMIC(atomicMax, max(old, value))
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicAnd, old& value)
EMULATION_ATOMIC(atomicExch, value)
#undef EMULATION_ATOMIC
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  T old = *address;
  if (old == expected) *address = value;
  return old;
}
// A thread that waits for one of an earlier block never has to: that one has finished.
inline void __nanosleep(unsigned) {}
inline void __threadfence() {}
inline void __threadfence_block() {}
