// Runs the blocks, warps and threads of a kernel on one CPU thread: fibers, shared memory, the scheduler and what it
// refuses. cuda_emulation.h says what for and gives all this CUDA's names.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_SWAP_STACKS
#else
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// The odd number of cache lines keeps the hot ends of neighbouring stacks out of the same cache set.
constexpr size_t kStackStride = kStackBytes + 5 * 64;

// Fibers.

struct Fiber {
#ifdef EMULATION_SWAP_STACKS
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;  // Its lowest address; for the scheduler's own, filled in by AddressSanitizer.
  size_t stack_bytes = 0;
};

#ifdef EMULATION_SWAP_STACKS
// Pushes the registers that a call preserves, swaps stacks, pops. swapcontext does it with two system calls: 64 blocks
// of 256 threads with eight barriers take 54 ms by swapcontext and 5 ms by this, on one AVX-512 server core.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}
#endif

inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef EMULATION_SWAP_STACKS
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void start_fiber(Fiber& fiber, void* stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
#ifdef EMULATION_SWAP_STACKS
  // What swap_stacks pops, from low to high: six registers, the entry as return address, and eight bytes that put
  // the entry's frame where a call would have put it.
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15});
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  std::fill(top - 8, top - 2, nullptr);
  fiber.stack_pointer = top - 8;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// Threads and the machine that runs them.

// A call in a kernel at which a thread waits for others.
struct Site {
  const char* call;
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && call == other.call; }
};

enum class State { kRunnable, kAtCollective, kAtBarrier, kExited };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state = State::kExited;
  Site site{};
  unsigned mask = 0;   // At a collective: the lanes it waits for.
  uint64_t value = 0;  // What it brought to the collective or barrier.
  uint64_t loads = 0;  // By __ldg, in this block.
  bool started = false;
};

// A thread-local variable inside a function of the kernels' namespace, that is, a __shared__ one.
constexpr const char* kKernelNamespace = "8roialign4cuda";  // mangled
struct SharedVariable {
  size_t offset, bytes;
};

inline thread_local char tls_anchor;  // A thread-local variable of known offset, from which the others are found.

// Work since the library was loaded. A warp loads as often as its busiest lane does; the other lanes idle meanwhile.
struct Work {
  uint64_t lane_loads, warp_loads, loaded_bytes, barriers, blocks;
};

struct Machine {
  Work work{};
  dim3 grid, block;
  uint3 block_index;
  Thread threads[kMaxThreads];
  int num_threads = 0;
  Thread* current = nullptr;
  Fiber scheduler;
  uint64_t collected[kMaxThreads];  // The values of the last collective of each lane.
  int barrier_count = 0;            // How many threads brought a non-zero value to the last barrier.
  std::string failure;              // Set by a thread that can't go on.

  const void* kernel = nullptr;
  const void* params = nullptr;
  void (*call)(const void* kernel, const void* params) = nullptr;

  char* stacks = nullptr;
  std::unique_ptr<char[]> dynamic_shared;
  std::vector<SharedVariable> shared_variables;
  std::unordered_map<const void*, std::vector<SharedVariable>> used_by;  // by the kernels that ran so far
  std::unordered_map<const void*, std::string> kernel_names;             // mangled
  size_t anchor_offset = 0;
  uint64_t random_state = 0;
  std::string seed;
};

inline Machine machine;

[[noreturn]] inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &machine.scheduler.stack_bytes);
  machine.scheduler.stack = const_cast<void*>(stack);
#endif
  for (;;) {
    Thread& self = *machine.current;
    machine.call(machine.kernel, machine.params);
    self.state = State::kExited;
    switch_fiber(self.fiber, machine.scheduler);
  }
}

inline void wait(State state, Site site) {
  Thread& self = *machine.current;
  self.state = state;
  self.site = site;
  switch_fiber(self.fiber, machine.scheduler);
}

// Symbols: kernel names and shared variables.

// Reads the symbol table of the library that holds this code; kernels may have internal linkage.
inline void read_symbols(Machine& m) {
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&machine), &library);
  std::ifstream file(library.dli_fname, std::ios::binary);
  std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
  auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    auto* symbols = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
    const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
      const char* name = names + symbols[s].st_name;
      int type = ELF64_ST_TYPE(symbols[s].st_info);
      if (type == STT_FUNC && symbols[s].st_shndx != SHN_UNDEF)
        m.kernel_names.emplace(static_cast<char*>(library.dli_fbase) + symbols[s].st_value, name);
      else if (type == STT_TLS && std::strstr(name, "tls_anchor"))
        m.anchor_offset = symbols[s].st_value;
      else if (type == STT_TLS && std::strstr(name, kKernelNamespace))
        m.shared_variables.push_back({symbols[s].st_value, symbols[s].st_size});
    }
  }
}

