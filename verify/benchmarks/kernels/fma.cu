// SPDX-License-Identifier: MIT
// Fused multiply-adds of 32 bit, as many as the card can do. Each chain goes round a cycle of STEPS random integers,
// x[s + 1] = a[s] * x[s] + b[s], all exact in 24 bits. A result that is wrong by one anywhere is multiplied by about
// 1500 at each further step, so it can't go unseen. CHAINS independent ones per thread hide the latency.
#define THREADS 256
#define CHAINS 8
#define STEPS 4
#define UNROLL 8

// table: a, b and x, each STEPS rows of THREADS. out: per block CHAINS rows of THREADS. Two further steps after the
// rounds, so that what is written is not what was read.
extern "C" __global__ void __launch_bounds__(THREADS, 4) fp32_fma(float *out, const float *table, unsigned rounds)
{
    float a[STEPS], b[STEPS], x[CHAINS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        a[s] = table[s * THREADS + threadIdx.x];
        b[s] = table[(STEPS + s) * THREADS + threadIdx.x];
    }
#pragma unroll
    for (int c = 0; c < CHAINS; c++) x[c] = table[(2 * STEPS + c % STEPS) * THREADS + threadIdx.x];
#pragma unroll 1
    for (unsigned r = 0; r < rounds; r++)
#pragma unroll
        for (int s = 0; s < STEPS * UNROLL; s++)
#pragma unroll
            for (int c = 0; c < CHAINS; c++) x[c] = __fmaf_rn(a[(c + s) % STEPS], x[c], b[(c + s) % STEPS]);
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
        for (int c = 0; c < CHAINS; c++) x[c] = __fmaf_rn(a[(c + s) % STEPS], x[c], b[(c + s) % STEPS]);
#pragma unroll
    for (int c = 0; c < CHAINS; c++) out[(blockIdx.x * CHAINS + c) * THREADS + threadIdx.x] = x[c];
}
