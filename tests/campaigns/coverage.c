/* Which branches of the core a run took, and how near its comparisons came.
 *
 * The compiler puts a call to these functions at every edge and comparison of a build with
 * QCOW2X_COVERAGE=1; this library, loaded ahead of the interpreter, answers them. One byte per edge
 * counts how often it was taken since q2_cov_begin; q2_cov_end says what no run before has shown.
 */
#include <stdint.h>
#include <string.h>

#define EDGES (1u << 17)
#define NEAR (1u << 16)
#define OPERANDS 4096u

static uint8_t edges[EDGES], near_misses[NEAR];
static uint8_t seen_edges[EDGES], seen_near[NEAR];
/* Constants that some field was compared with: what a mutator may put there. */
static uint64_t operands[OPERANDS];
static int running;
static __thread uint32_t before;

static inline uint32_t mix(uint64_t value)
{
    value *= UINT64_C(0x9e3779b97f4a7c15);
    return (uint32_t)(value >> 40);
}

void __sanitizer_cov_trace_pc(void)
{
    uint32_t here;

    if (!__atomic_load_n(&running, __ATOMIC_RELAXED))
        return;
    here = mix((uintptr_t)__builtin_return_address(0));
    uint8_t *count = &edges[(here ^ before) % EDGES];
    /* Threads may lose each other's counts; whether an edge was taken is never lost. */
    uint8_t more = __atomic_load_n(count, __ATOMIC_RELAXED) + 1;
    __atomic_store_n(count, more ? more : 255, __ATOMIC_RELAXED);
    before = here >> 1;
}

static inline void compared(uintptr_t where, uint64_t a, uint64_t b, int constant)
{
    if (!__atomic_load_n(&running, __ATOMIC_RELAXED) || a == b)
        return;
    /* How many bits agree: one more is progress, though the branch goes the same way. */
    uint32_t cell = mix(where ^ ((uint64_t)__builtin_popcountll(a ^ b) << 56)) % NEAR;
    __atomic_store_n(&near_misses[cell], 1, __ATOMIC_RELAXED);
    if (constant && a > 255) {
        uint32_t at = mix(a) % OPERANDS;
        if (__atomic_load_n(&operands[at], __ATOMIC_RELAXED) == 0) {
            __atomic_store_n(&operands[at], a, __ATOMIC_RELAXED);
        }
    }
}

#define HERE ((uintptr_t)__builtin_return_address(0))

void __sanitizer_cov_trace_cmp1(uint8_t a, uint8_t b) { compared(HERE, a, b, 0); }
void __sanitizer_cov_trace_cmp2(uint16_t a, uint16_t b) { compared(HERE, a, b, 0); }
void __sanitizer_cov_trace_cmp4(uint32_t a, uint32_t b) { compared(HERE, a, b, 0); }
void __sanitizer_cov_trace_cmp8(uint64_t a, uint64_t b) { compared(HERE, a, b, 0); }
void __sanitizer_cov_trace_const_cmp1(uint8_t a, uint8_t b) { compared(HERE, a, b, 1); }
void __sanitizer_cov_trace_const_cmp2(uint16_t a, uint16_t b) { compared(HERE, a, b, 1); }
void __sanitizer_cov_trace_const_cmp4(uint32_t a, uint32_t b) { compared(HERE, a, b, 1); }
void __sanitizer_cov_trace_const_cmp8(uint64_t a, uint64_t b) { compared(HERE, a, b, 1); }
void __sanitizer_cov_trace_cmpf(float a, float b) { (void)a, (void)b; }
void __sanitizer_cov_trace_cmpd(double a, double b) { (void)a, (void)b; }

void __sanitizer_cov_trace_switch(uint64_t value, const uint64_t *cases)
{
    uint64_t n;

    for (n = 0; n < cases[0]; n++)
        compared(HERE + n, cases[2 + n], value, 1);
}

/* How often an edge was taken, in AFL's steps: 1, 2, 3, 4-7, 8-15, 16-31, 32-127, more. */
static uint8_t step_of(uint8_t count)
{
    if (count <= 2)
        return count;
    if (count == 3)
        return 4;
    if (count < 8)
        return 8;
    if (count < 16)
        return 16;
    if (count < 32)
        return 32;
    return count < 128 ? 64 : 128;
}

void q2_cov_begin(void)
{
    memset(edges, 0, sizeof edges);
    memset(near_misses, 0, sizeof near_misses);
    before = 0;
    __atomic_store_n(&running, 1, __ATOMIC_SEQ_CST);
}

/* Ends a run. What it showed for the first time: *new_edges edges, *new_steps edges taken more
 * often or less than ever, and comparisons that came nearer, or to an operand, as the result. */
uint32_t q2_cov_end(uint32_t *new_edges, uint32_t *new_steps)
{
    uint32_t n, nearer = 0;

    __atomic_store_n(&running, 0, __ATOMIC_SEQ_CST);
    *new_edges = *new_steps = 0;
    for (n = 0; n < EDGES; n++) {
        uint8_t step = step_of(edges[n]);
        if (step & ~seen_edges[n]) {
            if (seen_edges[n] == 0)
                ++*new_edges;
            else
                ++*new_steps;
            seen_edges[n] |= step;
        }
    }
    for (n = 0; n < NEAR; n++)
        if (near_misses[n] && !seen_near[n]) {
            seen_near[n] = 1;
            nearer++;
        }
    return nearer;
}

uint32_t q2_cov_edges(void)
{
    uint32_t n, total = 0;

    for (n = 0; n < EDGES; n++)
        total += seen_edges[n] != 0;
    return total;
}

/* Up to max operands that were compared with, into out; returns how many. */
uint32_t q2_cov_operands(uint64_t *out, uint32_t max)
{
    uint32_t n, total = 0;

    for (n = 0; n < OPERANDS && total < max; n++)
        if (operands[n])
            out[total++] = operands[n];
    return total;
}
