// Weights of tokens and their sums, bit for bit those of `kernels/src/sampler.rs`; and what the threads of a block do together.
#pragma once
#include "kernel.h"

#define THREADS_MAX 1024
#define INFINITE BITS_FLOAT(0x7f800000u)

// What the threads of a block tell each other.
typedef struct {
    u64 sums[THREADS_MAX];
    float maxima[THREADS_MAX];
} Together;

// e^x for x <= 0, by the same polynomial.
DEVICE float exponential(float x) {
    const float round = 12582912.0f, clamped = x > -87.0f ? x : -87.0f;
    const float rounded = F_ADD(F_MUL(clamped, 1.44269504f), round), n = F_ADD(rounded, -round);
    const float r = F_ADD(F_ADD(clamped, -F_MUL(n, 0.6933594f)), -F_MUL(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = F_ADD(F_MUL(p, r), 1.3981999e-3f);
    p = F_ADD(F_MUL(p, r), 8.333452e-3f);
    p = F_ADD(F_MUL(p, r), 4.1665796e-2f);
    p = F_ADD(F_MUL(p, r), 0.16666665f);
    p = F_ADD(F_MUL(p, r), 0.5f);
    const float scale = BITS_FLOAT((FLOAT_BITS(rounded) << 23) + (127u << 23));
    const float value = F_MUL(F_ADD(F_ADD(F_MUL(F_MUL(p, r), r), r), 1.0f), scale);
    return x > -87.0f ? value : 0.0f;
}

// A weight in parts of 2^40, to the nearest.
DEVICE u64 mass(float weight) { return DOUBLE_BITS(D_ADD((double)weight, 4096.0)) - DOUBLE_BITS(4096.0); }

DEVICE u64 mass_of_bits(u32 bits) { return mass(BITS_FLOAT(bits)); }

// The sum of the values of all threads, and of those before this one.
DEVICE u64 sum_before(Together *board, u64 value, u64 *all) {
    SYNC();
    board->sums[THREAD] = value;
    SYNC();
    for (u32 width = 1; width < THREADS; width *= 2) {
        const u64 other = THREAD >= width ? board->sums[THREAD - width] : 0;
        SYNC();
        board->sums[THREAD] += other;
        SYNC();
    }
    *all = board->sums[THREADS - 1];
    return board->sums[THREAD] - value;
}

DEVICE u64 sum_of_all(Together *board, u64 value) {
    u64 all;
    sum_before(board, value, &all);
    return all;
}

DEVICE float max_of_all(Together *board, float value) {
    SYNC();
    board->maxima[THREAD] = value;
    SYNC();
    for (u32 width = THREADS / 2; width > 0; width /= 2) {
        if (THREAD < width && board->maxima[THREAD + width] > board->maxima[THREAD])
            board->maxima[THREAD] = board->maxima[THREAD + width];
        SYNC();
    }
    return board->maxima[0];
}

// The largest of a row's logits; `finite` says whether all are numbers and it is finite.
DEVICE float largest_of(Together *board, const float *logits, u32 vocab, int *finite) {
    float largest = -INFINITE;
    u64 bad = 0;
    for (u32 id = THREAD; id < vocab; id += THREADS) {
        largest = logits[id] > largest ? logits[id] : largest;
        bad += logits[id] != logits[id];
    }
    largest = max_of_all(board, largest);
    bad = sum_of_all(board, bad);
    *finite = bad == 0 && largest != INFINITE && largest != -INFINITE;
    return largest;
}
