// Hopper's asynchronous machinery as thin functions: mbarriers, the tensor memory accelerator (TMA), warpgroup matrix
// products (wgmma), and the matrix loads and stores of a warp. Names are PTX's; free of host headers.
#pragma once

namespace hybrid_ops {

using uint32 = unsigned int;
using uint64 = unsigned long long;

// The bytes of a CUtensorMap, which this header does not know.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------------------------------------------- mbarriers

__device__ __forceinline__ void init_barrier(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive(uint32 barrier, uint32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ----------------------------------------------------------------------------------------------------- clusters

__device__ __forceinline__ uint32 cluster_rank() {
  uint32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32 cluster_size() {
  uint32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of the cluster arrives and, later, waits for all; orders no memory but barriers after
// fence_barrier_init.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The same place in another CTA's shared memory.
__device__ __forceinline__ uint32 address_in_cta(uint32 address, uint32 rank) {
  uint32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// At a barrier of any CTA of the cluster.
__device__ __forceinline__ void arrive_in_cluster(uint32 barrier, uint32 count) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Four bytes to a CTA of the cluster, whose `barrier` counts them, as those of TMA; no fence, nobody waits.
__device__ __forceinline__ void store_counted(uint32 destination, float value, uint32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(destination),
               "r"(__float_as_uint(value)), "r"(barrier)
               : "memory");
}

// Adds one to a number in another CTA's shared memory, and waits until one in this CTA's is so large. Unlike a
// barrier's phases, numbers may be any distance ahead of who waits.
__device__ __forceinline__ void count_in_cluster(uint32 counter) {
  asm volatile("red.release.cluster.shared::cluster.add.u32 [%0], 1;" ::"r"(counter) : "memory");
}

__device__ __forceinline__ void wait_for_count(uint32 counter, uint32 count) {
  uint32 counted;
  do {
    asm volatile("ld.acquire.cluster.shared::cta.u32 %0, [%1];" : "=r"(counted) : "r"(counter) : "memory");
  } while (counted < count);
}

// From here on, once all CTAs have come to it, CTAs of the next kernel may take free places (programmatic dependent
// launch).
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Of a kernel that is launched early (programmatic dependent launch): until the kernel before has ended, and all it
// wrote is seen.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------- TMA

// Neighbours in memory into shared memory; `barrier` counts their bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(uint32 destination, const void* source, uint32 bytes, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// A box of a 4-D tensor into shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void load_box(uint32 destination, const TensorMap& map, uint32 barrier, int i0, int i1,
                                         int i2, int i3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
      : "memory");
}

// The same into the same place of all CTAs of the cluster whose bits `ctas` has, at a barrier of each.
__device__ __forceinline__ void load_box(uint32 destination, const TensorMap& map, uint32 barrier, int i0, int i1,
                                         int i2, int i3, unsigned short ctas) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "h"(ctas)
      : "memory");
}

// A box into the L2 cache.
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int i0, int i1, int i2, int i3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(i0), "r"(i1),
               "r"(i2), "r"(i3)
               : "memory");
}

// A box from shared memory to a 4-D tensor; what lies outside of it is not written.
__device__ __forceinline__ void store_box(const TensorMap& map, uint32 source, int i0, int i1, int i2, int i3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(source), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
      : "memory");
}