inline std::string kernel_name() {
  std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(machine.kernel_names[machine.kernel].c_str(), nullptr, nullptr, nullptr), std::free);
  return name ? name.get() : "a kernel without a symbol";
}

inline char* address_of(const SharedVariable& variable) {
  return &tls_anchor - machine.anchor_offset + variable.offset;
}

// All bits set is a NaN in every floating-point type, and -1.
inline void poison(const std::vector<SharedVariable>& variables) {
  for (const SharedVariable& variable : variables) std::memset(address_of(variable), 0xff, variable.bytes);
}

inline bool is_poisoned(const SharedVariable& variable) {
  const char* bytes = address_of(variable);
  return bytes[0] == char(0xff) && !std::memcmp(bytes, bytes + 1, variable.bytes - 1);
}

// The scheduler.

inline unsigned random_below(unsigned n) {  // xorshift64*
  uint64_t& s = machine.random_state;
  s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
  return static_cast<unsigned>(((s * 0x2545f4914f6cdd1dull >> 32) * n) >> 32);
}

inline void shuffle(unsigned char* order, int n) {
  for (int i = 0; i < n; ++i) {
    int j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
}

[[noreturn]] inline void fail(const std::string& what) {
  // The fibers are abandoned where they stand; the next launch starts fresh ones.
  for (Thread& thread : machine.threads) thread.started = false;
  std::ostringstream message;
  message << kernel_name() << ", block (" << machine.block_index.x << ", " << machine.block_index.y << ", "
          << machine.block_index.z << "): " << what;
  throw std::runtime_error(message.str());
}

// Where threads stand, a line for each place: "threads 0-31 33: __syncthreads at forward.cu:80".
inline std::string whereabouts(int begin, int end) {
  auto place = [](const Thread& thread) {
    std::ostringstream text;
    if (thread.state == State::kExited) return std::string("exited");
    text << thread.site.call << " at " << thread.site.file << ":" << thread.site.line;
    if (thread.state == State::kAtCollective) text << " with mask 0x" << std::hex << thread.mask;
    return text.str();
  };
  std::map<std::string, std::string> threads_at;
  for (int t = begin, last; t < end; t = last + 1) {
    std::string here = place(machine.threads[t]);
    for (last = t; last + 1 < end && place(machine.threads[last + 1]) == here;) ++last;
    threads_at[here] += " " + std::to_string(t) + (last > t ? "-" + std::to_string(last) : "");
  }
  std::string text;
  for (const auto& [here, threads] : threads_at) text += "\n  threads" + threads + ": " + here;
  return text;
}

// Releases every group of lanes that has met at one collective. Lanes that wait for others go on waiting.
inline bool release_collectives(int begin, int end) {
  bool released = false;
  for (int t = begin; t < end; ++t) {
    const Thread& first = machine.threads[t];
    if (first.state != State::kAtCollective) continue;
    bool complete = true;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(first.mask >> lane & 1)) continue;
      if (begin + lane >= end)
        fail("a collective's mask names lanes that the block does not have:" + whereabouts(begin, end));
      const Thread& other = machine.threads[begin + lane];
      complete = other.state == State::kAtCollective && other.mask == first.mask && other.site == first.site;
      if (!complete) break;
    }
    if (!complete) continue;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(first.mask >> lane & 1)) continue;
      machine.collected[begin + lane] = machine.threads[begin + lane].value;
      machine.threads[begin + lane].state = State::kRunnable;
    }
    released = true;
  }
  return released;
}

// Runs a warp until each of its threads has exited or stands at a block barrier.
inline void run_warp(int begin, int end) {
  unsigned char order[kWarpSize];
  do {
    shuffle(order, end - begin);
    for (int i = 0; i < end - begin; ++i) {
      Thread& thread = machine.threads[begin + order[i]];
      if (thread.state != State::kRunnable) continue;
      machine.current = &thread;
      switch_fiber(machine.scheduler, thread.fiber);
      if (!machine.failure.empty()) fail(std::exchange(machine.failure, ""));
    }
  } while (release_collectives(begin, end));
  for (int t = begin; t < end; ++t)
    if (machine.threads[t].state == State::kAtCollective)
      fail("a warp collective that not all lanes of its mask reach:" + whereabouts(begin, end));
}

