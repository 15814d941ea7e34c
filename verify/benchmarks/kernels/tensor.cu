// SPDX-License-Identifier: MIT
// Tensor cores by mma.sync, as many as the card can do: c[t] += a[s] * b[t] for every tile t and each step s in turn.
// The numbers are integers small enough for every sum to be exact, and the sum of the steps' a is a sparse matrix, so
// c grows by a known amount per round: one wrong product stays in the result, and so does a round that was left out.
// All four kinds hold 4 registers of a, 2 of b and 4 of c in each lane; accumulation is in 32 bits.
#define THREADS 256
#define WARPS (THREADS / 32)
#define TILES 8
#define STEPS 4

#ifdef __CUDACC__
#define MMA(name, shape, type, constraint)                                                                             \
    static __device__ void name(type (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2])                         \
    {                                                                                                                  \
        asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
                     : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3])          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32", float, "f")
MMA(mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", int, "r")
#endif

// table: for each warp of a block its a, b and c as rows of 32 lanes; out: for each warp of the grid its c.
#define KERNEL(name, multiply, type)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
    name(type *out, const unsigned *table, unsigned rounds)                                                            \
    {                                                                                                                  \
        unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;                                                     \
        const unsigned *own = table + warp * 32 * (STEPS * 4 + TILES * 2 + TILES * 4) + lane;                          \
        unsigned a[STEPS][4], b[TILES][2];                                                                             \
        type c[TILES][4];                                                                                              \
        _Pragma("unroll") for (int s = 0; s < STEPS; s++)                                                              \
            _Pragma("unroll") for (int r = 0; r < 4; r++) a[s][r] = own[32 * (s * 4 + r)];                             \
        own += 32 * STEPS * 4;                                                                                         \
        _Pragma("unroll") for (int t = 0; t < TILES; t++)                                                              \
            _Pragma("unroll") for (int r = 0; r < 2; r++) b[t][r] = own[32 * (t * 2 + r)];                             \
        own += 32 * TILES * 2;                                                                                         \
        _Pragma("unroll") for (int t = 0; t < TILES; t++)                                                              \
            _Pragma("unroll") for (int r = 0; r < 4; r++) c[t][r] = ((const type *)own)[32 * (t * 4 + r)];             \
        _Pragma("unroll 1") for (unsigned i = 0; i < rounds; i++)                                                      \
            _Pragma("unroll") for (int s = 0; s < STEPS; s++)                                                          \
                _Pragma("unroll") for (int t = 0; t < TILES; t++) multiply(c[t], a[s], b[t]);                          \
        out += (blockIdx.x * WARPS + warp) * 32 * TILES * 4 + lane;                                                    \
        _Pragma("unroll") for (int t = 0; t < TILES; t++)                                                              \
            _Pragma("unroll") for (int r = 0; r < 4; r++) out[32 * (t * 4 + r)] = c[t][r];                             \
    }
KERNEL(tensor_fp16, mma_f16, float)
KERNEL(tensor_bf16, mma_bf16, float)
KERNEL(tensor_tf32, mma_tf32, float)
KERNEL(tensor_int8, mma_s8, int)
