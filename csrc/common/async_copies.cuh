// Copies from global to shared memory that are under way while their thread goes on (cp.async), in groups.
#pragma once

namespace hybrid_ops {

// kBytes, 4, 8 or 16, to shared memory; both aligned to as many.
template <int kBytes>
__device__ __forceinline__ void copy_async(unsigned target, const void* global) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes) : "memory");
  }
}

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  copy_async<kBytes>(static_cast<unsigned>(__cvta_generic_to_shared(shared)), global);
}

// Four bytes, or as many zeros.
__device__ __forceinline__ void copy_async_if(bool condition, unsigned target, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(global), "r"(condition ? 4 : 0)
               : "memory");
}

// Arrives, as one of those that the barrier counts, when all of this thread's have arrived.
__device__ __forceinline__ void arrive_behind_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void load_shared(unsigned address, unsigned (&words)[1]) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(unsigned address, unsigned (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Until at most `pending` of them are, kPending to kMost.
template <int kMost, int kPending = 0>
__device__ __forceinline__ void wait_for_copies(int pending) {
  if constexpr (kPending == kMost) {
    wait_for_copies<kMost>();
  } else if (pending == kPending) {
    wait_for_copies<kPending>();
  } else {
    wait_for_copies<kMost, kPending + 1>(pending);
  }
}

// Asks L2 for a piece of memory; address and size are multiples of 16 bytes.
__device__ __forceinline__ void ask_for(const void* global, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

}  // namespace hybrid_ops
