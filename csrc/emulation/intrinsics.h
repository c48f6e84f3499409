// What kernels call on a GPU: indices, barriers, warp operations, atomics and a few functions of mathematics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "block.h"

#define threadIdx (::emulation::Block::current()->running->index)
#define blockIdx (::emulation::Block::current()->index)
#define blockDim (::emulation::Block::current()->size)
#define gridDim (::emulation::Block::current()->grid)

namespace emulation {

inline void barrier(int line) {
  Block& block = *Block::current();
  block.running->barrier = line;
  block.wait(State::at_barrier);
}

// Bring `value` to the lanes of `mask` and wait for theirs; `then` reads them.
template <class Value, class Read>
Value exchange(unsigned mask, Value value, int operation, Read then) {
  static_assert(sizeof(Value) <= 8, "a lane brings at most eight bytes");
  Block& block = *Block::current();
  Thread& thread = *block.running;
  if (!(mask >> thread.lane() & 1)) block.fail("a lane that its mask does not name calls a warp operation");
  std::memcpy(&thread.value, &value, sizeof(Value));
  thread.mask = mask;
  thread.operation = operation;
  block.wait(State::at_warp);
  return then([&](unsigned lane) {
    Value other = value;
    const unsigned first = thread.number - thread.lane();
    if (lane < 32 && mask >> lane & 1) std::memcpy(&other, &block.threads[first + lane].shown, sizeof(Value));
    return other;
  });
}

inline unsigned lane() { return Block::current()->running->lane(); }

}  // namespace emulation

#define __syncthreads() ::emulation::barrier(__LINE__)

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::exchange(mask, 0, 1, [](auto) { return 0; });
}
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  return emulation::exchange(mask, value, 2, [&](auto of) { return of(source & 31); });
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
  return emulation::exchange(mask, value, 3, [&](auto of) { return of(emulation::lane() ^ bits); });
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned by) {
  return emulation::exchange(mask, value, 4, [&](auto of) { return of(emulation::lane() + by); });
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned by) {
  return emulation::exchange(mask, value, 5, [&](auto of) { return of(emulation::lane() - by); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::exchange(mask, unsigned{predicate != 0}, 6, [&](auto of) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) bits |= of(lane) << lane;
    return bits;
  });
}

// Fibers change only where they wait, so plain code is atomic.
template <class Value>
Value atomicAdd(Value* at, Value value) {
  Value before = *at;
  *at = before + value;
  return before;
}
inline void __trap() { emulation::Block::current()->fail("__trap"); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
