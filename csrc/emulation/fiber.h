// Fibers: every emulated CUDA thread has a stack of its own, and the scheduler switches between them where threads wait.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t kStack = 64 * 1024, kGuard = 64 * 1024;

// Stacks are kept for the next block; below each lies a guard, so that a kernel which needs more faults instead of corrupting.
inline void* stack_end(size_t fiber) {
  static thread_local std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kGuard, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory) + kGuard);
  }
  return stacks[fiber] + kStack;
}

#if defined(__x86_64__)

// Save the callee-saved registers of the running context, go on in another: 2 ns, where swapcontext makes two system calls.
extern "C" void step_emulation_switch(void** save, void* to);
asm(R"(.text
.weak step_emulation_switch
.type step_emulation_switch,@function
step_emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size step_emulation_switch, .-step_emulation_switch
)");

struct Context {
  void* stack = nullptr;

  // Begin at `entry` on the stack of this number; the stack must be 16-byte aligned at a call, so 8 off at entry.
  void prepare(size_t fiber, void (*entry)()) {
    void** top = static_cast<void**>(stack_end(fiber)) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    stack = top;
  }
  void switch_to(Context& other) { step_emulation_switch(&stack, other.stack); }
};

#else

struct Context {
  ucontext_t context;

  void prepare(size_t fiber, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = static_cast<char*>(stack_end(fiber)) - kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

}  // namespace emulation
