// Before a token is drawn: penalties, bias and masks. And what is told of a row: its probabilities, and its most probable tokens.
// All of it exactly as `kernels/src/adjust.rs` does.
#include "weights.h"

// A token whose logit changes.
typedef struct {
    u32 token, count, seen;
    float bias;
} TokenAdjustment;

// How a row's logits change.
typedef struct {
    float repetition, frequency, presence;
    u32 first, count; // Which of all adjustments are the row's.
    u32 masked;       // Whether the row has a mask: its words are those of number `row` in `masks`.
} RowAdjustment;

// A block for each row.
KERNEL adjust(float *logits, u32 vocab, const RowAdjustment *rows, const TokenAdjustment *tokens, const u32 *masks) {
    float *row = logits + (u64)BLOCK * vocab;
    const RowAdjustment how = rows[BLOCK];
    for (u32 at = THREAD; at < how.count; at += THREADS) {
        const TokenAdjustment of = tokens[how.first + at];
        if (of.token >= vocab) continue;
        float logit = row[of.token];
        if (of.seen) logit = logit > 0.0f ? F_DIV(logit, how.repetition) : F_MUL(logit, how.repetition);
        if (of.count > 0) logit = F_ADD(F_ADD(logit, -F_MUL(how.frequency, (float)of.count)), -how.presence);
        row[of.token] = F_ADD(logit, of.bias);
    }
    SYNC();
    if (!how.masked) return;
    const u32 *mask = masks + (u64)BLOCK * ((vocab + 31) / 32);
    for (u32 id = THREAD; id < vocab; id += THREADS)
        if (!(mask[id / 32] >> id % 32 & 1)) row[id] = -INFINITE;
}

// What the probabilities of a row follow from.
typedef struct {
    u64 mass;
    u32 largest, finite;
} Normalizer;

typedef struct {
    u32 token;
    float logit;
} Probable;

// What is told of a row: nothing, or so many of its most probable tokens.
typedef struct {
    u32 top, told;
} Told;

// What makes probabilities of a row's logits; and, in `width` places for each row, first the token that was drawn, then the most
// probable ones, most probable first, and of equals the lowest id. A block for each row; its threads are a power of two, at most
// THREADS_MAX.
KERNEL probabilities(const float *logits, u32 vocab, const Told *rows, u32 width, const u32 *drawn, Normalizer *normalizers,
                     Probable *probable) {
    SHARED Together shared;
    SHARED u32 chosen;
    Together *board = &shared;
    const Told told = rows[BLOCK];
    if (!told.told) return;
    const float *row = logits + (u64)BLOCK * vocab;
    Probable *out = probable + (u64)BLOCK * width;
    int finite;
    const float largest = largest_of(board, row, vocab, &finite);
    u64 own = 0;
    for (u32 id = THREAD; finite && id < vocab; id += THREADS) own += mass(exponential(F_ADD(row[id], -largest)));
    const u64 whole = sum_of_all(board, own);
    if (THREAD == 0) {
        const Normalizer normalizer = {whole, FLOAT_BITS(largest), (u32)finite};
        const Probable that = {drawn[BLOCK], drawn[BLOCK] < vocab ? row[drawn[BLOCK]] : -INFINITE};
        normalizers[BLOCK] = normalizer;
        out[0] = that;
    }
    // One after another: the largest of what comes after the one before.
    float last = INFINITE;
    u32 last_id = vocab;
    for (u32 number = 1; number <= told.top; number += 1) {
        float best = -INFINITE;
        for (u32 id = THREAD; id < vocab; id += THREADS) {
            const int after = row[id] < last || (row[id] == last && id > last_id);
            best = after && row[id] > best ? row[id] : best;
        }
        best = max_of_all(board, best);
        if (THREAD == 0) chosen = vocab;
        SYNC();
        for (u32 id = THREAD; id < vocab; id += THREADS) {
            const int after = row[id] < last || (row[id] == last && id > last_id);
            if (after && row[id] == best) MIN(&chosen, id);
        }
        SYNC();
        last = best;
        last_id = chosen;
        const Probable found = {chosen, best};
        if (THREAD == 0) out[number] = found;
        SYNC();
    }
}
