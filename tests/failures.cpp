// Preloaded into a process, this fails one allocation or one launch that a test names: an allocation of attnx itself or
// of a tensor, and a launch of a CUDA kernel.
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdlib.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

// These say how many succeed before one fails; with -1 all do.
std::atomic<long> allocations{-1}, launches{-1};

bool fails(std::atomic<long>& left) {
  long n = left;
  while (n >= 0)
    if (left.compare_exchange_weak(n, n - 1)) return n == 0;
  return false;
}

// This is where libattnx lies.
std::uintptr_t first_address = 0, last_address = 0;

int find_library(dl_phdr_info* library, std::size_t, void*) {
  if (!std::strstr(library->dlpi_name, "libattnx")) return 0;
  const auto& last = library->dlpi_phdr[library->dlpi_phnum - 1];
  first_address = last_address = library->dlpi_addr;
  for (const ElfW(Phdr)* part = library->dlpi_phdr; part <= &last; ++part)
    if (part->p_type == PT_LOAD) last_address = library->dlpi_addr + part->p_vaddr + part->p_memsz;
  return 1;
}

// It tells whether an allocation fails that code at this address asked for.
bool fails_for(void* caller) {
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  return address >= first_address && address < last_address && fails(allocations);
}

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

struct Dimensions {
  unsigned x, y, z;
};

}  // namespace

// The next allocation, or launch, after so many fails. What is left of the number is -1 once one has.
extern "C" void fail_allocation(long after) {
  dl_iterate_phdr(find_library, nullptr);
  allocations = after;
}
extern "C" void fail_launch(long after) { launches = after; }
extern "C" long allocations_left() { return allocations; }
extern "C" long launches_left() { return launches; }

// Torch takes the memory of tensors from here.
extern "C" int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  static const auto allocate = next<int(void**, std::size_t, std::size_t)>("posix_memalign");
  return fails(allocations) ? ENOMEM : allocate(out, alignment, bytes);
}

void* operator new(std::size_t bytes) {
  void* const block = fails_for(__builtin_return_address(0)) ? nullptr : malloc(bytes ? bytes : 1);
  if (!block) throw std::bad_alloc();
  return block;
}

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  const auto unit = std::size_t(alignment);
  void* const block = fails_for(__builtin_return_address(0)) ? nullptr : aligned_alloc(unit, (bytes / unit + 1) * unit);
  if (!block) throw std::bad_alloc();
  return block;
}

extern "C" int cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments,
                                std::size_t shared_bytes, void* stream) {
  static const auto launch =
      next<int(const void*, Dimensions, Dimensions, void**, std::size_t, void*)>("cudaLaunchKernel");
  constexpr int kOutOfResources = 701;
  return fails(launches) ? kOutOfResources : launch(kernel, grid, block, arguments, shared_bytes, stream);
}
