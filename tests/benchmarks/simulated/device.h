/* SPDX-License-Identifier: MIT
 * Lets a kernel of verify/benchmarks/kernels be compiled as C++ and run on this machine, one thread after the other.
 *
 * The 32 lanes of a warp are fibers: a lane that comes to an mma waits there until all have come, as mma.sync asks.
 * What an mma does is written from the tables of the PTX manual, element by element ("Matrix Fragments for
 * mma.m16n8k8/16/32"), apart from the program that packs the operands. */
#ifndef DEVICE_H
#define DEVICE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

struct index3 { unsigned x, y, z; };
extern index3 threadIdx, blockIdx;
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

#define __global__
#define __device__
#define __launch_bounds__(...)

template <typename T> static inline T __ldcs(const T *from) { return *from; }
template <typename T> static inline void __stcs(T *to, T value) { *to = value; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline unsigned long long atomicAdd(unsigned long long *sum, unsigned long long more)
{
    unsigned long long old = *sum;
    *sum += more;
    return old;
}

unsigned long long now_ns(void);

enum mma_kind { MMA_F16, MMA_BF16, MMA_TF32, MMA_S8 };
/* Gives the lane's registers and returns when all of the warp have theirs back. */
void mma_wait(mma_kind kind, void *c, const unsigned *a, const unsigned *b);
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_wait(MMA_F16, c, a, b); }
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_wait(MMA_BF16, c, a, b); }
static inline void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_wait(MMA_TF32, c, a, b); }
static inline void mma_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_wait(MMA_S8, c, a, b); }

#endif
