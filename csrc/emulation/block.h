// One thread block: its threads as fibers, run cooperatively until all have returned.
//
// A warp runs as far as it can before the next one does, so that one which does not wait where it should is far ahead of the
// others: a missing __syncthreads shows as a wrong result under one of the orders. Shared memory is filled with 0xFF (NaN, -1)
// before every block. What a GPU leaves undefined is an error here: threads that wait at different barriers, lanes that are named
// in a mask and do not come.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

// STEP_EMULATION_ORDER: 0 warps, lanes and blocks ascending, 1 descending, others shuffled by this seed.
inline unsigned order() {
  const char* text = std::getenv("STEP_EMULATION_ORDER");
  return text ? static_cast<unsigned>(std::atoi(text)) : 0;
}

// The numbers below `count` in the order asked for; shuffled ones differ from call to call.
struct Sequence {
  unsigned mode = order();
  uint64_t state = mode * 0x9E3779B97F4A7C15ull + 1;

  std::vector<unsigned> operator()(unsigned count) {
    std::vector<unsigned> numbers(count);
    for (unsigned i = 0; i < count; i++) numbers[i] = mode == 1 ? count - 1 - i : i;
    if (mode > 1)
      for (unsigned i = count; i > 1; i--) std::swap(numbers[i - 1], numbers[random() % i]);
    return numbers;
  }
  uint64_t random() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
};

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
  Context context;
  State state = State::ready;
  dim3 index;
  unsigned number = 0;
  int barrier = 0;     // where it waits for its block
  unsigned mask = 0;   // whom it waits for in its warp,
  int operation = 0;   // and for which operation
  uint64_t value = 0;  // what it brings to that,
  uint64_t shown = 0;  // and what the lanes that came saw of it
  unsigned lane() const { return number % 32; }
};

// Shared memory of one declaration, with a margin that nobody may write to.
struct Shared {
  static constexpr size_t kAlign = 128;
  std::vector<char> memory;
  size_t begin = 0, end = 0;

  bool intact() const {
    for (size_t i = end; i < memory.size(); i++)
      if (memory[i] != '\xFF') return false;
    return true;
  }
};

struct Block {
  dim3 grid, size, index;
  std::vector<Thread> threads;
  Context scheduler;
  Thread* running = nullptr;
  std::function<void()> kernel;
  size_t dynamic_bytes = 0;
  std::unordered_map<const void*, Shared> shared;
  std::string failure;

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  // Called on a thread's fiber: wait, and go on when the scheduler says so.
  void wait(State state) {
    running->state = state;
    running->context.switch_to(scheduler);
  }
  // Exceptions cannot leave a fiber: the scheduler throws for it, and the fibers of this block are never resumed.
  void fail(const std::string& message) {
    if (failure.empty()) failure = message;
    wait(State::done);
  }

  // Shared memory of one declaration (`key`), the same for all threads of the block.
  void* shared_memory(const void* key, size_t bytes) {
    Shared& found = shared[key];
    if (found.memory.empty()) {
      found.memory.assign(bytes + 2 * Shared::kAlign, '\xFF');
      found.begin = -reinterpret_cast<uintptr_t>(found.memory.data()) % Shared::kAlign;
      found.end = found.begin + bytes;
    }
    return found.memory.data() + found.begin;
  }

  void run(Sequence& sequence) {
    current() = this;
    shared.clear();
    for (unsigned i = 0; i < threads.size(); i++) {
      threads[i] = Thread{};
      threads[i].number = i;
      threads[i].index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
      threads[i].context.prepare(i, &Block::entry);
    }
    do {
      bool moved = false;
      for (unsigned warp : sequence((threads.size() + 31) / 32)) moved |= run_warp(warp, sequence.mode == 1);
      if (!moved) throw std::runtime_error("deadlock: a barrier or a warp operation is reached by some of its threads only");
    } while (!finished());
    for (const auto& [key, memory] : shared)
      if (!memory.intact()) throw std::runtime_error("a thread writes behind the end of shared memory");
  }

 private:
  static void entry() {
    Block* block = current();
    block->kernel();
    block->wait(State::done);
  }

  bool run_warp(unsigned warp, bool descending) {
    const unsigned first = warp * 32, last = first + 32 < threads.size() ? first + 32 : threads.size();
    bool moved = false;
    for (bool again = true; again;) {
      again = false;
      for (unsigned i = 0; i < last - first; i++) {
        Thread& thread = threads[descending ? last - 1 - i : first + i];
        if (thread.state != State::ready) continue;
        running = &thread;
        scheduler.switch_to(thread.context);
        running = nullptr;
        if (!failure.empty()) throw std::runtime_error(failure);
        again = true;
      }
      for (unsigned i = first; i < last; i++)
        if (threads[i].state == State::at_warp && complete(threads[i], first, last)) {
          const unsigned mask = threads[i].mask;
          for (unsigned lane = 0; lane < 32; lane++)
            if (mask >> lane & 1) {
              threads[first + lane].state = State::ready;
              threads[first + lane].shown = threads[first + lane].value;
            }
          again = true;
        }
      moved |= again;
    }
    return moved;
  }

  // Whether all lanes that `thread` waits for have come to the same operation.
  bool complete(const Thread& thread, unsigned first, unsigned last) const {
    for (unsigned lane = 0; lane < 32; lane++) {
      if (!(thread.mask >> lane & 1)) continue;
      if (first + lane >= last) return false;
      const Thread& other = threads[first + lane];
      if (other.state != State::at_warp || other.mask != thread.mask || other.operation != thread.operation) return false;
    }
    return true;
  }

  // Whether all threads have returned; releases them where all wait at one barrier.
  bool finished() {
    size_t done = 0, waiting = 0;
    for (const Thread& thread : threads) {
      done += thread.state == State::done;
      waiting += thread.state == State::at_barrier;
    }
    if (done == threads.size()) return true;
    if (waiting == threads.size()) {
      for (Thread& thread : threads) {
        if (thread.barrier != threads[0].barrier) throw std::runtime_error("threads of a block wait at different __syncthreads");
        thread.state = State::ready;
      }
    } else if (done + waiting == threads.size()) {
      throw std::runtime_error("__syncthreads is reached by some threads after others have returned");
    }
    return false;
  }
};

}  // namespace emulation