// Until this thread's stores have read their shared memory; with kWritten until they are in global memory.
template <bool kWritten>
__device__ __forceinline__ void wait_for_stores() {
  if constexpr (kWritten) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

// Ordinary writes to shared memory before this are seen by TMA and wgmma after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -------------------------------------------------------------------------------------------------------- warps

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Barrier `id` (1 to 15) among `threads` threads.
__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -------------------------------------------------------------------------------------- 8 x 8 matrices of a warp
// In registers, a lane holds elements (lane / 4, 2 (lane % 4) + {0, 1}); in shared memory, lane 8 i + r points at row r
// of matrix i. `_transposed` exchanges rows and columns on the way.

__device__ __forceinline__ void load_matrices(uint32 (&r)[4], uint32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32 (&r)[4], uint32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32 row, uint32 r0, uint32 r1, uint32 r2, uint32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(uint32 row, uint32 r0, uint32 r1, uint32 r2, uint32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// -------------------------------------------------------------------------------------------------------- wgmma
// D[64, N] += A[64, 16] B[16, N] in bfloat16 with float32 sums. Of D, and of A where it is in registers, warp w of the
// four holds rows 16 w to 16 w + 15. With r = lane / 4 and c = 2 (lane % 4), d[4 j ..] are of D's columns 8 j ..
//     (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
// and the four registers of A, two neighbours along K in each, (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8).

// An operand in shared memory with 128-byte swizzle, at base + offset: atoms of 8 rows of 128 bytes, 1024 bytes apart
// along the rows; `wide_stride` apart along the other dimension where that is the contiguous one and longer than 64.
__device__ __forceinline__ uint64 swizzled_operand(uint32 base, uint32 offset, uint32 wide_stride = 16) {
  const uint32 low = (base >> 4) + ((offset >> 4) | (wide_stride >> 4) << 16);  // one addition: the rest are constants
  return (static_cast<uint64>((1u << 30) | (1024 >> 4)) << 32) | low;
}

// Before the first product, and after registers that the next one reads or adds to were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers that a product under way reads, until it has been waited for: the compiler takes them for free as soon as
// the product is issued. What it believes are stores that are never made.
template <int kCount>
__device__ __forceinline__ void keep_operands(const uint32 (&r)[kCount][4], bool never, uint32 anywhere) {
  if (never) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(anywhere + 16 * k), "r"(r[k][0]), "r"(r[k][1]),
                   "r"(r[k][2]), "r"(r[k][3])
                   : "memory");
    }
  }
}

// A copy of such a register where it is written to before the product has been waited for. `zero` is not known to be
// 0: ptxas, which sees through a move, would have the product read the original.
__device__ __forceinline__ uint32 copy_operand(uint32 r, uint32 zero) {
  uint32 copy;
  asm volatile("or.b32 %0, %1, %2;" : "=r"(copy) : "r"(r), "r"(zero));
  return copy;
}

#define HYBRID_OPS_D8(i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define HYBRID_OPS_D32(i) HYBRID_OPS_D8(i), HYBRID_OPS_D8(i + 8), HYBRID_OPS_D8(i + 16), HYBRID_OPS_D8(i + 24)
#define HYBRID_OPS_P32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define HYBRID_OPS_P40 HYBRID_OPS_P32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HYBRID_OPS_P64                                                                                          \
  HYBRID_OPS_P32                                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// A in registers, B in shared memory; kBColumns: N is contiguous there, not K.
template <bool kBColumns>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32* a, uint64 b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" HYBRID_OPS_P64
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}"
      : HYBRID_OPS_D32(0), HYBRID_OPS_D32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kBColumns));
}

template <bool kBColumns>
__device__ __forceinline__ void wgmma(float (&d)[40], const uint32* a, uint64 b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %45, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" HYBRID_OPS_P40
      "}, {%40, %41, %42, %43}, %44, add, 1, 1, %46;\n}"
      : HYBRID_OPS_D32(0), HYBRID_OPS_D8(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kBColumns));
}

template <bool kBColumns>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32* a, uint64 b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HYBRID_OPS_P32
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}"
      : HYBRID_OPS_D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kBColumns));
}

// Both operands in shared memory, K contiguous in both.
__device__ __forceinline__ void wgmma(float (&d)[32], uint64 a, uint64 b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HYBRID_OPS_P32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
      : HYBRID_OPS_D32(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#undef HYBRID_OPS_D8
#undef HYBRID_OPS_D32
#undef HYBRID_OPS_P32
#undef HYBRID_OPS_P40
#undef HYBRID_OPS_P64

}  // namespace hybrid_ops
