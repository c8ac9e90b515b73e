// Memory of what the operators return: huge pages, and one freed output kept for the next call. Knows torch.
#pragma once

#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace roialign {

using at::Tensor;

constexpr size_t kHugePage = 2 << 20;

// Asks for huge pages under large fresh memory, whose pages are else faulted in 4 KiB at a time: half the time of the
// forward.
inline void prefer_huge_pages(void* data, size_t size) {
#ifdef __linux__
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + size) / kHugePage * kHugePage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish; refusal changes nothing
  }
#endif
}

// Memory of a CPU output, kept when its tensor is freed. The C library keeps what is freed up to 32 MiB and gives larger
// blocks back to the system, which zeroes the pages of the next: for the 48 MiB of a thousand boxes a quarter of the
// forward's time on two threads. So one freed block is kept, the largest of kMaxKept or less, and serves the next output
// that fills at least half of it.
class OutputMemory {
 public:
  static constexpr size_t kMaxKept = 50 << 20;  // holds 1024 RoIs of 256 channels and 7 x 7 bins in float32

  // At least `size` bytes, until give_back.
  static OutputMemory* take(size_t size) {
    std::unique_ptr<OutputMemory> memory(kept_.exchange(nullptr));
    if (memory != nullptr && memory->size_ >= size) {
      if (memory->size_ / 2 <= size) {
        return memory.release();
      }
      give_back(memory.release());
    }
    memory.reset();  // before a larger one is made
    return new OutputMemory(size);
  }

  static void give_back(void* context) {
    std::unique_ptr<OutputMemory> memory(static_cast<OutputMemory*>(context)), other(kept_.exchange(nullptr));
    if (other != nullptr && other->size_ > memory->size_) {
      std::swap(memory, other);
    }
    other.reset(kept_.exchange(memory.release()));
  }

  // Frees what is kept. Returns its bytes.
  static size_t release() {
    const std::unique_ptr<OutputMemory> memory(kept_.exchange(nullptr));
    return memory == nullptr ? 0 : memory->size_;
  }

  void* data() const { return data_.get(); }

 private:
  static inline std::atomic<OutputMemory*> kept_{nullptr};

  explicit OutputMemory(size_t size) : data_(c10::GetCPUAllocator()->allocate(size)), size_(size) {
    prefer_huge_pages(data(), size);
  }

  c10::DataPtr data_;
  size_t size_;
};

inline Tensor empty_in_layout(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  Tensor tensor = at::empty(sizes, options.memory_format(format));
  if (tensor.is_cpu()) {
    prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
  }
  return tensor;
}

// The same for a tensor whose like is soon asked for again.
inline Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  double bytes = static_cast<double>(options.dtype().itemsize());  // as integers they might overflow
  for (const int64_t size : sizes) {
    bytes *= static_cast<double>(size);
  }
  if (!options.device().is_cpu() || bytes < kHugePage) {
    return empty_in_layout(sizes, options, format);
  }
  if (bytes > OutputMemory::kMaxKept) {
    OutputMemory::release();
    return empty_in_layout(sizes, options, format);
  }
  const auto strides = c10::get_channels_last_strides_2d(sizes);
  OutputMemory* memory = OutputMemory::take(static_cast<size_t>(bytes));
  at::TensorMaker tensor = at::for_blob(memory->data(), sizes);
  if (format == at::MemoryFormat::ChannelsLast) {
    tensor.strides(strides);
  }
  tensor.context(memory, OutputMemory::give_back).options(options);
  return tensor.resizeable_storage().allocator(c10::GetCPUAllocator()).make_tensor();
}

}  // namespace roialign
