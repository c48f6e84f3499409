// Accesses beside a tensor, or not aligned to their size: built with -fsanitize=kernel-address, the compiler calls a function
// before every load and store, and those here compare the address with the margins that the caller has laid around the tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block.h"

namespace emulation {

constexpr int kRanges = 64;
struct Range {
  uintptr_t begin, end;
};
// Plain arrays: a container's functions would be instrumented and call back.
inline Range forbidden[kRanges];
inline int forbidden_count = 0;

#define STEP_NOT_INSTRUMENTED __attribute__((no_sanitize_address))

// Ends the running thread's block; the scheduler's own accesses are none of our business.
inline void complain(const std::string& message) {
  forbidden_count = 0;
  Block::current()->fail(message);
}

STEP_NOT_INSTRUMENTED inline void access(uintptr_t address, size_t bytes, const char* what) {
  if (!forbidden_count || !Block::current() || !Block::current()->running) return;
  for (int i = 0; i < forbidden_count; i++)
    if (address < forbidden[i].end && address + bytes > forbidden[i].begin) complain(std::string(what) + " outside a tensor");
}

// An access of a whole number; one that is not aligned is an error on a GPU, and would end the process here for 16 bytes.
STEP_NOT_INSTRUMENTED inline void access_number(uintptr_t address, size_t bytes, const char* what) {
  if (forbidden_count && address % bytes && Block::current() && Block::current()->running)
    complain(std::string(what) + " " + std::to_string(bytes) + " bytes at a misaligned address");
  access(address, bytes, what);
}

}  // namespace emulation

#define STEP_EMULATION_API extern "C" inline __attribute__((used, visibility("default"))) STEP_NOT_INSTRUMENTED

// False if there is no room for another range.
STEP_EMULATION_API bool step_emulation_forbid(const void* begin, size_t bytes) {
  if (emulation::forbidden_count == emulation::kRanges) return false;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  emulation::forbidden[emulation::forbidden_count++] = {first, first + bytes};
  return true;
}
STEP_EMULATION_API void step_emulation_allow() { emulation::forbidden_count = 0; }

#define STEP_ACCESS(size)                                                                                            \
  STEP_EMULATION_API void __asan_load##size##_noabort(uintptr_t at) { emulation::access_number(at, size, "reads"); } \
  STEP_EMULATION_API void __asan_store##size##_noabort(uintptr_t at) { emulation::access_number(at, size, "writes"); }
STEP_ACCESS(1)
STEP_ACCESS(2)
STEP_ACCESS(4)
STEP_ACCESS(8)
STEP_ACCESS(16)
STEP_EMULATION_API void __asan_loadN_noabort(uintptr_t at, size_t bytes) { emulation::access(at, bytes, "reads"); }
STEP_EMULATION_API void __asan_storeN_noabort(uintptr_t at, size_t bytes) { emulation::access(at, bytes, "writes"); }
STEP_EMULATION_API void __asan_handle_no_return() {}
#undef STEP_ACCESS
