// Preloaded into a process: tells the emulator's bounds checker of the memory of every tensor, neither more nor less.
// Torch takes it from posix_memalign and gives it back to free, which stand here before those of the C library.
#include <dlfcn.h>
#include <stdlib.h>

#include <atomic>
#include <cstdint>

extern "C" void cudaemuRegisterRange(const void* ptr, size_t bytes, const char* name);
extern "C" void cudaemuUnregisterRange(const void* ptr);

namespace {

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

// Blocks in use, by address; free is called by any thread, for memory of others too, and must not allocate.
std::atomic<void*> blocks[1 << 16];

// Replaces one entry by another; false where the first is in no place that the address leads to.
bool replace(void* address, void* from, void* to) {
  std::size_t place = reinterpret_cast<std::uintptr_t>(address) / 64 * 40503;
  for (int probe = 0; probe < 64; ++probe) {
    std::atomic<void*>& block = blocks[place++ % (1 << 16)];
    if (void* expected = from; block.load() == from && block.compare_exchange_strong(expected, to)) return true;
  }
  return false;
}

}  // namespace

extern "C" int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  static const auto allocate = next<int(void**, std::size_t, std::size_t)>("posix_memalign");
  constexpr std::size_t kGuard = 4096;  // keeps the next block out of reach of what overruns this one
  const int status = allocate(out, alignment, bytes + kGuard);
  if (status != 0) return status;
  if (!replace(*out, nullptr, *out)) abort();
  cudaemuRegisterRange(*out, bytes, "tensor");
  return 0;
}

extern "C" void free(void* ptr) {
  static const auto release = next<void(void*)>("free");
  if (ptr && replace(ptr, ptr, nullptr)) cudaemuUnregisterRange(ptr);
  release(ptr);
}
