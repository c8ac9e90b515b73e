// Which instruction sets the compiler can build, and which one the CPU kernels run with. Knows the machine.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define ROIALIGN_HAS_TARGETS
#endif

namespace roialign::cpu {

enum Target { kBaseline, kAvx2, kAvx512 };
constexpr const char* kTargetNames[] = {"baseline", "avx2", "avx512"};

inline Target best_target() {
#ifdef ROIALIGN_HAS_TARGETS
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return has_avx2 ? has_avx512 ? kAvx512 : kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

// The target of a name, or the best where the name says nothing this machine can do.
inline Target target_of(const char* name) {
  for (int target = kBaseline; name != nullptr && target <= best_target(); ++target) {
    if (std::strcmp(name, kTargetNames[target]) == 0) {
      return static_cast<Target>(target);
    }
  }
  return best_target();
}

inline std::atomic<Target> current_target{target_of(std::getenv("ROIALIGN_EXT_CPU_CAPABILITY"))};

// Calls the kernel of the current target: ROIALIGN_DISPATCH(function(arguments)).
#ifdef ROIALIGN_HAS_TARGETS
#define ROIALIGN_DISPATCH(call)                                              \
  switch (::roialign::cpu::current_target.load(std::memory_order_relaxed)) { \
    case ::roialign::cpu::kAvx512:                                           \
      avx512::call;                                                          \
      break;                                                                 \
    case ::roialign::cpu::kAvx2:                                             \
      avx2::call;                                                            \
      break;                                                                 \
    case ::roialign::cpu::kBaseline:                                         \
      baseline::call;                                                        \
  }
#else
#define ROIALIGN_DISPATCH(call) baseline::call
#endif

}  // namespace roialign::cpu
