#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10; // running into it is a fault at once, not a mystery later

Fiber* running = nullptr;
void* scheduler_context = nullptr;

} // namespace

// ---- saving and restoring the state of the processor ----

#if defined(__x86_64__)

extern "C" void emulation_switch(void** save, void* load);
// What the ABI asks a function to preserve goes to the old stack and comes from the new one.
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, .-emulation_switch
)");

namespace {

void* make_context(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr; // in the place of a return address: `entry` never returns
  *--top = reinterpret_cast<void*>(entry);
  return top - 6; // six registers, whatever is in them
}

void free_context(void*) {}

void switch_context(void** save, void* load) { emulation_switch(save, load); }

} // namespace

#else

#include <ucontext.h> // works everywhere, and is fifty times slower

namespace {

void* make_context(char* stack, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  makecontext(context, entry, 0);
  return context;
}

void free_context(void* context) { delete static_cast<ucontext_t*>(context); }

void switch_context(void** save, void* load) {
  if (*save == nullptr) {
    *save = new ucontext_t;
  }
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}

} // namespace

#endif

// ---- fibers; AddressSanitizer has to be told about every change of stack ----

#if defined(__SANITIZE_ADDRESS__)

namespace {

void* scheduler_frames = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

} // namespace

void Fiber::switch_to() {
  __sanitizer_start_switch_fiber(&scheduler_frames, stack_, kStackBytes);
  switch_context(&scheduler_context, context_);
  __sanitizer_finish_switch_fiber(scheduler_frames, nullptr, nullptr);
}

void Fiber::yield() {
  Fiber* self = running;
  __sanitizer_start_switch_fiber(&self->asan_frames_, scheduler_stack, scheduler_stack_bytes);
  switch_context(&self->context_, scheduler_context);
  __sanitizer_finish_switch_fiber(self->asan_frames_, &scheduler_stack, &scheduler_stack_bytes);
}

void Fiber::run() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    running->body_();
    yield();
  }
}

void Fiber::reset() {
  __asan_unpoison_memory_region(stack_, kStackBytes);
  free_context(context_);
  context_ = make_context(stack_, run);
}

#else

void Fiber::switch_to() { switch_context(&scheduler_context, context_); }

void Fiber::yield() { switch_context(&running->context_, scheduler_context); }

void Fiber::run() {
  for (;;) {
    running->body_();
    yield();
  }
}

void Fiber::reset() {
  free_context(context_);
  context_ = make_context(stack_, run);
}

#endif

Fiber::Fiber(void (*body)()) : body_(body) {
  void* memory = mmap(
      nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
      0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::abort();
  }
  stack_ = static_cast<char*>(memory) + kGuardBytes;
  context_ = make_context(stack_, run);
}

Fiber::~Fiber() {
  free_context(context_);
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::resume() {
  running = this;
  switch_to();
}

} // namespace emulation
