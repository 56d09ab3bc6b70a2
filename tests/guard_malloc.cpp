// An electric fence for LD_PRELOAD: while it is on, memory that torch's CPU allocator or the C++
// extension asks for is filled with 0xFF, a NaN in every dtype, and ends at a page that nobody may
// touch. So does what they have freed. A tensor ends there exactly, whatever its alignment then is:
// an access of the element past it is a fault. What cannot be caught as it happens, a write before
// the first byte or into the slack of an aligned block, is found when the block is freed.
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" void* __libc_malloc(size_t size);
extern "C" void* __libc_memalign(size_t alignment, size_t size);
extern "C" void __libc_free(void* block);

namespace {

constexpr size_t kPage = 4096, kPages = size_t{1} << 26;  // 256 GiB of addresses, used once each
constexpr int kPoison = 0xFF, kSlack = 0xA5;
constexpr size_t kNewAlign = 16;

struct Block {
  uint64_t bytes;
  uint64_t pages : 63, freed : 1;  // with data; one that is fenced comes after them
  uint8_t* begin;
};

uint8_t* arena;
Block* blocks;    // by first page
uint32_t* first;  // page of a block, by page
std::atomic<size_t> next_page{1};
std::atomic<int64_t> counts[2];
std::atomic<bool> on{false};
struct sigaction before;
int told = 2;  // where reports go

struct Range {
  uintptr_t begin, end;
};
Range tensors, extension;  // the code of libc10 and of this project

bool holds(const Range& range, const void* caller) {
  const auto at = reinterpret_cast<uintptr_t>(caller);
  return on.load(std::memory_order_relaxed) && at >= range.begin && at < range.end;
}

bool is_ours(const void* p) {
  auto* at = static_cast<const uint8_t*>(p);
  return arena != nullptr && at >= arena && at < arena + kPages * kPage;
}

[[noreturn]] void report(const char* what, int64_t at, uint64_t bytes) {
  dprintf(told, "guard: %s at byte %lld of an allocation of %llu bytes\n", what,
          static_cast<long long>(at), static_cast<unsigned long long>(bytes));
  std::abort();
}

void* allocate(size_t bytes, size_t alignment, bool of_extension) {
  ++counts[of_extension];
  const size_t room = (bytes + alignment - 1) / alignment * alignment;
  const size_t pages = room / kPage + 1;
  const size_t page = next_page.fetch_add(pages + 1);
  uint8_t* start = arena + page * kPage;
  if (page + pages >= kPages || mprotect(start, pages * kPage, PROT_READ | PROT_WRITE) != 0) {
    std::perror("guard: no memory");
    std::abort();
  }
  uint8_t *end = start + pages * kPage, *begin = end - room;
  std::memset(start, kSlack, begin - start);
  std::memset(begin, kPoison, bytes);
  std::memset(begin + bytes, kSlack, end - begin - bytes);
  for (size_t i = 0; i <= pages; ++i) first[page + i] = static_cast<uint32_t>(page);
  blocks[page] = {bytes, pages, 0, begin};
  return begin;
}

void check_slack(const Block& block, const uint8_t* from, const uint8_t* to) {
  for (; from < to; ++from)
    if (*from != kSlack) report("a write was made", from - block.begin, block.bytes);
}

void release(void* p) {
  const size_t page = first[(static_cast<uint8_t*>(p) - arena) / kPage];
  Block& block = blocks[page];
  if (block.begin != p || block.freed) report("a second or wrong free", 0, block.bytes);
  uint8_t *start = arena + page * kPage, *end = start + block.pages * kPage;
  check_slack(block, start, block.begin);
  check_slack(block, block.begin + block.bytes, end);
  block.freed = 1;
  mmap(start, end - start, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
}

// Says which allocation was missed; the handler before, Python's, then says where.
void on_fault(int signal, siginfo_t* info, void* context) {
  auto* at = static_cast<uint8_t*>(info->si_addr);
  if (is_ours(at)) {
    const Block& block = blocks[first[(at - arena) / kPage]];
    char text[160];
    const int length =
        std::snprintf(text, sizeof text, "guard: access at byte %lld of %s of %llu bytes\n",
                      static_cast<long long>(at - block.begin),
                      block.freed ? "a freed allocation" : "an allocation",
                      static_cast<unsigned long long>(block.bytes));
    if (write(told, text, length) < 0) _exit(1);
  }
  sigaction(signal, &before, nullptr);
  if ((before.sa_flags & SA_SIGINFO) != 0)
    before.sa_sigaction(signal, info, context);
  else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
    before.sa_handler(signal);
}

int find_modules(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (std::strstr(info->dlpi_name, "/libc10.so")) tensors = {begin, begin + header.p_memsz};
    if (std::strstr(info->dlpi_name, "/_C.abi3.so")) extension = {begin, begin + header.p_memsz};
  }
  return 0;
}

template <class T>
T* reserve(size_t count, int protection) {
  void* p = mmap(nullptr, count * sizeof(T), protection,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::perror("guard: no addresses"), std::abort();
  return static_cast<T*>(p);
}

}  // namespace

// `report_to`: a file descriptor. Whether both modules are loaded.
extern "C" bool guard_on(int report_to) {
  told = report_to;
  if (arena == nullptr) {
    blocks = reserve<Block>(kPages, PROT_READ | PROT_WRITE);
    first = reserve<uint32_t>(kPages, PROT_READ | PROT_WRITE);
    arena = reserve<uint8_t>(kPages * kPage, PROT_NONE);
  }
  dl_iterate_phdr(find_modules, nullptr);
  struct sigaction mine{};
  mine.sa_sigaction = on_fault;
  mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &mine, &before);
  on = true;
  return tensors.begin != 0 && extension.begin != 0;
}
extern "C" void guard_off() {
  if (on.exchange(false)) sigaction(SIGSEGV, &before, nullptr);
}
// Allocations so far, of tensors or of the extension.
extern "C" int64_t guard_count(bool of_extension) { return counts[of_extension]; }

extern "C" int posix_memalign(void** out, size_t alignment, size_t bytes) {
  const bool guard = bytes > 0 && holds(tensors, __builtin_return_address(0));
  *out = guard ? allocate(bytes, 1, false) : __libc_memalign(alignment, bytes);
  return *out == nullptr ? 12 : 0;  // ENOMEM
}
void* operator new(size_t bytes) {
  if (bytes > 0 && holds(extension, __builtin_return_address(0)))
    return allocate(bytes, kNewAlign, true);
  void* p = __libc_malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
extern "C" void free(void* p) {
  if (is_ours(p)) return release(p);
  __libc_free(p);
}
