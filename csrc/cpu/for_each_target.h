// Includes ROIALIGN_KERNELS once for every instruction set that the compiler can build for this machine's family,
// each time in a namespace of its own that knows its vectors: one binary, chosen from at run time. Only what stands in
// that file is compiled for the instruction set, so no inline function of a shared header can end up with
// instructions that a lesser machine lacks.
//
// No include guard: every direction includes it for its own kernels, after all their headers.

#include "dispatch.h"

#ifdef ROIALIGN_HAS_TARGETS

// Vectors of a wider instruction set never cross a function that is not inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
namespace roialign::cpu::avx512 {
constexpr int kVectorBytes = 64;
constexpr bool kHasShuffle = true;
namespace {
#include "vectors.h"
#include ROIALIGN_KERNELS
}  // namespace
}  // namespace roialign::cpu::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#pragma GCC target("avx2,fma,f16c")
namespace roialign::cpu::avx2 {
constexpr int kVectorBytes = 32;
constexpr bool kHasShuffle = true;
namespace {
#include "vectors.h"
#include ROIALIGN_KERNELS
}  // namespace
}  // namespace roialign::cpu::avx2
#pragma GCC pop_options

#pragma GCC diagnostic pop
#endif

namespace roialign::cpu::baseline {
constexpr int kVectorBytes = 16;
constexpr bool kHasShuffle = false;
namespace {
#include "vectors.h"
#include ROIALIGN_KERNELS
}  // namespace
}  // namespace roialign::cpu::baseline
