// A fiber: a function with a stack of its own, which can stop in the middle and go on later.
#pragma once

#include <cstddef>

namespace emulation {

class Fiber {
 public:
  // `body` is called again whenever it has returned and the fiber is resumed.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber until it yields or its body returns.
  void resume();
  // Stops the fiber that runs, and returns to where it was resumed.
  static void yield();
  // Forgets where the fiber stopped: it starts anew.
  void reset();

 private:
  static void run();
  void switch_to();

  void (*body_)();
  char* stack_;
  void* context_; // where to go on; the form depends on the processor
  void* asan_frames_ = nullptr;
};

} // namespace emulation
