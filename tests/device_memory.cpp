// Preloaded into a process, this makes the memory of tensors what a device's is: there, code of attnx on the host that
// reads or writes it would crash. Here it is counted. Kernels, which the emulator runs, and torch may do both.
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

constexpr std::size_t kPage = 4096;

// A block in use has pages of its own. Free is called for memory of others, too, and must not allocate.
struct Block {
  std::atomic<char*> address;
  std::size_t bytes;
};
Block blocks[1 << 12];

Block* block_of(const void* address) {
  for (Block& block : blocks)
    if (char* const start = block.address; start && address >= start && address < start + block.bytes) return &block;
  return nullptr;
}

std::atomic<bool> watched{false};
std::atomic<long> touches{0};
char first_touch[256] = "";

void protect_all(int protection) {
  for (Block& block : blocks)
    if (char* const start = block.address) mprotect(start, block.bytes, protection);
}

bool of_attnx(std::uintptr_t code) {
  Dl_info from;
  return dladdr(reinterpret_cast<void*>(code), &from) && std::strstr(from.dli_fname, "libattnx");
}

// The code that touches a watched page is that of attnx, or that of libc, which attnx has called: its functions that
// copy and fill keep the address to return to on top of the stack.
void on_touch(int, siginfo_t* info, void* context) {
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto code = std::uintptr_t(registers[REG_RIP]);
  Block* const block = block_of(info->si_addr);
  if (!block) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  Dl_info from;
  const bool in_libc = dladdr(reinterpret_cast<void*>(code), &from) && std::strstr(from.dli_fname, "/libc.so");
  if (of_attnx(code) || (in_libc && of_attnx(*reinterpret_cast<std::uintptr_t*>(registers[REG_RSP])))) {
    if (touches++ == 0)
      snprintf(first_touch, sizeof first_touch, "%s + 0x%lx", from.dli_fname,
               code - reinterpret_cast<std::uintptr_t>(from.dli_fbase));
  }
  mprotect(block->address, block->bytes, PROT_READ | PROT_WRITE);
}

void watch_all() {
  struct sigaction action = {};
  action.sa_sigaction = on_touch;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  protect_all(PROT_NONE);
}

struct Dimensions {
  unsigned x, y, z;
};

}  // namespace

extern "C" void watch_memory(int on) {
  static struct sigaction before;
  if (on) sigaction(SIGSEGV, nullptr, &before);
  watched = on;
  on ? watch_all() : protect_all(PROT_READ | PROT_WRITE);
  if (!on) sigaction(SIGSEGV, &before, nullptr);
}
extern "C" long host_touches() { return touches; }
extern "C" const char* first_host_touch() { return first_touch; }

// Torch takes the memory of tensors from here.
extern "C" int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  static const auto allocate = next<int(void**, std::size_t, std::size_t)>("posix_memalign");
  if (alignment > kPage || bytes == 0) return allocate(out, alignment, bytes);
  const std::size_t pages = (bytes + kPage - 1) / kPage * kPage;
  void* const start =
      mmap(nullptr, pages, watched ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return allocate(out, alignment, bytes);
  for (Block& block : blocks) {
    if (char* none = nullptr; block.address.compare_exchange_strong(none, static_cast<char*>(start))) {
      block.bytes = pages;
      *out = start;
      return 0;
    }
  }
  munmap(start, pages);
  return allocate(out, alignment, bytes);
}

extern "C" void free(void* ptr) {
  static const auto release = next<void(void*)>("free");
  if (ptr && reinterpret_cast<std::uintptr_t>(ptr) % kPage == 0) {
    if (Block* const block = block_of(ptr)) {
      const std::size_t bytes = block->bytes;
      block->address = nullptr;
      munmap(ptr, bytes);
      return;
    }
  }
  release(ptr);
}

// The emulator runs a kernel here, which may touch all, and has a handler of its own meanwhile.
extern "C" int cudaLaunchKernel(const void* kernel, Dimensions grid, Dimensions block, void** arguments,
                                std::size_t shared_bytes, void* stream) {
  static const auto launch =
      next<int(const void*, Dimensions, Dimensions, void**, std::size_t, void*)>("cudaLaunchKernel");
  if (watched) protect_all(PROT_READ | PROT_WRITE);
  const int status = launch(kernel, grid, block, arguments, shared_bytes, stream);
  if (watched) watch_all();
  return status;
}
