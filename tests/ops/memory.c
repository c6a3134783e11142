// Preloaded by test_memory.py. Wraps malloc to track the allocated bytes and their peak.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>

static long allocated, peak;

static void* count(void* memory) {
  if (memory) {
    long now = __atomic_add_fetch(&allocated, malloc_usable_size(memory), __ATOMIC_RELAXED),
         highest = peak;
    while (now > highest && !__atomic_compare_exchange_n(
                                &peak, &highest, now, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  return memory;
}

// Defines `next`, the libc function `name`.
#define NEXT(result, name, ...)       \
  static result (*next)(__VA_ARGS__); \
  next = next ? next : (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

void* malloc(size_t size) {
  NEXT(void*, "malloc", size_t);
  return count(next(size));
}

void* aligned_alloc(size_t alignment, size_t size) {
  NEXT(void*, "aligned_alloc", size_t, size_t);
  return count(next(alignment, size));
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  NEXT(int, "posix_memalign", void**, size_t, size_t);
  int error = next(memory, alignment, size);
  if (!error) {
    count(*memory);
  }
  return error;
}

void free(void* memory) {
  NEXT(void, "free", void*);
  __atomic_sub_fetch(&allocated, malloc_usable_size(memory), __ATOMIC_RELAXED);
  next(memory);
}

// Resets the peak; returns the bytes allocated now.
long fcos_test_reset_peak(void) { return peak = allocated; }

// Returns the peak since the last reset.
long fcos_test_peak(void) { return peak; }
