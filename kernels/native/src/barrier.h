// Where threads wait for each other between operations, or between the parts of one. OpenMP's own barrier spins for
// milliseconds; where the machine is busy and two threads share a core, each of a network's fifty barriers then costs a
// time slice.
#pragma once

#include <sched.h>

#include <atomic>

class Barrier {
 public:
  void wait(int threads) {
    const int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
      if (spins < SPINS)
        pause();
      else
        sched_yield();
  }

 private:
  static constexpr int SPINS = 1000;  // some tens of microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<int> arrived{0}, round{0};
};
