// SPDX-License-Identifier: MIT
// A pattern over the device's memory, and a check of it. Every 32-bit word is a hash of its own number, so a word that
// was stored at another's address is found as well as one with a flipped bit; `flip` inverts all bits.
#define THREADS 256
#define DEPTH 4
// Words that are told one by one; further ones are only counted.
#define TOLD 64

struct wrong_word {
    unsigned long long number;
    unsigned expected, found;
};

struct verdict {
    unsigned long long words, bits;
    struct wrong_word told[TOLD];
};

// The same function is in gpubench.py.
static __device__ unsigned word_of(unsigned long long number, unsigned seed, unsigned flip)
{
    unsigned x = (unsigned)number * 0x9e3779b1u + (unsigned)(number >> 32) * 0x85ebca77u + seed;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16) ^ flip;
}

static __device__ uint4 vector_of(unsigned long long number, unsigned seed, unsigned flip)
{
    uint4 v;
    v.x = word_of(number, seed, flip);
    v.y = word_of(number + 1, seed, flip);
    v.z = word_of(number + 2, seed, flip);
    v.w = word_of(number + 3, seed, flip);
    return v;
}

// `base`: the number of the first word of `memory`, which is one block of several.
extern "C" __global__ void __launch_bounds__(THREADS)
pattern_write(uint4 *memory, unsigned long long count, unsigned long long base, unsigned seed, unsigned flip)
{
    unsigned long long first = (unsigned long long)blockIdx.x * (THREADS * DEPTH) + threadIdx.x;
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        unsigned long long i = first + d * THREADS;
        if (i < count) __stcs(memory + i, vector_of(base + i * 4, seed, flip));
    }
}

static __device__ void compare(unsigned found, unsigned expected, unsigned long long number, struct verdict *verdict)
{
    if (found == expected) return;
    unsigned long long place = atomicAdd(&verdict->words, 1ull);
    atomicAdd(&verdict->bits, (unsigned long long)__popc(found ^ expected));
    if (place >= TOLD) return;
    verdict->told[place].number = number;
    verdict->told[place].expected = expected;
    verdict->told[place].found = found;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
pattern_check(const uint4 *memory, unsigned long long count, unsigned long long base, unsigned seed, unsigned flip,
              struct verdict *verdict)
{
    unsigned long long first = (unsigned long long)blockIdx.x * (THREADS * DEPTH) + threadIdx.x;
    uint4 held[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (first + d * THREADS < count) held[d] = __ldcs(memory + first + d * THREADS);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        unsigned long long number = base + (first + d * THREADS) * 4;
        if (first + d * THREADS >= count) continue;
        uint4 expected = vector_of(number, seed, flip);
        compare(held[d].x, expected.x, number, verdict);
        compare(held[d].y, expected.y, number + 1, verdict);
        compare(held[d].z, expected.z, number + 2, verdict);
        compare(held[d].w, expected.w, number + 3, verdict);
    }
}
