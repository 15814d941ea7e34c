// SPDX-License-Identifier: MIT
// Bandwidth of the device's memory. A thread loads all its vectors before it stores any, so that enough loads are
// under way to hide the latency; a block takes one stretch of memory.
#define THREADS 256
#define DEPTH 4

extern "C" __global__ void __launch_bounds__(THREADS)
memory_copy(uint4 *out, const uint4 *in, unsigned long long count)
{
    unsigned long long first = (unsigned long long)blockIdx.x * (THREADS * DEPTH) + threadIdx.x;
    uint4 held[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (first + d * THREADS < count) held[d] = __ldcs(in + first + d * THREADS);
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (first + d * THREADS < count) __stcs(out + first + d * THREADS, held[d]);
}

// out = left + factor * right, as in STREAM.
extern "C" __global__ void __launch_bounds__(THREADS)
memory_triad(float4 *out, const float4 *left, const float4 *right, float factor, unsigned long long count)
{
    unsigned long long first = (unsigned long long)blockIdx.x * (THREADS * DEPTH) + threadIdx.x;
    float4 a[DEPTH], b[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (first + d * THREADS < count) {
            a[d] = __ldcs(left + first + d * THREADS);
            b[d] = __ldcs(right + first + d * THREADS);
        }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (first + d * THREADS < count) {
            float4 sum;
            sum.x = __fmaf_rn(factor, b[d].x, a[d].x);
            sum.y = __fmaf_rn(factor, b[d].y, a[d].y);
            sum.z = __fmaf_rn(factor, b[d].z, a[d].z);
            sum.w = __fmaf_rn(factor, b[d].w, a[d].w);
            __stcs(out + first + d * THREADS, sum);
        }
}