inline void count_loads() {
  Machine& m = machine;
  ++m.work.blocks;
  for (int begin = 0; begin < m.num_threads; begin += kWarpSize) {
    uint64_t most = 0;
    for (int t = begin; t < std::min(begin + kWarpSize, m.num_threads); ++t) {
      most = std::max(most, m.threads[t].loads);
      m.work.lane_loads += m.threads[t].loads;
      m.threads[t].loads = 0;
    }
    m.work.warp_loads += most;
  }
}

inline void run_block() {
  Machine& m = machine;
  for (int t = 0; t < m.num_threads; ++t) m.threads[t].state = State::kRunnable;
  int num_warps = (m.num_threads + kWarpSize - 1) / kWarpSize;
  for (;;) {
    unsigned char order[kMaxThreads / kWarpSize];
    shuffle(order, num_warps);
    for (int i = 0; i < num_warps; ++i)
      run_warp(order[i] * kWarpSize, std::min<int>((order[i] + 1) * kWarpSize, m.num_threads));
    // Between barriers every thread of the block must agree: all exited, or all at the same barrier.
    m.barrier_count = 0;
    for (int t = 0; t < m.num_threads; ++t) {
      const Thread& thread = m.threads[t];
      if (thread.state != m.threads[0].state ||
          (thread.state == State::kAtBarrier && !(thread.site == m.threads[0].site)))
        fail("a barrier that not all threads reach:" + whereabouts(0, m.num_threads));
      m.barrier_count += thread.value != 0;
    }
    if (m.threads[0].state == State::kExited) {
      count_loads();
      return;
    }
    ++m.work.barriers;
    for (int t = 0; t < m.num_threads; ++t) m.threads[t].state = State::kRunnable;
  }
}

inline void prepare_threads(dim3 block) {
  Machine& m = machine;
  m.num_threads = block.x * block.y * block.z;
  if (!m.stacks) {
    read_symbols(m);
    m.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackStride, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) throw std::bad_alloc();
  }
  for (unsigned t = 0; t < unsigned(m.num_threads); ++t) {
    Thread& thread = m.threads[t];
    thread.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    if (!thread.started) start_fiber(thread.fiber, m.stacks + t * kStackStride, fiber_main);
    thread.started = true;
  }
}

// The order goes on from launch to launch, so that running an operator twice runs it in two orders. A new seed
// starts a new sequence.
inline void read_seed() {
  const char* seed = std::getenv("ROIALIGN_EXT_EMULATION_SEED");
  if (machine.random_state && machine.seed == (seed ? seed : "")) return;
  machine.seed = seed ? seed : "";
  machine.random_state = 0x9e3779b97f4a7c15ull * (2 * std::strtoull(machine.seed.c_str(), nullptr, 10) + 1);
}

// Runs every block of the grid. The kernel, its params and how to call it are set.
inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine;
  read_seed();
  prepare_threads(block);
  m.grid = grid;
  m.block = block;
  // On the heap and no larger than asked for, so that AddressSanitizer sees its end.
  m.dynamic_shared.reset(shared_bytes ? new char[shared_bytes] : nullptr);

  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  const unsigned drawn_from = static_cast<unsigned>(std::min<uint64_t>(num_blocks, UINT32_MAX));
  uint64_t number = random_below(drawn_from), stride = 1 + random_below(drawn_from);
  while (std::gcd(stride, num_blocks) != 1) ++stride;
  for (uint64_t i = 0; i < num_blocks; ++i, number = (number + stride) % num_blocks) {
    m.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    // To poison the variables of all kernels takes longer than many a block. The first blocks, and ever fewer of the
    // later ones, find out which the kernel uses; between the others only those are poisoned.
    const bool is_survey = i < 8 || (i & (i - 1)) == 0;
    std::vector<SharedVariable>& used = m.used_by[m.kernel];
    poison(is_survey ? m.shared_variables : used);
    if (shared_bytes) std::memset(m.dynamic_shared.get(), 0xff, shared_bytes);
    run_block();
    for (const SharedVariable& variable : m.shared_variables) {
      if (!is_survey) break;
      auto is_same = [&](const SharedVariable& other) { return other.offset == variable.offset; };
      if (!is_poisoned(variable) && std::none_of(used.begin(), used.end(), is_same)) used.push_back(variable);
    }
  }
}

}  // namespace emulation
