// A stack of its own that can be left and entered again: one for each emulated CUDA thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

constexpr size_t kStackBytes = 96 << 10;
constexpr uint64_t kCanary = 0x5ca1ab1edeadbea7;  // at the end of the stack

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and takes another's.
extern "C" void emu_switch_stack(void** save, void* load);
asm(R"(
.text
.weak emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack, . - emu_switch_stack
)");
#endif

class Fiber {
 public:
  using Entry = void (*)();  // must never return

  void start(Entry entry) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    std::memcpy(stack_.get(), &kCanary, sizeof(kCanary));
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top) - 8;  // 6 registers, the entry, its return address
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    pointer_ = frame;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // From the scheduler into the fiber, until it leaves.
  void enter() {
#if defined(__x86_64__)
    emu_switch_stack(&scheduler_, pointer_);
#else
    swapcontext(&scheduler_, &context_);
#endif
  }
  bool overflowed() const { return std::memcmp(stack_.get(), &kCanary, sizeof(kCanary)) != 0; }
  // From the fiber back into the scheduler.
  void leave() {
#if defined(__x86_64__)
    emu_switch_stack(&pointer_, scheduler_);
#else
    swapcontext(&context_, &scheduler_);
#endif
  }

 private:
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t context_, scheduler_;
#endif
};

}  // namespace emu
